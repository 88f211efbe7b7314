// SPDX-License-Identifier: MIT
/// \file
/// Runs local_mha_measure as a child process and reads what it found.
#pragma once

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

namespace report {

inline double median(std::vector<double> values) {
  if (values.empty()) throw std::runtime_error("no samples");
  std::sort(values.begin(), values.end());
  const std::size_t half = values.size() / 2;
  return values.size() % 2 != 0 ? values[half] : (values[half - 1] + values[half]) / 2;
}

inline std::string quoted(const std::string& text) {
  std::string result = "'";
  for (const char c : text) result += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return result + "'";
}

/// What a command prints.
/// \throws std::runtime_error if it fails
inline std::string output_of(const std::string& command) {
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) throw std::runtime_error("cannot start " + command);
  std::string text;
  std::array<char, 4096> part{};
  while (const std::size_t n = std::fread(part.data(), 1, part.size(), pipe))
    text.append(part.data(), n);
  if (const int status = pclose(pipe); status != 0)
    throw std::runtime_error("failed (" + std::to_string(status) + "): " + command);
  return text;
}

/// Of one case: medians over its samples.
struct Figures {
  double flops = 0;
  double tokens = 0;
  double seconds = 0;
  double share = 0;  ///< of the peak around the same sample
  double peak = 0;
  double max_error = 0;
  bool correct = false;
  std::optional<double>
      scratch_bytes;                  ///< held at most during a first call, beyond input and output
  std::optional<double> allocations;  ///< in later calls
};

/// One build of local_mha_measure.
class Build {
 public:
  explicit Build(std::filesystem::path program) : program_(std::move(program)) {}

  bool exists() const { return std::filesystem::exists(program_); }
  const std::string& compiler() const { return compiler_; }
  const std::string& flags() const { return flags_; }
  const std::string& instruction_sets() const { return instruction_sets_; }
  /// By which products of bfloat16 are: `AMX`, `VDPBF16PS` or `float`.
  const std::string& bfloat16_products() const { return bfloat16_products_; }

  /// Measures `cases` in rounds and keeps their figures, of which figures() finds them by name.
  /// \throws std::runtime_error if the program fails
  void measure(const std::vector<std::string>& cases, int rounds, double seconds,
               const std::string& options = "") {
    std::string command = quoted(program_.string()) + " --rounds " + std::to_string(rounds) +
                          " --seconds " + std::to_string(seconds) + " " + options;
    for (const std::string& name : cases) command += " " + quoted(name);
    const nlohmann::json found = nlohmann::json::parse(output_of(command));
    compiler_ = found.at("compiler");
    flags_ = found.at("flags");
    instruction_sets_ = found.at("instruction_sets");
    bfloat16_products_ = found.at("bfloat16_products");
    for (const nlohmann::json& result : found.at("results")) {
      Figures f;
      f.flops = result.at("flops");
      f.tokens = result.at("tokens");
      f.max_error = result.at("max_error");
      f.correct = result.at("correct");
      if (result.contains("scratch_bytes")) {
        f.scratch_bytes = result["scratch_bytes"].get<double>();
        f.allocations = result.at("allocations").get<double>();
      }
      const std::vector<double> times = result.at("seconds");
      const std::vector<double> peaks = result.at("peak");
      std::vector<double> shares;
      for (std::size_t i = 0; i < times.size(); ++i)
        shares.push_back(f.flops / times[i] / peaks.at(i));
      f.seconds = median(times);
      f.peak = median(peaks);
      f.share = median(shares);
      figures_[result.at("case")] = f;
    }
  }

  /// \throws std::runtime_error if the case was not measured
  const Figures& figures(const std::string& name) const {
    const auto found = figures_.find(name);
    if (found == figures_.end()) throw std::runtime_error("case not measured: " + name);
    return found->second;
  }

  const std::map<std::string, Figures>& all() const { return figures_; }

 private:
  std::filesystem::path program_;
  std::string compiler_;
  std::string flags_;
  std::string instruction_sets_;
  std::string bfloat16_products_;
  std::map<std::string, Figures> figures_;
};

}  // namespace report
