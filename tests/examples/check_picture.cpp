// SPDX-License-Identifier: MIT
// check_picture FILE.png [CELLS [SCALE [CASE.safetensors SEQUENCE HEAD WINDOW]]]
//
// Decodes a picture and writes its size. With CELLS, it is one of attention_map: finds the matrix
// in it by its frame, and writes a character for each cell: # attended, - not seen in a window
// around, p padding, . not seen. With SCALE (sqrt or linear) the colors are those of probabilities,
// written as #, and those of each query must have the same sum, for they are shares of the largest.
// With CASE they must be the softmax of a LocalAttention that sees its own window and the ones
// beside it, without positions, of queries and keys in the file.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <exception>
#include <iostream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_STATIC
#define STBI_ONLY_PNG
#include <stb_image.h>

#include <local_mha/io/safetensors.hpp>

#include "matrix_plot.hpp"

namespace {

using local_mha::examples::Color;

bool is_same(Color a, Color b) { return a.red == b.red && a.green == b.green && a.blue == b.blue; }

class Picture {
 public:
  explicit Picture(const std::string& path) {
    int channels = 0;
    bytes_.reset(stbi_load(path.c_str(), &width_, &height_, &channels, 3));
    if (!bytes_) throw std::runtime_error(path + ": " + stbi_failure_reason());
  }

  int width() const { return width_; }
  int height() const { return height_; }
  Color at(int x, int y) const {
    const stbi_uc* pixel = bytes_.get() + 3 * (y * width_ + x);
    return {pixel[0], pixel[1], pixel[2]};
  }

 private:
  struct Free {
    void operator()(stbi_uc* bytes) const { stbi_image_free(bytes); }
  };
  int width_ = 0;
  int height_ = 0;
  std::unique_ptr<stbi_uc, Free> bytes_;
};

/// The square inside of the frame, whose lines are 2 pixels thick.
struct Matrix {
  int left = 0;
  int top = 0;
  int cell = 0;
};

Matrix find_matrix(const Picture& picture, int cells) {
  constexpr Color ink{30, 30, 40};
  int longest = 0;
  Matrix found;
  for (int y = 0; y < picture.height(); ++y) {
    int run = 0;
    for (int x = 0; x < picture.width(); ++x) {
      run = is_same(picture.at(x, y), ink) ? run + 1 : 0;
      if (run <= longest) continue;
      longest = run;
      found = {.left = x - run + 3, .top = y + 2};
    }
  }
  const int side = longest - 4;
  if (side < cells || side % cells != 0)
    throw std::runtime_error("expected a frame around " + std::to_string(cells) +
                             " cells, got one around " + std::to_string(side) + " pixels");
  for (int i = -2; i < side + 2; ++i)
    for (const int edge : {-2, -1, side, side + 1})
      if (!is_same(picture.at(found.left + i, found.top + edge), ink) ||
          !is_same(picture.at(found.left + edge, found.top + i), ink))
        throw std::runtime_error("expected a closed frame");
  found.cell = side / cells;
  return found;
}

/// The places of colors on the scale.
class Places {
 public:
  Places() {
    for (int i = 0; i <= steps; ++i) {
      const auto found = of_.try_emplace(key(color(i)), i, i).first;
      found->second.second = i;
    }
  }
  /// The middle of the places that have the color; -1 if none has.
  double operator()(Color color) const {
    const auto found = of_.find(key(color));
    if (found == of_.end()) return -1;
    const auto [first, last] = found->second;
    // Nothing and all are themselves.
    return first == 0 ? 0 : last == steps ? 1 : static_cast<double>(first + last) / (2 * steps);
  }

 private:
  static constexpr int steps = 100'000;
  static Color color(int i) {
    return local_mha::examples::sequential_color(static_cast<double>(i) / steps);
  }
  static int key(Color color) { return (color.red << 16) + (color.green << 8) + color.blue; }

