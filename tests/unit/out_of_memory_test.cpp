// SPDX-License-Identifier: MIT
// The 1st, 2nd, … allocation of every call fails, alone or with all after it. Then the call throws,
// and everything is as it was, so that a second try gives the bits of a first one; or it does
// without the memory, and gives them at once.
#define EIGEN_USE_THREADS
#include "support/failing_memory.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "support/library.hpp"
#include "support/random_case.hpp"

namespace out_of_memory_test {

using local_mha::Index;
using local_mha::LocalAttention;
using local_mha::LocalAttentionConfig;
using local_mha::LocalMHA;
using local_mha::LocalMHAConfig;
using local_mha::LocalTransformer;
using local_mha::LocalTransformerConfig;
using local_mha::Tensor;
using local_mha::TensorView;
using local_mha::Training;
using support::tensor;
using Layer = LocalMHA<float>;
using Attention = LocalAttention<float>;
using Model = LocalTransformer<float>;
using Tokens = Tensor<std::int64_t, 2>;

/// All numbers of what a call gave, to be compared to the bit.
template <typename T, int Rank>
void append(std::vector<double>& to, const Tensor<T, Rank>& from) {
  to.insert(to.end(), from.data(), from.data() + from.size());
}
template <typename Parameters>
  requires requires(const Parameters& p) { p.has_shapes_of(p); }
void append(std::vector<double>& to, const Parameters& from) {
  local_mha::for_each_parameter(from, [&](const std::string&, const auto& t) {
    to.insert(to.end(), t.data(), t.data() + t.size());
  });
}
void append(std::vector<double>& to, const Attention::Gradients& from) {
  for (const auto* t : {&from.q, &from.k, &from.v}) append(to, *t);
  if (from.attn_bias) append(to, *from.attn_bias);
}
template <typename... Parts>
std::vector<double> numbers(const Parts&... parts) {
  std::vector<double> all;
  (append(all, parts), ...);
  return all;
}

/// \param make `make()` gives the objects of the call, by a std::unique_ptr
/// \param call `call(objects)`, whose allocations fail
/// \param result `result(objects)`, numbers that tell whether the objects are right: those of a
///        second try after a failure must be those of a first one
/// \param state null, or numbers of what a call that fails must leave as it was
template <typename Make, typename Call, typename Result>
void expect_as_it_was(
    const std::string& what, Make&& make, Call&& call, Result&& result,
    const std::function<std::vector<double>(const decltype(*make())&)>& state = nullptr) {
  if (MEMORY_FAILS == 0) GTEST_SKIP() << "needs its own malloc";
  SCOPED_TRACE(what);
  const auto undisturbed = make();
  call(*undisturbed);
  const auto expected = result(*undisturbed);
  long failures = 0;
  for (const bool all_after : {false, true})
    for (long number = 1;; ++number) {
      const auto objects = make();
      const auto before = state ? state(*objects) : std::vector<double>();
      const auto outcome = support::with_failure(number, all_after, [&] { call(*objects); });
      if (!outcome.failed) break;
      ++failures;
      if (outcome.threw) {
        if (state) {
          ASSERT_TRUE(state(*objects) == before) << "changed by allocation " << number;
        }
        call(*objects);
      }
      ASSERT_TRUE(result(*objects) == expected)
          << "after allocation " << number << (outcome.threw ? ", tried again" : ", not noticed");
    }
  EXPECT_GT(failures, 0) << "nothing was tried";
}

LocalMHAConfig layer_config() {
  LocalMHAConfig c{.dim = 10, .window_size = 5, .dim_head = 6, .heads = 3, .dropout = 0.2};
  c.prenorm = c.qk_rmsnorm = c.gate_values_per_head = c.use_xpos = true;
  return c;
}
LocalTransformerConfig model_config() {
  LocalTransformerConfig c{.num_tokens = 9, .max_seq_len = 60, .dim = 8, .depth = 2};
  c.local_attn_window_size = 5;
  c.dim_head = 4;
  c.heads = 2;
  c.attn_dropout = c.ff_dropout = 0.2;
  c.use_dynamic_pos_bias = true;
  return c;
}
template <int Rank>
Tensor<float, Rank> random(std::uint64_t seed, const std::vector<Index>& shape) {
  return tensor<float, Rank>(Random(seed).array({shape.begin(), shape.end()}));
}
Tokens tokens(std::uint64_t seed, Index batch, Index n) {
  Random random(seed);
  Tokens t(batch, n);
  for (Index i = 0; i < t.size(); ++i) t.data()[i] = random.integer(0, 8);
  return t;
}
template <int Rank>
TensorView<const float, Rank> view(const Tensor<float, Rank>& t) {
  return t;
}

/// The calling thread, or a pool.
template <typename Call>
void on_each_device(Call&& call) {
  {
    SCOPED_TRACE("alone");
    call(Eigen::DefaultDevice());
  }
  SCOPED_TRACE("on a pool");
  Eigen::ThreadPool pool(3);
  call(Eigen::ThreadPoolDevice(&pool, 3));
}

TEST(OutOfMemory, InCallsOfTheAttention) {
  LocalAttentionConfig config{.window_size = 5, .dropout = 0.2, .dim = 6};
  config.use_xpos = true;
  struct Objects {
    Attention attention;
    Attention::Workspace workspace;
    Attention::Saved saved;
    Attention::Gradients gradients;
    Tensor<float, 4> out{2, 2, 17, 6};
  };
  const auto q = random<4>(1, {2, 2, 17, 6});
  const auto small = random<4>(2, {1, 2, 7, 6});
  const auto bias = random<3>(3, {2, 5, 15});
  const Training training{.seed = 3};
  on_each_device([&](const auto& device) {
    // All kept memory is that of another call.
    const auto make = [&] {
      auto o = std::make_unique<Objects>(Objects{Attention(config), {}, {}, {}});
      Tensor<float, 4> y(1, 2, 7, 6);
      o->attention.forward_into(y, o->workspace, small, small, small, {.device = device});
      o->saved = o->attention.forward_saving(small, small, small);
      o->attention.backward_into(o->gradients, o->workspace, o->saved, small, small, small, small,
                                 {.device = device});
      o->saved =
          o->attention.forward_saving(q, q, q, {.attn_bias = view(bias), .training = training});
      return o;
    };
    expect_as_it_was(
        "forward_into", make,
        [&](Objects& o) {
          o.attention.forward_into(
              o.out, o.workspace, q, q, q,
              {.attn_bias = view(bias), .training = training, .device = device});
        },
        [&](Objects& o) { return numbers(o.out); });
    expect_as_it_was(
        "backward_into", make,
        [&](Objects& o) {
          o.attention.backward_into(o.gradients, o.workspace, o.saved, q, q, q, q,
                                    {.attn_bias = view(bias), .device = device});
        },
        [&](Objects& o) { return numbers(o.gradients); });
    expect_as_it_was(
        "forward_saving", make,
        [&](Objects& o) {
          o.saved = o.attention.forward_saving(
              q, q, q, {.attn_bias = view(bias), .training = training, .device = device});
        },
        [&](Objects& o) {
          return numbers(o.attention.backward(o.saved, q, q, q, q, {.attn_bias = view(bias)}));
        });
  });
}

TEST(OutOfMemory, InCallsOfTheLayer) {
  struct Objects {
    Layer layer;
    Layer::Workspace workspace = {};
    Layer::Saved saved = {};
    Layer::Parameters gradients = Layer::Parameters::zeros(layer_config());
    Tensor<float, 3> y{2, 17, 10};
    Tensor<float, 3> grad_x{2, 17, 10};
    Tensor<float, 3> grad_bias{3, 5, 15};
  };
  const Layer layer(layer_config(), 1);
  const auto x = random<3>(1, {2, 17, 10});
  const auto small = random<3>(2, {1, 7, 10});
  const auto bias = random<3>(3, {3, 5, 15});
  const Training training{.seed = 5};
  const auto others = Layer(layer_config(), 2).parameters();
  on_each_device([&](const auto& device) {
    const auto make = [&] {
      auto o = std::make_unique<Objects>(Objects{layer});
      o->layer.forward_saving_into(device, TensorView<float, 3>(o->y.data(), {1, 7, 10}),
                                   o->workspace, o->saved, small);
      o->layer.backward_into(device, TensorView<float, 3>(o->grad_x.data(), {1, 7, 10}),
                             o->workspace, o->gradients, o->saved, small, small);
      o->grad_bias.setZero();
      return o;
    };
    const auto make_saved = [&] {
      auto o = make();
      o->layer.forward_saving(o->saved, x, {}, view(bias), training);
      return o;
    };
    const auto forward_saving = [&](Objects& o) {
      o.layer.forward_saving_into(device, o.y, o.workspace, o.saved, x, {}, view(bias), training);
    };
    const auto backward = [&](Objects& o) {
      o.layer.backward_into(device, o.grad_x, o.workspace, o.gradients, o.saved, x, x, {},
                            view(bias), {}, &o.grad_bias);
    };
    expect_as_it_was(
        "forward_into", make,
        [&](Objects& o) {
          o.layer.forward_into(device, o.y, o.workspace, x, {}, view(bias), training);
        },
        [&](Objects& o) { return numbers(o.y); });
    expect_as_it_was("forward_saving_into", make, forward_saving, [&](Objects& o) {
      backward(o);
      return numbers(o.y, o.grad_x, o.gradients, o.grad_bias);
    });
    expect_as_it_was(
        "backward_into", make_saved, backward,
        [&](Objects& o) { return numbers(o.grad_x, o.gradients, o.grad_bias); },
        [&](const Objects& o) { return numbers(o.gradients, o.grad_bias); });
  });
  const auto make = [&] { return std::make_unique<Layer>(layer); };
  const auto forward = [&](const Layer& l) { return numbers(l.forward(x), l.parameters()); };
  expect_as_it_was(
      "set_parameters", make, [&](Layer& l) { l.set_parameters(others); }, forward, forward);
  expect_as_it_was(
      "parameters", [&] { return std::make_unique<Layer>(layer_config(), 1); },
      [](Layer& l) { l.parameters(); }, forward,
      [&](const Layer& l) { return numbers(l.forward(x)); });
  expect_as_it_was(
      "construction", [&] { return std::make_unique<std::optional<Layer>>(); },
      [&](std::optional<Layer>& l) { l.emplace(layer_config(), 1); },
      [&](std::optional<Layer>& l) { return forward(*l); });
}

// With all that a sliding window can have, packed.
TEST(OutOfMemory, InCallsOfALayerWithASlidingWindow) {
  LocalMHAConfig config{.dim = 10, .dim_head = 6, .heads = 4, .kv_heads = 2};
  config.token_window = {.left = 5, .right = 3};
  config.score.soft_cap = 2;
  config.sinks = config.relative_bias = true;
  config.first_keys = 3;
  struct Objects {
    Layer layer;
    Layer::Parameters gradients;
    Layer::Workspace workspace = {};
    Layer::Saved saved = {};
    Tensor<float, 3> y{1, 47, 10};
    Tensor<float, 3> grad_x{1, 47, 10};
  };
  const Layer layer(config, 1);
  const auto x = random<3>(1, {1, 47, 10});
  const auto small = random<3>(2, {1, 7, 10});
  const std::vector<Index> cuts{0, 20, 20, 21, 47};
  on_each_device([&](const auto& device) {
    const auto make = [&] {
      auto o = std::make_unique<Objects>(Objects{layer, Layer::Parameters::zeros(config)});
      o->layer.forward_saving_into(device, TensorView<float, 3>(o->y.data(), {1, 7, 10}),
                                   o->workspace, o->saved, small);
      return o;
    };
    const auto make_saved = [&] {
      auto o = make();
      o->layer.forward_saving(o->saved, x, {}, {}, {}, cuts);
      return o;
    };
    const auto backward = [&](Objects& o) {
      o.layer.backward_into(device, o.grad_x, o.workspace, o.gradients, o.saved, x, x);
    };
    expect_as_it_was(
        "forward_saving_into", make,
        [&](Objects& o) {
          o.layer.forward_saving_into(device, o.y, o.workspace, o.saved, x, {}, {}, {}, cuts);
        },
        [&](Objects& o) {
          backward(o);
          return numbers(o.y, o.grad_x, o.gradients);
        });
    expect_as_it_was(
        "backward_into", make_saved, backward,
        [&](Objects& o) { return numbers(o.grad_x, o.gradients); },
        [&](const Objects& o) { return numbers(o.gradients); });
  });
}

/// What a half-made saved would give must be refused, and not computed.
TEST(OutOfMemory, LeavesNothingSavedThatIsNoCalls) {
  if (MEMORY_FAILS == 0) GTEST_SKIP() << "needs its own malloc";
  const Layer layer(layer_config(), 1);
  const auto small = random<3>(2, {1, 7, 10});
  const auto x = random<3>(1, {2, 17, 10});
  auto gradients = Layer::Parameters::zeros(layer_config());
  for (long number = 1;; ++number) {
    Layer::Saved saved;
    layer.forward_saving(saved, small);
    const auto outcome =
        support::with_failure(number, false, [&] { layer.forward_saving(saved, x); });
    if (!outcome.failed) break;
    if (!outcome.threw) continue;
    EXPECT_ANY_THROW(layer.backward(gradients, saved, x, x)) << number;
  }
}

TEST(OutOfMemory, InCallsOfTheModel) {
  struct Objects {
    Model model;
    Model::Parameters gradients;
    float loss = 0;
    Tensor<float, 3> logits = {};
    Tokens made = {};
  };
  const Model model(model_config(), 1);
  const auto gradients = Model(model_config(), 4).parameters();
  const auto input = tokens(1, 2, 9);
  const auto make = [&] { return std::make_unique<Objects>(Objects{model, gradients}); };
  on_each_device([&](const auto& device) {
    expect_as_it_was(
        "backward", make,
        [&](Objects& o) {
          o.loss = o.model.backward(o.gradients, input,
                                    {.training = Training{.seed = 2}, .device = device});
        },
        [](Objects& o) {
          auto all = numbers(o.gradients);
          all.push_back(static_cast<double>(o.loss));
          return all;
        },
        [](const Objects& o) { return numbers(o.gradients); });
    expect_as_it_was(
        "forward", make, [&](Objects& o) { o.logits = o.model.forward(input, {.device = device}); },
        [](Objects& o) { return numbers(o.logits); });
  });
  const auto others = Model(model_config(), 2).parameters();
  const auto forward = [&](const Objects& o) {
    return numbers(o.model.forward(input), o.model.parameters());
  };
  expect_as_it_was(
      "set_parameters", make, [&](Objects& o) { o.model.set_parameters(others); }, forward,
      forward);
  expect_as_it_was(
      "parameters",
      [&] { return std::make_unique<Objects>(Objects{Model(model_config(), 1), gradients}); },
      [](Objects& o) { o.model.parameters(); }, forward,
      [&](const Objects& o) { return numbers(o.model.forward(input)); });
  const std::vector<Index> lengths{20, 7};
  const local_mha::GenerateConfig config{.length = 5, .prompt_lengths = lengths};
  const auto prompt = tokens(3, 2, 20);
  expect_as_it_was(
      "generate", make, [&](Objects& o) { o.made = o.model.generate(prompt, config); },
      [](Objects& o) { return numbers(o.made); });
}

/// A stream and what a call of it gave.
template <typename Stream, typename Output>
struct Streaming {
  Stream stream;
  Output output = {};
};

/// Every call of a stream: `push(device, stream, n)` gives a result.
template <typename Stream, typename Make, typename Push>
void expect_streams_as_they_were(Make&& make_stream, Push&& push) {
  using Output = decltype(push(Eigen::DefaultDevice(), std::declval<Stream&>(), Index{1}));
  using Objects = Streaming<Stream, Output>;
  // What goes on from here tells where the stream stands, and what it holds.
  const auto result = [&](const Objects& o) {
    auto all = numbers(o.output);
    Stream copy = o.stream;
    if (copy.position() == 0 || copy.answered() < copy.position() || copy.most_rollback() > 0)
      copy.rollback(0);
    append(all, push(Eigen::DefaultDevice(), copy, 7));
    append(all, copy.flush());
    for (Index b = 0; b < copy.batch(); ++b) all.push_back(static_cast<double>(copy.position(b)));
    return all;
  };
  const auto make = [&] {
    auto o = std::make_unique<Objects>(Objects{make_stream()});
    push(Eigen::DefaultDevice(), o->stream, 13);
    return o;
  };
  on_each_device([&](const auto& device) {
    for (const Index n : {1, 40}) {
      // What gives no results allocates nothing.
      if (make()->stream.results_of(n) == 0) continue;
      expect_as_it_was(
          "push " + std::to_string(n), make,
          [&](Objects& o) { o.output = push(device, o.stream, n); }, result, result);
    }
    // Nothing waits in a causal one, and nothing is allocated.
    if (make()->stream.results_of_flush() == 0) return;
    expect_as_it_was(
        "flush", make, [&](Objects& o) { o.output = o.stream.flush(device); },
        [&](const Objects& o) {
          Objects after{o.stream, o.output};
          after.stream.rollback(0);
          return result(after);
        });
  });
  std::ostringstream saved(std::ios::binary);
  {
    const auto far = make();
    push(Eigen::DefaultDevice(), far->stream, 30);
    far->stream.save(saved);
  }
  std::istringstream state(saved.str(), std::ios::binary);
  expect_as_it_was(
      "load", make,
      [&](Objects& o) {
        state.clear();
        state.seekg(0);
        o.stream.load(state);
      },
      result, result);
  const auto other = make();
  push(Eigen::DefaultDevice(), other->stream, 9);
  expect_as_it_was(
      "assignment", make, [&](Objects& o) { o.stream = other->stream; }, result, result);
  expect_as_it_was(
      "reset and rollback", make,
      [&](Objects& o) {
        Stream copy = o.stream;
        copy.rollback(1);
        copy.reset();
        o.stream = std::move(copy);
      },
      result, result);
}

TEST(OutOfMemory, InStreamsOfTheLayer) {
  for (const bool causal : {true, false})
    for (const Index batch : {1, 4}) {
      SCOPED_TRACE(testing::Message() << "causal " << causal << ", batch " << batch);
      LocalMHAConfig config = layer_config();
      config.causal = causal;
      const Layer layer(config, 1);
      const auto bias = random<3>(3, {3, 5, causal ? 10 : 15});
      expect_streams_as_they_were<Layer::Stream>(
          [&] { return Layer::Stream(layer, {batch, 4, 3}, view(bias)); },
          [&, x = random<3>(1, {batch, 40, 10})](const auto& device, Layer::Stream& stream,
                                                 Index n) {
            return stream.push(TensorView<const float, 3>(x.data(), {batch, n, 10}),
                               {.device = device});
          });
    }
}

local_mha::EncoderConfig encoder_config() {
  local_mha::EncoderConfig config{.depth = 2, .layers = {layer_config()}};
  config.layers.push_back(config.layers[0]);
  config.layers[1].causal = true;
  config.ff_dropout = 0.2;
  config.num_residual_streams = 3;
  return config;
}

TEST(OutOfMemory, InCallsOfTheEncoder) {
  using Module = local_mha::Encoder<float>;
  struct Objects {
    Module encoder;
    Module::Parameters gradients;
    Module::Workspace workspace = {};
    Module::Saved saved = {};
    Tensor<float, 3> y{1, 37, 10};
  };
  const Module encoder(encoder_config(), 1);
  const auto x = random<3>(1, {1, 37, 10});
  const auto small = random<3>(2, {1, 7, 10});
  const Training training{.seed = 3};
  on_each_device([&](const auto& device) {
    const auto make = [&] {
      auto o =
          std::make_unique<Objects>(Objects{encoder, Module::Parameters::zeros(encoder_config())});
      o->encoder.forward_into({o->y.data(), {1, 7, 10}}, o->workspace, small, {.device = device});
      o->encoder.forward_saving(o->saved, small, {.device = device});
      return o;
    };
    const auto make_saved = [&] {
      auto o = make();
      o->encoder.forward_saving(o->saved, x, {.training = training, .device = device});
      return o;
    };
    const auto backward = [&](Objects& o) {
      o.encoder.backward_into(o.y, o.workspace, o.gradients, o.saved, x, device);
    };
    expect_as_it_was(
        "forward_into", make,
        [&](Objects& o) {
          o.encoder.forward_into(o.y, o.workspace, x, {.training = training, .device = device});
        },
        [&](Objects& o) { return numbers(o.y); });
    expect_as_it_was(
        "forward_saving_into", make,
        [&](Objects& o) {
          o.encoder.forward_saving_into(o.y, o.workspace, o.saved, x,
                                        {.training = training, .device = device});
        },
        [&](Objects& o) {
          backward(o);
          return numbers(o.y, o.gradients);
        });
    expect_as_it_was(
        "backward_into", make_saved, backward, [](Objects& o) { return numbers(o.y, o.gradients); },
        [](const Objects& o) { return numbers(o.gradients); });
  });
  const auto others = Module(encoder_config(), 2).parameters();
  const auto forward = [&](const Module& m) { return numbers(m.forward(x), m.parameters()); };
  expect_as_it_was(
      "set_parameters", [&] { return std::make_unique<Module>(encoder); },
      [&](Module& m) { m.set_parameters(others); }, forward, forward);
  expect_as_it_was(
      "parameters", [&] { return std::make_unique<Module>(encoder_config(), 1); },
      [](Module& m) { m.parameters(); }, forward,
      [&](const Module& m) { return numbers(m.forward(x)); });
}

TEST(OutOfMemory, InStreamsOfTheEncoder) {
  using Stream = local_mha::Encoder<float>::Stream;
  const local_mha::Encoder<float> encoder(encoder_config(), 1);
  expect_streams_as_they_were<Stream>(
      [&] { return Stream(encoder, {3, 4, 3}); },
      [&, x = random<3>(1, {3, 40, 10})](const auto& device, Stream& stream, Index n) {
        return stream.push(TensorView<const float, 3>(x.data(), {3, n, 10}), {.device = device});
      });
}

TEST(OutOfMemory, InStreamsOfTheAttention) {
  const Attention attention({.window_size = 5, .dim = 6});
  expect_streams_as_they_were<Attention::Stream>(
      [&] { return Attention::Stream(attention, 2, 6, {3, 4, 3}); },
      [&, q = random<4>(1, {3, 2, 40, 6})](const auto& device, Attention::Stream& stream, Index n) {
        const TensorView<const float, 4> some(q.data(), {3, 2, n, 6});
        return stream.push(some, some, some, {.device = device});
      });
}

TEST(OutOfMemory, InStreamsOfTheModel) {
  for (const bool causal : {true, false}) {
    LocalTransformerConfig config = model_config();
    config.causal = causal;
    const Model model(config, 1);
    expect_streams_as_they_were<Model::Stream>(
        [&] { return Model::Stream(model, {3, 4, 3}); },
        [&, t = tokens(1, 3, 40)](const auto& device, Model::Stream& stream, Index n) {
          return stream.push(TensorView<const std::int64_t, 2>(t.data(), {3, n}),
                             {.device = device});
        });
  }
}

TEST(OutOfMemory, InTraining) {
  struct Objects {
    Model::Parameters weights;
    Model::Parameters gradients;
    local_mha::AdamW<Model::Parameters> optimizer;
  };
  const auto weights = Model(model_config(), 1).parameters();
  const auto gradients = Model(model_config(), 2).parameters();
  const auto make = [&] {
    return std::make_unique<Objects>(
        Objects{weights, gradients, local_mha::AdamW<Model::Parameters>({}, weights)});
  };
  const auto all = [](const Objects& o) {
    auto n = numbers(o.weights, o.gradients, o.optimizer.mean(), o.optimizer.square());
    n.push_back(static_cast<double>(o.optimizer.steps()));
    return n;
  };
  expect_as_it_was(
      "step", make, [](Objects& o) { o.optimizer.step(o.weights, o.gradients, 0.1); }, all, all);
  expect_as_it_was(
      "clip_gradients", make, [](Objects& o) { local_mha::clip_gradients(o.gradients, 0.5); }, all,
      all);
  const auto mean = Model(model_config(), 3).parameters();
  expect_as_it_was(
      "restore", make, [&](Objects& o) { o.optimizer.restore(7, mean, mean); }, all, all);
}

TEST(OutOfMemory, InTheFeedForward) {
  using FeedForward = local_mha::FeedForward<float>;
  using Matrix = local_mha::RowMatrix<float>;
  struct Objects {
    FeedForward layer;
    FeedForward::Saved saved = {};
    local_mha::FeedForwardParameters<float> gradients =
        local_mha::FeedForwardParameters<float>::zeros(6, 10);
    Matrix result = {};
  };
  auto parameters = local_mha::FeedForwardParameters<float>::zeros(6, 10);
  std::srand(1);
  local_mha::for_each_parameter(parameters, [](const auto&, auto& w) { w.setRandom(); });
  const Matrix x = Matrix::Random(50, 6);
  const Matrix small = Matrix::Random(5, 6);
  const auto result = [](const Objects& o) {
    auto all = numbers(o.gradients);
    all.insert(all.end(), o.result.data(), o.result.data() + o.result.size());
    return all;
  };
  on_each_device([&](const auto& device) {
    const auto make = [&] {
      auto o = std::make_unique<Objects>(Objects{FeedForward(parameters, 0.2)});
      o->layer.forward_saving(o->saved, small, {.device = device});
      return o;
    };
    const auto make_saved = [&] {
      auto o = make();
      o->layer.forward_saving(o->saved, x, {.training = Training{.seed = 3}, .device = device});
      return o;
    };
    const auto backward = [&](Objects& o) {
      o.result = o.layer.backward(o.gradients, o.saved, x, x, {.device = device});
    };
    expect_as_it_was(
        "forward_saving", make,
        [&](Objects& o) {
          o.result = o.layer.forward_saving(o.saved, x,
                                            {.training = Training{.seed = 3}, .device = device});
        },
        [&](Objects& o) {
          backward(o);
          return result(o);
        });
    expect_as_it_was("backward", make_saved, backward, result,
                     [](const Objects& o) { return numbers(o.gradients); });
  });
}

/// A Linear, LayerNorm or FeedForward of 6 channels.
template <typename Module, typename Config>
void fail_in_module(const Config& config) {
  struct Objects {
    Module module;
    typename Module::Saved saved = {};
    typename Module::Workspace workspace = {};
    typename Module::Parameters gradients;
    Tensor<float, 3> result = {};
  };
  const auto x = random<3>(1, {2, 25, 6});
  const auto other = Module(config, 2).parameters();
  const auto weights = [](const Objects& o) { return numbers(o.module.parameters()); };
  const auto result = [](const Objects& o) { return numbers(o.gradients, o.result); };
  on_each_device([&](const auto& device) {
    const auto make = [&] {
      return std::make_unique<Objects>(
          Objects{.module = Module(config, 1), .gradients = Module::Parameters::zeros(config)});
    };
    const auto make_saved = [&] {
      auto o = make();
      o->result = o->module.forward_saving(o->saved, x, {.device = device});
      return o;
    };
    expect_as_it_was(
        "forward", make, [&](Objects& o) { o.result = o.module.forward(x, {.device = device}); },
        result);
    expect_as_it_was(
        "forward_into", make_saved,
        [&](Objects& o) { o.module.forward_into(o.result, o.workspace, x, {.device = device}); },
        result);
    expect_as_it_was(
        "forward_saving", make,
        [&](Objects& o) { o.result = o.module.forward_saving(o.saved, x, {.device = device}); },
        [&](Objects& o) {
          o.module.backward(o.gradients, o.saved, o.result, x, {.device = device});
          return result(o);
        });
    expect_as_it_was(
        "backward", make_saved,
        [&](Objects& o) {
          o.result = o.module.backward(o.gradients, o.saved, x, x, {.device = device});
        },
        result, [](const Objects& o) { return numbers(o.gradients); });
    expect_as_it_was(
        "set_parameters", make, [&](Objects& o) { o.module.set_parameters(other); }, weights,
        weights);
  });
}

// What a backward pass adds to, and what it reads.
template <typename Gradients>
struct ToBeAddedTo {
  Gradients gradients;
  local_mha::RowMatrix<float> result = {};
};

/// \param backward `backward(objects)` adds to the gradients
template <typename Gradients, typename Backward>
void expect_gradients_as_they_were(const std::string& what, const Gradients& zeros,
                                   Backward&& backward) {
  using Objects = ToBeAddedTo<Gradients>;
  const auto gradients = [](const Objects& o) { return numbers(o.gradients); };
  expect_as_it_was(
      what, [&] { return std::make_unique<Objects>(Objects{zeros}); }, backward, gradients,
      gradients);
}

TEST(OutOfMemory, InComponentsOfTheirOwn) {
  using Rows = local_mha::RowMatrix<float>;
  const Rows x = Rows::Random(37, 12), grad = Rows::Random(37, 12);
  {
    using Parameters = local_mha::DynamicPositionBiasParameters<float>;
    auto weights = Parameters::zeros(5, 3);
    local_mha::for_each_parameter(weights, [](const auto&, auto& w) { w.setRandom(); });
    const local_mha::DynamicPositionBias<float> module(weights);
    const auto of_bias = random<3>(1, {3, 4, 8});
    expect_gradients_as_they_were("DynamicPositionBias", Parameters::zeros(5, 3),
                                  [&](auto& o) { module.backward(o.gradients, of_bias, 4, 1, 0); });
  }
  {
    using Parameters = local_mha::HyperConnectionParameters<float>;
    auto weights = Parameters::zeros(3, 12);
    local_mha::for_each_parameter(weights, [](const auto&, auto& w) { w.setRandom(); });
    const local_mha::HyperConnection<float> module(weights);
    const Rows streams = Rows::Random(37, 36), of_streams = Rows::Random(37, 36);
    expect_gradients_as_they_were("HyperConnection", Parameters::zeros(3, 12), [&](auto& o) {
      o.result = module.mix_backward(o.gradients, of_streams, streams, x, grad);
    });
  }
  {
    const local_mha::LayerNorm<float> module({.dim = 12});
    using Parameters = local_mha::LayerNormParameters<float>;
    expect_gradients_as_they_were("LayerNorm", Parameters::zeros({.dim = 12}), [&](auto& o) {
      o.result = module.backward(grad, x, o.gradients.weight, o.gradients.bias);
    });
  }
  {
    using Parameters = local_mha::LinearParameters<float>;
    const local_mha::LinearConfig config{.in_features = 12, .out_features = 12};
    const Rows weight = Rows::Random(12, 12);
    expect_gradients_as_they_were("linear_backward", Parameters::zeros(config), [&](auto& o) {
      o.result = local_mha::linear_backward(Eigen::DefaultDevice(), weight, x, grad,
                                            o.gradients.weight, &o.gradients.bias);
    });
  }
}

TEST(OutOfMemory, InTheModules) {
  fail_in_module<local_mha::Linear<float>>(
      local_mha::LinearConfig{.in_features = 6, .out_features = 6});
  fail_in_module<local_mha::LayerNorm<float>>(local_mha::LayerNormConfig{.dim = 6});
  fail_in_module<local_mha::FeedForward<float>>(local_mha::FeedForwardConfig{.dim = 6});
}

}  // namespace out_of_memory_test
