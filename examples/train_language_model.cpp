// SPDX-License-Identifier: MIT
/// \file
/// Trains a language model over bytes, a causal LocalTransformer, on a text.
///
/// Nothing that a training depends on is lost when the program stops: a checkpoint holds weights,
/// optimizer and curves, and what a step draws is a function of the seed and the step. So a
/// training that was stopped and resumed ends with the same bits as one that was not.
#define EIGEN_USE_THREADS

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include <local_mha/io/atomic_file.hpp>
#include <local_mha/io/safetensors.hpp>
#include <local_mha/io/weights.hpp>
#include <local_mha/local_mha.hpp>

#include "input_file.hpp"
#include "loss_plot.hpp"
#include "output_file.hpp"
#include "program.hpp"
#include "ranks.hpp"
#include "terminal.hpp"

namespace {

using local_mha::Index;
using local_mha::Tensor;
using local_mha::Training;
using Tokens = Tensor<std::int64_t, 2>;
namespace examples = local_mha::examples;
namespace io = local_mha::io;

/// More than any machine at hand has; what is beyond, such as a typing error, would use up memory.
constexpr Index most_threads = 1024;
constexpr Index most_sequences = 1'000'000;

struct Options {
  std::string text_path;
  std::string model_path;
  bool resume = false;
  Index dim = 128;
  Index depth = 4;
  Index heads = 4;
  Index dim_head = 32;
  Index window = 64;
  Index num_residual_streams = 1;
  Index seqlen = 256;
  bool xpos = false;
  double dropout = 0;
  Index batch = 16;
  std::optional<Index> given_steps;
  double learning_rate = 3e-3;
  std::optional<Index> given_warmup;
  double weight_decay = 0.1;
  double clip = 1;
  double validation_share = 0.1;
  Index validate_every = 50;
  std::uint64_t seed = 0;
  bool in_double = false;
  std::string arithmetic = "float";
  Index ranks_per_sequence = 0;
  Index threads = std::clamp<Index>(std::thread::hardware_concurrency(), 1, most_threads);

  Index steps() const { return given_steps.value_or(1000); }
  Index warmup() const { return given_warmup.value_or(std::min<Index>(50, steps() / 10)); }

  local_mha::CosineSchedule schedule() const {
    return {learning_rate, learning_rate / 10, warmup(), steps()};
  }

