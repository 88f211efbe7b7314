// SPDX-License-Identifier: MIT
// A stack of layers in the callback of a sound card: blocks of 480 samples, 20 ms at 24 kHz. All
// memory is taken before; the callback allocates nothing, locks nothing and throws nothing.
#include <cmath>
#include <iostream>
#include <vector>

#include <local_mha/local_mha.hpp>

namespace {

constexpr Eigen::Index hop = 60, frames = 8, dim = 32;  // a frame is 60 samples, a block 8 frames

class Effect {
 public:
  explicit Effect(const local_mha::Encoder<float>& encoder) : stream_(encoder) {}

  // What the sound card calls, with `[frames][dim]` in and out. A causal stream answers at once.
  void process(const float* in, float* out) noexcept {
    const local_mha::TensorView<const float, 3> x(in, {1, frames, dim});
    const local_mha::TensorView<float, 3> y(out, {1, frames, dim});
    stream_.push_into(y, x);
  }

 private:
  local_mha::Encoder<float>::Stream stream_;
};

}  // namespace

int main() {
  const local_mha::LocalMHAConfig layer{
      .dim = dim, .window_size = 32, .dim_head = 16, .heads = 2, .causal = true, .prenorm = true};
  const local_mha::Encoder<float> encoder({.depth = 2, .layers = {layer}}, /*seed=*/1);
  Effect effect(encoder);

  constexpr Eigen::Index blocks = 50;  // a second
  local_mha::Tensor<float, 3> sound(1, blocks * frames, dim), result(1, blocks * frames, dim);
  sound.setRandom();
  for (Eigen::Index b = 0; b < blocks; ++b)
    effect.process(sound.data() + b * frames * dim, result.data() + b * frames * dim);

  const auto whole = encoder.forward(sound);  // the same, as if all had been there at once
  bool same = true;
  for (Eigen::Index i = 0; i < whole.size(); ++i)
    same = same && std::abs(whole.data()[i] - result.data()[i]) < 1e-5F;
  std::cout << blocks << " blocks of " << hop * frames << " samples, " << (same ? "as" : "not as")
            << " of the whole\n";
  return same ? 0 : 1;
}
