// SPDX-License-Identifier: MIT
// Google Benchmark program: the passes of the attention and of the layer, forward and backward, and
// a model's step of training, with Eigen's matrix product at the layer's shapes and the attention
// in Eigen expressions, and both by tiles through that product, beside them.
//
// Counters: flops (a second; unmasked pairs only), peak_share (of the multiply-add peak of the same
// scalar, measured just before and after on the same core), tokens (a second), max_error (against
// sampled rows computed in double). A wrong result is an error, not a time.
#include <benchmark/benchmark.h>
#include <algorithm>

#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>

#include "measuring/clock.hpp"
#include "measuring/make_work.hpp"
#include "measuring/random.hpp"

namespace {

using measuring::Case;

template <typename Scalar>
Case base(const char* subject) {
  Case c;
  c.subject = subject;
  c.scalar = std::is_same_v<Scalar, float> ? "float" : "double";
  return c;
}

void measure(benchmark::State& state, const Case& c) {
  const std::unique_ptr<measuring::Work> work = measuring::make_work(c);
  const double start = measuring::cpu_seconds();
  work->run();
  const double run = std::min(measuring::cpu_seconds() - start, 0.1);
  constexpr double peak_seconds = 0.025;
  const double peak_before = work->peak(peak_seconds, run);
  const double begin = measuring::cpu_seconds();
  for (auto _ : state) {
    work->run();
    benchmark::ClobberMemory();
  }
  const double seconds = measuring::cpu_seconds() - begin;
  const double peak = (peak_before + work->peak(peak_seconds, run)) / 2;

  const auto runs = static_cast<double>(state.iterations());
  const double error = work->max_error();
  using benchmark::Counter;
  state.counters["flops"] = Counter(runs * work->flops(), Counter::kIsRate);
  state.counters["tokens"] = Counter(runs * c.tokens(), Counter::kIsRate);
  state.counters["peak_share"] = runs * work->flops() / seconds / peak;
  state.counters["max_error"] = error;
  if (!(error <= work->tolerance()))
    state.SkipWithError(("wrong result: relative error " + std::to_string(error)).c_str());
}

template <typename Scalar>
Case attention(const benchmark::State& state, const char* subject = "attention") {
  Case c = base<Scalar>(subject);
  c.seqlen = state.range(0);
  c.dim_head = state.range(1);
  c.window_size = state.range(2);
  return c;
}

template <typename Scalar>
void BM_LocalAttention_Forward(benchmark::State& state) {
  measure(state, attention<Scalar>(state));
}

template <typename Scalar>
void BM_LocalAttention_Forward_NonCausal(benchmark::State& state) {
  Case c = attention<Scalar>(state);
  c.causal = 0;
  measure(state, c);
}

template <typename Scalar>
void BM_LocalAttention_Forward_Bucketed(benchmark::State& state) {
  Case c = attention<Scalar>(state);
  c.exact = 0;
  measure(state, c);
}

template <typename Scalar>
void BM_LocalAttention_Forward_Rotary(benchmark::State& state) {
  Case c = attention<Scalar>(state);
  c.rotary = 1;
  measure(state, c);
}

template <typename Scalar>
void BM_LocalAttention_Forward_Heads(benchmark::State& state) {
  Case c = attention<Scalar>(state);
  c.heads = state.range(3);
  measure(state, c);
}

template <typename Scalar>
void BM_LocalAttention_Forward_PaddingMask(benchmark::State& state) {
  Case c = attention<Scalar>(state);
  c.batch = state.range(3);
  c.padding = 1;
  measure(state, c);
}

template <typename Scalar>
void BM_LocalAttention_Forward_AttnBias(benchmark::State& state) {
  Case c = attention<Scalar>(state);
  c.bias = 1;
  measure(state, c);
}

template <typename Scalar>
void BM_LocalAttention_Forward_Dropout(benchmark::State& state) {
  Case c = attention<Scalar>(state);
  c.dropout = 10;
  measure(state, c);
}

template <typename Scalar>
void BM_LocalAttention_Backward(benchmark::State& state) {
  Case c = attention<Scalar>(state);
  c.backward = 1;
  measure(state, c);
}

template <typename Scalar>
void BM_LocalAttention_Backward_Dropout(benchmark::State& state) {
  Case c = attention<Scalar>(state);
  c.backward = 1;
  c.dropout = 10;
  measure(state, c);
}

template <typename Scalar>
void BM_NaiveAttention_Forward(benchmark::State& state) {
  measure(state, attention<Scalar>(state, "naive_attention"));
}

template <typename Scalar>
void BM_TiledAttention_Forward(benchmark::State& state) {
  measure(state, attention<Scalar>(state, "tiled_attention"));
}

template <typename Scalar>
Case layer(const benchmark::State& state, const char* subject = "layer") {
  Case c = base<Scalar>(subject);
  c.seqlen = state.range(0);
  c.dim = state.range(1);
  c.heads = state.range(2);
  return c;
}

// xPos and qk_rmsnorm are on.
template <typename Scalar>
void BM_LocalMHA_Forward(benchmark::State& state) {
  Case c = layer<Scalar>(state);
  c.window_size = state.range(3);
  c.causal = state.range(4);
  c.xpos = 1;
  c.qk_rmsnorm = 1;
  measure(state, c);
}

template <typename Scalar>
void BM_TiledLayer_Forward(benchmark::State& state) {
  Case c = layer<Scalar>(state, "tiled_layer");
  c.window_size = state.range(3);
  c.xpos = 1;
  c.qk_rmsnorm = 1;
  measure(state, c);
}

// LocalMHA, and back.
template <typename Scalar>
void BM_LocalMHA_TrainingStep(benchmark::State& state) {
  Case c = layer<Scalar>(state);
  c.window_size = state.range(3);
  c.causal = state.range(4);
  c.xpos = 1;
  c.qk_rmsnorm = 1;
  c.backward = 1;
  measure(state, c);
}

// A whole step of training a byte-level model, all of it: loss, backward pass, clipping, AdamW and
// the new weights. A step that does not lower the loss of its batch is wrong.
template <typename Scalar>
void BM_LocalTransformer_TrainingStep(benchmark::State& state) {
  using Model = local_mha::LocalTransformer<Scalar>;
  local_mha::LocalTransformerConfig config{.num_tokens = 256,
                                           .max_seq_len = state.range(1),
                                           .dim = state.range(2),
                                           .depth = state.range(3),
                                           .local_attn_window_size = state.range(5),
                                           .dim_head = state.range(2) / state.range(4),
                                           .heads = state.range(4)};
  config.use_xpos = config.qk_rmsnorm = true;
  Model model(config, 1);
  auto parameters = model.parameters();
  auto gradients = Model::Parameters::zeros(config);
  local_mha::AdamW optimizer(local_mha::AdamWConfig{}, gradients);
  local_mha::Tensor<std::int64_t, 2> tokens(state.range(0), config.max_seq_len + 1);
  measuring::Random random(1);
  for (measuring::Index i = 0; i < tokens.size(); ++i) tokens.data()[i] = random.below(256);
  const Eigen::DefaultDevice device;
  const Scalar before = model.loss(tokens);
  for (auto _ : state) {
    local_mha::set_zero(gradients);
    benchmark::DoNotOptimize(model.backward(gradients, tokens, {.device = device}));
    local_mha::clip_gradients(gradients, 1.0);
    optimizer.step(parameters, gradients, 1e-3);
    model.set_parameters(parameters);
  }
  const auto steps = static_cast<double>(state.iterations());
  state.counters["tokens"] =
      benchmark::Counter(steps * static_cast<double>(state.range(0) * config.max_seq_len),
                         benchmark::Counter::kIsRate);
  if (!(model.loss(tokens) < before)) state.SkipWithError("wrong result: the loss does not fall");
}

template <typename Scalar>
void BM_EigenProduct_LayerProjections(benchmark::State& state) {
  measure(state, layer<Scalar>(state, "eigen_product"));
}

const std::vector<std::string> attention_names{"seqlen", "dim_head", "window_size"};
const std::vector<std::string> layer_names{"seqlen", "dim", "heads", "window_size", "causal"};
const std::vector<std::string> product_names{"seqlen", "dim", "heads"};

using benchmark::kMillisecond;

BENCHMARK(BM_LocalAttention_Forward<float>)
    ->ArgNames(attention_names)
    ->ArgsProduct({{8192}, {64}, {5, 16, 32, 64, 128, 256, 512, 1024}})
    ->ArgsProduct({{8192}, {32, 80, 96, 128}, {256}})
    ->ArgsProduct({{1024, 65536}, {64}, {256}})
    ->Unit(kMillisecond);
BENCHMARK(BM_LocalAttention_Forward<double>)
    ->ArgNames(attention_names)
    ->ArgsProduct({{8192}, {64}, {16, 256}})
    ->Unit(kMillisecond);
BENCHMARK(BM_LocalAttention_Forward_NonCausal<float>)
    ->ArgNames(attention_names)
    ->Args({8192, 64, 256})
    ->Unit(kMillisecond);
BENCHMARK(BM_LocalAttention_Forward_Bucketed<float>)
    ->ArgNames(attention_names)
    ->Args({8192, 64, 256})
    ->Unit(kMillisecond);
BENCHMARK(BM_LocalAttention_Forward_Rotary<float>)
    ->ArgNames(attention_names)
    ->Args({8192, 64, 256})
    ->Unit(kMillisecond);
BENCHMARK(BM_LocalAttention_Forward_Heads<float>)
    ->ArgNames({"seqlen", "dim_head", "window_size", "heads"})
    ->Args({8192, 64, 256, 8})
    ->Unit(kMillisecond);
BENCHMARK(BM_LocalAttention_Forward_PaddingMask<float>)
    ->ArgNames({"seqlen", "dim_head", "window_size", "batch"})
    ->Args({8192, 64, 256, 8})
    ->Unit(kMillisecond);
BENCHMARK(BM_LocalAttention_Forward_AttnBias<float>)
    ->ArgNames(attention_names)
    ->Args({8192, 64, 256})
    ->Unit(kMillisecond);
BENCHMARK(BM_LocalAttention_Forward_Dropout<float>)
    ->ArgNames(attention_names)
    ->Args({8192, 64, 256})
    ->Unit(kMillisecond);
BENCHMARK(BM_LocalAttention_Backward<float>)
    ->ArgNames(attention_names)
    ->ArgsProduct({{8192}, {64}, {16, 128, 256, 512}})
    ->ArgsProduct({{8192}, {32, 128}, {256}})
    ->Unit(kMillisecond);
BENCHMARK(BM_LocalAttention_Backward<double>)
    ->ArgNames(attention_names)
    ->Args({8192, 64, 256})
    ->Unit(kMillisecond);
BENCHMARK(BM_LocalAttention_Backward_Dropout<float>)
    ->ArgNames(attention_names)
    ->Args({8192, 64, 256})
    ->Unit(kMillisecond);
BENCHMARK(BM_NaiveAttention_Forward<float>)
    ->ArgNames(attention_names)
    ->ArgsProduct({{8192}, {64}, {16, 128, 256, 512}})
    ->Unit(kMillisecond);
BENCHMARK(BM_NaiveAttention_Forward<double>)
    ->ArgNames(attention_names)
    ->Args({8192, 64, 256})
    ->Unit(kMillisecond);

BENCHMARK(BM_TiledAttention_Forward<float>)
    ->ArgNames(attention_names)
    ->ArgsProduct({{8192}, {64}, {128, 256, 512}})
    ->Unit(kMillisecond);

BENCHMARK(BM_LocalMHA_Forward<float>)
    ->ArgNames(layer_names)
    ->Args({1024, 512, 8, 256, 1})
    ->Args({8192, 512, 8, 256, 1})
    ->Args({65536, 512, 8, 256, 1})
    ->Args({8192, 256, 4, 128, 1})
    ->Args({8192, 768, 12, 128, 0})
    ->Args({8192, 192, 3, 64, 1})
    ->Unit(kMillisecond);
BENCHMARK(BM_LocalMHA_Forward<double>)
    ->ArgNames(layer_names)
    ->Args({8192, 512, 8, 256, 1})
    ->Unit(kMillisecond);
BENCHMARK(BM_LocalMHA_TrainingStep<float>)
    ->ArgNames(layer_names)
    ->Args({8192, 512, 8, 256, 1})
    ->Unit(kMillisecond);
BENCHMARK(BM_LocalTransformer_TrainingStep<float>)
    ->ArgNames({"batch", "seqlen", "dim", "depth", "heads", "window_size"})
    ->Args({16, 256, 128, 4, 4, 64})
    ->Args({1, 4096, 512, 2, 8, 256})
    ->Unit(kMillisecond);
BENCHMARK(BM_TiledLayer_Forward<float>)
    ->ArgNames({"seqlen", "dim", "heads", "window_size"})
    ->Args({8192, 512, 8, 256})
    ->Unit(kMillisecond);
BENCHMARK(BM_EigenProduct_LayerProjections<float>)
    ->ArgNames(product_names)
    ->Args({8192, 512, 8})
    ->Args({8192, 256, 4})
    ->Args({8192, 768, 12})
    ->Args({8192, 192, 3})
    ->Unit(kMillisecond);
BENCHMARK(BM_EigenProduct_LayerProjections<double>)
    ->ArgNames(product_names)
    ->Args({8192, 512, 8})
    ->Unit(kMillisecond);

}  // namespace