  /// What a resumed training must have in common with what it goes on from.
  nlohmann::json to_json() const {
    return {{"dim", dim},
            {"depth", depth},
            {"heads", heads},
            {"dim-head", dim_head},
            {"window", window},
            {"num-residual-streams", num_residual_streams},
            {"seqlen", seqlen},
            {"xpos", xpos},
            {"dropout", dropout},
            {"batch", batch},
            {"steps", steps()},
            {"learning-rate", learning_rate},
            {"warmup", warmup()},
            {"weight-decay", weight_decay},
            {"clip", clip},
            {"validation-share", validation_share},
            {"validate-every", validate_every},
            {"seed", seed},
            {"double", in_double},
            {"arithmetic", arithmetic}};
  }
};

/// Set by Ctrl-C and SIGTERM: the step at hand is finished, and the checkpoint written.
volatile std::sig_atomic_t interrupted = 0;

void check(const Options& options) {
  const auto at_least = [](const char* name, Index value, Index least) {
    if (value < least) local_mha::reject(name, "at least " + std::to_string(least), value);
  };
  if (options.batch < 1 || options.batch > most_sequences)
    local_mha::reject("--batch", "1 to " + std::to_string(most_sequences), options.batch);
  at_least("--seqlen", options.seqlen, 1);
  at_least("--steps", options.steps(), 1);
  at_least("--validate-every", options.validate_every, 1);
  if (options.threads < 1 || options.threads > most_threads)
    local_mha::reject("--threads", "1 to " + std::to_string(most_threads), options.threads);
  if (options.in_double && options.arithmetic != "float")
    local_mha::reject("--arithmetic", "float, because of --double", options.arithmetic);
  if (options.warmup() < 0 || options.warmup() > options.steps())
    local_mha::reject("--warmup", "0 to --steps, " + std::to_string(options.steps()),
                      options.warmup());
  if (!(options.learning_rate > 0) || !std::isfinite(options.learning_rate))
    local_mha::reject("--learning-rate", "a positive number", options.learning_rate);
  if (!(options.clip > 0)) local_mha::reject("--clip", "a positive number", options.clip);
  if (!(options.validation_share > 0 && options.validation_share < 1))
    local_mha::reject("--validation-share", "a number between 0 and 1", options.validation_share);
}

local_mha::LocalTransformerConfig model_config(const Options& options) {
  local_mha::LocalTransformerConfig config{.num_tokens = 256,
                                           .max_seq_len = options.seqlen,
                                           .dim = options.dim,
                                           .depth = options.depth,
                                           .local_attn_window_size = options.window,
                                           .dim_head = options.dim_head,
                                           .heads = options.heads};
  config.use_xpos = options.xpos;
  config.qk_rmsnorm = true;
  config.num_residual_streams = options.num_residual_streams;
  config.attn_dropout = config.ff_dropout = options.dropout;
  return config;
}

/// A text in two parts: what is trained on, and behind it what the model is judged by.
class Text {
 public:
  /// \throws std::runtime_error if the file cannot be read, or is too short for a sequence
  Text(const std::string& path, double validation_share, Index seqlen) {
    std::ifstream file = examples::open_input(path);
    std::array<char, 1 << 16> block;
    do {
      file.read(block.data(), block.size());
      bytes_.append(block.data(), static_cast<std::size_t>(file.gcount()));
    } while (file);
    if (file.bad()) throw std::runtime_error(path + ": cannot be read");
    const auto size = static_cast<Index>(bytes_.size());
    train_size_ = size - static_cast<Index>(static_cast<double>(size) * validation_share);
    if (train_size_ <= seqlen || size - train_size_ < 2)
      throw std::runtime_error(
          path + ": expected at least " + std::to_string(static_cast<std::uint64_t>(seqlen) + 1) +
          " bytes to train on and 2 to validate with, got " + std::to_string(train_size_) +
          " and " + std::to_string(size - train_size_));
  }

  Index train_size() const { return train_size_; }
  Index validation_size() const { return static_cast<Index>(bytes_.size()) - train_size_; }

  /// `[batch, seqlen + 1]` from places that the seed and the step determine.
  Tokens batch(const Options& options, Index step) const {
    Tokens tokens(options.batch, options.seqlen + 1);
    const local_mha::Philox random(options.seed);
    const auto places = static_cast<std::uint64_t>(train_size_ - options.seqlen);
    for (Index b = 0; b < options.batch; ++b) {
      const auto words = random({static_cast<std::uint32_t>(b), static_cast<std::uint32_t>(step),
                                 static_cast<std::uint32_t>(step >> 32), 2});
      const std::uint64_t drawn = std::uint64_t{words[0]} << 32 | words[1];
      copy(static_cast<Index>(drawn % places), options.seqlen + 1, &tokens(b, 0));
    }
    return tokens;
  }

  /// Bits that a byte of the validation part takes, in consecutive windows.
  /// \param loss `loss(input, labels)`, the mean over both
  template <typename Loss>
  double validate(Index seqlen, Index batch, Loss&& loss) const {
    double nats = 0;
    const Index inputs = validation_size() - 1;
    for (Index first = 0; first < inputs;) {
      const Index length = std::min(seqlen, inputs - first);
      const Index windows = std::min(batch, (inputs - first) / length);
      Tokens input(windows, length);
      Tokens labels(windows, length);
      copy(train_size_ + first, windows * length, input.data());
      copy(train_size_ + first + 1, windows * length, labels.data());
      nats += static_cast<double>(loss(input, labels)) * static_cast<double>(windows * length);
      first += windows * length;
    }
    return nats / static_cast<double>(inputs) / std::log(2.0);
  }

