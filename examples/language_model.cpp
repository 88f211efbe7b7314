// SPDX-License-Identifier: MIT
/// \file
/// A language model over bytes: how well it predicts a text, and texts by it.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <ios>
#include <iostream>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include <local_mha/io/safetensors.hpp>
#include <local_mha/io/weights.hpp>
#include <local_mha/local_mha.hpp>

#include "input_file.hpp"
#include "program.hpp"
#include "terminal.hpp"

namespace {

using local_mha::Index;
using local_mha::Tensor;
/// What weights are rounded to and multiplied as.
template <typename Number>
using ModelOf = local_mha::LocalTransformer<float, Number, Number>;
using Tokens = Tensor<std::int64_t, 2>;
namespace examples = local_mha::examples;
namespace io = local_mha::io;

/// \throws std::invalid_argument if the model's tokens are not bytes, or it sees what it predicts
template <typename Number>
ModelOf<Number> load_model(const std::string& path) {
  auto [config, parameters] = io::load_local_transformer<Number>(io::SafetensorsFile(path));
  if (config.num_tokens > 256)
    local_mha::reject(path + ": num_tokens", "at most 256, because tokens are bytes here",
                      config.num_tokens);
  if (!is_causal(config))
    local_mha::reject(path + ": causal", "true, because the model predicts the next byte", false);
  return ModelOf<Number>(config, std::move(parameters));
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

/// Says so if positions are beyond the model's position embedding.
template <typename Model>
void warn_past(const Model& model, std::uint64_t positions) {
  const Index longest = model.config().max_seq_len;
  if (positions > static_cast<std::uint64_t>(longest))
    std::cerr << "Past max_seq_len = " << longest
              << " the position embedding stays at its last row, for which the model was not "
                 "trained.\n";
}

/// Nats that the bytes of `labels` take.
double nats_of(const Tensor<float, 3>& logits, const Tokens& labels) {
  const Tensor<double, 3> precise = logits.cast<double>();
  return local_mha::cross_entropy<double>(precise, labels) * static_cast<double>(labels.size());
}

/// The bytes that are scored one after another.
class ScoredText {
 public:
  /// \throws std::runtime_error if the file cannot be read
  explicit ScoredText(const std::string& path) : path_(path), file_(examples::open_input(path)) {
    text_ = read_bytes(file_, path, 1);
  }

  /// The next bytes as tokens, up to `most` inputs and the byte that the last one predicts. The
  /// last byte of a stretch is the first input of the next one.
  std::vector<std::int64_t> next(Index most, Index num_tokens) {
    if (text_.size() > 1) text_.erase(0, text_.size() - 1);
    text_ += read_bytes(file_, path_, static_cast<std::size_t>(most));
    std::vector<std::int64_t> tokens(text_.size());
    to_tokens(text_, num_tokens, path_, predicted_, tokens.begin());
    if (!tokens.empty()) predicted_ += tokens.size() - 1;
    return tokens;
  }
  /// Bytes that have been labels.
  std::uint64_t predicted() const { return predicted_; }
  /// The file's size; 0 if it is not known.
  double size() const {
    std::error_code unknown;
    const auto size = std::filesystem::file_size(path_, unknown);
    return unknown ? 0 : static_cast<double>(size);
  }

 private:
  std::string path_;
  std::ifstream file_;
  std::string text_;
  std::uint64_t predicted_ = 0;
};

/// Inputs `[batch, seqlen]` from `first` on, and the byte after each.
std::pair<Tokens, Tokens> inputs_and_labels(const std::vector<std::int64_t>& tokens, Index first,
                                            Index batch, Index seqlen) {
  Tokens input(batch, seqlen);
  Tokens labels(batch, seqlen);
  std::copy_n(tokens.begin() + first, batch * seqlen, input.data());
  std::copy_n(tokens.begin() + first + 1, batch * seqlen, labels.data());
  return {std::move(input), std::move(labels)};
}

/// The nats of a stretch of text: window by window of max_seq_len, the last one shorter.
template <typename Model>
double nats_of_windows(const Model& model, const std::vector<std::int64_t>& tokens) {
  const auto inputs = static_cast<Index>(tokens.size()) - 1;
  double nats = 0;
  for (Index first = 0; first < inputs;) {
    // All whole windows, then the shorter one at the text's end.
    const Index seqlen = std::min(model.config().max_seq_len, inputs - first);
    const Index batch = (inputs - first) / seqlen;
    const auto [input, labels] = inputs_and_labels(tokens, first, batch, seqlen);
    nats += nats_of(model.forward(input), labels);
    first += batch * seqlen;
  }
  return nats;
}

/// \param streams the text goes through the model once; else each window of it alone
template <typename Number>
int score(const std::string& model_path, const std::string& text_path, bool streams) {
  const auto model = load_model<Number>(model_path);
  const Index window = model.config().max_seq_len;
  ScoredText text(text_path);
  const examples::Stopwatch watch;
  double nats = 0;
  {
    examples::ProgressBar progress(text.size(), "bytes");
    std::optional<typename ModelOf<Number>::Stream> stream;
    if (streams) stream.emplace(model);
    // Several windows at once: enough rows to fill the matrix products, and few enough to take
    // little memory.
    const Index at_once = streams ? 4096 : std::max<Index>(1, 4096 / window) * window;
    while (true) {
      const auto tokens = text.next(at_once, model.config().num_tokens);
      const auto inputs = static_cast<Index>(tokens.size()) - 1;
      if (inputs < 1) break;
      if (stream) {
        const auto [input, labels] = inputs_and_labels(tokens, 0, 1, inputs);
        nats += nats_of(stream->push(input), labels);
      } else {
        nats += nats_of_windows(model, tokens);
      }
      progress.update(static_cast<double>(text.predicted()));
    }
  }
  const auto predicted = static_cast<double>(text.predicted());
  if (predicted == 0)
    throw std::runtime_error(text_path +
                             ": expected at least 2 bytes, of which the second is predicted, got "
                             "fewer");
  const double seconds = watch.seconds();
  std::cout << std::fixed << std::setprecision(6) << nats / predicted / std::log(2.)
            << " bits per byte\n";
  if (streams) warn_past(model, text.predicted());
  std::cerr << text.predicted() << " bytes predicted in " << std::fixed << std::setprecision(2)
            << seconds << " s, " << std::setprecision(0) << predicted / seconds << " per second\n";
  return 0;
}

struct Generation {
  std::string prompt = "\n";
  Index length = 500;
  std::string stop;
  local_mha::SamplingConfig sampling{.temperature = 0.8};
  std::uint64_t seed = 0;
};

template <typename Number>
int generate(const std::string& model_path, const Generation& options) {
  if (options.prompt.empty()) local_mha::reject("--prompt", "at least one byte", "none");
  if (options.length < 0) local_mha::reject("--length", "at least 0", options.length);
  if (options.stop.size() > 1) local_mha::reject("--stop", "one byte", options.stop.size());
  try {
    validate(options.sampling);
  } catch (const std::invalid_argument& error) {
    std::string message = error.what();
    const auto name_end = message.begin() + static_cast<std::ptrdiff_t>(message.find(':'));
    std::replace(message.begin(), name_end, '_', '-');
    throw std::invalid_argument("--" + message);
  }
  const auto model = load_model<Number>(model_path);
  const Index num_tokens = model.config().num_tokens;
  const auto tokens_of = [&](const std::string& text, std::string_view option) {
    Tokens tokens(1, static_cast<Index>(text.size()));
    to_tokens(text, num_tokens, option, 0, tokens.data());
    return tokens;
  };
  const Tokens prompt = tokens_of(options.prompt, "--prompt");
  std::optional<std::int64_t> stop;
  if (!options.stop.empty()) stop = tokens_of(options.stop, "--stop")(0, 0);

  std::cout << options.prompt << std::flush;
  Index made = 0;
  const examples::Stopwatch watch;
  {
    examples::ProgressBar progress(static_cast<double>(options.length), "tokens",
                                   !examples::is_terminal(stdout));
    model.generate(prompt,
                   {.length = options.length,
                    .sampling = options.sampling,
                    .stop_token = stop,
                    .seed = options.seed},
                   [&](const auto& tokens) {
                     if (!std::cout.put(static_cast<char>(tokens[0])).flush())
                       throw std::runtime_error("cannot write to standard output");
                     progress.update(static_cast<double>(++made));
                   });
  }
  const double seconds = watch.seconds();
  std::cout << "\n" << std::flush;
  // The last byte made goes through no layer.
  warn_past(model,
            static_cast<std::uint64_t>(std::min(prompt.dimension(1), model.config().max_seq_len) +
                                       std::max<Index>(made - 1, 0)));
  std::cerr << made << " tokens in " << std::fixed << std::setprecision(2) << seconds << " s, "
            << std::setprecision(1) << (seconds > 0 ? static_cast<double>(made) / seconds : 0)
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
  std::string arithmetic = "float";
  const auto add_arithmetic = [&](CLI::App& command) {
    command
        .add_option(
            "--arithmetic", arithmetic,
            "What numbers are multiplied as: rounded to bfloat16, some processors are faster")
        ->check(CLI::IsMember({"float", "bfloat16"}))
        ->capture_default_str();
  };

  std::string text_path;
  CLI::App& score_command =
      *app.add_subcommand("score", "Prints how many bits a byte of a text takes under the model");
  score_command.footer(
      "The text is cut into consecutive windows of max_seq_len bytes, the last one shorter. In "
      "each,\n"
      "the model predicts from every byte and those before it in the window the next byte; the "
      "very\n"
      "first byte of the text is not predicted.\n"
      "With --stream, the whole text goes through the model once, and every byte is predicted "
      "from\n"
      "all before it that its windows show. Past max_seq_len, the position embedding stays at its\n"
      "last row, for which the model was not trained.");
  add_model(score_command);
  add_arithmetic(score_command);
  bool streams = false;
  score_command.add_flag("--stream", streams, "Takes the text as one sequence, of any length");
  score_command.add_option("text", text_path, "The text, of any length")
      ->required()
      ->type_name("TEXTFILE");

  Generation generation;
  CLI::App& generate_command =
      *app.add_subcommand("generate", "Writes a prompt and goes on from it, byte by byte");
  generate_command.footer(
      "A byte costs the same however long the text is. Of the prompt, the last max_seq_len bytes\n"
      "count; past max_seq_len, the position embedding stays at its last row. The same arguments "
      "and\n"
      "seed give the same text; on another processor, where sums are rounded differently, it may\n"
      "part at some byte.");
  add_model(generate_command);
  add_arithmetic(generate_command);
  generate_command.add_option("--prompt", generation.prompt, "What the text begins with")
      ->default_str("a line feed");
  generate_command.add_option("--length", generation.length, "Bytes to write after the prompt")
      ->capture_default_str();
  generate_command
      .add_option("--temperature", generation.sampling.temperature,
                  "What the logits are divided by; 0: always the most likely byte")
      ->capture_default_str();
  generate_command
      .add_option("--top-k", generation.sampling.top_k,
                  "Draws from the K most likely bytes; 0: from all")
      ->capture_default_str();
  generate_command
      .add_option("--top-p", generation.sampling.top_p,
                  "Draws from the most likely bytes that together have this probability")
      ->capture_default_str();
  generate_command.add_option("--stop", generation.stop, "Ends after this byte")
      ->default_str("never");
  generate_command.add_option("--seed", generation.seed, "Seed of the random numbers")
      ->check([](const std::string& seed) {  // the conversion would wrap it
        return seed.starts_with('-') ? "expected at least 0, got " + seed : std::string();
      })
      ->capture_default_str();

  if (const auto status = examples::parse(app, argc, argv)) return *status;
  const auto run_with = [&]<typename Number>(Number) {
    return score_command.parsed() ? score<Number>(model_path, text_path, streams)
                                  : generate<Number>(model_path, generation);
  };
  return arithmetic == "float" ? run_with(float()) : run_with(Eigen::bfloat16());
}

}  // namespace

int main(int argc, char** argv) {
  return examples::run_program("language_model", [&] { return run(argc, argv); });
}