  std::map<int, std::pair<int, int>> of_;
};

/// Probabilities `[query][key]` of a head, 0 for what is not seen.
std::vector<double> softmax_of(const std::string& path, std::size_t sequence, std::size_t head,
                               std::size_t window) {
  const local_mha::io::SafetensorsFile file(path);
  const auto& shape = file.entry("input/q").shape;
  const auto heads = static_cast<std::size_t>(shape[1]);
  const auto seqlen = static_cast<std::size_t>(shape[2]);
  const auto dim_head = static_cast<std::size_t>(shape[3]);
  const std::vector<double> q = file.read<double>("input/q");
  const std::vector<double> k = file.read<double>("input/k");
  const std::size_t first = (sequence * heads + head) * seqlen * dim_head;
  std::vector<double> p(seqlen * seqlen);
  for (std::size_t i = 0; i < seqlen; ++i) {
    double sum = 0;
    for (std::size_t j = 0; j < seqlen; ++j) {
      if (j / window + 1 < i / window || j / window > i / window + 1) continue;
      double score = 0;
      for (std::size_t d = 0; d < dim_head; ++d)
        score += q[first + i * dim_head + d] * k[first + j * dim_head + d];
      sum += p[i * seqlen + j] = std::exp(score / std::sqrt(static_cast<double>(dim_head)));
    }
    for (std::size_t j = 0; j < seqlen; ++j) p[i * seqlen + j] /= sum;
  }
  return p;
}

void check(int argc, char** argv) {
  if (argc != 2 && argc != 3 && argc != 4 && argc != 8)
    throw std::runtime_error("expected FILE.png [CELLS [SCALE [CASE SEQUENCE HEAD WINDOW]]]");
  const Picture picture(argv[1]);
  std::cout << picture.width() << " x " << picture.height() << '\n';
  if (argc == 2) return;
  const int cells = std::stoi(argv[2]);
  const std::string scale = argc > 3 ? argv[3] : "";
  const Matrix matrix = find_matrix(picture, cells);
  std::cout << "cells of " << matrix.cell << '\n';

  const Places place_of;
  const auto seqlen = static_cast<std::size_t>(cells);
  std::vector<double> shares(seqlen * seqlen);  // of the largest probability
  for (std::size_t i = 0; i < seqlen; ++i) {
    std::string row;
    for (std::size_t j = 0; j < seqlen; ++j) {
      // The lines between cells are on their left and above.
      const auto middle = [&](std::size_t at) {
        return static_cast<int>(at) * matrix.cell + matrix.cell / 2;
      };
      const Color color = picture.at(matrix.left + middle(j), matrix.top + middle(i));
      const double place = scale.empty() ? -1 : place_of(color);
      const bool is_attended = scale.empty() ? is_same(color, {38, 84, 164}) : place >= 0;
      shares[i * seqlen + j] = !is_attended ? 0 : scale == "linear" ? place : place * place;
      row += is_same(color, {243, 243, 246})   ? '.'
             : is_same(color, {208, 208, 218}) ? '-'
             : is_same(color, {242, 178, 110}) ? 'p'
             : is_attended                     ? '#'
                                               : '?';
    }
    std::cout << row << '\n';
  }
  if (scale.empty()) return;

  // Colors tell places apart to a few thousandths.
  if (*std::ranges::max_element(shares) < 0.995)
    throw std::runtime_error("expected the largest probability at the end of the scale");
  std::vector<double> sums;
  for (std::size_t i = 0; i < seqlen; ++i) {
    double sum = 0;
    for (std::size_t j = 0; j < seqlen; ++j) sum += shares[i * seqlen + j];
    if (sum > 0) sums.push_back(sum);
  }
  const auto [least, most] = std::ranges::minmax_element(sums);
  std::cout << "sums of " << *least << " to " << *most << '\n';
  if (*most > 1.02 * *least) throw std::runtime_error("expected equal sums");

  if (argc < 8) return;
  const auto index = [&](int argument) {
    return static_cast<std::size_t>(std::stoi(argv[argument]));
  };
  const std::vector<double> p = softmax_of(argv[4], index(5), index(6), index(7));
  const double largest = *std::ranges::max_element(p);
  if (p.size() != shares.size()) throw std::runtime_error("expected a share for each key");
  for (std::size_t i = 0; i < p.size(); ++i)
    if (!(std::abs(shares[i] - p[i] / largest) < 0.01))
      throw std::runtime_error("expected the softmax of the case");
  std::cout << "as the softmax of the case\n";
}

}  // namespace

int main(int argc, char** argv) {
  try {
    check(argc, argv);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
