// SPDX-License-Identifier: MIT
/// \file
/// Case: what is measured, its name, and how many floating-point operations it is worth.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "random.hpp"

namespace measuring {

using Index = std::ptrdiff_t;

/// A shape and what is computed on it. Written and read as
/// `attention/float/seqlen:8192/dim_head:64/window_size:256`, defaults left out.
struct Case {
  /// `attention` (LocalAttention), `layer` (LocalMHA), `encoder` (`depth` layers and
  /// feed-forwards), `prefill` (the layer's stream in chunks of 512), `decode` (one position of the
  /// stream, after `seqlen − 1`), `naive_attention` (Eigen expressions), `tiled_attention` and
  /// `tiled_layer` (tiles through Eigen's matrix product), `eigen_product` and `eigen_vectors` (the
  /// layer's projections by Eigen's matrix products, of all positions and of one)
  std::string subject = "attention";
  std::string scalar = "float";
  Index batch = 1;
  Index seqlen = 8192;
  Index dim = 0;  ///< channels of the layer; 0: no layer
  Index heads = 1;
  Index dim_head = 64;
  Index window_size = 256;
  Index causal = 1;
  Index exact = 1;   ///< exact_windowsize
  Index rotary = 0;  ///< a layer has it always
  Index xpos = 0;
  Index qk_rmsnorm = 0;  ///< layer
  Index padding = 0;     ///< a padding mask of random lengths
  Index bias = 0;        ///< an attn_bias for each head
  Index dropout = 0;     ///< percent, attention
  /// `i − left ≤ j ≤ i + right` in place of the look-around
  Index token_window = 0;
  Index left = 0;
  Index right = 0;
  Index kv_heads = 0;    ///< heads of keys and values; 0: as many as of queries
  Index sinks = 0;       ///< a logit for each head that takes its share of the softmax
  Index soft_cap = 0;    ///< `soft_cap · tanh(score / soft_cap)`, attention
  Index alibi = 0;       ///< `score − 2^(−8(h + 1)/heads) · |i − j|`, attention
  Index first_keys = 0;  ///< rows that all later ones see, too
  Index packed = 0;      ///< attention: sequences of this length on average, from a tenth to 1.9
  Index biases = 0;      ///< of a layer's projections
  Index depth = 0;       ///< of an encoder
  Index residual_streams = 0;  ///< of an encoder; 0: a single one
  /// Of the attention: the backward pass alone. Of a layer or an encoder: forward and backward, a
  /// step of training.
  Index backward = 0;
  Index threads = 1;  ///< of an Eigen::ThreadPoolDevice; 1: the calling thread
  /// Weights, keys and values are stored in so many bits: 16 are bfloat16. 0: as they are computed
  /// with. Layer, prefill and decode
  Index stored_bits = 0;
  /// Operands of products have so many bits: 16 are bfloat16, and so is what is stored. 0: as they
  /// are computed with. Attention and layer forward, prefill and decode
  Index arithmetic_bits = 0;
  Index layers = 1;  ///< decode: so many layers one after the other, each with weights of its own

  Index look_forward() const { return causal != 0 ? 0 : 1; }
  Index inner() const { return heads * dim_head; }
  Index heads_of_keys() const { return kv_heads > 0 ? kv_heads : heads; }
  /// The head of keys and values that head `h` of queries reads.
  Index head_of_keys(Index h) const { return h / (heads / heads_of_keys()); }
  /// Rows of to_qkv.
  Index projected() const { return (heads + 2 * heads_of_keys()) * dim_head; }
  bool of_layer() const {
    return subject != "attention" && subject != "naive_attention" && subject != "tiled_attention";
  }
  bool of_one_position() const { return subject == "decode" || subject == "eigen_vectors"; }
  bool of_eigen() const { return subject == "eigen_product" || subject == "eigen_vectors"; }
  /// Others than the library's that compute the same.
  bool of_peer() const {
    return subject == "naive_attention" || subject == "tiled_attention" || subject == "tiled_layer";
  }

  friend bool operator==(const Case&, const Case&) = default;

