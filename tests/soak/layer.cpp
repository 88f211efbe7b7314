// SPDX-License-Identifier: MIT
// LocalMHA: results and gradients, in kept and poisoned room, on threads, at once, after failures.
#include <limits>
#include <span>
#include <utility>

#include <local_mha/extern.hpp>

#include "soak/cases.hpp"
#include "soak/devices.hpp"
#include "soak/layer_draw.hpp"
#include "soak/memory.hpp"

namespace soak {

namespace {

using local_mha::LocalMHA;
using local_mha::Tensor;

template <typename Scalar>
class LayerRun {
  using Layer = LocalMHA<Scalar>;
  using Parameters = typename Layer::Parameters;

 public:
  LayerRun(Check& check, Random& random)
      : check_(check),
        random_(random),
        draw_(draw_layer<Scalar>(random)),
        layer_(draw_.config, weights(draw_.parameters)),
        x_(support::tensor<Scalar, 3>(draw_.x)),
        grad_y_(support::tensor<Scalar, 3>(draw_.grad_y)),
        bias_(support::bias_tensor<Scalar>(draw_.bias)),
        view_(support::optional_view(bias_)),
        mask_(support::padding_mask(draw_.masked, draw_.batch(), draw_.seqlen())),
        gradients_(Parameters::zeros(draw_.config)) {
    check.description = describe(draw_);
  }

  void run() {
    const int threads = draw_threads(random_);
    check_.description += ", " + std::to_string(threads) + " threads";
    if (random_.chance(0.6)) spoil(threads);
    auto expected_gradients = reference::zeros_like(exact<Scalar>(draw_.parameters));
    const auto expected = expected_of<Scalar>(draw_, expected_gradients);
    const Tensor<Scalar, 3> y = forward(threads, workspace_);
    check_.compare("y", y.data(), expected.y);

    on_threads(threads, [&](const auto& device) {
      Tensor<Scalar, 3> same = nan_of(x_);
      layer_.forward_saving_into(device, same, workspace_, saved_, x_, mask_, view_, draw_.training,
                                 draw_.places.cu_seqlens);
      check_.compare("y of forward_saving", same.data(), expected.y);
    });
    const Tensor<Scalar, 3> grad_x = backward(threads);
    check_.compare("grad x", grad_x.data(), expected.x);
    if (!draw_.bias.empty()) check_.compare("grad bias", grad_bias_.data(), expected.bias);
    for_each_parameter(gradients_, [&](const std::string& name, const auto& gradient) {
      check_.compare("grad " + name, gradient.data(), expected_gradients.at(name));
    });

    if (random_.chance(0.15)) repeat_at_once(y);
    if (random_.chance(0.1)) repeat_on_other_threads(grad_x);
    if (random_.chance(0.1)) repeat_without_allocating();
    if (random_.chance(0.1)) shorten_without_allocating();
    if (random_.chance(0.15)) repeat_after_failing(y);
    if (random_.chance(0.1)) fail_backward();
    if (random_.chance(0.1)) fail_to_set_parameters(y);
  }

 private:
  static constexpr Scalar nan_ = std::numeric_limits<Scalar>::quiet_NaN();

  Parameters weights(const reference::Parameters<double>& values) const {
    auto parameters = Parameters::zeros(draw_.config);
    support::assign(parameters, values);
    return parameters;
  }
  static Tensor<Scalar, 3> nan_of(const Tensor<Scalar, 3>& like) {
    Tensor<Scalar, 3> nan(like.dimensions());
    nan.setConstant(nan_);
    return nan;
  }

  Tensor<Scalar, 3> forward(int threads, typename Layer::Workspace& workspace) const {
    Tensor<Scalar, 3> y = nan_of(x_);
    on_threads(threads, [&](const auto& device) {
      layer_.forward_into(device, y, workspace, x_, mask_, view_, draw_.training,
                          draw_.places.cu_seqlens);
    });
    return y;
  }

  // Sets gradients_ and grad_bias_, too.
  Tensor<Scalar, 3> backward(int threads) {
    Tensor<Scalar, 3> grad_x = nan_of(x_);
    set_zero(gradients_);
    grad_bias_.resize(bias_.dimensions());
    grad_bias_.setZero();
    on_threads(threads, [&](const auto& device) {
      layer_.backward_into(device, grad_x, workspace_, gradients_, saved_, grad_y_, x_, mask_,
                           view_, draw_.training, view_ ? &grad_bias_ : nullptr);
    });
    return grad_x;
  }

  // Calls with NaN leave NaN behind in what is kept, of this shape or of another.
  void spoil(int threads) {
    const Index more = random_.chance(0.3) ? random_.integer(1, 20) : 0;
    check_.description += ", spoiled by N " + std::to_string(draw_.seqlen() + more);
    Tensor<Scalar, 3> nan(draw_.batch(), draw_.seqlen() + more, draw_.config.dim);
    std::span<const Index> cuts;
    if (more == 0 && random_.chance(0.5)) cuts = draw_.places.cu_seqlens;
    nan.setConstant(nan_);
    Tensor<Scalar, 3> y(nan.dimensions());
    auto gradients = Parameters::zeros(draw_.config);
    on_threads(threads, [&](const auto& device) {
      layer_.forward_saving_into(device, y, workspace_, saved_, nan, {}, view_, {}, cuts);
      layer_.backward_into(device, y, workspace_, gradients, saved_, nan, nan, {}, view_);
    });
  }

