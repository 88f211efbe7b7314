// SPDX-License-Identifier: MIT
/// \file
/// Pictures of local attention: who attends whom, and the probabilities of a head.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include <local_mha/io/safetensors.hpp>
#include <local_mha/io/weights.hpp>
#include <local_mha/local_mha.hpp>

#include "case_file.hpp"
#include "image.hpp"
#include "matrix_plot.hpp"
#include "output_file.hpp"
#include "program.hpp"

namespace {

using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalAttentionConfig;
using local_mha::LocalMHA;
using local_mha::PaddingMask;
using local_mha::reject;
using local_mha::RowMatrix;
using local_mha::Tensor;
using local_mha::Window;
using local_mha::examples::CaseFiles;
using local_mha::examples::Color;
using local_mha::examples::MatrixPlot;
namespace examples = local_mha::examples;
namespace io = local_mha::io;

constexpr Color attended{38, 84, 164};
constexpr Color padding{242, 178, 110};
constexpr Color hidden{208, 208, 218};
constexpr Color outside{243, 243, 246};
constexpr Index longest = 2048;  // a picture has as many rows, and probabilities take their square

void require_index(std::string_view option, Index value, Index count) {
  if (value < 0 || value >= count) reject(option, "0 to " + std::to_string(count - 1), value);
}

void require_drawable(std::string_view argument, Index seqlen) {
  if (seqlen < 1 || seqlen > longest)
    reject(argument, "1 to " + std::to_string(longest) + " positions", seqlen);
}

std::string describe(const LocalAttentionConfig& config, const Window& window) {
  std::ostringstream text;
  text << "window_size " << window.size() << ", look_backward " << config.look_backward
       << ", look_forward " << local_mha::resolved_look_forward(config)
       << (config.causal ? ", causal" : ", not causal")
       << (config.exact_windowsize ? ", exact" : ", whole windows");
  return text.str();
}

bool is_masked(const PaddingMask& mask, Index sequence, Index position) {
  return mask && mask.row(sequence)[position] != 0;
}

struct Pattern {
  std::string path;
  Index seqlen = 40;
  LocalAttentionConfig config{.window_size = 8, .exact_windowsize = true};
  std::optional<Index> length;
  std::optional<Index> cell_size;
};

int draw_pattern(const Pattern& options) {
  LocalAttentionConfig config = options.config;
  validate(config);
  require_drawable("--seqlen", options.seqlen);
  PaddingMask mask;
  if (options.length) mask = PaddingMask::from_lengths({&*options.length, 1}, options.seqlen);
  // All scores are equal, so that every key that is attended gets a probability.
  Tensor<float, 4> q(1, 1, options.seqlen, 1);
  q.setZero();
  const auto probabilities =
      LocalAttention<float>(config).attention_probabilities(q, q, {.mask = mask});

  const Window window(config);
  MatrixPlot plot{.title = "Who attends whom",
                  .subtitle = describe(config, window),
                  .seqlen = options.seqlen,
                  .window_size = config.window_size,
                  .labels = {},
                  .legend = {{attended, "attended"}},
                  .scale = {},
                  .cell_size = options.cell_size};
  if (config.causal || config.exact_windowsize)
    plot.legend.emplace_back(hidden, "in a window around, but not seen");
  if (mask) plot.legend.emplace_back(padding, "padding");
  plot.draw([&](Index query, Index key) {
        if (probabilities(0, 0, query, key) > 0) return attended;
        const Index column = key - window.look_around_begin(query);
        if (column < 0 || column >= window.look_around()) return outside;
        return window.attends(query, key) && is_masked(mask, 0, key) ? padding : hidden;
      })
      .write_png(options.path);
  return 0;
}

struct Head {
  std::string path;
  std::string case_path;
  std::string weights_path;
  std::optional<std::string> text;
  Index sequence = 0;
  Index layer = 0;
  Index head = 0;
  std::string scale = "sqrt";
  std::optional<Index> cell_size;
};

/// The probabilities of one head over one sequence, and what a picture says about them.
struct HeadProbabilities {
  std::string title;
  LocalAttentionConfig config;
  Index window_size;
  RowMatrix<float> probabilities;   ///< `[N, N]`
  PaddingMask mask;                 ///< of the sequence alone
  std::vector<std::string> labels;  ///< characters of a text
};

/// Sequence `b` of a batch.
template <typename Scalar, int Rank>
Tensor<Scalar, Rank> take_sequence(const Tensor<Scalar, Rank>& batch, Index b) {
  auto extents = batch.dimensions();
  auto offsets = extents;
  offsets.fill(0);
  require_index("--sequence", b, extents[0]);
  offsets[0] = b;
  extents[0] = 1;
  return batch.slice(offsets, extents);
}

PaddingMask take_mask(const io::SafetensorsFile& file, Index b, Index batch) {
  constexpr std::string_view name = "input/keep_mask";
  if (!file.contains(name)) return {};
  const auto keep = file.tensor<bool, 2>(name);
  if (keep.dimension(0) != batch)
    reject(name, std::to_string(batch) + " sequences", keep.dimension(0));
  return PaddingMask::keep(take_sequence(keep, b));
}

/// Head `h` of `[1, H, N, N]`.
RowMatrix<float> take_head(const Tensor<float, 4>& probabilities, Index h) {
  require_index("--head", h, probabilities.dimension(1));
  const Index seqlen = probabilities.dimension(2);
  return Eigen::Map<const RowMatrix<float>>(probabilities.data() + h * seqlen * seqlen, seqlen,
                                            seqlen);
}

HeadProbabilities of_attention(const CaseFiles& files, const Head& options) {
  const LocalAttentionConfig config = io::load_local_attention(files.weights);
  const auto q = files.inputs.tensor<float, 4>("input/q");
  const auto k = files.inputs.tensor<float, 4>("input/k");
  require_drawable("input/q", q.dimension(2));
  const auto window_size = examples::window_size_of_call(files);
  const PaddingMask mask = take_mask(files.inputs, options.sequence, q.dimension(0));
  const auto attn_bias = examples::read_attn_bias<float>(files.inputs);
  const auto probabilities = LocalAttention<float>(config).attention_probabilities(
      take_sequence(q, options.sequence), take_sequence(k, options.sequence),
      {.mask = mask, .attn_bias = examples::view(attn_bias), .window_size = window_size});
  return {"LocalAttention",
          config,
          window_size.value_or(config.window_size),
          take_head(probabilities, options.head),
          mask,
          {}};
}

HeadProbabilities of_mha(const CaseFiles& files, const Head& options) {
  auto [config, parameters] = io::load_local_mha<float>(files.weights);
  const LocalMHA<float> mha(config, std::move(parameters));
  const auto x = files.inputs.tensor<float, 3>("input/x");
  require_drawable("input/x", x.dimension(1));
  const PaddingMask mask = take_mask(files.inputs, options.sequence, x.dimension(0));
  const auto attn_bias = examples::read_attn_bias<float>(files.inputs);
  const auto probabilities = mha.attention_probabilities(take_sequence(x, options.sequence), mask,
                                                         examples::view(attn_bias));
  return {"LocalMHA",
          attention_config(config),
          config.window_size,
          take_head(probabilities, options.head),
          mask,
          {}};
}

/// A printable character, or what stands for it.
std::string label_of(char c) {
  if (c == '\n') return "\\n";
  return std::string(1, c > 0x20 && c < 0x7f ? c : '_');
}

HeadProbabilities of_transformer(const CaseFiles& files, const Head& options) {
  const auto [config, parameters] = io::load_local_transformer<float>(files.weights);
  require_index("--layer", options.layer, config.depth);
  std::vector<std::int64_t> tokens;
  std::vector<std::string> labels;
  PaddingMask mask;
  if (options.text) {
    for (const char c : *options.text) {
      tokens.push_back(static_cast<unsigned char>(c));
      labels.push_back(label_of(c));
    }
  } else {
    const auto batch = files.inputs.tensor<std::int64_t, 2>("input/tokens");
    const auto sequence = take_sequence(batch, options.sequence);
    tokens.assign(sequence.data(), sequence.data() + sequence.size());
    mask = take_mask(files.inputs, options.sequence, batch.dimension(0));
    // The mask is that of the logits' input, which has no last label.
    const auto seqlen = static_cast<std::size_t>(mask ? mask.shape()[1] : config.max_seq_len);
    if (mask && seqlen > tokens.size())
      reject("input/keep_mask", "at most as many positions as tokens", seqlen);
    tokens.resize(std::min(tokens.size(), seqlen));
  }
  const auto seqlen = static_cast<Index>(tokens.size());
  require_drawable(options.text ? "--text" : "input/tokens", seqlen);
  if (seqlen > config.max_seq_len)
    reject("--text", "at most max_seq_len = " + std::to_string(config.max_seq_len) + " bytes",
           seqlen);

  // The model's forward pass up to the layer.
  const local_mha::LocalMHAConfig layer = layer_config(config, options.layer);
  Tensor<float, 3> x(1, seqlen, config.dim);
  Eigen::Map<RowMatrix<float>> rows(x.data(), seqlen, config.dim);
  for (Index i = 0; i < seqlen; ++i) {
    const std::int64_t token = tokens[static_cast<std::size_t>(i)];
    require_index(options.text ? "--text: token" : "input/tokens", token, config.num_tokens);
    rows.row(i) = parameters.token_emb.row(token) + parameters.pos_emb.row(i);
  }
  local_mha::EncoderConfig up_to = encoder_config(config);
  up_to.depth = options.layer + 1;
  if (up_to.layers.size() > 1) up_to.layers.resize(static_cast<std::size_t>(up_to.depth));
  local_mha::EncoderParameters<float> below = parameters;
  below.layers.resize(static_cast<std::size_t>(up_to.depth));
  local_mha::Encoder<float>::Saved saved;
  local_mha::Encoder<float>(up_to, below).forward_saving(saved, x, {.mask = mask});
  std::optional<Tensor<float, 3>> bias;
  if (parameters.dynamic_pos_bias)
    bias = local_mha::DynamicPositionBias<float>(*parameters.dynamic_pos_bias)
               .forward(layer.window_size, layer.look_backward, resolved_look_forward(layer));
  const LocalMHA<float> mha(layer, below.layers.back().attention);
  return {"LocalTransformer, layer " + std::to_string(options.layer),
          attention_config(layer),
          layer.window_size,
          take_head(mha.attention_probabilities(saved.input_of_attention(options.layer), mask,
                                                examples::view(bias)),
                    options.head),
          mask,
          labels};
}

HeadProbabilities compute(const Head& options) {
  if (options.case_path.empty() && (options.weights_path.empty() || !options.text))
    throw std::invalid_argument("expected CASE.safetensors, or --weights and --text");
  const CaseFiles files = options.case_path.empty()
                              ? CaseFiles::open(options.weights_path, "")
                              : CaseFiles::open(options.case_path, options.weights_path);
  if (!files.family.empty() || files.is_encoder)
    reject("case",
           "a LocalMHA, LocalAttention or LocalTransformer, no model's layer and no encoder",
           io::printable(files.kind));
  if (options.text && files.kind != "LocalTransformer")
    reject("--text", "a LocalTransformer to read it", files.kind);
  if (options.layer != 0 && files.kind != "LocalTransformer")
    reject("--layer", "0, because there is one layer", options.layer);
  if (files.kind == "LocalMHA") return of_mha(files, options);
  if (files.kind == "LocalAttention") return of_attention(files, options);
  return of_transformer(files, options);
}

std::string rounded(double value) {
  std::ostringstream text;
  text.precision(2);
  text << value;
  return text.str();
}

int draw_head(const Head& options) {
  examples::require_different_files(
      "png", {{"the input", options.case_path}, {"the picture", options.path}});
  examples::require_different_files(
      "png", {{"the weights", options.weights_path}, {"the picture", options.path}});
  const HeadProbabilities head = compute(options);
  const RowMatrix<float>& p = head.probabilities;
  const Window window(head.config, head.window_size);
  const double largest = std::max(static_cast<double>(p.maxCoeff()), 1e-6);
  const bool linear = options.scale == "linear";
  const auto place = [&](double value) {
    return linear ? value / largest : std::sqrt(value / largest);
  };
  MatrixPlot::Scale scale{"probability", {}};
  for (const double value : {0., linear ? largest / 2 : largest / 4, largest})
    scale.ticks.emplace_back(place(value), rounded(value));

  MatrixPlot plot{.title = head.title + ", head " + std::to_string(options.head) + ", sequence " +
                           std::to_string(options.sequence),
                  .subtitle = describe(head.config, window),
                  .seqlen = p.rows(),
                  .window_size = window.size(),
                  .labels = head.labels,
                  .legend = {{outside, "not seen"}},
                  .scale = scale,
                  .cell_size = options.cell_size};
  if (head.mask) plot.legend.emplace_back(padding, "padding");
  plot.draw([&](Index query, Index key) {
        if (!window.attends(query, key)) return outside;
        if (is_masked(head.mask, 0, key)) return padding;
        return examples::sequential_color(place(static_cast<double>(p(query, key))));
      })
      .write_png(options.path);
  return 0;
}

int run(int argc, char** argv) {
  CLI::App app("Draws local attention as a PNG file: a row for each query, a column for each key.",
               "attention_map");
  app.require_subcommand(1);

  Pattern pattern;
  CLI::App& pattern_command =
      *app.add_subcommand("pattern", "Who attends whom under given options");
  pattern_command.add_option("png", pattern.path, "Where to write the picture")
      ->required()
      ->type_name("OUT.png");
  pattern_command.add_option("--seqlen", pattern.seqlen, "Positions in the sequence")
      ->capture_default_str();
  pattern_command.add_option("--window-size", pattern.config.window_size, "Positions in a window")
      ->capture_default_str();
  pattern_command.add_flag("--causal", pattern.config.causal, "A query sees no later position");
  pattern_command
      .add_option("--look-backward", pattern.config.look_backward,
                  "Windows before its own that a query sees")
      ->capture_default_str();
  pattern_command.add_option("--look-forward", pattern.config.look_forward,
                             "Windows after its own that a query sees. Default: 0 if causal, "
                             "else 1");
  pattern_command
      .add_option("--exact-windowsize", pattern.config.exact_windowsize,
                  "false: a query sees whole windows, not as many positions")
      ->capture_default_str();
  pattern_command.add_option("--length", pattern.length,
                             "Positions that are not padding, at the beginning");

  Head head;
  CLI::App& head_command = *app.add_subcommand(
      "head", "The attention probabilities of a head, for weights and an input");
  head_command.footer(
      "Example: attention_map head map.png --weights shakespeare.safetensors --layer 3 --head 1 "
      "\\\n"
      "           --text \"To be, or not to be: that is the question\"");
  head_command.add_option("png", head.path, "Where to write the picture")
      ->required()
      ->type_name("OUT.png");
  head_command
      .add_option("case", head.case_path,
                  "Inputs of a LocalMHA, LocalAttention or LocalTransformer, as export_layer.py "
                  "writes them")
      ->type_name("CASE.safetensors");
  head_command
      .add_option("--weights", head.weights_path,
                  "Weights and configuration, if they stand in a file of their own")
      ->type_name("MODEL.safetensors");
  head_command.add_option("--text", head.text,
                          "A text as input, whose bytes are a LocalTransformer's tokens");
  head_command.add_option("--sequence", head.sequence, "Which sequence of the input, from 0")
      ->capture_default_str();
  head_command.add_option("--layer", head.layer, "Which layer of a LocalTransformer, from 0")
      ->capture_default_str();
  head_command.add_option("--head", head.head, "Which head, from 0")->capture_default_str();
  head_command.add_option("--scale", head.scale, "How colors grow with the probability")
      ->check(CLI::IsMember({"linear", "sqrt"}))
      ->capture_default_str();

  for (const auto& [command, cell_size] :
       {std::pair(&pattern_command, &pattern.cell_size), std::pair(&head_command, &head.cell_size)})
    command->add_option("--cell-size", *cell_size,
                        "Pixels on a cell's side. Default: what fits a screen");

  if (const auto status = examples::parse(app, argc, argv)) return *status;
  return pattern_command.parsed() ? draw_pattern(pattern) : draw_head(head);
}

}  // namespace

int main(int argc, char** argv) {
  return examples::run_program("attention_map", [&] { return run(argc, argv); });
}
