// SPDX-License-Identifier: MIT
// Measures what the library wants of itself, prints a table of the figures, and writes report.json
// and report.png. What is measured and how: benchmarks/README.md.
#include <sys/resource.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "measurement.hpp"
#include "plot.hpp"

namespace {

using nlohmann::json;
using report::Build;
using report::Figures;

// ---- What is measured -------------------------------------------------------------------------

constexpr const char* attention_w256 = "attention/float/seqlen:8192/dim_head:64/window_size:256";
constexpr const char* layer_options = "/dim_head:64/window_size:256/xpos:1/qk_rmsnorm:1";

std::string layer_of(const char* scalar, long seqlen) {
  return std::string("layer/") + scalar + "/seqlen:" + std::to_string(seqlen) + "/dim:512/heads:8" +
         layer_options;
}

std::string encoder_of(const std::string& further) {
  return std::string("encoder/float/seqlen:8192/dim:512/heads:8") + layer_options + "/depth:6" +
         further;
}

/// A share of the peak that a case of the main build is to reach.
struct ShareBar {
  std::string name;
  std::string of;    ///< case
  double bar;        ///< percent; 0: shown beside the others
  double whole = 0;  ///< the same where instructions of 512 bits are done whole, two in a cycle
};

constexpr const char* modernbert_layer =
    "layer/float/seqlen:8192/dim:768/heads:12/dim_head:64/window_size:64/causal:0/token_window:1/"
    "left:64/right:64";
constexpr const char* gpt_oss_options =
    "/float/seqlen:8192/dim:2880/heads:64/dim_head:64/window_size:128/token_window:1/left:127/"
    "kv_heads:8/sinks:1/biases:1";

std::vector<ShareBar> share_bars() {
  const std::string attention = "attention/float/seqlen:8192/";
  const std::string plain = "layer/float/seqlen:8192/";
  const std::string bfloat16 = "/arithmetic_bits:16";
  return {
      {"attention, D=64, w=128", attention + "dim_head:64/window_size:128", 75, 68},
      {"attention, D=64, w=256", attention_w256, 80, 76},
      {"attention, D=64, w=512", attention + "dim_head:64/window_size:512", 85, 80},
      {"attention, D=32, w=256", attention + "dim_head:32/window_size:256", 76, 66},
      {"attention, D=128, w=256", attention + "dim_head:128/window_size:256", 80, 73},
      {"attention, D=80, w=256", attention + "dim_head:80/window_size:256", 70},
      {"attention, D=96, w=256", attention + "dim_head:96/window_size:256", 70},
      {"attention, non-causal, D=64, w=256", attention + "dim_head:64/window_size:256/causal:0",
       78},
      {"attention, bucketed, D=64, w=256", attention + "dim_head:64/window_size:256/exact:0", 78},
      {"attention, double, D=64, w=256", "attention/double/seqlen:8192/dim_head:64/window_size:256",
       74, 70},
      {"attention, D=64, w=5", attention + "dim_head:64/window_size:5", 42},
      {"attention, D=64, w=16", attention + "dim_head:64/window_size:16", 42, 46},
      {"attention, padding mask, batch 8, D=64, w=256",
       "attention/float/batch:8/seqlen:8192/dim_head:64/window_size:256/padding:1", 70, 72},
      {"attention, attn_bias, D=64, w=256", attention + "dim_head:64/window_size:256/bias:1", 70,
       68},
      {"attention, dropout, D=64, w=256", attention + "dim_head:64/window_size:256/dropout:10", 72,
       66},
      {"attention backward, D=64, w=128", attention + "dim_head:64/window_size:128/backward:1", 70,
       68},
      {"attention backward, D=64, w=256", attention + "dim_head:64/window_size:256/backward:1", 78,
       75},
      {"attention backward, D=64, w=512", attention + "dim_head:64/window_size:512/backward:1", 83,
       79},
      {"attention backward, D=32, w=256", attention + "dim_head:32/window_size:256/backward:1", 75},
      {"attention backward, D=128, w=256", attention + "dim_head:128/window_size:256/backward:1",
       75},
      {"attention backward, double, D=64, w=256",
       "attention/double/seqlen:8192/dim_head:64/window_size:256/backward:1", 73},
      {"attention backward, dropout, D=64, w=256",
       attention + "dim_head:64/window_size:256/dropout:10/backward:1", 72},
      {"layer, forward and backward, dim 512, 8 heads, w=256",
       layer_of("float", 8192) + "/backward:1", 75, 77},
      {"layer, dim 512, 8 heads, w=256", layer_of("float", 8192), 86, 84},
      {"layer, dim 256, 4 heads, w=128", plain + "dim:256/heads:4/dim_head:64/window_size:128", 80},
      {"layer, dim 768, 12 heads, w=128, non-causal",
       plain + "dim:768/heads:12/dim_head:64/window_size:128/causal:0", 82},
      {"ModernBERT's layer, dim 768, 12 heads, {64, 64}", modernbert_layer, 85, 68},
      {"layer, dim 192, 3 heads, w=64", plain + "dim:192/heads:3/dim_head:64/window_size:64", 74},
      {"layer, double, dim 512, 8 heads, w=256", layer_of("double", 8192), 78},
      {"attention, products of bfloat16, D=64, w=256", std::string(attention_w256) + bfloat16, 125,
       115},
      {"layer, products of bfloat16, dim 512, 8 heads, w=256", layer_of("float", 8192) + bfloat16,
       140, 140},
      {"attention backward, products of bfloat16, D=64, w=256",
       std::string(attention_w256) + "/backward:1" + bfloat16, 0},
      {"layer, forward and backward, products of bfloat16, dim 512, 8 heads, w=256",
       layer_of("float", 8192) + "/backward:1" + bfloat16, 115, 110},
      {"Eigen's product at the layer's shapes, dim 512, 8 heads",
       "eigen_product/float/seqlen:8192/dim:512/heads:8/dim_head:64/window_size:256", 0},
      {"Eigen's product at the layer's shapes, double",
       "eigen_product/double/seqlen:8192/dim:512/heads:8/dim_head:64/window_size:256", 0},
      {"naive attention in Eigen expressions, D=64, w=256",
       "naive_attention/float/seqlen:8192/dim_head:64/window_size:256", 0},
  };
}

/// Cases beside others of the main build: by how many points of the peak they lie above.
struct PointsBar {
  std::string name;
  std::string of;
  std::string other;
  double bar;  ///< below 0: they may lie under them
};

std::vector<PointsBar> points_bars() {
  const std::string attention = "attention/float/seqlen:8192/";
  const std::string w256 = attention_w256;
  const std::string eight = attention + "heads:8/dim_head:64/window_size:256";
  return {
      {"token window {255, 0}, over the look-around of 255", w256 + "/token_window:1/left:255",
       attention + "dim_head:64/window_size:255", -1},
      {"ALiBi, over plain, D=64, w=256", w256 + "/alibi:1", w256, -8},
      {"soft-cap, over plain, D=64, w=256", w256 + "/soft_cap:50", w256, -12},
      {"8 query heads on 2 key heads, over 8 on 8, D=64, w=256", eight + "/kv_heads:2", eight, 3},
      {"packed sequences of 1000 +- 900 rows, over one, D=64, w=256", w256 + "/packed:1000", w256,
       -5},
      {"sinks, over plain, D=64, w=256", w256 + "/sinks:1", w256, -1},
      {"4 first keys, over plain, D=64, w=256", w256 + "/first_keys:4", w256, -3},
      {"encoder of 6 layers, dim 512, w=256, over the layer alone", encoder_of(""),
       layer_of("float", 8192), -5},
      {"the same, forward and backward", encoder_of("/backward:1"),
       layer_of("float", 8192) + "/backward:1", -6},
  };
}

/// Cases whose like by tiles through Eigen's product is measured in turn with them.
struct Tiled {
  std::string name;
  std::string of;

