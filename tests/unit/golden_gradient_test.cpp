// SPDX-License-Identifier: MIT
// The gradients of the PyTorch package: every one in the golden files.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include <local_mha/io/weights.hpp>

#include "support/golden_file.hpp"
#include "support/library.hpp"

namespace golden_gradient_test {

namespace io = local_mha::io;
using local_mha::Index;
using local_mha::Tensor;

/// Relative to the largest element of a gradient.
template <typename Scalar>
constexpr double tolerance = std::is_same_v<Scalar, float> ? 1e-4 : 1e-9;

/// Compares gradients with a file's `grad/…`, and knows which of them it has compared.
template <typename Scalar>
class Gradients {
 public:
  explicit Gradients(const golden::Case& file) : file_(file) {
    for (const auto& [name, tensor] : file_.tensors)
      if (name.rfind("grad/", 0) == 0) largest_ = std::max(largest_, support::largest(tensor));
  }

  void expect(const std::string& name, const reference::Array<Scalar>& got) {
    const auto& expected = file_.at("grad/" + name);
    // The softmax does not feel what all scores have in common, such as the last bias of the
    // dynamic position bias: its gradient is 0 but for roundings of larger terms.
    double size = support::largest(expected);
    if (size < 1e-12 * largest_) size = largest_;
    EXPECT_TRUE(support::close(got, expected, tolerance<Scalar> * size)) << name;
    compared_.insert("grad/" + name);
  }
  template <typename Parameters>
  void expect_parameters(const Parameters& parameters) {
    for (const auto& [name, gradient] : support::named<Scalar>(parameters))
      expect("param/" + name, gradient);
  }
  void expect_all_compared() const {
    for (const auto& [name, tensor] : file_.tensors)
      if (name.rfind("grad/", 0) == 0) {
        EXPECT_EQ(compared_.count(name), 1U) << name;
      }
    EXPECT_FALSE(compared_.empty());
  }

 private:
  const golden::Case& file_;
  double largest_ = 0;
  std::set<std::string> compared_;
};

local_mha::PaddingMask mask(const io::SafetensorsFile& file) {
  if (!file.contains("input/keep_mask")) return {};
  return local_mha::PaddingMask::keep(file.tensor<bool, 2>("input/keep_mask"));
}

template <typename Scalar>
void expect_golden_gradients(const std::filesystem::path& path) {
  const io::SafetensorsFile file(path);
  const golden::Case naive = golden::read(path);
  const io::Case described = io::read_case(file);
  Gradients<Scalar> gradients(naive);
  Tensor<Scalar, 3> attn_bias(0, 0, 0);
  if (file.contains("input/attn_bias")) attn_bias = file.tensor<Scalar, 3>("input/attn_bias");
  const auto bias = support::optional_view(attn_bias);
  if (described.kind == "LocalAttention") {
    local_mha::LocalAttentionCall<Scalar> call{.mask = mask(file), .attn_bias = bias};
    if (described.call.contains("window_size"))
      call.window_size = described.call["window_size"].get<Index>();
    const local_mha::LocalAttention<Scalar> attention(io::load_local_attention(file));
    const auto q = file.tensor<Scalar, 4>("input/q");
    const auto k = file.tensor<Scalar, 4>("input/k");
    const auto v = file.tensor<Scalar, 4>("input/v");
    const auto saved = attention.forward_saving(q, k, v, call);
    auto g = attention.backward(saved, file.tensor<Scalar, 4>("input/grad_y"), q, k, v, call);
    // There q and k are one.
    if (attention.config().shared_qk)
      g.q += g.k;
    else
      gradients.expect("k", support::array(g.k));
    gradients.expect("q", support::array(g.q));
    gradients.expect("v", support::array(g.v));
    if (g.attn_bias) gradients.expect("attn_bias", support::array(*g.attn_bias));
  } else if (described.kind == "LocalMHA") {
    auto [config, parameters] = io::load_local_mha<Scalar>(file);
    const local_mha::LocalMHA<Scalar> mha(config, std::move(parameters));
    const auto x = file.tensor<Scalar, 3>("input/x");
    typename local_mha::LocalMHA<Scalar>::Saved saved;
    mha.forward_saving(saved, x, mask(file), bias);
    auto of_weights = local_mha::LocalMHAParameters<Scalar>::zeros(config);
    Tensor<Scalar, 3> of_bias = attn_bias.constant(Scalar(0));
    const auto of_x = mha.backward(of_weights, saved, file.tensor<Scalar, 3>("input/grad_y"), x,
                                   mask(file), bias, {}, bias ? &of_bias : nullptr);
    gradients.expect("x", support::array(of_x));
    gradients.expect_parameters(of_weights);
    if (bias) gradients.expect("attn_bias", support::array(of_bias));
  } else {
    ASSERT_EQ(described.kind, "LocalTransformer");
    auto [config, parameters] = io::load_local_transformer<Scalar>(file);
    const local_mha::LocalTransformer<Scalar> model(config, std::move(parameters));
    auto of_weights = local_mha::LocalTransformerParameters<Scalar>::zeros(config);
    const Scalar loss = model.backward(of_weights, file.tensor<std::int64_t, 2>("input/tokens"));
    EXPECT_NEAR(static_cast<double>(loss), file.scalar<double>("output/loss"),
                (std::is_same_v<Scalar, float> ? 1e-5 : 1e-12) * static_cast<double>(loss));
    gradients.expect_parameters(of_weights);
  }
  gradients.expect_all_compared();
}

/// The files that hold gradients.
std::vector<std::filesystem::path> files() {
  std::vector<std::filesystem::path> found;
  for (const auto& path : golden::files(LOCAL_MHA_TEST_DATA_DIR "/golden"))
    if (!golden::read(path).below("grad/").empty()) found.push_back(path);
  return found;
}

class GoldenGradients : public testing::TestWithParam<std::filesystem::path> {};

TEST_P(GoldenGradients, InDouble) { expect_golden_gradients<double>(GetParam()); }
TEST_P(GoldenGradients, InFloat) { expect_golden_gradients<float>(GetParam()); }

INSTANTIATE_TEST_SUITE_P(, GoldenGradients, testing::ValuesIn(files()),
                         [](const auto& file) { return file.param.stem().string(); });

TEST(FilesWithGradients, AreAllButOne) { EXPECT_EQ(files().size(), 38U); }

}  // namespace golden_gradient_test
