// SPDX-License-Identifier: MIT
/// \file
/// Long series below one another, with stretches of them marked.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/core/types.hpp>

#include "image.hpp"

namespace local_mha::examples {

/// Stretches of rows, `[begin, end)`, that are drawn as a band behind all series.
struct Marks {
  std::string label;
  Color color;
  std::vector<std::pair<Index, Index>> stretches;
};

/// Draws each column of a table in a strip of its own: between the least and the most that it has
/// in the rows of a pixel.
/// \param first the row that the picture begins with
inline Image draw_series_plot(const std::string& title, const std::vector<std::string>& names,
                              const RowMatrix<float>& all, Index first,
                              const std::vector<Marks>& marks) {
  const RowMatrix<float> rows = all.bottomRows(all.rows() - first);
  constexpr int width = 1200, left = 130, right = 20, top = 70, strip = 130, gap = 14;
  const auto strips = static_cast<int>(rows.cols());
  Image image(width, top + strips * (strip + gap) + 40, {255, 255, 255});
  image.text(left, 14, title);
  const auto x_of = [&](Index row) {
    return left + static_cast<int>(row * (width - left - right) / std::max<Index>(1, rows.rows()));
  };
  int label_left = left;
  for (const Marks& mark : marks) {
    image.fill(label_left, 42, 16, 16, mark.color);
    image.text(label_left + 24, 42, mark.label);
    label_left += 64 + Image::text_width(mark.label);
  }
  for (int s = 0; s < strips; ++s) {
    const int y = top + s * (strip + gap);
    image.fill(left, y, width - left - right, strip, {244, 244, 244});
    // The one that comes first is highest.
    for (std::size_t m = 0; m < marks.size(); ++m)
      for (const auto& [begin, end] : marks[m].stretches) {
        const int share = strip / static_cast<int>(marks.size());
        image.fill(x_of(begin - first), y + static_cast<int>(m) * share,
                   std::max(2, x_of(end) - x_of(begin)), share, marks[m].color);
      }
    image.text(10, y + strip / 2 - Image::text_height / 2, names[static_cast<std::size_t>(s)]);
    if (rows.rows() == 0) continue;
    const auto column = rows.col(s);
    const float least = column.minCoeff();
    const float range = std::max(column.maxCoeff() - least, 1e-6F);
    const auto y_of = [&](float value) {
      return y + strip - 4 - static_cast<int>((value - least) / range * (strip - 8));
    };
    for (Index begin = 0; begin < rows.rows();) {
      Index end = begin;  // and one row of the next pixel, so that the line is whole
      while (end < rows.rows() && x_of(end) == x_of(begin)) ++end;
      const auto part = column.segment(begin, std::min(end + 1, rows.rows()) - begin);
      const int high = y_of(part.maxCoeff());
      image.fill(x_of(begin), high, 1, y_of(part.minCoeff()) - high + 2, {30, 60, 110});
      begin = end;
    }
  }
  for (int tick = 0; tick <= 4; ++tick) {
    const Index row = rows.rows() * tick / 4;
    const std::string label = std::to_string(first + row);
    const int x =
        std::min(x_of(row) - Image::text_width(label) / 2, width - Image::text_width(label) - 4);
    image.text(x, image.height() - 30, label);
  }
  return image;
}

}  // namespace local_mha::examples
