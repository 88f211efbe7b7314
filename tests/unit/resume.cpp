// SPDX-License-Identifier: MIT
// A stream that outlives its process. Each call is a process of its own:
//   resume whole OUT        pushes both halves of a text, writes the results of the second
//   resume save STATE       pushes the first half, saves, and is killed
//   resume load STATE OUT   loads, pushes the second half, writes its results
#include <algorithm>
#include <csignal>
#include <cstdint>
#include <exception>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/local_mha.hpp>

namespace {

using local_mha::Index;
using local_mha::Tensor;

constexpr Index batch = 2;
constexpr Index half = 333;

// The same in every process.
Tensor<float, 3> layer_input(std::uint64_t seed) {
  local_mha::RandomSequence random(seed);
  Tensor<float, 3> x(batch, half, 24);
  for (Index i = 0; i < x.size(); ++i) x.data()[i] = static_cast<float>(random.normal());
  return x;
}
Tensor<std::int64_t, 2> model_input(std::uint64_t seed) {
  local_mha::RandomSequence random(seed);
  Tensor<std::int64_t, 2> tokens(batch, half);
  for (Index i = 0; i < tokens.size(); ++i)
    tokens.data()[i] = static_cast<std::int64_t>(50 * random.uniform());
  return tokens;
}

local_mha::LocalMHAConfig layer_config() {
  local_mha::LocalMHAConfig config{.dim = 24, .window_size = 19, .dim_head = 16, .heads = 3};
  config.use_xpos = config.qk_rmsnorm = config.gate_values_per_head = config.prenorm = true;
  return config;
}
local_mha::LocalTransformerConfig model_config() {
  local_mha::LocalTransformerConfig config{
      .num_tokens = 50, .max_seq_len = 500, .dim = 24, .depth = 3};
  config.local_attn_window_size = 31;
  config.dim_head = 8;
  config.heads = 3;
  return config;
}

class Streams {
 public:
  void push(std::uint64_t seed) {
    layer_results_ = layer_stream_.push(layer_input(seed));
    model_results_ = model_stream_.push(model_input(seed));
  }
  void save(const std::string& path) const {
    std::ofstream out(path, std::ios::binary);
    layer_stream_.save(out);
    model_stream_.save(out);
  }
  void load(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    layer_stream_.load(in);
    model_stream_.load(in);
  }
  void write_results(const std::string& path) const {
    std::ofstream out(path, std::ios::binary);
    for (const auto* results : {&layer_results_, &model_results_})
      out.write(reinterpret_cast<const char*>(results->data()),
                static_cast<std::streamsize>(results->size() * Index{sizeof(float)}));
    if (results_are_empty() || !out.flush()) throw std::runtime_error(path + ": nothing written");
  }

 private:
  bool results_are_empty() const { return layer_results_.size() * model_results_.size() == 0; }

  local_mha::LocalMHA<float> layer_{layer_config(), 3};
  local_mha::LocalTransformer<float> model_{model_config(), 4};
  local_mha::LocalMHA<float>::Stream layer_stream_{layer_, {.batch = batch}};
  local_mha::LocalTransformer<float>::Stream model_stream_{model_, {.batch = batch}};
  Tensor<float, 3> layer_results_;
  Tensor<float, 3> model_results_;
};

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  const auto is = [&](const char* name, std::size_t size) {
    return arguments.size() == size && arguments[0] == name;
  };
  try {
    Streams streams;
    if (is("whole", 2)) {
      streams.push(1);
      streams.push(2);
      streams.write_results(arguments[1]);
    } else if (is("save", 2)) {
      streams.push(1);
      streams.save(arguments[1]);
      std::raise(SIGKILL);
    } else if (is("load", 3)) {
      streams.load(arguments[1]);
      streams.push(2);
      streams.write_results(arguments[2]);
    } else {
      std::cerr << "usage: see the head of the source\n";
      return 2;
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
