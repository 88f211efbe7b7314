// SPDX-License-Identifier: MIT
// Windows as other systems count them, and an attention with a score of one's own.
#include <iostream>

#include <local_mha/attention/token_window.hpp>
#include <local_mha/local_mha.hpp>

int main() {
  using namespace local_mha;
  // Which keys query 10 of 100 sees, by the conventions of four systems, all told "8".
  const auto show = [](const char* name, const TokenWindow& window) {
    const Window seen(LocalAttentionConfig{.token_window = window});
    const Range keys = seen.keys_visible(10, 100);
    std::cout << name << ": " << keys.begin << " to " << keys.end - 1 << '\n';
  };
  show("hugging_face", token_windows::hugging_face(8));
  show("modernbert", token_windows::modernbert(8));
  show("flash", token_windows::flash(8, 8));
  show("onnx_runtime", token_windows::onnx_runtime(8));

  // Four heads that share two heads of keys and values, as in Mistral and its kin.
  LocalMHAConfig config{.dim = 64, .dim_head = 16, .heads = 4};
  config.kv_heads = 2;
  config.token_window = token_windows::hugging_face(8);
  const LocalMHA<float> layer(config, /*seed=*/1);
  Tensor<float, 3> x(1, 100, 64);
  x.setRandom();
  std::cout << "to_qkv [" << layer.parameters().to_qkv.rows() << ", 64], result of "
            << layer.forward(x).dimension(1) << " rows\n";

  // A score of one's own: nearer keys count more. It is compiled into the kernel.
  const auto nearer = [](float s, Index, Index i, Index j) {
    return s - 0.1F * static_cast<float>(i - j);
  };
  const LocalAttention<float, decltype(nearer)> attention(
      {.token_window = token_windows::hugging_face(8)}, nearer);
  Tensor<float, 4> q(1, 2, 30, 16);  // [batch, heads, sequence, dim_head]
  q.setRandom();
  std::cout << "own score: " << attention.forward(q, q, q).dimension(2) << " rows\n";
  return 0;
}