  /// FNV-1a, to tell texts apart.
  std::uint64_t fingerprint() const {
    std::uint64_t hash = 0xcbf29ce484222325;
    for (const char c : bytes_) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
    return hash;
  }

 private:
  void copy(Index first, Index size, std::int64_t* to) const {
    for (Index i = 0; i < size; ++i)
      to[i] = static_cast<unsigned char>(bytes_[static_cast<std::size_t>(first + i)]);
  }

  std::string bytes_;
  Index train_size_ = 0;
};

/// What was measured so far, in bits per byte.
struct History {
  std::vector<double> losses;  ///< of each step's batch
  std::vector<double> norms;   ///< of each step's gradients, before clipping
  std::vector<double> rates;   ///< of learning in each step
  std::vector<double> validated_steps;
  std::vector<double> validation_losses;

  /// The best validation loss, infinite before the first.
  double best() const {
    return validation_losses.empty() ? std::numeric_limits<double>::infinity()
                                     : *std::ranges::min_element(validation_losses);
  }
};

/// The files of a training, all beside the model.
struct Files {
  explicit Files(const std::string& model_path) : model(model_path) {
    const auto beside = [&](const char* extension) {
      return std::filesystem::path(model_path).replace_extension(extension).string();
    };
    checkpoint = beside(".checkpoint.safetensors");
    table = beside(".csv");
    plot = beside(".png");
  }

  /// \throws std::invalid_argument if one would take the place of another, or of the text
  /// \throws io::SafetensorsError if one cannot be written
  void check(const std::string& text) const {
    examples::require_different_files("--out", {{"the text", text},
                                                {"the model", model},
                                                {"the checkpoint", checkpoint},
                                                {"the table of losses", table},
                                                {"the plot of losses", plot}});
    // Before the work, not after it.
    for (const std::string* file : {&model, &checkpoint, &table, &plot})
      const io::AtomicFile probe(*file);
  }

  /// Removes what was being written when an earlier run was killed.
  void remove_temporaries() const {
    for (const std::string* file : {&model, &checkpoint, &table, &plot})
      io::AtomicFile::remove_temporaries(*file);
  }

  std::string model;
  std::string checkpoint;
  std::string table;
  std::string plot;
};

/// The weights that it trains are of Scalars; each step, the model takes them as what it
/// multiplies.
template <typename Scalar, typename Arithmetic = Scalar>
class Trainer {
  using Model = local_mha::LocalTransformer<Scalar, Arithmetic, Arithmetic>;
  using Parameters = local_mha::LocalTransformerParameters<Scalar>;

 public:
  Trainer(const Options& options, const Text& text, const examples::Ranks& ranks)
      : options_(options),
        text_(text),
        ranks_(ranks),
        files_(options.model_path),
        config_(model_config(options)),
        pool_(static_cast<int>(options.threads)),
        device_(&pool_, static_cast<int>(options.threads)),
        parameters_(local_mha::initial_parameters<Parameters>(config_, options.seed)),
        model_(config_, parameters_),
        gradients_(Parameters::zeros(config_)),
        optimizer_({.beta2 = 0.99, .weight_decay = options.weight_decay, .decay_vectors = false},
                   gradients_),
        schedule_(options.schedule()) {}

