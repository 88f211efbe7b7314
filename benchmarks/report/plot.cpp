// SPDX-License-Identifier: MIT
#include "plot.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string_view>

#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb_image_write.h>

#include "font.hpp"

namespace report {

namespace {

struct Color {
  double red, green, blue;
};

constexpr Color black{0.13, 0.13, 0.15};
constexpr Color grey{0.86, 0.86, 0.88};
// Distinguishable by lightness too.
constexpr std::array<Color, 6> palette{{{0.00, 0.27, 0.55},
                                        {0.85, 0.37, 0.01},
                                        {0.10, 0.60, 0.35},
                                        {0.55, 0.20, 0.60},
                                        {0.75, 0.60, 0.10},
                                        {0.45, 0.45, 0.48}}};

enum class Align { left, centre, right };

class Canvas {
 public:
  Canvas(int width, int height)
      : width_(width),
        height_(height),
        pixels_(static_cast<std::size_t>(width) * static_cast<std::size_t>(height) * 3, 255) {}

  void blend(int x, int y, const Color& color, double opacity) {
    if (x < 0 || y < 0 || x >= width_ || y >= height_ || opacity <= 0) return;
    std::uint8_t* pixel = &pixels_[(static_cast<std::size_t>(y) * static_cast<std::size_t>(width_) +
                                    static_cast<std::size_t>(x)) *
                                   3];
    const double parts[] = {color.red, color.green, color.blue};
    for (int i = 0; i < 3; ++i)
      pixel[i] = static_cast<std::uint8_t>(
          std::lround(pixel[i] * (1 - opacity) + 255 * parts[i] * opacity));
  }

  // Every pixel takes the colour by its distance from the segment.
  void line(double x0, double y0, double x1, double y1, const Color& color, double thickness) {
    const double reach = thickness / 2 + 1;
    const double dx = x1 - x0;
    const double dy = y1 - y0;
    const double length2 = dx * dx + dy * dy;
    const auto [left, right] = std::minmax(x0, x1);
    const auto [top, bottom] = std::minmax(y0, y1);
    for (int y = floor_of(top - reach); y <= floor_of(bottom + reach); ++y)
      for (int x = floor_of(left - reach); x <= floor_of(right + reach); ++x) {
        const double px = x + 0.5 - x0;
        const double py = y + 0.5 - y0;
        const double along =
            length2 > 0 ? std::clamp((px * dx + py * dy) / length2, 0.0, 1.0) : 0.0;
        const double distance = std::hypot(px - along * dx, py - along * dy);
        blend(x, y, color, std::clamp(thickness / 2 + 0.5 - distance, 0.0, 1.0));
      }
  }

  void dot(double x, double y, const Color& color, double diameter) {
    line(x, y, x, y, color, diameter);
  }

  static int text_width(std::string_view text, int scale) {
    return static_cast<int>(text.size()) * (font::width + 1) * scale - scale;
  }

  /// \param y the text's top; descenders go below `y + font::height * scale`
  void text(int x, int y, std::string_view text, const Color& color, int scale, Align align) {
    if (align == Align::centre) x -= text_width(text, scale) / 2;
    if (align == Align::right) x -= text_width(text, scale);
    for (const char character : text) {
      for (int row = 0; row < font::height * scale; ++row)
        for (int column = 0; column < font::width * scale; ++column)
          if (font::is_set(character, column / scale, row / scale))
            blend(x + column, y + row + font::drop(character) * scale, color, 1);
      x += (font::width + 1) * scale;
    }
  }

  void write(const std::string& path) const {
    if (stbi_write_png(path.c_str(), width_, height_, 3, pixels_.data(), width_ * 3) == 0)
      throw std::runtime_error(path + ": cannot be written");
  }

 private:
  static int floor_of(double x) { return static_cast<int>(std::floor(x)); }