  /// Calls `visit(key, value)` for each number.
  template <typename Self, typename Visitor>
  static void visit(Self& c, Visitor&& visit) {
    visit("batch", c.batch);
    visit("seqlen", c.seqlen);
    visit("dim", c.dim);
    visit("heads", c.heads);
    visit("dim_head", c.dim_head);
    visit("window_size", c.window_size);
    visit("causal", c.causal);
    visit("exact", c.exact);
    visit("rotary", c.rotary);
    visit("xpos", c.xpos);
    visit("qk_rmsnorm", c.qk_rmsnorm);
    visit("padding", c.padding);
    visit("bias", c.bias);
    visit("dropout", c.dropout);
    visit("token_window", c.token_window);
    visit("left", c.left);
    visit("right", c.right);
    visit("kv_heads", c.kv_heads);
    visit("sinks", c.sinks);
    visit("soft_cap", c.soft_cap);
    visit("alibi", c.alibi);
    visit("first_keys", c.first_keys);
    visit("packed", c.packed);
    visit("biases", c.biases);
    visit("depth", c.depth);
    visit("residual_streams", c.residual_streams);
    visit("backward", c.backward);
    visit("threads", c.threads);
    visit("stored_bits", c.stored_bits);
    visit("arithmetic_bits", c.arithmetic_bits);
    visit("layers", c.layers);
  }

  std::string name() const {
    std::string text = subject + "/" + scalar;
    std::vector<Index> defaults;
    const Case plain;
    visit(plain, [&](const char*, const Index& value) { defaults.push_back(value); });
    std::size_t at = 0;
    visit(*this, [&](const std::string_view key, const Index& value) {
      const bool always = key == "seqlen" || key == "dim_head" || key == "window_size";
      if (always || value != defaults[at])
        text += "/" + std::string(key) + ":" + std::to_string(value);
      ++at;
    });
    return text;
  }