  std::string peer() const { return "tiled_" + of; }
};

std::vector<Tiled> tiled_cases() {
  const std::string attention = "attention/float/seqlen:8192/dim_head:64/window_size:";
  return {{"attention, w=128", attention + "128"},
          {"attention, w=256", attention_w256},
          {"attention, w=512", attention + "512"},
          {"layer, w=256", layer_of("float", 8192)}};
}

/// How many times faster than these the library is to be, where instructions of 512 bits are done
/// whole.
constexpr double tiled_bar_whole = 1.8;

/// Another build of the same source, and the bars of attention_w256 and of the layer in it.
struct OtherBuild {
  std::string program;
  std::string label;
  double attention_bar;
  double layer_bar;  ///< above 0: for the same processor, by another compiler
};

const std::vector<OtherBuild>& other_builds() {
  static const std::vector<OtherBuild> all{
      {"local_mha_measure_avx2", "AVX2 build", 73, 0},
      {"local_mha_measure_sse2", "SSE2 build", 0, 0},
      {"local_mha_measure_clang", "clang", 0, 86},
      {"local_mha_measure_gcc", "g++", 0, 86},
  };
  return all;
}

// ---- Rows of the table ------------------------------------------------------------------------

struct Row {
  std::string name;
  std::optional<double> figure = {};
  std::optional<double> bar = {};
  std::string unit = "% of peak";
  bool at_most = false;
  std::string of = {};  ///< the case, if the row is of a single one
  double tokens_per_second = 0;