  int width_;
  int height_;
  std::vector<std::uint8_t> pixels_;
};

std::string short_number(double value) {
  constexpr double kilo = 1024;
  if (value >= kilo * kilo && std::fmod(value, kilo * kilo) == 0)
    return std::to_string(std::lround(value / kilo / kilo)) + "M";
  if (value >= kilo && std::fmod(value, kilo) == 0)
    return std::to_string(std::lround(value / kilo)) + "K";
  return std::to_string(std::lround(value));
}

std::string tick_label(double value, double step) {
  const int digits = step >= 1 ? 0 : static_cast<int>(std::ceil(-std::log10(step)));
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.*f", digits, value);
  return text.data();
}

// 1, 2 or 5 times a power of ten, for four to ten ticks.
double tick_step(double range) {
  const double rough = range / 8;
  const double power = std::pow(10.0, std::floor(std::log10(rough)));
  for (const double factor : {1.0, 2.0, 5.0})
    if (factor * power >= rough) return factor * power;
  return 10 * power;
}

struct Box {
  int left, top, right, bottom;
};

void draw(Canvas& canvas, const Panel& panel, const Box& box) {
  double x_low = HUGE_VAL;
  double x_high = 0;
  double y_high = panel.y_max;
  for (const Series& series : panel.series)
    for (const auto& [x, y] : series.points) {
      x_low = std::min(x_low, x);
      x_high = std::max(x_high, x);
      if (panel.y_max == 0) y_high = std::max(y_high, y);
    }
  if (x_high == 0) throw std::runtime_error("plot '" + panel.title + "' has no points");
  const double step = tick_step(y_high);
  y_high = std::ceil(y_high / step * (1 - 1e-9)) * step;
  const double first = std::log2(x_low);
  const double last = std::max(first + 1, std::log2(x_high));
  const auto x_at = [&](double x) {
    return box.left + 12 + (box.right - box.left - 24) * (std::log2(x) - first) / (last - first);
  };
  const auto y_at = [&](double y) { return box.bottom - (box.bottom - box.top) * y / y_high; };

  constexpr int small = 2;
  constexpr int glyph = font::height * small;
  for (int i = 0; i * step <= y_high * (1 + 1e-9); ++i) {
    const double y = i * step;
    canvas.line(box.left, y_at(y), box.right, y_at(y), i == 0 ? black : grey, 1);
    canvas.text(box.left - 8, static_cast<int>(y_at(y)) - glyph / 2, tick_label(y, step), black,
                small, Align::right);
  }
  // As many powers of two as there is room for their labels.
  const int every = (last - first) * 60 > box.right - box.left ? 2 : 1;
  for (int power = static_cast<int>(std::ceil(first)); power <= last; power += every) {
    const double x = x_at(std::exp2(power));
    canvas.line(x, box.top, x, box.bottom, grey, 1);
    canvas.line(x, box.bottom, x, box.bottom + 5, black, 1);
    canvas.text(static_cast<int>(x), box.bottom + 10, short_number(std::exp2(power)), black, small,
                Align::centre);
  }
  canvas.line(box.left, box.top, box.left, box.bottom, black, 1);

  canvas.text((box.left + box.right) / 2, box.top - 66, panel.title, black, 3, Align::centre);
  canvas.text(box.left - 60, box.top - 32, panel.y_label, black, small, Align::left);
  canvas.text((box.left + box.right) / 2, box.bottom + 36, panel.x_label, black, small,
              Align::centre);

  int legend_y = box.bottom + 66;
  for (std::size_t i = 0; i < panel.series.size(); ++i) {
    const Series& series = panel.series[i];
    const Color& color = palette[i % palette.size()];
    for (std::size_t p = 0; p < series.points.size(); ++p) {
      const auto [x, y] = series.points[p];
      canvas.dot(x_at(x), y_at(y), color, 8);
      if (p > 0)
        canvas.line(x_at(series.points[p - 1].first), y_at(series.points[p - 1].second), x_at(x),
                    y_at(y), color, 2.5);
    }
    canvas.line(box.left, legend_y + glyph / 2.0, box.left + 36, legend_y + glyph / 2.0, color,
                2.5);
    canvas.dot(box.left + 18, legend_y + glyph / 2.0, color, 8);
    canvas.text(box.left + 46, legend_y, series.label, black, small, Align::left);
    legend_y += glyph + 8;
  }
}

}  // namespace

void write_plot(const std::string& path, const std::vector<Panel>& panels) {
  constexpr int panel_width = 860;
  constexpr int plot_height = 420;
  std::size_t most_series = 0;
  for (const Panel& panel : panels) most_series = std::max(most_series, panel.series.size());
  const int height = 86 + plot_height + 76 + static_cast<int>(most_series) * 22 + 10;
  Canvas canvas(panel_width * static_cast<int>(panels.size()), height);
  for (std::size_t i = 0; i < panels.size(); ++i) {
    const int left = panel_width * static_cast<int>(i);
    draw(canvas, panels[i], {left + 90, 86, left + panel_width - 40, 86 + plot_height});
  }
  canvas.write(path);
}

}  // namespace report
