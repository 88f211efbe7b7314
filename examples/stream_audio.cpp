// SPDX-License-Identifier: MIT
/// \file
/// Sound in real time: a stack of layers over frames of samples, block by block, and how long a
/// block takes.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include <local_mha/local_mha.hpp>

#include "durations.hpp"
#include "input_file.hpp"
#include "program.hpp"
#include "terminal.hpp"
#include "wav.hpp"

namespace {

using local_mha::Index;
using local_mha::Tensor;
using local_mha::TensorView;
using Layer = local_mha::LocalMHA<float>;
namespace examples = local_mha::examples;

constexpr Index block_size = 256;

struct Options {
  std::string input;
  std::string raw_format = "s16";
  std::uint32_t rate = 48'000;
  double seconds = 10;
  Index layers = 4;
  Index dim = 64;
  Index heads = 4;
  Index dim_head = 32;
  Index window_size = 128;
  std::uint64_t seed = 0;
};

/// `x += layer(x)` for one layer after the other. A frame is `dim` samples in a row.
class Stack {
 public:
  explicit Stack(const Options& options) : dim_(options.dim), y_(block_size) {
    local_mha::LocalMHAConfig config{.dim = dim_, .window_size = options.window_size};
    config.dim_head = options.dim_head;
    config.heads = options.heads;
    config.causal = config.prenorm = true;
    for (Index i = 0; i < options.layers; ++i) {
      // The stream keeps the layer's weights.
      const Layer layer(config, options.seed + static_cast<std::uint64_t>(i));
      streams_.emplace_back(layer);
    }
  }

  /// Takes a block, and leaves the result in its place. Allocates nothing.
  void process(std::array<float, block_size>& block) {
    const std::array<Index, 3> shape{1, block_size / dim_, dim_};
    for (Layer::Stream& stream : streams_) {
      stream.push_into(TensorView<float, 3>(y_.data(), shape),
                       TensorView<const float, 3>(block.data(), shape));
      Eigen::Map<Eigen::VectorXf>(block.data(), block_size) += y_;
    }
  }

 private:
  Index dim_;
  std::vector<Layer::Stream> streams_;
  Eigen::VectorXf y_;
};

/// \throws std::invalid_argument if the layers would take more than a gibibyte
void check_size(const Options& options) {
  const auto real = [](Index n) { return static_cast<double>(n); };
  // Keys and values of a window, and weights.
  const double of_a_channel = 2 * real(options.window_size) + 4 * real(options.dim);
  const double channels = real(options.layers) * real(options.heads) * real(options.dim_head);
  constexpr double most = 0x1p28;
  if (channels * of_a_channel > most)
    local_mha::reject("--window-size",
                      "windows and layers of at most 2^28 numbers (--layers x --heads x --dim-head "
                      "x (2 x --window-size + 4 x --dim))",
                      options.window_size, " and ", channels * of_a_channel, " numbers");
}

/// A tone that rises from 100 to 4000 hertz, again and again, and some noise.
class MadeSound {
 public:
  explicit MadeSound(const Options& options)
      : rate_(options.rate),
        left_(static_cast<std::uint64_t>(std::llround(options.seconds * options.rate))),
        random_(options.seed) {}

  bool next(float& sample) {
    if (left_ == 0) return false;
    --left_;
    constexpr double two_pi = 6.283185307179586;
    time_ = std::fmod(time_ + 1 / rate_, 2);
    phase_ = std::fmod(phase_ + two_pi * 100 * std::pow(40.0, time_ / 2) / rate_, two_pi);
    sample = static_cast<float>(0.5 * std::sin(phase_) + 0.02 * (2 * random_.uniform() - 1));
    return true;
  }