  /// Goes on from the checkpoint.
  /// \throws io::SafetensorsError if it is malformed
  /// \throws std::invalid_argument if it belongs to other options or another text
  void resume() {
    const io::SafetensorsFile file(files_.checkpoint);
    const auto found = file.metadata().find("training");
    if (found == file.metadata().end())
      throw io::SafetensorsError(files_.checkpoint, "",
                                 "__metadata__: expected the key 'training', got none");
    auto kept = io::parse_json(found->second, "training");
    const Index kept_steps = integer(kept, "steps");
    // Older checkpoints do not say it.
    if (!kept.contains("num-residual-streams")) kept["num-residual-streams"] = 1;
    if (!kept.contains("double")) kept["double"] = false;
    if (!kept.contains("arithmetic")) kept["arithmetic"] = "float";
    const Index kept_warmup = integer(kept, "warmup");
    if (!options_.given_steps) options_.given_steps = kept_steps;
    if (!options_.given_warmup) options_.given_warmup = kept_warmup;
    if (options_.steps() < kept_steps)
      local_mha::reject(
          "--resume", "steps of at least " + std::to_string(kept_steps) + ", as in the checkpoint",
          options_.steps());
    check(options_);
    schedule_ = options_.schedule();
    const auto given = description();
    for (const auto& [name, value] : given.items()) {
      if (!kept.contains(name))
        throw io::SafetensorsError(files_.checkpoint, "",
                                   "training: expected the key '" + name + "'");
      if (kept[name] == value || name == "steps") continue;
      if (name == "text")
        throw std::runtime_error(options_.text_path +
                                 ": the text differs from the one this training began with");
      local_mha::reject("--resume", name + " of " + kept[name].dump() + ", as in the checkpoint",
                        value.dump());
    }
    const auto load = [&](const char* prefix) {
      return io::load_local_transformer_parameters<Scalar>(file, config_, prefix);
    };
    history_ = {file.read<double>("history/loss"),
                file.read<double>("history/gradient_norm"),
                {},
                file.read<double>("history/validated_step"),
                file.read<double>("history/validation_loss")};
    if (file.contains("history/learning_rate")) {
      history_.rates = file.read<double>("history/learning_rate");
    } else {
      // It was made by one schedule.
      Options whole = options_;
      whole.given_steps = kept_steps;
      for (Index i = 0; i < step(); ++i) history_.rates.push_back(whole.schedule()(i));
    }
    if (history_.norms.size() != history_.losses.size() ||
        history_.rates.size() != history_.losses.size() ||
        history_.validated_steps.size() != history_.validation_losses.size())
      throw io::SafetensorsError(files_.checkpoint, "history/gradient_norm",
                                 "expected as many steps as losses");
    parameters_ = load("param/");
    optimizer_.restore(history_.losses.size(), load("mean/"), load("square/"));
    model_.set_parameters(parameters_);
    checkpoint_step_ = step();
  }

  /// \return true if all steps are done, false if it was interrupted, with a checkpoint written
  bool run() {
    const Index begin = step();
    const auto tokens_of = [&](Index steps) {
      return static_cast<double>(steps) * static_cast<double>(options_.batch * options_.seqlen);
    };
    const examples::Stopwatch watch;
    examples::ProgressBar progress(tokens_of(options_.steps() - begin), "tokens");
    // Ranks that are told to stop at different moments stop at the same step.
    while (step() < options_.steps() && !ranks_.any(interrupted != 0)) {
      train_step();
      if (step() % options_.validate_every == 0 || step() == options_.steps()) {
        validate();
        if (!examples::is_terminal(stderr)) report(tokens_of(step() - begin) / watch.seconds());
      }
      std::ostringstream note;
      note << std::fixed << std::setprecision(3) << "loss " << history_.losses.back();
      if (!history_.validation_losses.empty())
        note << "  validation " << history_.validation_losses.back();
      progress.update(tokens_of(step() - begin), note.str());
    }
    const bool done = step() == options_.steps();
    if (!done && checkpoint_step_ != step()) write_checkpoint();
    return done;
  }

  Index step() const { return static_cast<Index>(history_.losses.size()); }
  const History& history() const { return history_; }
  const Files& files() const { return files_; }