  /// Empty without a bar or a figure.
  std::optional<bool> met() const {
    if (!bar || !figure) return std::nullopt;
    return at_most ? *figure <= *bar : *figure >= *bar;
  }
};

Row share_row(const std::string& name, const std::string& of, const Figures& f, double bar) {
  Row row{
      .name = name, .figure = 100 * f.share, .of = of, .tokens_per_second = f.tokens / f.seconds};
  if (bar > 0) row.bar = bar;
  return row;
}

template <typename Value>
json or_null(const std::optional<Value>& value) {
  return value ? json(*value) : json(nullptr);
}

json to_json(const Row& row) {
  json j{{"name", row.name}, {"figure", or_null(row.figure)}, {"bar", or_null(row.bar)},
         {"unit", row.unit}, {"met", or_null(row.met())},     {"at_most", row.at_most}};
  if (!row.of.empty()) {
    j["case"] = row.of;
    j["tokens_per_second"] = row.tokens_per_second;
  }
  return j;
}

std::string formatted(double value) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), value < 10 ? "%.3f" : "%.1f", value);
  return text.data();
}

void print_table(const json& found) {
  std::cout << "\nProcessor   " << found.at("processor").get<std::string>() << "\nCompiler    "
            << found.at("compiler").get<std::string>() << "\nFlags       "
            << found.at("flags").get<std::string>() << "\nFMA peak   ";
  for (const char* scalar : {"float", "double"})
    std::cout << " " << formatted(found.at("peak").at(scalar)) << " GFLOP/s " << scalar;
  std::cout << " on one core, 512 bits "
            << (found.at("whole_512_bits").get<bool>() ? "at once" : "in halves, or not at all")
            << ", bfloat16 by " << found.at("bfloat16_products").get<std::string>() << "\n\n";
  std::printf("%-60s %10s %10s  %-9s  %s\n", "", "figure", "wanted", "unit", "met");
  for (const json& row : found.at("rows")) {
    const auto text = [&](const char* key) {
      return row.at(key).is_null() ? std::string("-") : formatted(row[key]);
    };
    const std::string bar = (row.at("bar").is_null() ? ""
                             : row.at("at_most")     ? "<= "
                                                     : ">= ") +
                            text("bar");
    const json& met = row.at("met");
    std::printf("%-60s %10s %10s  %-9s  %s\n", row.at("name").get<std::string>().c_str(),
                text("figure").c_str(), bar.c_str(), row.at("unit").get<std::string>().c_str(),
                met.is_null()     ? ""
                : met.get<bool>() ? "yes"
                                  : "NO");
  }
  std::fflush(stdout);
}

// The same case by others: how many times faster the library is.
void print_peers(const json& found, const json& peers) {
  std::map<std::string, double> own;
  for (const json& row : found.at("rows"))
    if (row.contains("case")) own.emplace(row["case"], row.at("tokens_per_second"));
  std::printf("\nBeside others (%s)\n\n%-72s %12s %12s %8s\n",
              peers.at("machine").get<std::string>().c_str(), "", "tokens/s", "local_mha",
              "factor");
  for (const json& row : peers.at("rows")) {
    const std::string name = row.at("name");
    const double theirs = row.at("tokens_per_second");
    const auto ours = own.find(row.at("case"));
    if (ours == own.end())
      std::printf("%-72s %12.0f %12s\n", name.c_str(), theirs, "-");
    else
      std::printf("%-72s %12.0f %12.0f %7.1fx\n", name.c_str(), theirs, ours->second,
                  ours->second / theirs);
  }
  std::fflush(stdout);
}

// ---- Measuring --------------------------------------------------------------------------------

struct Settings {
  int rounds = 11;
  bool million = true;
};

void say(const std::string& what) { std::cerr << "report: " << what << std::endl; }

