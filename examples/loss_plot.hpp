// SPDX-License-Identifier: MIT
/// \file
/// The curves of a training as a picture.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "image.hpp"

namespace local_mha::examples {

/// A loss over the steps.
struct LossCurve {
  std::string label;
  Color color;
  std::vector<double> steps;
  std::vector<double> losses;
};

namespace detail {

/// A number with as many digits as it needs.
inline std::string short_text(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.4g", value);
  return text;
}

/// A line of points 3 pixels wide.
inline void draw_line(Image& image, double x0, double y0, double x1, double y1, Color color) {
  const int points = 1 + static_cast<int>(std::max(std::abs(x1 - x0), std::abs(y1 - y0)));
  for (int i = 0; i <= points; ++i) {
    const double share = static_cast<double>(i) / points;
    image.fill(static_cast<int>(x0 + share * (x1 - x0)) - 1,
               static_cast<int>(y0 + share * (y1 - y0)) - 1, 3, 3, color);
  }
}

}  // namespace detail

/// Draws the curves over one another.
inline Image draw_loss_plot(const std::string& title, double last_step,
                            const std::vector<LossCurve>& curves) {
  constexpr int width = 960, height = 600, left = 90, top = 60, right = 30, bottom = 60;
  constexpr Color grid{225, 225, 225};
  double most = 1;
  for (const LossCurve& curve : curves)
    for (const double loss : curve.losses)
      if (std::isfinite(loss)) most = std::max(most, std::ceil(loss));
  const auto x_of = [&](double step) {
    return left + (width - left - right) * step / std::max(1.0, last_step);
  };
  const auto y_of = [&](double loss) {
    return top + (height - top - bottom) * (1 - std::clamp(loss / most, 0.0, 1.0));
  };

  Image image(width, height, {255, 255, 255});
  image.text(left, 20, title);
  for (double loss = 0; loss <= most; loss += 1) {
    const int y = static_cast<int>(y_of(loss));
    image.fill(left, y, width - left - right, 1, grid);
    image.text(left - 40, y - Image::text_height / 2, detail::short_text(loss));
  }
  for (int tick = 0; tick <= 4; ++tick) {
    const double step = std::round(last_step * tick / 4);
    const int x = static_cast<int>(x_of(step));
    image.fill(x, top, 1, height - top - bottom, grid);
    const std::string label = detail::short_text(step);
    image.text(x - Image::text_width(label) / 2, height - bottom + 12, label);
  }
  image.text(width / 2 - Image::text_width("step") / 2, height - 24, "step");
  int label_top = top + 10;
  for (const LossCurve& curve : curves) {
    for (std::size_t i = 1; i < curve.steps.size(); ++i)
      detail::draw_line(image, x_of(curve.steps[i - 1]), y_of(curve.losses[i - 1]),
                        x_of(curve.steps[i]), y_of(curve.losses[i]), curve.color);
    const int label_left = width - right - 20 - Image::text_width(curve.label);
    image.fill(label_left - 40, label_top + Image::text_height / 2, 30, 3, curve.color);
    image.text(label_left, label_top, curve.label);
    label_top += 28;
  }
  return image;
}

}  // namespace local_mha::examples