 private:
  void train_step() {
    const Index now = step();
    local_mha::set_zero(gradients_);
    // Each step drops something else.
    const Training training{options_.seed * 0x9e3779b97f4a7c15 + static_cast<std::uint64_t>(now)};
    const double loss = static_cast<double>(ranks_.backward(
        model_, gradients_, text_.batch(options_, now), {.training = training, .device = device_}));
    const double norm = local_mha::clip_gradients(gradients_, options_.clip);
    if (!std::isfinite(loss) || !std::isfinite(norm))
      throw std::runtime_error("the loss of step " + std::to_string(now + 1) +
                               " is not finite: try a lower --learning-rate");
    const double rate = schedule_(now);
    optimizer_.step(parameters_, gradients_, rate);
    model_.set_parameters(parameters_);
    history_.losses.push_back(loss / std::log(2.0));
    history_.norms.push_back(norm);
    history_.rates.push_back(rate);
  }

  // A line for a log, where there is no progress bar.
  void report(double tokens_per_second) const {
    std::ostringstream line;
    line << "step " << step() << " of " << options_.steps() << ": loss " << std::fixed
         << std::setprecision(3) << history_.losses.back() << ", validation "
         << history_.validation_losses.back() << " bits per byte, " << std::setprecision(0)
         << tokens_per_second << " tokens per second\n";
    std::cerr << line.str() << std::flush;
  }

  // The checkpoint comes last: what is newer than it is made again, the same.
  void validate() {
    const double best = history_.best();
    const double loss = text_.validate(
        options_.seqlen, options_.batch, [&](const Tokens& input, const Tokens& labels) {
          return ranks_.loss(model_, input, labels, {.device = device_});
        });
    history_.validated_steps.push_back(static_cast<double>(step()));
    history_.validation_losses.push_back(loss);
    if (!ranks_.first()) return;
    if (loss < best) {
      std::ostringstream note;
      note << "step " << step() << ", " << std::setprecision(4) << loss
           << " bits per byte in validation";
      io::save_local_transformer(files_.model, config_, parameters_, {.note = note.str()});
    }
    write_table();
    write_plot();
    write_checkpoint();
  }

  nlohmann::json description() const {
    nlohmann::json description = options_.to_json();
    description["text"] = text_.fingerprint();
    return description;
  }

  /// \throws io::SafetensorsError if the training's description has no such number
  Index integer(const nlohmann::json& kept, const char* name) const {
    if (!kept.is_object() || !kept.contains(name) || !kept[name].is_number_integer())
      throw io::SafetensorsError(files_.checkpoint, "",
                                 std::string("training: expected an integer '") + name + "'");
    return kept[name].get<Index>();
  }

  void write_checkpoint() {
    if (!ranks_.first()) return;
    io::SafetensorsWriter writer;
    io::add_local_transformer(writer, config_, parameters_);
    io::add_local_transformer(writer, config_, optimizer_.mean(), {.prefix = "mean/"});
    io::add_local_transformer(writer, config_, optimizer_.square(), {.prefix = "square/"});
    const auto add = [&](const char* name, const std::vector<double>& values) {
      writer.add(name, {static_cast<Index>(values.size())}, values);
    };
    add("history/loss", history_.losses);
    add("history/gradient_norm", history_.norms);
    add("history/learning_rate", history_.rates);
    add("history/validated_step", history_.validated_steps);
    add("history/validation_loss", history_.validation_losses);
    writer.set_metadata("training", description().dump());
    writer.write(files_.checkpoint);
    checkpoint_step_ = step();
  }

  void write_table() const {
    std::ostringstream table;
    table << "step,learning_rate,bits_per_byte,gradient_norm,validation_bits_per_byte\n"
          << std::setprecision(9);
    std::size_t next = 0;
    for (std::size_t i = 0; i < history_.losses.size(); ++i) {
      table << i + 1 << ',' << history_.rates[i] << ',' << history_.losses[i] << ','
            << history_.norms[i] << ',';
      if (next < history_.validated_steps.size() &&
          history_.validated_steps[next] == static_cast<double>(i + 1))
        table << history_.validation_losses[next++];
      table << '\n';
    }
    examples::write_file(files_.table, table.str());
  }

