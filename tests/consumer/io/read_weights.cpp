// SPDX-License-Identifier: MIT
// Loads a model file by way of the installed component io, and runs it.
#include <iostream>
#include <utility>

#include <local_mha/io/weights.hpp>
#include <local_mha/local_mha.hpp>

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const local_mha::io::SafetensorsFile file(argv[1]);
  auto [config, parameters] = local_mha::io::load_local_transformer<float>(file);
  const local_mha::LocalTransformer<float> model(config, std::move(parameters));
  local_mha::Tensor<std::int64_t, 2> tokens(1, 3);
  tokens.setConstant('e');
  const auto logits = model.forward(tokens);
  std::cout << "logits " << logits.dimensions() << '\n';
  return logits.dimension(2) == config.num_tokens ? 0 : 1;
}
