// SPDX-License-Identifier: MIT
/// \file
/// A language model over bytes: how well it predicts a text, and texts by it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <ios>
#include <iostream>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include <local_mha/core/random.hpp>
#include <local_mha/io/safetensors.hpp>
#include <local_mha/io/weights.hpp>
#include <local_mha/local_mha.hpp>

#include "program.hpp"
#include "terminal.hpp"

namespace {

using local_mha::Index;
using local_mha::Tensor;
using Model = local_mha::LocalTransformer<float>;
using Tokens = Tensor<std::int64_t, 2>;
namespace examples = local_mha::examples;
namespace io = local_mha::io;

/// \throws std::invalid_argument if the model's tokens are not bytes, or it sees what it predicts
Model load_model(const std::string& path) {
  auto [config, parameters] = io::load_local_transformer<float>(io::SafetensorsFile(path));
  if (config.num_tokens > 256)
    local_mha::reject(path + ": num_tokens", "at most 256, because tokens are bytes here",
                      config.num_tokens);
  if (!config.causal)
    local_mha::reject(path + ": causal", "true, because the model predicts the next byte", false);
  return Model(config, std::move(parameters));
}

/// The token of each byte.
/// \param source where the bytes come from, for errors
/// \param offset of the first byte there
/// \throws std::invalid_argument naming the first byte that the model has no token for
template <typename Output>
void to_tokens(std::string_view bytes, Index num_tokens, std::string_view source,
               std::uint64_t offset, Output tokens) {
  for (const char c : bytes) {
    const Index token = static_cast<unsigned char>(c);
    if (token >= num_tokens) {
      std::ostringstream byte;
      byte << "byte 0x" << std::hex << token << std::dec << " at offset " << offset;
      local_mha::reject(source, "bytes of 0 to " + std::to_string(num_tokens - 1), byte.str());
    }
    *tokens++ = token;
    ++offset;
  }
}

/// Reads up to `size` bytes.
std::string read_bytes(std::ifstream& file, const std::string& path, std::size_t size) {
  std::string bytes(size, '\0');
  file.read(bytes.data(), static_cast<std::streamsize>(size));
  if (file.bad()) throw std::runtime_error(path + ": cannot be read");
  bytes.resize(static_cast<std::size_t>(file.gcount()));
  return bytes;
}

int score(const std::string& model_path, const std::string& text_path) {
  const Model model = load_model(model_path);
  const Index num_tokens = model.config().num_tokens;
  const Index window = model.config().max_seq_len;
  if (std::filesystem::is_directory(text_path))
    throw std::runtime_error(text_path + ": expected a file, got a directory");
  std::ifstream file(text_path, std::ios::binary);
  if (!file) throw std::runtime_error(text_path + ": cannot be opened");
  std::error_code unknown;
  const auto file_size = std::filesystem::file_size(text_path, unknown);

  const examples::Stopwatch watch;
  examples::ProgressBar progress(unknown ? 0 : static_cast<double>(file_size), "bytes");
  double nats = 0;
  std::uint64_t predicted = 0;
  // Several windows at once, each [input | the byte after it]: enough rows to fill the matrix
  // products, and few enough to take little memory.
  const Index windows = std::max<Index>(1, 4096 / window);
  std::string text = read_bytes(file, text_path, 1);
  while (true) {
    // The last byte of a stretch is the first input of the next one.
    text += read_bytes(file, text_path, static_cast<std::size_t>(windows * window));
    const auto inputs = static_cast<Index>(text.size()) - 1;
    std::vector<std::int64_t> tokens(text.size());
    to_tokens(text, num_tokens, text_path, predicted, tokens.begin());
    if (inputs < 1) break;
    // All whole windows, then the shorter one at the text's end.
    for (Index first = 0; first < inputs;) {
      const Index seqlen = std::min(window, inputs - first);
      const Index batch = (inputs - first) / seqlen;
      Tokens input(batch, seqlen);
      Tokens labels(batch, seqlen);
      std::copy_n(tokens.begin() + first, batch * seqlen, input.data());
      std::copy_n(tokens.begin() + first + 1, batch * seqlen, labels.data());
      const Tensor<double, 3> logits = model.forward(input).cast<double>();
      nats +=
          local_mha::cross_entropy<double>(logits, labels) * static_cast<double>(batch * seqlen);
      first += batch * seqlen;
      progress.update(static_cast<double>(predicted) + static_cast<double>(first));
    }
    predicted += static_cast<std::uint64_t>(inputs);
    text.erase(0, text.size() - 1);
  }
  if (predicted == 0)
    throw std::runtime_error(text_path + ": expected at least 2 bytes, of which the second is " +
                             "predicted, got " + std::to_string(text.size()));
  const double seconds = watch.seconds();
  std::cout << std::fixed << std::setprecision(6)
            << nats / static_cast<double>(predicted) / std::log(2.) << " bits per byte\n";
  std::cerr << predicted << " bytes predicted in " << std::fixed << std::setprecision(2) << seconds
            << " s, " << std::setprecision(0) << static_cast<double>(predicted) / seconds
            << " per second\n";
  return 0;
}

struct Generation {
  std::string prompt = "\n";
  Index length = 500;
  double temperature = 0.8;
  Index top_k = 0;
  std::uint64_t seed = 0;
};

/// A token drawn from softmax(logits / temperature), of the `top_k` most likely ones.
/// \param temperature 0: the most likely one
/// \param top_k 0: of all
Index sample(const std::vector<double>& logits, double temperature, Index top_k,
             local_mha::RandomSequence& random) {
  std::vector<Index> order(logits.size());
  std::iota(order.begin(), order.end(), Index{0});
  // Of equally likely tokens, the smaller comes first.
  std::ranges::sort(order, [&](Index a, Index b) {
    const double logit_a = logits[static_cast<std::size_t>(a)];
    const double logit_b = logits[static_cast<std::size_t>(b)];
    return logit_a != logit_b ? logit_a > logit_b : a < b;
  });
  if (temperature == 0) return order[0];
  if (top_k > 0 && top_k < static_cast<Index>(order.size()))
    order.resize(static_cast<std::size_t>(top_k));
  std::vector<double> cumulative;
  double sum = 0;
  for (const Index token : order) {
    const double below_best =
        logits[static_cast<std::size_t>(token)] - logits[static_cast<std::size_t>(order[0])];
    sum += std::exp(below_best / temperature);
    cumulative.push_back(sum);
  }
  const double drawn = random.uniform() * sum;
  const auto found = std::ranges::upper_bound(cumulative, drawn);
  return order[std::min(static_cast<std::size_t>(found - cumulative.begin()), order.size() - 1)];
}

int generate(const std::string& model_path, const Generation& options) {
  if (options.prompt.empty()) local_mha::reject("--prompt", "at least one byte", "none");
  if (options.length < 0) local_mha::reject("--length", "at least 0", options.length);
  if (!(options.temperature >= 0) || !std::isfinite(options.temperature))
    local_mha::reject("--temperature", "a finite number of at least 0", options.temperature);
  if (options.top_k < 0) local_mha::reject("--top-k", "at least 0", options.top_k);
  const Model model = load_model(model_path);
  const Index num_tokens = model.config().num_tokens;

  std::vector<std::int64_t> tokens(options.prompt.size());
  to_tokens(options.prompt, num_tokens, "--prompt", 0, tokens.begin());
  local_mha::RandomSequence random(options.seed);
  std::cout << options.prompt << std::flush;
  const examples::Stopwatch watch;
  examples::ProgressBar progress(static_cast<double>(options.length), "tokens",
                                 !examples::is_terminal(stdout));
  for (Index made = 0; made < options.length; ++made) {
    const Index seqlen = std::min(static_cast<Index>(tokens.size()), model.config().max_seq_len);
    Tokens context(1, seqlen);
    std::copy(tokens.end() - seqlen, tokens.end(), context.data());
    const Tensor<float, 3> logits = model.forward(context);
    const float* last = &logits(0, seqlen - 1, 0);
    const std::vector<double> next(last, last + num_tokens);
    if (!std::ranges::all_of(next, [](double logit) { return std::isfinite(logit); }))
      throw std::runtime_error(model_path + ": the model's logits are not finite");
    tokens.push_back(sample(next, options.temperature, options.top_k, random));
    if (!std::cout.put(static_cast<char>(tokens.back())).flush()) return examples::exit_error;
    progress.update(static_cast<double>(made + 1));
  }
  const double seconds = watch.seconds();
  std::cout << "\n" << std::flush;
  std::cerr << options.length << " tokens in " << std::fixed << std::setprecision(2) << seconds
            << " s, " << std::setprecision(1)
            << (seconds > 0 ? static_cast<double>(options.length) / seconds : 0)
            << " tokens per second\n";
  return 0;
}

int run(int argc, char** argv) {
  CLI::App app(
      "Language models over bytes: causal LocalTransformers whose tokens are byte values, in\n"
      "safetensors files with their configuration, such as examples/data/shakespeare.safetensors.",
      "language_model");
  app.require_subcommand(1);
  std::string model_path;
  const auto add_model = [&](CLI::App& command) {
    command.add_option("model", model_path, "The model")
        ->required()
        ->type_name("MODEL.safetensors");
  };

  std::string text_path;
  CLI::App& score_command =
      *app.add_subcommand("score", "Prints how many bits a byte of a text takes under the model");
  score_command.footer(
      "The text is cut into consecutive windows of max_seq_len bytes, the last one shorter. In "
      "each,\n"
      "the model predicts from every byte and those before it in the window the next byte; the "
      "very\n"
      "first byte of the text is not predicted.");
  add_model(score_command);
  score_command.add_option("text", text_path, "The text, of any length")
      ->required()
      ->type_name("TEXTFILE");

  Generation generation;
  CLI::App& generate_command =
      *app.add_subcommand("generate", "Writes a prompt and goes on from it, byte by byte");
  generate_command.footer(
      "The model sees the last max_seq_len bytes. The same arguments and seed give the same text; "
      "on\n"
      "another processor, where sums are rounded differently, it may part at some byte.");
  add_model(generate_command);
  generate_command.add_option("--prompt", generation.prompt, "What the text begins with")
      ->default_str("a line feed");
  generate_command.add_option("--length", generation.length, "Bytes to write after the prompt")
      ->capture_default_str();
  generate_command
      .add_option("--temperature", generation.temperature,
                  "What the logits are divided by; 0: always the most likely byte")
      ->capture_default_str();
  generate_command
      .add_option("--top-k", generation.top_k, "Draws from the K most likely bytes; 0: from all")
      ->capture_default_str();
  generate_command.add_option("--seed", generation.seed, "Seed of the random numbers")
      ->check([](const std::string& seed) {  // the conversion would wrap it
        return seed.starts_with('-') ? "expected at least 0, got " + seed : std::string();
      })
      ->capture_default_str();

  if (const auto status = examples::parse(app, argc, argv)) return *status;
  return score_command.parsed() ? score(model_path, text_path) : generate(model_path, generation);
}

}  // namespace

int main(int argc, char** argv) {
  return examples::run_program("language_model", [&] { return run(argc, argv); });
}