 private:
  double rate_;
  std::uint64_t left_;
  local_mha::RandomSequence random_;
  double time_ = 0;
  double phase_ = 0;
};

/// Takes all samples through the stack.
/// \param next `next(sample)`: false at the end
template <typename Next>
int stream(const Options& options, const std::string& source, double rate, Next&& next) {
  Stack stack(options);
  examples::Durations durations;
  std::array<float, block_size> block{};
  std::uint64_t samples = 0;
  double power_in = 0;
  double power_out = 0;
  const auto power = [&] {
    double sum = 0;
    for (const float sample : block) sum += static_cast<double>(sample) * sample;
    return sum;
  };
  for (bool ended = false; !ended;) {
    Index filled = 0;
    while (filled < block_size && next(block[static_cast<std::size_t>(filled)])) ++filled;
    ended = filled < block_size;
    if (filled == 0) break;
    std::fill(block.begin() + filled, block.end(), 0.0F);
    samples += static_cast<std::uint64_t>(filled);
    power_in += power();
    const examples::Stopwatch watch;
    stack.process(block);
    durations.add(watch.seconds());
    power_out += power();
  }
  if (samples == 0) throw std::runtime_error(source + ": expected at least 1 sample, got none");

  const double real_time = static_cast<double>(block_size) / rate;
  const auto print = [&](const char* what, double seconds) {
    std::cout << "  " << std::left << std::setw(18) << what << std::right << std::setw(10)
              << std::setprecision(1) << 1e6 * seconds << " us" << std::setw(8)
              << std::setprecision(2) << 100 * seconds / real_time << " % of real time\n";
  };
  const auto count = static_cast<double>(samples);
  std::cout << std::fixed << std::setprecision(2) << source << ": " << count / rate << " s at "
            << std::setprecision(0) << rate << " samples per second, " << durations.count()
            << " blocks of " << block_size << "\n"
            << options.layers << " layers, dim " << options.dim << ", " << options.heads
            << " heads of " << options.dim_head << ", windows of " << options.window_size
            << " frames of " << options.dim << " samples\n";
  print("real time", real_time);
  print("mean", durations.mean());
  print("99.9th percentile", durations.quantile(0.999));
  print("longest", durations.longest());
  std::cout << "loudness " << std::setprecision(4) << std::sqrt(power_in / count) << " in, "
            << std::sqrt(power_out / count) << " out\n";
  return 0;
}

int run(int argc, char** argv) {
  Options options;
  CLI::App app(
      "Runs a stack of causal LocalMHA layers (x += layer(x), with the weights of new layers) over "
      "sound\nas it comes, in blocks of 256 samples, and prints how long a block takes against "
      "real "
      "time.\nA frame is dim samples in a row. The last block is filled up with silence.",
      "stream_audio");
  app.add_option("input", options.input,
                 "A WAV file; - for standard input, raw samples or a WAV file (which begins with "
                 "RIFF); nothing for a rising tone")
      ->type_name("[FILE.wav | -]");
  app.add_option("--format", options.raw_format, "Of raw samples, little-endian: s16 or f32")
      ->check(CLI::IsMember({"s16", "f32"}))
      ->capture_default_str();
  app.add_option("--rate", options.rate, "Samples per second, where no WAV file says it")
      ->check(CLI::Range(1, 10'000'000))
      ->capture_default_str();
  app.add_option("--seconds", options.seconds, "Length of the rising tone")->capture_default_str();
  app.add_option("--layers", options.layers, "Layers of the stack")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  app.add_option("--dim", options.dim, "Samples in a frame, a divisor of 256")
      ->capture_default_str();
  app.add_option("--heads", options.heads, "Heads of a layer")->capture_default_str();
  app.add_option("--dim-head", options.dim_head, "Channels of a head")->capture_default_str();
  app.add_option("--window-size", options.window_size, "Frames in a window")->capture_default_str();
  app.add_option("--seed", options.seed, "Seed of the weights and of the tone's noise")
      ->check([](const std::string& seed) {  // the conversion would wrap it
        return seed.starts_with('-') ? "expected at least 0, got " + seed : std::string();
      })
      ->capture_default_str();
  if (const auto status = examples::parse(app, argc, argv)) return *status;
  if (options.dim < 1 || options.dim > block_size || block_size % options.dim != 0)
    local_mha::reject("--dim", "a divisor of 256", options.dim);
  if (!(options.seconds >= 0.001 && options.seconds <= 1e6))
    local_mha::reject("--seconds", "0.001 to 1000000", options.seconds);
  check_size(options);

  if (options.input.empty()) {
    MadeSound sound(options);
    return stream(options, "A rising tone", options.rate,
                  [&](float& sample) { return sound.next(sample); });
  }
  const auto stream_reader = [&](examples::SampleReader reader, const std::string& name,
                                 double rate) {
    return stream(options, name, rate, [&](float& sample) { return reader.next(sample); });
  };
  if (options.input == "-") {
    std::string begun(4, '\0');
    std::cin.read(begun.data(), static_cast<std::streamsize>(begun.size()));
    begun.resize(static_cast<std::size_t>(std::cin.gcount()));
    const std::string name = "standard input";
    if (begun == "RIFF") {
      const examples::WavHeader header = examples::read_wav_header(std::cin, name, begun);
      return stream_reader({std::cin, name, header.format, header.data_bytes}, "Standard input",
                           header.rate);
    }
    const bool is_float = options.raw_format == "f32";
    return stream_reader({std::cin,
                          name,
                          {.is_float = is_float, .bits = is_float ? 32 : 16},
                          examples::until_the_end,
                          begun},
                         "Standard input", options.rate);
  }
  std::ifstream file = examples::open_input(options.input);
  const examples::WavHeader header = examples::read_wav_header(file, options.input);
  return stream_reader({file, options.input, header.format, header.data_bytes}, options.input,
                       header.rate);
}

}  // namespace

int main(int argc, char** argv) {
  // So that standard input tells a failure from the end.
  std::ios::sync_with_stdio(false);
  return examples::run_program("stream_audio", [&] { return run(argc, argv); });
}