std::string processor_name() {
  std::ifstream info("/proc/cpuinfo");
  std::map<std::string, std::string> first;
  for (std::string line; std::getline(info, line) && !line.empty();) {
    const std::size_t colon = line.find(':');
    if (colon == std::string::npos || colon + 2 > line.size()) continue;
    const std::size_t key_end = line.find_last_not_of("\t ", colon - 1);
    first.emplace(line.substr(0, key_end + 1), line.substr(colon + 2));
  }
  if (!first.contains("model name")) return "unknown";
  std::string name = first["model name"];
  if (first.contains("cpu family") && first.contains("model"))
    name += " (family " + first["cpu family"] + ", model " + first["model"] + ")";
  return name;
}

// Seconds that the compiler computes for a file that includes the library and calls forward().
std::optional<double> compile_seconds() {
  const auto spent = [] {
    rusage usage{};
    getrusage(RUSAGE_CHILDREN, &usage);
    const auto seconds = [](const timeval& t) {
      return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
    };
    return seconds(usage.ru_utime) + seconds(usage.ru_stime);
  };
  const double before = spent();
  if (std::system(LOCAL_MHA_BENCHMARK_COMPILE_COMMAND) != 0) return std::nullopt;
  return spent() - before;
}

std::vector<long> powers_of_two(long first, long last) {
  std::vector<long> all;
  for (long n = first; n <= last; n *= 2) all.push_back(n);
  return all;
}

class Report {
 public:
  Report(const std::filesystem::path& programs, const Settings& settings)
      : programs_(programs), settings_(settings), main_(programs / "local_mha_measure") {}

  json run(const std::string& plot_path) {
    find_kind();
    measure_bars();
    measure_other_builds();
    measure_threads();
    measure_streams();
    measure_generation();
    measure_ranks();
    measure_lengths();
    measure_windows();
    compile();
    draw(plot_path);
    check();
    return result();
  }

  /// Cases whose result was wrong.
  const std::vector<std::string>& wrong() const { return wrong_; }

 private:
  // Whether instructions of 512 bits do twice the work of those of 256, and by which bfloat16 is
  // multiplied.
  void find_kind() {
    const std::string any = "attention/float/seqlen:64/dim_head:64/window_size:16";
    Build build(programs_ / "local_mha_measure");
    build.measure({any}, 5, 0.01);
    bfloat16_products_ = build.bfloat16_products();
    Build half(programs_ / "local_mha_measure_avx2");
    if (!half.exists()) return;
    half.measure({any}, 5, 0.01);
    whole_ = build.figures(any).peak > 1.5 * half.figures(any).peak;
  }

  // That of this kind of processor.
  double bar_of(const ShareBar& bar) const {
    const bool of_bfloat16 = bar.of.find("/arithmetic_bits:16") != std::string::npos;
    if (!of_bfloat16 || bfloat16_products_ == "VDPBF16PS") return whole_ ? bar.whole : bar.bar;
    if (bfloat16_products_ != "AMX") return 0;
    if (bar.of.find("/backward:1") != std::string::npos)
      return bar.of.starts_with("layer") ? 250 : 0;
    return bar.of.starts_with("layer") ? 450 : 200;
  }

  void measure_bars() {
    say("the figures, in " + std::to_string(settings_.rounds) + " rounds");
    std::vector<std::string> cases;
    for (const ShareBar& bar : share_bars()) cases.push_back(bar.of);
    for (const PointsBar& bar : points_bars())
      for (const std::string& of : {bar.of, bar.other})
        if (std::find(cases.begin(), cases.end(), of) == cases.end()) cases.push_back(of);
    for (const Tiled& tiled : tiled_cases())
      cases.insert(std::find(cases.begin(), cases.end(), tiled.of) + 1, tiled.peer());
    main_.measure(cases, settings_.rounds, 0.05);
    note_tiles(main_);
    for (const ShareBar& bar : share_bars()) {
      std::string name = bar.name;
      if (bar.of == layer_of("float", 8192)) name += ", " + main_.compiler();
      rows_.push_back(share_row(name, bar.of, main_.figures(bar.of), bar_of(bar)));
    }
    for (const PointsBar& bar : points_bars()) {
      const Figures& of = main_.figures(bar.of);
      rows_.push_back({.name = bar.name,
                       .figure = 100 * (of.share - main_.figures(bar.other).share),
                       .bar = bar.bar,
                       .unit = "points",
                       .of = bar.of,
                       .tokens_per_second = of.tokens / of.seconds});
    }
    const std::string streams = encoder_of("/residual_streams:4");
    main_.measure({encoder_of(""), streams}, settings_.rounds, 0.05);
    rows_.push_back(
        {.name = "encoder with 4 residual streams, against one",
         .figure = main_.figures(streams).seconds / main_.figures(encoder_of("")).seconds,
         .bar = 1.06,
         .unit = "times",
         .at_most = true,
         .of = streams,
         .tokens_per_second = main_.figures(streams).tokens / main_.figures(streams).seconds});
    peak_["float"] = main_.figures(attention_w256).peak * 1e-9;
    peak_["double"] = main_.figures(layer_of("double", 8192)).peak * 1e-9;
  }

