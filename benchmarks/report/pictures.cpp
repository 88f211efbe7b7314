// SPDX-License-Identifier: MIT
// Draws the pictures of the README and of the guide as SVG: who attends whom beside the speed that
// was measured against others, and those of how the kernel works.
#include <algorithm>
#include <cmath>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <local_mha/config.hpp>
#include <local_mha/core/window.hpp>

namespace {

using local_mha::Index;
using local_mha::LocalAttentionConfig;
using local_mha::Range;
using local_mha::Window;
using nlohmann::json;

constexpr const char* dark = "#26549f";
constexpr const char* middle = "#7fa3da";
constexpr const char* pale = "#d5e0f3";
constexpr const char* empty = "#f1f1f4";
constexpr const char* other = "#b0b4be";
constexpr const char* accent = "#d9772b";
constexpr const char* ink = "#23262d";

// What a row of the peers' JSON is to be drawn of.
constexpr const char* shown_case =
    "layer/float/seqlen:8192/dim:512/heads:8/dim_head:64/window_size:256/xpos:1/qk_rmsnorm:1/"
    "threads:16";

std::string escaped(const std::string& text) {
  std::string result;
  for (const char c : text)
    result += c == '&' ? "&amp;" : c == '<' ? "&lt;" : c == '>' ? "&gt;" : std::string(1, c);
  return result;
}

// 1234567 as 1,230,000: three digits are all that such figures have.
std::string with_commas(double value) {
  const double unit = std::pow(10, std::max(0.0, std::floor(std::log10(std::max(value, 1.0))) - 2));
  std::string digits = std::to_string(std::llround(value / unit) * std::llround(unit));
  for (std::size_t at = digits.size(); at > 3;) digits.insert(at -= 3, ",");
  return digits;
}

std::string rounded(double value) {
  std::ostringstream text;
  text.imbue(std::locale::classic());
  text.setf(std::ios::fixed);
  text.precision(1);
  text << value;
  return text.str();
}

class Svg {
 public:
  Svg(int width, int height, const std::string& description) {
    text_ << "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" << width << "\" height=\""
          << height << "\" viewBox=\"0 0 " << width << ' ' << height
          << "\" font-family=\"system-ui, 'DejaVu Sans', sans-serif\" role=\"img\">\n"
          << "<title>" << escaped(description) << "</title>\n";
    fill(0, 0, width, height, "#ffffff");
  }

  void fill(int x, int y, int width, int height, const char* color) {
    text_ << "<rect x=\"" << x << "\" y=\"" << y << "\" width=\"" << width << "\" height=\""
          << height << "\" fill=\"" << color << "\"/>\n";
  }
  void frame(int x, int y, int width, int height, const char* color) {
    text_ << "<rect x=\"" << x << "\" y=\"" << y << "\" width=\"" << width << "\" height=\""
          << height << "\" fill=\"none\" stroke=\"" << color << "\" stroke-width=\"2\"/>\n";
  }
  void line(int x0, int y0, int x1, int y1, const char* color) {
    text_ << "<line x1=\"" << x0 << "\" y1=\"" << y0 << "\" x2=\"" << x1 << "\" y2=\"" << y1
          << "\" stroke=\"" << color << "\" stroke-width=\"2\"/>\n";
  }
  // \param anchor start, middle or end
  void text(int x, int y, const std::string& said, int size, const char* anchor = "start",
            bool bold = false) {
    text_ << "<text x=\"" << x << "\" y=\"" << y << "\" font-size=\"" << size << "\" text-anchor=\""
          << anchor << "\" fill=\"" << ink << '"' << (bold ? " font-weight=\"bold\"" : "") << '>'
          << escaped(said) << "</text>\n";
  }
  void legend(int x, int y, const char* color, const std::string& said) {
    fill(x, y - 11, 13, 13, color);
    text(x + 20, y, said, 13);
  }

  void write(const std::filesystem::path& path) {
    std::ofstream file(path, std::ios::binary);
    file << text_.str() << "</svg>\n";
    if (!file.flush()) throw std::runtime_error(path.string() + ": cannot be written");
  }