  /// \throws std::invalid_argument saying what is wrong with `text`
  static Case parse(std::string_view text) {
    Case c;
    const auto bad = [&](const std::string& what) -> std::invalid_argument {
      return std::invalid_argument("case '" + std::string(text) + "': " + what);
    };
    std::string_view rest = text;
    for (int part = 0; !rest.empty() || part < 2; ++part) {
      const std::string_view word = rest.substr(0, rest.find('/'));
      rest.remove_prefix(std::min(rest.size(), word.size() + 1));
      if (part == 0) {
        c.subject = word;
      } else if (part == 1) {
        c.scalar = word;
      } else {
        const std::string_view key = word.substr(0, word.find(':'));
        const std::string_view number = word.substr(std::min(word.size(), key.size() + 1));
        std::string keys;
        bool known = false;
        visit(c, [&](const std::string_view its_key, Index& value) {
          keys += " " + std::string(its_key);
          if (its_key != key) return;
          known = true;
          const auto [end, error] =
              std::from_chars(number.data(), number.data() + number.size(), value);
          if (error != std::errc{} || end != number.data() + number.size() || value < 0)
            throw bad("expected " + std::string(key) + ":<number>, got " + std::string(word));
        });
        if (!known) throw bad("expected one of" + keys + ", got " + std::string(key));
      }
    }
    constexpr std::array<std::string_view, 10> subjects{
        "attention",       "layer",           "encoder",     "prefill",       "decode",
        "naive_attention", "tiled_attention", "tiled_layer", "eigen_product", "eigen_vectors"};
    if (std::find(subjects.begin(), subjects.end(), c.subject) == subjects.end()) {
      std::string all;
      for (const std::string_view subject : subjects) all += " " + std::string(subject);
      throw bad("expected one of" + all + ", got " + c.subject);
    }
    if (c.scalar != "float" && c.scalar != "double")
      throw bad("expected float or double, got " + c.scalar);
    if (c.batch < 1 || c.seqlen < 1 || c.heads < 1 || c.dim_head < 1 || c.window_size < 1)
      throw bad("expected at least 1 for batch, seqlen, heads, dim_head and window_size");
    if (c.of_layer() != (c.dim > 0)) throw bad("a dim is needed by a layer, and only there");
    if (!c.of_layer() && c.qk_rmsnorm != 0) throw bad("qk_rmsnorm is for a layer");
    if (c.batch != 1 && (c.subject == "decode" || c.subject == "prefill"))
      throw bad("streams are measured with a batch of 1");
    if (c.causal == 0 && (c.subject == "decode" || c.subject == "prefill"))
      throw bad("streams are measured causal");
    if (c.subject != "attention" && (c.padding != 0 || c.bias != 0 || c.rotary != 0))
      throw bad("padding, bias and rotary are for attention");
    if (c.dropout >= 100 || (c.dropout > 0 && c.subject != "attention"))
      throw bad("dropout is for attention, and below 100 (percent)");
    if (c.backward != 0 && c.subject != "attention" && c.subject != "layer" &&
        c.subject != "encoder")
      throw bad("backward is for attention, layer and encoder");
    if ((c.subject == "encoder") != (c.depth > 0))
      throw bad("a depth is needed by an encoder, and only there");
    if (c.subject != "encoder" && c.residual_streams != 0)
      throw bad("residual_streams are those of an encoder");
    if (c.subject == "encoder" && c.causal == 0) throw bad("encoders are measured causal");
    if ((c.backward != 0 || c.dropout != 0) && (c.padding != 0 || c.bias != 0 || c.rotary != 0))
      throw bad("backward and dropout are without padding, bias and rotary");
    // Which the check of the gradients rests on.
    if (c.backward != 0 && c.subject == "layer" && c.qk_rmsnorm == 0)
      throw bad("backward of a layer needs qk_rmsnorm");
    if (c.token_window == 0 && (c.left != 0 || c.right != 0))
      throw bad("left and right are those of a token_window:1");
    if (c.heads % c.heads_of_keys() != 0) throw bad("kv_heads divides heads");
    if (c.packed != 0 && (c.batch != 1 || c.first_keys != 0 || c.packed < 10))
      throw bad("packed is 10 or more, with a batch of 1 and without first_keys");
    const bool other_rules = c.kv_heads != 0 || c.sinks != 0 || c.soft_cap != 0 || c.alibi != 0 ||
                             c.first_keys != 0 || c.packed != 0;
    if (other_rules && (c.backward != 0 || c.padding != 0 || c.bias != 0 || c.rotary != 0))
      throw bad("these rules are measured forward, without padding, bias and rotary");
    if ((other_rules || c.token_window != 0) && c.of_peer())
      throw bad(c.subject + " is that of the look-around");
    if (c.subject == "tiled_layer" && (c.causal == 0 || c.exact == 0 || c.dim_head % 2 != 0))
      throw bad("tiled_layer is causal and exact, with an even dim_head");
    if (c.subject != "attention" &&
        (c.soft_cap != 0 || c.alibi != 0 || c.first_keys != 0 || c.packed != 0))
      throw bad("soft_cap, alibi, first_keys and packed are for attention");
    if (c.biases != 0 && (!c.of_layer() || c.of_peer())) throw bad("biases are for a layer");
    if (c.threads < 1 || c.threads > 1024) throw bad("expected 1 to 1024 threads");
    if (c.threads > 1 && (c.of_eigen() || c.of_peer()))
      throw bad("threads are for the library's own");
    if (c.stored_bits != 0 &&
        (c.stored_bits != 16 || c.scalar != "float" || c.backward != 0 ||
         (c.subject != "layer" && c.subject != "prefill" && c.subject != "decode")))
      throw bad("stored_bits are 16, of float, in a layer's forward pass, prefill and decode");
    if (c.arithmetic_bits != 0 &&
        (c.arithmetic_bits != 16 || c.stored_bits != 0 || c.scalar != "float" ||
         (c.subject != "attention" && c.subject != "layer" && c.subject != "prefill" &&
          c.subject != "decode")))
      throw bad(
          "arithmetic_bits are 16, of float: attention, layer, prefill and decode, without "
          "stored_bits");
    if (c.layers < 1 || (c.layers > 1 && c.subject != "decode"))
      throw bad("layers, at least 1, are those of decode");
    if (c.xpos != 0 && !c.of_layer() && c.rotary == 0) throw bad("xpos needs rotary");
    return c;
  }

  /// Unmasked keys of each sequence: random lengths if `padding`.
  std::vector<Index> lengths() const {
    std::vector<Index> all(static_cast<std::size_t>(batch), seqlen);
    Random random(7);
    if (padding != 0)
      for (Index& length : all) length = 1 + random.below(seqlen);
    return all;
  }

  /// Where packed sequences begin, and the end of the last.
  std::vector<Index> cu_seqlens() const {
    std::vector<Index> ends{0};
    Random random(8);
    while (packed > 0 && ends.back() < seqlen)
      ends.push_back(
          std::min(seqlen, ends.back() + packed - packed * 9 / 10 + random.below(packed * 9 / 5)));
    return ends;
  }