  void measure_other_builds() {
    for (const OtherBuild& other : other_builds()) {
      Build build(programs_ / other.program);
      if (!build.exists()) continue;
      say("the " + other.label + " of the same source");
      std::vector<std::string> cases{attention_w256, layer_of("float", 8192)};
      if (other.layer_bar > 0) {
        cases.clear();
        for (const Tiled& tiled : tiled_cases())
          cases.insert(cases.end(), {tiled.of, tiled.peer()});
      }
      build.measure(cases, settings_.rounds, 0.05);
      if (other.layer_bar > 0) note_tiles(build);
      const std::string label = (other.layer_bar > 0 ? "" : other.label + ", ") + build.compiler();
      const auto add = [&](const char* what, const std::string& of, double bar) {
        Row row = share_row(std::string(what) + ", " + label, of, build.figures(of), bar);
        row.of.clear();  // a case stands for the main build
        rows_.push_back(row);
      };
      add("attention, D=64, w=256", attention_w256, other.attention_bar);
      add("layer, dim 512, 8 heads, w=256", layer_of("float", 8192), other.layer_bar);
      others_.push_back({{"compiler", build.compiler()},
                         {"flags", build.flags()},
                         {"instruction_sets", build.instruction_sets()}});
      note_wrong(build, label);
    }
    for (const Tiled& tiled : tiled_cases()) {
      const Tiles& tiles = fastest_tiles_.at(tiled.of);
      rows_.push_back({.name = "Eigen's product in tiles, " + tiled.name + ", " + tiles.compiler,
                       .figure = 100 * tiles.share});
      rows_.push_back({.name = "the same, how many times faster the library is",
                       .figure = tiles.factor,
                       .bar = whole_ ? std::optional(tiled_bar_whole) : std::nullopt,
                       .unit = "times"});
    }
  }

  // Tiles through Eigen's product are those of the compiler that serves them best, and the library
  // is compared with them in that build.
  void note_tiles(const Build& build) {
    for (const Tiled& tiled : tiled_cases()) {
      const double share = build.figures(tiled.peer()).share;
      Tiles& fastest = fastest_tiles_[tiled.of];
      if (share <= fastest.share) continue;
      fastest = {.share = share,
                 .factor = build.figures(tiled.of).share / share,
                 .compiler = build.compiler()};
    }
  }

  void measure_threads() {
    const std::string single = layer_of("float", 8192);
    const auto on = [&](unsigned threads) {
      return single + "/threads:" + std::to_string(threads);
    };
    const unsigned cores = std::thread::hardware_concurrency();
    // Threads, and how many times faster than one they are to be; 0: shown beside the others.
    std::map<unsigned, double> bars;
    if (cores > 1) bars[cores] = 0;
    if (cores >= 2) bars[2] = 1.8;
    if (cores >= 16) bars[16] = 13;
    if (bars.empty()) return;
    say("threads");
    std::vector<std::string> cases{single};
    for (const auto& [threads, bar] : bars) cases.push_back(on(threads));
    Build build(programs_ / "local_mha_measure");
    build.measure(cases, settings_.rounds, 0.2, "--wall");
    for (const auto& [threads, bar] : bars) {
      Row row{.name = "layer, dim 512, 8 heads, w=256, " + std::to_string(threads) +
                      " threads against one",
              .figure = build.figures(single).seconds / build.figures(on(threads)).seconds,
              .unit = "times"};
      if (bar > 0) row.bar = bar;
      row.of = on(threads);
      row.tokens_per_second =
          build.figures(on(threads)).tokens / build.figures(on(threads)).seconds;
      rows_.push_back(row);
    }
    note_wrong(build, "threads");
  }