 private:
  std::ostringstream text_;
};

// A row for each query, a column for each key; `color(i, j)` of a cell.
template <typename ColorOf>
void draw_grid(Svg& svg, int left, int top, int cell, Index n, ColorOf&& color) {
  for (Index i = 0; i < n; ++i)
    for (Index j = 0; j < n;) {
      const char* const of = color(i, j);
      Index end = j + 1;
      while (end < n && color(i, end) == of) ++end;  // one rectangle for as many as are alike
      svg.fill(left + static_cast<int>(j) * cell, top + static_cast<int>(i) * cell,
               static_cast<int>(end - j) * cell, cell - 1, of);
      j = end;
    }
  for (Index j = 1; j < n; ++j)
    svg.fill(left + static_cast<int>(j) * cell - 1, top, 1, static_cast<int>(n) * cell, "#ffffff");
}

bool sees(const Window& window, Index i, Index j, Index n) {
  const Range keys = window.keys_visible(i, n);
  return j >= keys.begin && j < keys.end;
}

struct Bar {
  std::string name;
  double rows_per_second;
};

constexpr const char* own_name = "local_mha";

// Those of the case, the slowest first.
std::vector<Bar> bars_of(const json& peers) {
  std::vector<Bar> bars;
  bool own = false;
  for (const json& row : peers.at("rows")) {
    if (row.at("case") != shown_case) continue;
    std::string name = row.at("name");
    name = name.substr(0, name.rfind(", "));
    name = name.substr(name.rfind(", ") + 2);
    own = own || name == own_name;
    bars.push_back({name, row.at("tokens_per_second").get<double>()});
  }
  if (!own)
    throw std::runtime_error(std::string("there is no local_mha of the case ") + shown_case);
  std::sort(bars.begin(), bars.end(),
            [](const Bar& a, const Bar& b) { return a.rows_per_second < b.rows_per_second; });
  return bars;
}

void draw_overview(const json& peers, const std::filesystem::path& path) {
  constexpr Index n = 24;
  const Window window(
      LocalAttentionConfig{.window_size = 6, .causal = true, .exact_windowsize = true});
  Svg svg(960, 400, "Who attends whom in a local window, and speed against others");
  constexpr int left = 40, top = 72, cell = 12;
  svg.text(left, 30, "Who attends whom", 18, "start", true);
  svg.text(left, 54, "keys, from left to right (causal, window_size 6)", 13);
  draw_grid(svg, left, top, cell, n, [&](Index i, Index j) {
    return !sees(window, i, j, n) ? empty : i == j ? accent : dark;
  });
  svg.text(left + 12, 382, "rows are queries", 13);
  svg.legend(left + 140, 382, accent, "itself");
  svg.legend(left + 215, 382, dark, "seen");

  const std::vector<Bar> bars = bars_of(peers);
  constexpr int bar_left = 500, bar_width = 350;
  svg.text(380, 30, "One layer on 16 threads, positions a second", 18, "start", true);
  int y = 72;
  for (const Bar& bar : bars) {
    const int width = std::max(1, static_cast<int>(std::lround(bar_width * bar.rows_per_second /
                                                               bars.back().rows_per_second)));
    const bool own = bar.name == own_name;
    svg.text(bar_left - 12, y + 26, bar.name, 14, "end", own);
    svg.fill(bar_left, y, width, 40, own ? accent : other);
    svg.text(bar_left + width + 8, y + 26, with_commas(bar.rows_per_second), 14);
    y += 58;
  }
  const char* const notes[] = {
      "8192 positions, dim 512, 8 heads of 64, window_size 256, float, forward;",
      "masked SDPA and FlexAttention: PyTorch's, without xPos, on another day."};
  y = 330;
  for (const char* note : notes) svg.text(380, y, note, 13), y += 20;
  svg.text(380, y, peers.at("machine").get<std::string>(), 13);
  svg.write(path);
}

// Who attends whom in three windows of 16 positions, with lines between them.
void draw_pattern(const LocalAttentionConfig& config, const std::string& said,
                  const std::filesystem::path& path) {
  constexpr Index n = 48, size = 16;
  constexpr int left = 40, top = 72, cell = 8, length = static_cast<int>(n) * cell;
  const Window window(config);
  Svg svg(560, 480, "Who attends whom: " + said);
  svg.text(left, 28, said, 18, "start", true);
  svg.text(left, 50, "columns are keys, rows are queries", 13);
  draw_grid(svg, left, top, cell, n,
            [&](Index i, Index j) { return sees(window, i, j, n) ? dark : empty; });
  for (Index at = 0; at < n; at += size) {
    const int place = static_cast<int>(at) * cell;
    svg.text(left + place, top - 6, std::to_string(at), 11);
    svg.text(left - 6, top + place + 10, std::to_string(at), 11, "end");
    if (at == 0) continue;
    svg.line(left + place, top, left + place, top + length, accent);
    svg.line(left, top + place, left + length, top + place, accent);
  }
  svg.legend(left + length + 20, top + 12, dark, "seen");
  svg.write(path);
}

// A block of 16 queries, and the keys that it goes over.
void draw_tile(const std::filesystem::path& path) {
  constexpr Index n = 80, block = 16, first = 48;
  const Window window(
      LocalAttentionConfig{.window_size = 32, .causal = true, .exact_windowsize = true});
  Svg svg(700, 560, "A tile: 16 queries, and the keys that all of them or some of them see");
  constexpr int left = 40, top = 60, cell = 6;
  svg.text(left, 28, "A tile: 16 queries and the keys that they see", 18, "start", true);
  svg.text(left, 50, "causal, window_size 32; columns are keys, rows are queries", 13);
  Range all{0, n};
  for (Index i = first; i < first + block; ++i) {
    const Range keys = window.keys_visible(i, n);
    all.begin = std::max(all.begin, keys.begin);
    all.end = std::min(all.end, keys.end);
  }
  draw_grid(svg, left, top, cell, n, [&](Index i, Index j) {
    const bool seen = sees(window, i, j, n);
    if (i < first || i >= first + block) return seen ? pale : empty;
    if (j >= all.begin && j < all.end) return dark;
    return seen ? accent : empty;
  });
  const Range keys = window.keys_of({first, first + block}, n);
  const auto at = [](Index i) { return static_cast<int>(i) * cell; };
  svg.frame(left + at(keys.begin), top + at(first), at(keys.end - keys.begin), at(block), ink);
  svg.legend(540, 90, dark, "all 16 see these:");
  svg.text(560, 110, "no mask is read", 13);
  svg.legend(540, 150, accent, "edges: some do");
  svg.legend(540, 190, pale, "other tiles");
  svg.text(540, 240, "keys " + std::to_string(keys.begin) + " to " + std::to_string(keys.end - 1),
           13);
  svg.text(540, 260,
           "of queries " + std::to_string(first) + " to " + std::to_string(first + block - 1), 13);
  svg.write(path);
}

// A block in memory: a channel of 16 positions side by side.
void draw_lanes(const std::filesystem::path& path) {
  Svg svg(700, 260,
          "A block: 16 positions are the lanes of a register, a register for each channel");
  constexpr int left = 130, top = 60, cell = 26, channels = 6;
  svg.text(20, 28, "A block of float: 16 positions side by side, a row for each channel", 18,
           "start", true);
  for (int c = 0; c < channels; ++c) {
    for (int lane = 0; lane < 16; ++lane)
      svg.fill(left + lane * cell, top + c * cell, cell - 2, cell - 2, c == 2 ? accent : pale);
    svg.text(left - 10, top + c * cell + 17,
             c + 1 < channels ? "channel " + std::to_string(c) : std::string("…"), 13, "end");
  }
  for (int lane = 0; lane < 16; ++lane)
    svg.text(left + lane * cell + 12, top - 8, std::to_string(lane), 11, "middle");
  svg.legend(left, 242, accent, "a cache line of 64 bytes: one AVX-512 register, or two with AVX2");
  svg.write(path);
}

// The state of one query over three stretches of keys, computed here from scores that are given.
void draw_softmax(const std::filesystem::path& path) {
  const std::vector<std::vector<double>> strips{
      {0.2, 1.1, -0.6, 0.7}, {1.4, 0.1, 2.2, 0.9}, {-0.3, 1.7, 0.5, 1.2}};
  Svg svg(700, 300, "The state of a softmax after each stretch of keys");
  svg.text(20, 28, "The softmax of one query: its state after each stretch of keys", 18, "start",
           true);
  constexpr int left = 40, width = 210, zero = 180, unit = 50;
  double m = -HUGE_VAL, l = 0;
  for (std::size_t s = 0; s < strips.size(); ++s) {
    const int x0 = left + static_cast<int>(s) * width;
    const double before = m;
    for (const double score : strips[s]) m = std::max(m, score);
    l *= std::exp2(before - m);  // 0 at first
    for (const double score : strips[s]) l += std::exp2(score - m);
    for (std::size_t k = 0; k < strips[s].size(); ++k) {
      const int height = static_cast<int>(std::lround(unit * std::abs(strips[s][k])));
      svg.fill(x0 + static_cast<int>(k) * 40, strips[s][k] > 0 ? zero - height : zero, 30, height,
               middle);
    }
    svg.line(x0, zero, x0 + 150, zero, other);
    const int y = zero - static_cast<int>(std::lround(unit * m));
    svg.line(x0, y, x0 + 150, y, accent);
    svg.text(x0, 242, "m = " + rounded(m) + ",  l = " + rounded(l), 14);
    svg.text(x0, 262, s == 0 ? "begins" : m > before ? "m rose: l was rescaled" : "m stayed", 13);
  }
  svg.legend(left, 288, middle, "scores, in powers of two");
  svg.legend(left + 230, 288, accent, "the largest so far, m");
  svg.write(path);
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Draws the pictures of the README and the guide as SVG"};
  std::string folder;
  std::string peers_path;
  app.add_option("folder", folder, "where they go")->required()->check(CLI::ExistingDirectory);
  app.add_option("--peers", peers_path, "JSON as benchmarks/peers/pytorch.py --output writes it")
      ->required()
      ->check(CLI::ExistingFile);
  CLI11_PARSE(app, argc, argv);
  try {
    std::ifstream file(peers_path);
    const json peers = json::parse(file);
    const std::filesystem::path to(folder);
    draw_overview(peers, to / "overview.svg");
    draw_pattern({.window_size = 16, .causal = true, .exact_windowsize = true},
                 "Causal, window_size 16", to / "causal.svg");
    draw_pattern({.window_size = 16, .exact_windowsize = false}, "Whole windows of 16, not causal",
                 to / "whole_windows.svg");
    draw_tile(to / "tile.svg");
    draw_lanes(to / "lanes.svg");
    draw_softmax(to / "softmax.svg");
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "local_mha_pictures: " << error.what() << '\n';
    return 2;
  }
}
