// SPDX-License-Identifier: MIT
/// \file
/// A picture to draw rectangles and text on, written as PNG.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <string>
#include <vector>

// Debian's libstb-dev; everything static, so this header belongs to one source file.
#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STB_IMAGE_WRITE_STATIC
#include <stb_easy_font.h>
#include <stb_image_write.h>

#include "output_file.hpp"

namespace local_mha::examples {

struct Color {
  std::uint8_t red = 0;
  std::uint8_t green = 0;
  std::uint8_t blue = 0;
};

/// RGB, row by row from the top. What lies outside is not drawn.
class Image {
 public:
  Image(int width, int height, Color background)
      : width_(width),
        height_(height),
        pixels_(static_cast<std::size_t>(width) * static_cast<std::size_t>(height), background) {}

  int width() const { return width_; }
  int height() const { return height_; }

  void fill(int left, int top, int width, int height, Color color) {
    const int right = std::min(left + width, width_);
    const int bottom = std::min(top + height, height_);
    for (int y = std::max(top, 0); y < bottom; ++y)
      for (int x = std::max(left, 0); x < right; ++x)
        pixels_[static_cast<std::size_t>(y) * static_cast<std::size_t>(width_) +
                static_cast<std::size_t>(x)] = color;
  }

  /// One line of ASCII; `left`, `top` is the corner of a capital letter.
  void text(int left, int top, const std::string& line, Color color = {}) {
    // Four corners a rectangle, each x, y, z and a color; no character has 24 rectangles.
    std::vector<float> corners(24 * 16 * line.size());
    std::string copy = line;  // the font takes it by a pointer to non-const
    const int rectangles = stb_easy_font_print(0, 0, copy.data(), nullptr, corners.data(),
                                               static_cast<int>(corners.size() * sizeof(float)));
    for (int i = 0; i < rectangles; ++i) {
      const float* first = corners.data() + 16 * static_cast<std::size_t>(i);
      const float* third = first + 8;
      const auto scaled = [](float x) { return static_cast<int>(x * font_scale); };
      fill(left + scaled(first[0]), top + scaled(first[1]), scaled(third[0] - first[0]),
           scaled(third[1] - first[1]), color);
    }
  }

  static int text_width(const std::string& line) {
    std::string copy = line;
    return font_scale * stb_easy_font_width(copy.data());
  }

  /// Height of a capital letter.
  static constexpr int text_height = 14;

  /// The bytes of a PNG file.
  /// \throws std::bad_alloc if there is no room for them
  std::string png() const {
    std::string bytes;
    const auto append = [](void* to, void* more, int size) {
      static_cast<std::string*>(to)->append(static_cast<const char*>(more),
                                            static_cast<std::size_t>(size));
    };
    if (stbi_write_png_to_func(append, &bytes, width_, height_, 3, pixels_.data(), 3 * width_) == 0)
      throw std::bad_alloc();
    return bytes;
  }

  /// \throws io::SafetensorsError if the file cannot be written; what was there stays then
  void write_png(const std::string& path) const { write_file(path, png()); }

 private:
  static constexpr int font_scale = 2;

  int width_;
  int height_;
  std::vector<Color> pixels_;
};

}  // namespace local_mha::examples