  /// Does query `i` see key `j` of a sequence whose keys from `length` on are masked? Of packed
  /// sequences, this is about one alone.
  bool sees(Index i, Index j, Index length) const {
    if (j < 0 || j >= length) return false;
    if (j < first_keys && (j <= i || causal == 0)) return true;
    if (token_window != 0) return i - left <= j && j <= i + right;
    if (causal != 0 && j > i) return false;
    const Index buckets_back = i / window_size - j / window_size;
    if (buckets_back > 1 || buckets_back < -look_forward()) return false;
    if (exact == 0) return true;
    return i - j <= window_size && j - i <= look_forward() * window_size;
  }

  /// Keys that query `i` sees, in their order.
  std::vector<Index> seen(Index i, Index length) const {
    std::vector<Index> keys;
    for (Index j = 0; j < std::min(first_keys, first_candidate(i)); ++j)
      if (sees(i, j, length)) keys.push_back(j);
    for (Index j = first_candidate(i); j < last_candidate(i); ++j)
      if (sees(i, j, length)) keys.push_back(j);
    return keys;
  }

  /// Pairs of a query and a key that it sees, over all sequences and heads: counted one by one,
  /// but for buckets whose look-around lies within the sequence, which are all alike.
  double pairs() const {
    if (of_one_position())
      return static_cast<double>(heads * static_cast<Index>(seen(seqlen - 1, seqlen).size()));
    double total = 0;
    if (token_window != 0 || first_keys != 0 || packed != 0) {
      std::vector<Index> sequences = lengths();
      const std::vector<Index> ends = cu_seqlens();
      if (packed != 0) {
        sequences.clear();
        for (std::size_t s = 1; s < ends.size(); ++s) sequences.push_back(ends[s] - ends[s - 1]);
      }
      for (const Index length : sequences)
        for (Index i = 0; i < (packed != 0 ? length : seqlen); ++i)
          total += static_cast<double>(seen(i, length).size());
      return total * static_cast<double>(heads);
    }
    std::optional<double> of_inner_bucket;
    for (const Index length : lengths())
      for (Index bucket = 0; bucket * window_size < seqlen; ++bucket) {
        const bool inner = bucket >= 1 && (bucket + 2) * window_size <= std::min(seqlen, length);
        if (inner && of_inner_bucket) {
          total += *of_inner_bucket;
          continue;
        }
        double count = 0;
        const Index end = std::min(seqlen, (bucket + 1) * window_size);
        for (Index i = bucket * window_size; i < end; ++i)
          for (Index j = first_candidate(i); j < last_candidate(i); ++j)
            if (sees(i, j, length)) count += 1;
        if (inner) of_inner_bucket = count;
        total += count;
      }
    return total * static_cast<double>(heads);
  }

  double tokens() const { return static_cast<double>(of_one_position() ? 1 : batch * seqlen); }

  /// A pair takes `2·dim_head` for its score and as many for its value; a token of the layer
  /// `2·dim·inner` for each of q, k, v (of kv_heads) and the output. On the way back there are two
  /// products for each of a projection, and five for two of the attention. A feed-forward is three
  /// projections, of a width of `int(dim · 8/3)`; what connects the layers of an encoder does not
  /// count.
  double flops() const {
    const double projections =
        of_layer() ? 2 * tokens() * static_cast<double>(dim * (projected() + inner())) : 0;
    if (of_eigen()) return projections;
    const double attention = 4 * static_cast<double>(dim_head) * pairs();
    if (subject == "encoder") {
      const double all = projections + 6 * tokens() * static_cast<double>(dim * (dim * 8 / 3));
      return static_cast<double>(depth) *
             (backward == 0 ? all + attention : 3 * all + 3.5 * attention);
    }
    if (backward == 0) return static_cast<double>(layers) * (projections + attention);
    return subject == "layer" ? 3 * projections + 3.5 * attention : 2.5 * attention;
  }

 private:
  Index first_candidate(Index i) const {
    if (token_window != 0) return std::max<Index>(0, i - left);
    return std::max<Index>(0, (i / window_size - 1) * window_size);
  }
  Index last_candidate(Index i) const {
    if (token_window != 0) return std::min(seqlen, i + right + 1);
    return std::min(seqlen, (i / window_size + 1 + look_forward()) * window_size);
  }
};

}  // namespace measuring
