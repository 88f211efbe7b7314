// SPDX-License-Identifier: MIT
// LocalAttention: results and gradients, in kept and poisoned room, on threads, at once.
#include <algorithm>
#include <limits>

#include <local_mha/extern.hpp>

#include "soak/attention_draw.hpp"
#include "soak/cases.hpp"
#include "soak/devices.hpp"
#include "soak/memory.hpp"

namespace soak {

namespace {

using local_mha::LocalAttention;
using local_mha::Tensor;

template <typename Scalar>
class AttentionRun {
  using Attention = LocalAttention<Scalar>;
  using Call = typename Attention::Call;

 public:
  AttentionRun(Check& check, Random& random)
      : check_(check),
        random_(random),
        draw_(draw_attention<Scalar>(random)),
        attention_(draw_.config),
        q_(support::tensor<Scalar, 4>(draw_.q)),
        k_(support::tensor<Scalar, 4>(draw_.k)),
        v_(support::tensor<Scalar, 4>(draw_.v)),
        grad_out_(support::tensor<Scalar, 4>(draw_.grad_out)),
        bias_(support::bias_tensor<Scalar>(draw_.bias)),
        relative_bias_(support::optional_tensor<Scalar, 2>(draw_.relative_bias)),
        sinks_(support::optional_tensor<Scalar, 1>(draw_.sinks)),
        global_(support::flag_tensor(draw_.places.global, draw_.batch(), draw_.seqlen())),
        plain_(support::attention_call<Scalar>(draw_.call, {}, support::optional_view(bias_))) {
    plain_.relative_bias = support::optional_view(relative_bias_);
    plain_.sinks = support::optional_view(sinks_);
    call_ = plain_;
    call_.mask = support::padding_mask(draw_.masked, draw_.batch(), draw_.seqlen());
    call_.cu_seqlens = draw_.packed_call().cu_seqlens;
    call_.global_rows = support::optional_view(global_);
    check.description = describe(draw_);
  }

  void run() {
    const int threads = draw_threads(random_);
    check_.description += ", " + std::to_string(threads) + " threads";
    if (random_.chance(0.6)) spoil(threads);
    const auto expected = expected_of<Scalar>(draw_);
    Tensor<Scalar, 4> out = forward(threads, workspace_);
    check_.compare("out", out.data(), expected.out);

    typename Attention::Saved saved;
    on_threads(threads, [&](const auto& device) {
      saved = attention_.forward_saving(q_, k_, v_, on(device, call_));
    });
    check_.compare("saved.out", saved.out.data(), expected.out);
    check_.compare("saved.lse", saved.lse.data(), expected.lse);
    backward(threads, saved);
    check_.compare("grad q", gradients_.q.data(), expected.q);
    check_.compare("grad k", gradients_.k.data(), expected.k);
    check_.compare("grad v", gradients_.v.data(), expected.v);
    check_.equal("grad bias given", gradients_.attn_bias.has_value(), !draw_.bias.empty());
    if (gradients_.attn_bias)
      check_.compare("grad bias", gradients_.attn_bias->data(), expected.bias);
    check_.equal("grad relative_bias given", gradients_.relative_bias.has_value(),
                 !draw_.relative_bias.empty());
    if (gradients_.relative_bias)
      check_.compare("grad relative_bias", gradients_.relative_bias->data(),
                     expected.relative_bias);
    check_.equal("grad sinks given", gradients_.sinks.has_value(), !draw_.sinks.empty());
    if (gradients_.sinks) check_.compare("grad sinks", gradients_.sinks->data(), expected.sinks);

    if (random_.chance(0.2)) repeat_at_once(out);
    if (random_.chance(0.1)) repeat_on_other_threads(saved);
    if (random_.chance(0.1)) repeat_without_allocating(saved);
    if (random_.chance(0.1)) repeat_after_failing(out);
    if (random_.chance(0.1)) shorten_without_allocating();
  }

 private:
  static constexpr Scalar nan_ = std::numeric_limits<Scalar>::quiet_NaN();

  static Call on(const local_mha::AnyDevice& device, Call call) {
    call.device = device;
    return call;
  }

  Tensor<Scalar, 4> forward(int threads, typename Attention::Workspace& workspace) const {
    Tensor<Scalar, 4> out(q_.dimensions());
    out.setConstant(nan_);
    on_threads(threads, [&](const auto& device) {
      attention_.forward_into(out, workspace, q_, k_, v_, on(device, call_));
    });
    return out;
  }

  void backward(int threads, const typename Attention::Saved& saved) {
    on_threads(threads, [&](const auto& device) {
      attention_.backward_into(gradients_, workspace_, saved, grad_out_, q_, k_, v_,
                               on(device, call_));
    });
  }

