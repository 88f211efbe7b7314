// SPDX-License-Identifier: MIT
/// \file
/// A picture of a matrix `[query][key]`: colored cells, axes, windows, legend.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iomanip>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/core/error.hpp>
#include <local_mha/core/types.hpp>

#include "image.hpp"

namespace local_mha::examples {

/// From nearly white over green and blue to nearly black, for `t` in `[0, 1]`. Lightness falls all
/// the way, so that it reads in gray as well.
inline Color sequential_color(double t) {
  constexpr std::array<std::array<double, 3>, 6> stops{{{255, 252, 205},
                                                        {190, 229, 180},
                                                        {92, 190, 192},
                                                        {36, 130, 185},
                                                        {38, 62, 145},
                                                        {8, 16, 60}}};
  const double at = std::clamp(t, 0., 1.) * static_cast<double>(stops.size() - 1);
  const auto low = std::min(static_cast<std::size_t>(at), stops.size() - 2);
  const double share = at - static_cast<double>(low);
  const auto channel = [&](std::size_t c) {
    return static_cast<std::uint8_t>(
        std::lround((1 - share) * stops[low][c] + share * stops[low + 1][c]));
  };
  return {channel(0), channel(1), channel(2)};
}

/// What a picture shows beside its cells.
struct MatrixPlot {
  /// What the colors of sequential_color() stand for.
  struct Scale {
    std::string name;
    std::vector<std::pair<double, std::string>> ticks;  ///< places in `[0, 1]` and their values
  };

  std::string title;
  std::string subtitle;
  Index seqlen = 0;
  Index window_size = 1;
  std::vector<std::string> labels;  ///< of the positions; empty: numbers at the windows
  std::vector<std::pair<Color, std::string>> legend;
  std::optional<Scale> scale;
  std::optional<Index> cell_size;  ///< in pixels; empty: what fits a screen

  /// \param color of the cell `(query, key)`
  /// \throws std::invalid_argument if the cell size is out of range
  Image draw(const std::function<Color(Index, Index)>& color) const {
    if (cell_size && (*cell_size < 1 || *cell_size > 64))
      reject("--cell-size", "1 to 64", *cell_size);
    Layout layout = make_layout();
    Image image(layout.width, layout.height, white);
    image.text(space, space, title, ink);
    image.text(space, space + line, subtitle, faint_ink);
    draw_cells(image, layout, color);
    draw_axes(image, layout);
    int y = layout.top + layout.side + 2 * space;
    if (scale) y = draw_scale(image, layout, y);
    draw_legend(image, layout, y);
    return image;
  }

 private:
  static constexpr Color white{255, 255, 255};
  static constexpr Color ink{30, 30, 40};
  static constexpr Color faint_ink{110, 110, 120};
  static constexpr Color window_line{90, 90, 110};
  static constexpr int space = 12;
  static constexpr int line = Image::text_height + space;
  static constexpr int bar_width = 320;

  struct Layout {
    int cell;
    int side;  // of the matrix
    int left;  // the matrix' corner
    int top;
    int width;  // of the picture
    int height;
  };

  std::string label(Index i) const {
    return labels.empty() ? std::to_string(i) : labels[static_cast<std::size_t>(i)];
  }

  Layout make_layout() const {
    Layout layout;
    layout.cell = static_cast<int>(
        cell_size.value_or(std::clamp<Index>(880 / std::max<Index>(seqlen, 1), 1, 32)));
    layout.side = static_cast<int>(seqlen) * layout.cell;
    int label_width = Image::text_width("query");
    for (Index i = 0; i < seqlen; ++i)
      label_width = std::max(label_width, Image::text_width(label(i)));
    layout.left = label_width + 2 * space + 8;
    layout.top = space + 4 * line + 8;
    int legend_width = layout.left;
    for (const auto& entry : legend) legend_width += swatch_width(entry.second);
    const int scale_width =
        scale ? layout.left + bar_width + 2 * space + Image::text_width(scale->ticks.back().second)
              : 0;
    layout.width =
        std::max({layout.left + layout.side + label_width, legend_width, scale_width,
                  2 * space + Image::text_width(title), 2 * space + Image::text_width(subtitle)});
    layout.height =
        layout.top + layout.side + 3 * space + (scale ? 3 * line : 0) + (legend.empty() ? 0 : line);
    return layout;
  }

