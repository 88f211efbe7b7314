// SPDX-License-Identifier: MIT
// Tokens a second that a trained model makes on one core, beside the time that it takes to read its
// weights once, which every token does. Prints JSON.
//
//   local_mha_generation [--rounds R] MODEL.safetensors
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <iostream>
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

// Adds them up from memory, in several sums, so that it waits for the memory alone.
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

int run(const std::vector<std::string>& arguments) {
  int rounds = 5;
  std::string path;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i] == "--rounds" && i + 1 < arguments.size())
      rounds = std::max(1, std::stoi(arguments[++i]));
    else
      path = arguments[i];
  }
  if (path.empty()) throw std::invalid_argument("expected a model");
  auto [config, parameters] =
      local_mha::io::load_local_transformer<float>(local_mha::io::SafetensorsFile(path));

  // All that a token reads: of the embeddings, that is one row.
  std::vector<float> weights;
  const auto add = [&](const auto& tensor) {
    weights.insert(weights.end(), tensor.data(), tensor.data() + tensor.size());
  };
  for (const auto& layer : parameters.layers) {
    add(layer.attention.to_qkv);
    add(layer.attention.to_out);
    add(layer.feed_forward.proj_in);
    add(layer.feed_forward.proj_out);
  }
  add(parameters.to_logits);
  const local_mha::LocalTransformer<float> model(config, std::move(parameters));

  constexpr Index length = 400;
  local_mha::Tensor<std::int64_t, 2> prompt(1, 8);
  for (Index i = 0; i < prompt.size(); ++i) prompt(0, i) = i % config.num_tokens;
  std::vector<double> of_a_token;
  std::vector<double> of_the_weights;
  float sum = 0;
  for (int round = 0; round < rounds; ++round) {
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
            << ", \"sum\": " << sum << "}\n";
  return 0;
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