  void repeat_at_once(const Tensor<Scalar, 3>& y) {
    const int threads = draw_threads(random_);
    Tensor<Scalar, 3> others[3];
    all_at_once(3, [&](int i) {
      typename Layer::Workspace workspace;
      others[i] = forward(i == 0 ? threads : 0, workspace);
    });
    for (const Tensor<Scalar, 3>& other : others)
      check_.same("y of calls at once", other.data(), y.data(), y.size());
  }

  void repeat_on_other_threads(const Tensor<Scalar, 3>& grad_x) {
    const Parameters before = gradients_;
    const Tensor<Scalar, 3> again = backward(draw_threads(random_));
    check_.same("grad x on other threads", again.data(), grad_x.data(), grad_x.size());
    const auto of_before = support::named<Scalar>(before);
    for_each_parameter(gradients_, [&](const std::string& name, const auto& gradient) {
      check_.same("grad " + name + " on other threads", gradient.data(),
                  of_before.at(name).data.data(), gradient.size());
    });
  }

  void repeat_without_allocating() {
    const int threads = draw_threads(random_);
    Tensor<Scalar, 3> y = forward(threads, workspace_);
    backward(threads);
    on_threads(threads, [&](const auto& device) {
      check_.equal("allocations of a repeated forward_into()", allocations_of([&] {
                     layer_.forward_into(device, y, workspace_, x_, mask_, view_, draw_.training,
                                         draw_.places.cu_seqlens);
                   }),
                   0L);
      check_.equal("allocations of a repeated backward_into()", allocations_of([&] {
                     layer_.backward_into(device, y, workspace_, gradients_, saved_, grad_y_, x_,
                                          mask_, view_, draw_.training,
                                          view_ ? &grad_bias_ : nullptr);
                   }),
                   0L);
    });
  }

  // What a longer sequence needs serves a shorter one.
  void shorten_without_allocating() {
    const int threads = draw_threads(random_);
    Tensor<Scalar, 3> x(draw_.batch(), draw_.seqlen() + random_.integer(1, 100), draw_.config.dim),
        y(x.dimensions()), shorter(x_.dimensions());
    x.setZero();
    on_threads(threads, [&](const auto& device) {
      layer_.forward_into(device, y, workspace_, x, {}, view_);
      check_.equal("allocations of a shorter forward_into()", allocations_of([&] {
                     layer_.forward_into(device, shorter, workspace_, x_, {}, view_);
                   }),
                   0L);
    });
  }

  // A backward pass that runs out of memory leaves the gradients as they were.
  void fail_backward() {
    const auto before = support::named<Scalar>(gradients_);
    typename Layer::Workspace workspace;
    Tensor<Scalar, 3> grad_x(x_.dimensions());
    bool failed = false;
    on_threads(draw_threads(random_), [&](const auto& device) {
      fail_after(random_.integer(0, 40));
      try {
        layer_.backward_into(device, grad_x, workspace, gradients_, saved_, grad_y_, x_, mask_,
                             view_, draw_.training);
      } catch (const std::bad_alloc&) {
        failed = true;
      }
      fail_no_more();
    });
    if (!failed) return;
    for_each_parameter(gradients_, [&](const std::string& name, const auto& gradient) {
      check_.same("grad " + name + " after a failed allocation", gradient.data(),
                  before.at(name).data.data(), gradient.size());
    });
  }

  // A call that runs out of memory leaves room in which the next one is right.
  void repeat_after_failing(const Tensor<Scalar, 3>& y) {
    typename Layer::Workspace fresh;
    auto& workspace = random_.chance(0.5) ? fresh : workspace_;
    Tensor<Scalar, 3> other(x_.dimensions());
    fail_after(random_.integer(0, 30));
    try {
      layer_.forward_into(other, workspace, x_, mask_, view_, draw_.training,
                          draw_.places.cu_seqlens);
    } catch (const std::bad_alloc&) {
    }
    fail_no_more();
    check_.same("y after a failed allocation", forward(0, workspace).data(), y.data(), y.size());
  }

  // A layer keeps its weights if it cannot take others.
  void fail_to_set_parameters(const Tensor<Scalar, 3>& y) {
    auto others = draw_.parameters;
    for (auto& [name, array] : others)
      for (double& number : array.data) number = round_to<Scalar>(number / 2 + 0.25);
    Parameters other = weights(others);
    fail_after(random_.integer(0, 12));
    bool failed = false;
    try {
      layer_.set_parameters(std::move(other));
    } catch (const std::bad_alloc&) {
      failed = true;
    }
    fail_no_more();
    if (!failed) return;
    typename Layer::Workspace workspace;
    check_.same("y of a layer that could not take other weights", forward(0, workspace).data(),
                y.data(), y.size());
  }

  Check& check_;
  Random& random_;
  LayerDraw draw_;
  Layer layer_;
  Tensor<Scalar, 3> x_, grad_y_, bias_;
  typename Layer::Bias view_;
  local_mha::PaddingMask mask_;
  typename Layer::Workspace workspace_;
  typename Layer::Saved saved_;
  Parameters gradients_;
  Tensor<Scalar, 3> grad_bias_;
};

}  // namespace

void layer_case(Check& check, Random& random) {
  if (random.chance(0.6))
    LayerRun<float>(check, random).run();
  else
    LayerRun<double>(check, random).run();
}

}  // namespace soak