  void draw_cells(Image& image, const Layout& at,
                  const std::function<Color(Index, Index)>& color) const {
    const auto pixel = [&](Index i) { return static_cast<int>(i) * at.cell; };
    for (Index i = 0; i < seqlen; ++i)
      for (Index j = 0; j < seqlen; ++j)
        image.fill(at.left + pixel(j), at.top + pixel(i), at.cell, at.cell, color(i, j));
    const auto cross = [&](int offset, Color stroke, int thickness) {
      image.fill(at.left + offset, at.top, thickness, at.side, stroke);
      image.fill(at.left, at.top + offset, at.side, thickness, stroke);
    };
    if (at.cell >= 7)
      for (Index i = 1; i < seqlen; ++i) cross(pixel(i), white, 1);
    if (has_window_lines(at))
      for (Index i = window_size; i < seqlen; i += window_size)
        cross(pixel(i), window_line, at.cell >= 7 ? 2 : 1);
    for (const int edge : {-2, at.side}) {
      image.fill(at.left + edge, at.top - 2, 2, at.side + 4, ink);
      image.fill(at.left - 2, at.top + edge, at.side + 4, 2, ink);
    }
  }

  // Lines closer to one another would hide what is between them.
  bool has_window_lines(const Layout& at) const {
    return window_size < seqlen && window_size > 1 && window_size * at.cell >= 8;
  }

  // Numbers stand at the borders of windows, labels at the middle of cells.
  void draw_axes(Image& image, const Layout& at) const {
    image.text(at.left, at.top - 2 * line - 8, "key", ink);
    image.text(at.left - 8 - space - Image::text_width("query"), at.top - line - 6, "query", ink);
    int widest = Image::text_height;
    for (Index i = 0; i < seqlen; ++i) widest = std::max(widest, Image::text_width(label(i)));
    Index step = 1;
    if (labels.empty()) {
      if (has_window_lines(at)) step = window_size;
      while (step < seqlen && static_cast<int>(step) * at.cell < widest + space) step *= 2;
    } else if (at.cell < widest) {
      return;
    }
    const int middle = labels.empty() ? 0 : at.cell / 2;
    for (Index i = 0; i < seqlen; i += step) {
      const int offset = static_cast<int>(i) * at.cell + middle;
      const int width = Image::text_width(label(i));
      image.text(at.left + offset - (labels.empty() ? 0 : width / 2), at.top - line - 6, label(i),
                 ink);
      image.text(at.left - 10 - width,
                 at.top + offset + (labels.empty() ? 2 : -Image::text_height / 2), label(i), ink);
      if (!labels.empty()) continue;
      image.fill(at.left + offset, at.top - 8, 2, 6, ink);
      image.fill(at.left - 8, at.top + offset, 6, 2, ink);
    }
  }

  int draw_scale(Image& image, const Layout& at, int y) const {
    image.text(at.left, y, scale->name, ink);
    y += line;
    for (int x = 0; x < bar_width; ++x)
      image.fill(at.left + x, y, 1, Image::text_height,
                 sequential_color(static_cast<double>(x) / (bar_width - 1)));
    y += Image::text_height;
    for (const auto& [place, value] : scale->ticks) {
      const int x = at.left + static_cast<int>(place * (bar_width - 2));
      image.fill(x, y, 2, 6, ink);
      image.text(x - (place > 0 ? Image::text_width(value) / 2 : 0), y + 10, value, ink);
    }
    return y + 2 * line;
  }

  static int swatch_width(const std::string& name) {
    return 2 * Image::text_height + Image::text_width(name) + 2 * space;
  }

  void draw_legend(Image& image, const Layout& at, int y) const {
    int x = at.left;
    for (const auto& [color, name] : legend) {
      constexpr int size = Image::text_height + 4;
      image.fill(x, y - 3, size, size, faint_ink);
      image.fill(x + 1, y - 2, size - 2, size - 2, color);
      image.text(x + size + 8, y, name, ink);
      x += swatch_width(name);
    }
  }
};

}  // namespace local_mha::examples