  void measure_streams() {
    say("streams");
    const std::string layer = layer_of("float", 8192);
    const auto of = [&](const std::string& subject) {
      return subject + layer.substr(layer.find('/'));
    };
    Build build(programs_ / "local_mha_measure");
    build.measure({layer, of("prefill"), of("decode"), of("eigen_vectors")}, settings_.rounds,
                  0.05);
    const Figures& step = build.figures(of("decode"));
    rows_.push_back({.name = "a step of the layer's stream, dim 512, 8 heads, w=256",
                     .figure = 1e6 * step.seconds,
                     .unit = "us",
                     .of = of("decode"),
                     .tokens_per_second = step.tokens / step.seconds});
    rows_.push_back({.name = "a step, against Eigen's two matrix-vector products alone",
                     .figure = step.seconds / build.figures(of("eigen_vectors")).seconds,
                     .bar = 1.45,
                     .unit = "times",
                     .at_most = true});
    rows_.push_back({.name = "a step, allocations",
                     .figure = step.allocations,
                     .bar = 0,
                     .unit = "",
                     .at_most = true});
    rows_.push_back(
        {.name = "prefill by chunks of 512, of the full forward's speed",
         .figure = 100 * build.figures(layer).seconds / build.figures(of("prefill")).seconds,
         .bar = 95,
         .unit = "%"});
    const std::string step_of_gpt_oss = std::string("decode") + gpt_oss_options;
    const std::string products = std::string("eigen_vectors") + gpt_oss_options;
    build.measure({step_of_gpt_oss, products}, settings_.rounds, 0.05);
    rows_.push_back(
        {.name = "a step of gpt-oss' layer, against its two products by Eigen",
         .figure = build.figures(step_of_gpt_oss).seconds / build.figures(products).seconds,
         .bar = 1.35,
         .unit = "times",
         .at_most = true});
    note_wrong(build, "streams");

    // Weights, keys and values in bfloat16, of one layer and of several whose weights come from
    // further away.
    Build stored(programs_ / "local_mha_measure");
    for (const std::string layers : {"", "/layers:24"}) {
      const std::string whole = of("decode") + layers;
      const std::string rounded = of("decode") + "/stored_bits:16" + layers;
      stored.measure({whole, rounded}, settings_.rounds, 0.05);
      rows_.push_back({.name = std::string("a step with bfloat16 storage") +
                               (layers.empty() ? "" : ", 24 layers in turn") +
                               ", against that of float",
                       .figure = stored.figures(rounded).seconds / stored.figures(whole).seconds,
                       .bar = 0.58,
                       .unit = "times",
                       .at_most = true});
    }
    const std::string forward = layer + "/stored_bits:16";
    stored.measure({layer, forward}, settings_.rounds, 0.05);
    rows_.push_back(
        {.name = "the layer's forward pass with bfloat16 storage, of that of float",
         .figure = 100 * stored.figures(layer).seconds / stored.figures(forward).seconds,
         .bar = 96,
         .unit = "%"});
    note_wrong(stored, "16 bits");
  }

  void measure_generation() {
    const std::filesystem::path program = programs_ / "local_mha_generation";
    if (!std::filesystem::exists(program)) return;
    say("generation");
    const json found = json::parse(report::output_of(report::quoted(program.string()) + " " +
                                                     report::quoted(LOCAL_MHA_BENCHMARK_MODEL)));
    rows_.push_back({.name = "generation by the trained model, one core",
                     .figure = found.at("tokens_per_second").get<double>(),
                     .unit = "tokens/s"});
    rows_.push_back({.name = "reading its " +
                             formatted(found.at("weight_bytes").get<double>() / (1 << 20)) +
                             " MiB of weights, one core",
                     .figure = found.at("weight_reads_per_second").get<double>(),
                     .unit = "times/s"});
    const json rounded =
        json::parse(report::output_of(report::quoted(program.string()) + " --storage bfloat16 " +
                                      report::quoted(LOCAL_MHA_BENCHMARK_MODEL)));
    rows_.push_back({.name = "generation by the trained model in bfloat16, one core",
                     .figure = rounded.at("tokens_per_second").get<double>(),
                     .unit = "tokens/s"});
  }

