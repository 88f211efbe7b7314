// SPDX-License-Identifier: MIT
// Pictures, decoded: what was drawn is what the file shows.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "loss_plot.hpp"
#include "matrix_plot.hpp"

#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_STATIC
#define STBI_ONLY_PNG
#include <stb_image.h>

namespace {

using local_mha::examples::Color;
using local_mha::examples::Image;
using local_mha::examples::LossCurve;
using local_mha::examples::sequential_color;

struct Decoded {
  int width = 0;
  int height = 0;
  std::vector<std::uint8_t> bytes;

  std::vector<int> at(int x, int y) const {
    const std::size_t first = 3 * (static_cast<std::size_t>(y) * static_cast<std::size_t>(width) +
                                   static_cast<std::size_t>(x));
    return {bytes.at(first), bytes.at(first + 1), bytes.at(first + 2)};
  }
};

Decoded decode(const std::string& png) {
  Decoded picture;
  int channels = 0;
  const auto* bytes = reinterpret_cast<const stbi_uc*>(png.data());
  stbi_uc* pixels = stbi_load_from_memory(bytes, static_cast<int>(png.size()), &picture.width,
                                          &picture.height, &channels, 3);
  if (pixels == nullptr) throw std::runtime_error(stbi_failure_reason());
  picture.bytes.assign(pixels, pixels + 3 * picture.width * picture.height);
  stbi_image_free(pixels);
  return picture;
}

TEST(Image, IsDecodedAsItWasDrawn) {
  Image image(7, 5, {1, 2, 3});
  image.fill(2, 1, 3, 2, {200, 100, 50});
  image.fill(-3, 4, 4, 9, {9, 8, 7});  // only a corner is inside
  image.fill(6, -1, 20, 2, {255, 254, 253});
  const Decoded picture = decode(image.png());
  ASSERT_EQ(picture.width, 7);
  ASSERT_EQ(picture.height, 5);
  for (int y = 0; y < 5; ++y)
    for (int x = 0; x < 7; ++x) {
      std::vector<int> expected{1, 2, 3};
      if (x >= 2 && x < 5 && y >= 1 && y < 3) expected = {200, 100, 50};
      if (x == 0 && y == 4) expected = {9, 8, 7};
      if (x == 6 && y == 0) expected = {255, 254, 253};
      EXPECT_EQ(picture.at(x, y), expected) << x << ", " << y;
    }
}

TEST(Image, HasTextOfItsHeightAndWidth) {
  const std::string text = "THE 17";
  const int width = Image::text_width(text);
  Image image(width + 20, 40, {255, 255, 255});
  image.text(10, 10, text, {0, 0, 0});
  const Decoded picture = decode(image.png());
  int left = picture.width, right = 0, top = picture.height, bottom = 0;
  for (int y = 0; y < picture.height; ++y)
    for (int x = 0; x < picture.width; ++x)
      if (picture.at(x, y)[0] == 0) {
        left = std::min(left, x);
        right = std::max(right, x + 1);
        top = std::min(top, y);
        bottom = std::max(bottom, y + 1);
      }
  EXPECT_GE(left, 10);
  EXPECT_LE(left, 14);
  EXPECT_LE(right, 10 + width);
  EXPECT_GE(right, 10 + width - 6);
  EXPECT_EQ(bottom - top, Image::text_height);
}

TEST(SequentialColor, FallsFromLightToDark) {
  const auto lightness = [](double t) {
    const Color color = sequential_color(t);
    return 0.299 * color.red + 0.587 * color.green + 0.114 * color.blue;
  };
  EXPECT_GT(lightness(0), 240);
  EXPECT_LT(lightness(1), 25);
  for (int i = 1; i <= 100; ++i) EXPECT_LT(lightness(0.01 * i), lightness(0.01 * (i - 1))) << i;
  EXPECT_EQ(lightness(-1), lightness(0));
  EXPECT_EQ(lightness(2), lightness(1));
}

// The axes reach from 0 to the last step and, rounded up, the largest loss.
TEST(LossPlot, HasItsCurvesWhereTheyBelong) {
  const std::vector<int> white{255, 255, 255}, red{250, 10, 20}, blue{10, 20, 250};
  const LossCurve level{"level", {250, 10, 20}, {0, 50, 100}, {4, 4, 4}};
  const LossCurve falling{"falling", {10, 20, 250}, {0, 100}, {7.5, 1.5}};
  const Decoded picture =
      decode(local_mha::examples::draw_loss_plot("title", 100, {level, falling}).png());
  ASSERT_EQ(picture.width, 960);
  ASSERT_EQ(picture.height, 600);
  const auto x_of = [](double step) { return static_cast<int>(90 + 840 * step / 100); };
  const auto y_of = [](double loss) { return static_cast<int>(540 - 480 * loss / 8); };
  for (double step = 1; step < 100; step += 4) {
    const double loss = 7.5 - 6 * step / 100;
    EXPECT_EQ(picture.at(x_of(step), y_of(loss)), blue) << step;
    if (std::abs(loss - 4) < 0.2) continue;  // where they meet, the second one is above
    EXPECT_EQ(picture.at(x_of(step), y_of(4)), red) << step;
    EXPECT_EQ(picture.at(x_of(step) + 2, y_of(0.5)), white) << step;
  }
}

TEST(WritePng, LeavesOtherFilesAloneAndLinksWhatTheyAre) {
  namespace fs = std::filesystem;
  const fs::path folder = fs::path(testing::TempDir()) / "write_png";
  fs::remove_all(folder);
  fs::create_directories(folder);
  const auto text_of = [](const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  std::ofstream(folder / "plot.png.tmp") << "not a picture";
  std::ofstream(folder / "old.png") << "old";
  fs::create_symlink("old.png", folder / "plot.png");
  const Image image(4, 3, {1, 2, 3});
  image.write_png((folder / "plot.png").string());
  EXPECT_EQ(text_of(folder / "plot.png.tmp"), "not a picture");
  EXPECT_TRUE(fs::is_symlink(folder / "plot.png"));
  EXPECT_EQ(text_of(folder / "old.png"), image.png());
  EXPECT_EQ(std::distance(fs::directory_iterator(folder), {}), 3);
  // What is no file stays what it is.
  fs::create_directory(folder / "folder.png");
  EXPECT_THROW(image.write_png((folder / "folder.png").string()), std::runtime_error);
  EXPECT_THROW(image.write_png((folder / "none" / "plot.png").string()), std::runtime_error);
  EXPECT_EQ(std::distance(fs::directory_iterator(folder), {}), 4);
  fs::remove_all(folder);
}

}  // namespace