  // Calls with NaN leave NaN behind in what is kept, of this shape or of another.
  void spoil(int threads) {
    const Index more =
        random_.chance(0.4) ? random_.integer(-std::min<Index>(20, draw_.seqlen()), 20) : 0;
    const Index d =
        draw_.config.dim || random_.chance(0.8) ? draw_.dim_head() : random_.integer(1, 40);
    check_.description +=
        ", spoiled by N " + std::to_string(draw_.seqlen() + more) + " D " + std::to_string(d);
    const Index n = draw_.seqlen() + more;
    Tensor<Scalar, 4> q(draw_.batch(), draw_.heads(), n, d),
        k(draw_.batch(), draw_.kv_heads(), n, d);
    q.setConstant(nan_);
    k.setConstant(nan_);
    Call call = plain_;
    if (more == 0 && random_.chance(0.5)) call = call_;
    call.mask = {};
    on_threads(threads, [&](const auto& device) {
      call.device = device;
      const auto saved = attention_.forward_saving(q, k, k, call);
      Tensor<Scalar, 4> out(q.dimensions());
      attention_.forward_into(out, workspace_, q, k, k, call);
      attention_.backward_into(gradients_, workspace_, saved, q, q, k, k, call);
    });
  }

  void repeat_at_once(const Tensor<Scalar, 4>& out) {
    const int threads = draw_threads(random_);
    Tensor<Scalar, 4> others[3];
    all_at_once(3, [&](int i) {
      typename Attention::Workspace workspace;
      Tensor<Scalar, 4>& other = others[i];
      other.resize(q_.dimensions());
      other.setConstant(nan_);
      if (i == 0)
        other = forward(threads, workspace);
      else
        attention_.forward_into(other, workspace, q_, k_, v_, call_);
    });
    for (const Tensor<Scalar, 4>& other : others)
      check_.same("out of calls at once", other.data(), out.data(), out.size());
  }

  void repeat_on_other_threads(const typename Attention::Saved& saved) {
    const auto before = gradients_;
    backward(draw_threads(random_), saved);
    const auto same = [&](const char* what, const auto& got, const auto& expected) {
      check_.same(what, got.data(), expected.data(), got.size());
    };
    same("grad q on other threads", gradients_.q, before.q);
    same("grad k on other threads", gradients_.k, before.k);
    same("grad v on other threads", gradients_.v, before.v);
    if (before.attn_bias)
      same("grad bias on other threads", *gradients_.attn_bias, *before.attn_bias);
    if (before.relative_bias)
      same("grad relative_bias on other threads", *gradients_.relative_bias, *before.relative_bias);
    if (before.sinks) same("grad sinks on other threads", *gradients_.sinks, *before.sinks);
  }

  void repeat_without_allocating(const typename Attention::Saved& saved) {
    const int threads = draw_threads(random_);
    Tensor<Scalar, 4> out = forward(threads, workspace_);
    backward(threads, saved);
    on_threads(threads, [&](const auto& device) {
      check_.equal("allocations of a repeated forward_into()", allocations_of([&] {
                     attention_.forward_into(out, workspace_, q_, k_, v_, on(device, call_));
                   }),
                   0L);
      check_.equal("allocations of a repeated backward_into()", allocations_of([&] {
                     attention_.backward_into(gradients_, workspace_, saved, grad_out_, q_, k_, v_,
                                              on(device, call_));
                   }),
                   0L);
    });
  }

  // What a longer sequence needs serves a shorter one.
  void shorten_without_allocating() {
    const int threads = draw_threads(random_);
    const Index n = draw_.seqlen() + random_.integer(1, 100), d = draw_.dim_head();
    Tensor<Scalar, 4> q(draw_.batch(), draw_.heads(), n, d),
        k(draw_.batch(), draw_.kv_heads(), n, d), out(q.dimensions()), shorter(q_.dimensions());
    q.setZero();
    k.setZero();
    on_threads(threads, [&](const auto& device) {
      attention_.forward_into(out, workspace_, q, k, k, on(device, plain_));
      check_.equal("allocations of a shorter forward_into()", allocations_of([&] {
                     attention_.forward_into(shorter, workspace_, q_, k_, v_, on(device, plain_));
                   }),
                   0L);
    });
  }

  // A call that runs out of memory leaves room in which the next one is right.
  void repeat_after_failing(const Tensor<Scalar, 4>& out) {
    typename Attention::Workspace fresh;
    auto& workspace = random_.chance(0.5) ? fresh : workspace_;
    Tensor<Scalar, 4> other(q_.dimensions());
    fail_after(random_.integer(0, 20));
    try {
      attention_.forward_into(other, workspace, q_, k_, v_, call_);
    } catch (const std::bad_alloc&) {
    }
    fail_no_more();
    check_.same("out after a failed allocation", forward(0, workspace).data(), out.data(),
                out.size());
  }

  Check& check_;
  Random& random_;
  AttentionDraw draw_;
  Attention attention_;
  Tensor<Scalar, 4> q_, k_, v_, grad_out_;
  Tensor<Scalar, 3> bias_;
  Tensor<Scalar, 2> relative_bias_;
  Tensor<Scalar, 1> sinks_;
  Tensor<bool, 2> global_;
  Call plain_;  // without a mask, packed sequences and global rows
  Call call_;
  typename Attention::Workspace workspace_;
  typename Attention::Gradients gradients_;
};

}  // namespace

void attention_case(Check& check, Random& random) {
  if (random.chance(0.7))
    AttentionRun<float>(check, random).run();
  else
    AttentionRun<double>(check, random).run();
}

}  // namespace soak