  // As many ranks as there are cores, where MPI is.
  void measure_ranks() {
#if defined(LOCAL_MHA_BENCHMARK_MPIRUN)
    const unsigned ranks = std::clamp(std::thread::hardware_concurrency(), 1U, 16U);
    say(std::to_string(ranks) + " ranks of MPI");
    const std::filesystem::path figures = programs_ / "ranks.json";
    report::output_of(report::quoted(LOCAL_MHA_BENCHMARK_MPIRUN) + " -n " + std::to_string(ranks) +
                      " " + report::quoted((programs_ / "local_mha_measure_mpi").string()) +
                      " --json " + report::quoted(figures.string()));
    const json found = json::parse(std::ifstream(figures));
    rows_.push_back({.name = "the layer on one rank, of the time without MPI",
                     .figure = 100 * found.at("layer_on_one_rank_against_no_mpi").get<double>(),
                     .bar = 101,
                     .unit = "%",
                     .at_most = true});
    for (const json& one : found.at("cases")) {
      if (one.at("ranks") != ranks || ranks == 1) continue;
      const std::string name = one.at("case").get<std::string>() + ", " + std::to_string(ranks) +
                               " ranks, " + one.at("scaling").get<std::string>();
      const bool weak = one.at("scaling") == "weak";
      rows_.push_back({.name = name + ": scaling, of the peak's",
                       .figure = 100 * one.at("share_of_peak_scaling").get<double>(),
                       .bar = weak ? std::optional(ranks > 2 ? 90.0 : 95.0) : std::nullopt,
                       .unit = "%"});
      rows_.push_back({.name = name + ": waiting",
                       .figure = 100 * one.at("waiting").get<double>(),
                       .bar = weak ? std::optional(2.0) : std::nullopt,
                       .unit = "%",
                       .at_most = true});
    }
#endif
  }

  void measure_lengths() {
    std::vector<std::string> cases;
    for (const long n : powers_of_two(256, 1L << 18)) cases.push_back(layer_of("float", n));
    say("cost per token, sequences of 256 to 262,144");
    Build& lengths = lengths_;
    lengths.measure(cases, 3, 0.02);
    if (!settings_.million) return;
    say("cost per token, a sequence of 1,048,576");
    Build ends(programs_ / "local_mha_measure");
    const std::string short_one = layer_of("float", 8192);
    const std::string long_one = layer_of("float", 1L << 20);
    ends.measure({short_one, long_one}, 2, 2);
    const Figures& at_8192 = ends.figures(short_one);
    Row allocations{.name = "layer, allocations of a repeated call",
                    .figure = at_8192.allocations,
                    .bar = 0,
                    .unit = "",
                    .at_most = true};
    rows_.push_back(allocations);
    million_ = ends.figures(long_one);
    rows_.push_back({.name = "layer, cost per token at N = 1,048,576 against N = 8192",
                     .figure = cost(*million_) / cost(at_8192),
                     .bar = 1.03,
                     .unit = "times",
                     .at_most = true});
    Row scratch{
        .name = "layer, scratch memory at N = 1,048,576", .bar = 5, .unit = "MiB", .at_most = true};
    if (million_->scratch_bytes) scratch.figure = *million_->scratch_bytes / (1 << 20);
    rows_.push_back(scratch);
    note_wrong(ends, main_.compiler());
  }

  void measure_windows() {
    say("share of the peak over the window");
    std::vector<std::string> cases;
    for (const long w : windows_)
      for (const auto& [subject, dim_head] : curves_)
        cases.push_back(curve_case(subject, dim_head, w));
    main_.measure(cases, 3, 0.03);
  }

  void compile() {
    say("compile time");
    rows_.push_back({.name = "compile time of a file that calls forward",
                     .figure = compile_seconds(),
                     .bar = 12,
                     .unit = "s",
                     .at_most = true});
  }

  void draw(const std::string& path) {
    report::Panel cost_panel{.title = "Cost per token of the layer",
                             .x_label = "sequence length N",
                             .y_label = "microseconds per token"};
    report::Series layer{.label = "dim 512, 8 heads, w=256, xPos, qk_rmsnorm, float"};
    for (const long n : powers_of_two(256, 1L << 18))
      layer.points.emplace_back(n, 1e6 * cost(lengths_.figures(layer_of("float", n))));
    if (million_) layer.points.emplace_back(1L << 20, 1e6 * cost(*million_));
    cost_panel.series = {layer};
    curves_json_["cost_per_token_us"] = layer.points;

    report::Panel share_panel{.title = "Attention's share of the FMA peak",
                              .x_label = "window size w (N = 8192, causal, exact)",
                              .y_label = "% of the FMA peak of one core",
                              .y_max = 100};
    for (const auto& [subject, dim_head] : curves_) {
      report::Series series{.label = (subject == "attention" ? std::string("local_mha, float, D=")
                                                             : "Eigen expressions, float, D=") +
                                     std::to_string(dim_head)};
      for (const long w : windows_)
        series.points.emplace_back(w, 100 * main_.figures(curve_case(subject, dim_head, w)).share);
      curves_json_["peak_share_over_window"][series.label] = series.points;
      share_panel.series.push_back(std::move(series));
    }
    report::write_plot(path, {cost_panel, share_panel});
  }

