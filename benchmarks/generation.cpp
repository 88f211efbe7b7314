// SPDX-License-Identifier: MIT
// Tokens a second that a trained model makes on one core, beside the time that it takes to read its
// weights once, which every token does; and how well it predicts a text. Prints JSON.
//
//   local_mha_generation [--rounds R] [--storage float|bfloat16|half]
//                        [--arithmetic float|bfloat16] [--text TEXT] MODEL.safetensors
//
// With a storage of 16 bits, it reads, holds and multiplies with weights in that. In the arithmetic
// of bfloat16, which implies that storage, products are of rounded operands.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/io/safetensors.hpp>
#include <local_mha/io/weights.hpp>
#include <local_mha/local_mha.hpp>

#include "measuring/clock.hpp"

namespace {

using local_mha::Index;

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

// Adds up their memory, in several sums, so that it waits for the memory alone.
float sum_of(const std::vector<float>& values) {
  using L = local_mha::Lanes<float>;
  constexpr Index sums = 8;
  std::array<L, sums> sum;
  sum.fill(L::zero());
  const auto end = static_cast<Index>(values.size()) / (sums * L::count) * sums * L::count;
  for (Index i = 0; i < end; i += sums * L::count)
    for (Index s = 0; s < sums; ++s)
      sum[static_cast<std::size_t>(s)] =
          sum[static_cast<std::size_t>(s)] + L::load_unaligned(values.data() + i + s * L::count);
  float total = 0;
  for (const L& one : sum) total += local_mha::sum_of_lanes(one);
  return total;
}

struct Options {
  int rounds = 5;
  std::string storage;
  std::string arithmetic = "float";
  std::string text;
  std::string model;
};

// Bits that a byte of a text takes, of which the model predicts each from those before it in
// windows of max_seq_len.
template <typename Model>
double bits_per_byte(const Model& model, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (text.size() < 2) throw std::invalid_argument(path + ": expected a text of at least 2 bytes");
  const auto predicted = static_cast<Index>(text.size()) - 1;
  double nats = 0;
  for (Index first = 0; first < predicted;) {
    const Index n = std::min(model.config().max_seq_len, predicted - first);
    local_mha::Tensor<std::int64_t, 2> tokens(1, n + 1);
    for (Index i = 0; i <= n; ++i)
      tokens(0, i) = static_cast<unsigned char>(text[static_cast<std::size_t>(first + i)]);
    nats += static_cast<double>(model.loss(tokens)) * static_cast<double>(n);
    first += n;
  }
  return nats / static_cast<double>(predicted) / std::log(2.0);
}

template <typename Storage, typename Arithmetic = float>
int run(const Options& options) {
  auto [config, parameters] =
      local_mha::io::load_local_transformer<Storage>(local_mha::io::SafetensorsFile(options.model));

  // All that a token reads: of the embeddings, that is one row.
  std::vector<float> weights;
  const auto add = [&](const auto& tensor) {
    const std::size_t bytes = static_cast<std::size_t>(tensor.size()) * sizeof(Storage);
    weights.insert(weights.end(), bytes / sizeof(float), 1.0F);
  };
  for (const auto& layer : parameters.layers) {
    add(layer.attention.to_qkv);
    add(layer.attention.to_out);
    add(layer.feed_forward.proj_in);
    add(layer.feed_forward.proj_out);
  }
  add(parameters.to_logits);
  const local_mha::LocalTransformer<float, Storage, Arithmetic> model(config,
                                                                      std::move(parameters));

  constexpr Index length = 400;
  local_mha::Tensor<std::int64_t, 2> prompt(1, 8);
  for (Index i = 0; i < prompt.size(); ++i) prompt(0, i) = i % config.num_tokens;
  std::vector<double> of_a_token;
  std::vector<double> of_the_weights;
  float sum = 0;
  for (int round = 0; round < options.rounds; ++round) {
    double begin = measuring::cpu_seconds();
    const auto made = model.generate(prompt, {.length = length});
    of_a_token.push_back((measuring::cpu_seconds() - begin) / static_cast<double>(length));
    sum += static_cast<float>(made(0, length - 1));
    constexpr int reads = 50;
    begin = measuring::cpu_seconds();
    for (int i = 0; i < reads; ++i) {
      sum += sum_of(weights);
      weights[0] += 1;  // so that it is summed anew
    }
    of_the_weights.push_back((measuring::cpu_seconds() - begin) / reads);
  }
  std::cout << "{\"tokens_per_second\": " << 1 / median(of_a_token)
            << ", \"weight_bytes\": " << weights.size() * sizeof(float)
            << ", \"weight_reads_per_second\": " << 1 / median(of_the_weights)
            << ", \"sum\": " << sum;
  if (!options.text.empty())
    std::cout << ", \"bits_per_byte\": " << std::fixed << std::setprecision(6)
              << bits_per_byte(model, options.text);
  std::cout << "}\n";
  return 0;
}

int run(const std::vector<std::string>& arguments) {
  Options options;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const bool has_value = i + 1 < arguments.size();
    if (arguments[i] == "--rounds" && has_value)
      options.rounds = std::max(1, std::stoi(arguments[++i]));
    else if (arguments[i] == "--storage" && has_value)
      options.storage = arguments[++i];
    else if (arguments[i] == "--arithmetic" && has_value)
      options.arithmetic = arguments[++i];
    else if (arguments[i] == "--text" && has_value)
      options.text = arguments[++i];
    else
      options.model = arguments[i];
  }
  if (options.model.empty()) throw std::invalid_argument("expected a model");
  if (options.arithmetic == "bfloat16") {
    if (!options.storage.empty() && options.storage != "bfloat16")
      throw std::invalid_argument("--storage: expected bfloat16, as the arithmetic is, got " +
                                  options.storage);
    return run<Eigen::bfloat16, Eigen::bfloat16>(options);
  }
  if (options.arithmetic != "float")
    throw std::invalid_argument("--arithmetic: expected float or bfloat16, got " +
                                options.arithmetic);
  if (options.storage.empty() || options.storage == "float") return run<float>(options);
  if (options.storage == "bfloat16") return run<Eigen::bfloat16>(options);
  if (options.storage == "half") return run<Eigen::half>(options);
  throw std::invalid_argument("--storage: expected float, bfloat16 or half, got " +
                              options.storage);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::cerr << "local_mha_generation: " << error.what() << '\n';
    return 2;
  }
}