  void write_plot() const {
    // The mean of each stretch of steps: the loss of a batch jumps.
    examples::LossCurve training{"training", {66, 114, 178}, {}, {}};
    const std::size_t stretch = std::max<std::size_t>(1, history_.losses.size() / 200);
    for (std::size_t i = 0; i + stretch <= history_.losses.size(); i += stretch) {
      double sum = 0;
      for (std::size_t j = i; j < i + stretch; ++j) sum += history_.losses[j];
      training.steps.push_back(static_cast<double>(i) + (static_cast<double>(stretch) + 1) / 2);
      training.losses.push_back(sum / static_cast<double>(stretch));
    }
    examples::draw_loss_plot(
        "bits per byte", static_cast<double>(step()),
        {training,
         {"validation", {214, 96, 39}, history_.validated_steps, history_.validation_losses}})
        .write_png(files_.plot);
  }

  Options options_;
  const Text& text_;
  const examples::Ranks& ranks_;
  Files files_;
  local_mha::LocalTransformerConfig config_;
  Eigen::ThreadPool pool_;
  Eigen::ThreadPoolDevice device_;
  Parameters parameters_;
  Model model_;
  Parameters gradients_;
  local_mha::AdamW<Parameters> optimizer_;
  local_mha::CosineSchedule schedule_;
  History history_;
  Index checkpoint_step_ = -1;  ///< of the checkpoint written; -1: none yet
};

template <typename Scalar, typename Arithmetic = Scalar>
int train(const Options& options, const examples::Ranks& ranks) {
  if (ranks.first()) Files(options.model_path).check(options.text_path);
  const Text text(options.text_path, options.validation_share, options.seqlen);
  Trainer<Scalar, Arithmetic> trainer(options, text, ranks);
  if (options.resume) {
    trainer.resume();
  } else if (std::filesystem::exists(trainer.files().checkpoint)) {
    throw std::runtime_error(trainer.files().checkpoint +
                             ": there is a checkpoint already: go on with --resume, or remove it");
  }
  // Nobody writes before all have looked.
  ranks.any(false);
  if (ranks.first()) trainer.files().remove_temporaries();
  const examples::Stopwatch watch;
  const Index begin = trainer.step();
  const bool done = trainer.run();
  const double seconds = watch.seconds();
  const double tokens = static_cast<double>(trainer.step() - begin) *
                        static_cast<double>(options.batch * options.seqlen);
  std::cerr << "steps " << begin << " to " << trainer.step() << " in " << std::fixed
            << std::setprecision(1) << seconds << " s, " << std::setprecision(0)
            << (seconds > 0 ? tokens / seconds : 0) << " tokens per second";
  if (ranks.number() > 1) std::cerr << " on " << ranks.number() << " ranks";
  std::cerr << '\n';
  if (!done) {
    std::cerr << "Stopped. Go on with the same arguments and --resume.\n";
    return 130;
  }
  std::cout << std::fixed << std::setprecision(6) << trainer.history().best()
            << " bits per byte in validation\n";
  return 0;
}

int run(int argc, char** argv) {
  Options options;
  CLI::App app(
      "Trains a language model over bytes, a causal LocalTransformer, on a text.\n\n"
      "The text's end is kept for validation. Beside MODEL.safetensors, which holds the best\n"
      "weights so far and loads in language_model, there are MODEL.csv and MODEL.png with the "
      "loss\n"
      "curves, and MODEL.checkpoint.safetensors, from which --resume goes on after Ctrl-C, or "
      "after\n"
      "the program was killed: to the same bits as if it had not stopped. Under mpirun, where the "
      "program was "
      "built\nwith MPI, all ranks train one model, each a part of each sequence; the first one "
      "writes.\n"
      "Exit status: 0 when all steps are done, 130 after Ctrl-C, 2 after an error.",
      "train_language_model");
  options.text_path = LOCAL_MHA_OWN_SOURCES;
  app.add_option("text", options.text_path,
                 "The text: any file. Without one, the project's own sources")
      ->type_name("TEXTFILE");
  app.add_option("--out", options.model_path, "Where the model goes")
      ->required()
      ->type_name("MODEL.safetensors");
  app.add_flag("--resume", options.resume, "Goes on from the checkpoint");
  const auto add = [&](const char* name, auto& value, const char* text) {
    app.add_option(name, value, text)->capture_default_str();
  };
  add("--dim", options.dim, "Channels of a residual stream");
  add("--depth", options.depth, "Layers");
  add("--heads", options.heads, "Heads of the attention");
  add("--dim-head", options.dim_head, "Channels of a head");
  add("--window", options.window, "Positions back that a position sees in each layer");
  add("--num-residual-streams", options.num_residual_streams,
      "Residual streams, which hyper-connections mix; 1: plain residual connections");
  add("--seqlen", options.seqlen, "Bytes in a sequence: the longest context");
  app.add_flag("--xpos", options.xpos, "xPos: attention decays with distance");
  add("--dropout", options.dropout, "Of attention probabilities and hidden activations");
  add("--batch", options.batch, "Sequences in a step");
  app.add_option("--steps", options.given_steps,
                 "Steps of the optimizer. Default: 1000; with --resume, those of the checkpoint, "
                 "which may be exceeded");
  add("--learning-rate", options.learning_rate,
      "The highest; reached after the warm-up, a tenth of it at the end");
  app.add_option("--warmup", options.given_warmup,
                 "Steps over which the learning rate rises. Default: 50, or a tenth of --steps if "
                 "that is less");
  add("--weight-decay", options.weight_decay, "Of weights with two dimensions");
  add("--clip", options.clip, "Largest norm of the gradients");
  add("--validation-share", options.validation_share, "Share of the text that validates");
  add("--validate-every", options.validate_every, "Steps between validations and checkpoints");
  app.add_option("--seed", options.seed, "Seed of the random numbers")
      ->check([](const std::string& seed) {  // the conversion would wrap it
        return seed.starts_with('-') ? "expected at least 0, got " + seed : std::string();
      })
      ->capture_default_str();
  app.add_flag("--double", options.in_double, "Computes in double");
  app.add_option("--arithmetic", options.arithmetic,
                 "What numbers are multiplied as: rounded to bfloat16, some processors are faster. "
                 "The weights that are trained, and written, are float")
      ->check(CLI::IsMember({"float", "bfloat16"}))
      ->capture_default_str();
  app.add_option("--ranks-per-sequence", options.ranks_per_sequence,
                 "Under mpirun, ranks that hold a sequence together; groups of them share the "
                 "batch. Default: all ranks");
  add("--threads", options.threads, "Threads, of each rank; the result does not depend on them");
  if (const auto status = examples::parse(app, argc, argv)) return *status;
  check(options);
  const examples::Ranks ranks(options.ranks_per_sequence, options.batch);
  return ranks.together([&] {
    if (options.in_double) return train<double>(options, ranks);
    if (options.arithmetic == "float") return train<float>(options, ranks);
    return train<float, Eigen::bfloat16>(options, ranks);
  });
}

}  // namespace

int main(int argc, char** argv) {
  // Before all else: from the beginning it stops with a checkpoint.
  std::signal(SIGINT, [](int) { interrupted = 1; });
  std::signal(SIGTERM, [](int) { interrupted = 1; });
  const examples::MpiProgram program(argc, argv);
  return examples::run_program("train_language_model", [&] { return run(argc, argv); });
}