  void check() {
    note_wrong(main_, main_.compiler());
    note_wrong(lengths_, main_.compiler());
  }

  json result() const {
    json rows = json::array();
    for (const Row& row : rows_) rows.push_back(to_json(row));
    return {{"processor", processor_name()}, {"compiler", main_.compiler()},
            {"flags", main_.flags()},        {"instruction_sets", main_.instruction_sets()},
            {"whole_512_bits", whole_},      {"bfloat16_products", bfloat16_products_},
            {"other_builds", others_},       {"peak", peak_},
            {"peak_unit", "GFLOP/s"},        {"rows", rows},
            {"curves", curves_json_}};
  }

  void note_wrong(const Build& build, const std::string& label) {
    for (const auto& [name, figures] : build.all())
      if (!figures.correct)
        wrong_.push_back(name + " (" + label + "): relative error " +
                         std::to_string(figures.max_error));
  }

  static double cost(const Figures& f) { return f.seconds / f.tokens; }

  static std::string curve_case(const std::string& subject, long dim_head, long w) {
    return subject + "/float/seqlen:8192/dim_head:" + std::to_string(dim_head) +
           "/window_size:" + std::to_string(w);
  }

  std::filesystem::path programs_;
  Settings settings_;
  Build main_;
  Build lengths_{programs_ / "local_mha_measure"};
  std::optional<Figures> million_;
  std::vector<long> windows_ = powers_of_two(4, 4096);
  std::vector<std::pair<std::string, long>> curves_{
      {"attention", 64}, {"attention", 128}, {"naive_attention", 64}};
  std::vector<Row> rows_;
  std::map<std::string, double> peak_;
  bool whole_ = false;
  std::string bfloat16_products_;
  // By the case that they are beside.
  struct Tiles {
    double share = 0;
    double factor = 0;  // of the library's share
    std::string compiler;
  };
  std::map<std::string, Tiles> fastest_tiles_;
  json others_ = json::array();
  json curves_json_;
  std::vector<std::string> wrong_;
};

json read_json(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  return json::parse(file);
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Measures the library against the values wanted; writes report.json and report.png"};
  const std::filesystem::path here = std::filesystem::absolute(argv[0]).parent_path();
  std::string directory = here.string();
  std::string peers_path;
  std::string from_path;
  Settings settings;
  bool quick = false;
  app.add_option("--output", directory, "folder of report.json and report.png")
      ->check(CLI::ExistingDirectory);
  app.add_option("--peers", peers_path, "JSON of a script in benchmarks/peers/, to be shown beside")
      ->check(CLI::ExistingFile);
  app.add_option("--from", from_path, "print the table of this report.json, measure nothing")
      ->check(CLI::ExistingFile);
  app.add_option("--rounds", settings.rounds, "samples of each figure")->check(CLI::Range(1, 1000));
  app.add_flag("--quick", quick, "three samples, and no sequence of a million");
  CLI11_PARSE(app, argc, argv);
  if (quick) settings = {.rounds = 3, .million = false};
  try {
    json found;
    std::vector<std::string> wrong;
    if (!from_path.empty()) {
      found = read_json(from_path);
    } else {
      Report report(here, settings);
      found = report.run(directory + "/report.png");
      wrong = report.wrong();
      std::ofstream file(directory + "/report.json");
      file << found.dump(2) << '\n';
      if (!file.flush()) throw std::runtime_error(directory + "/report.json: cannot be written");
    }
    print_table(found);
    if (!peers_path.empty()) print_peers(found, read_json(peers_path));
    if (from_path.empty())
      std::cout << "\n" << directory << "/report.json\n" << directory << "/report.png\n";
    for (const std::string& name : wrong) std::cerr << "report: wrong result: " << name << '\n';
    return wrong.empty() ? 0 : 1;
  } catch (const std::exception& error) {
    std::cerr << "local_mha_report: " << error.what() << '\n';
    return 2;
  }
}
