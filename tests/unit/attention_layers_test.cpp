// SPDX-License-Identifier: MIT
// Attention layers of published models: what they give, from files as transformers writes them.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include <nlohmann/json.hpp>

#include <local_mha/core/random.hpp>
#include <local_mha/io/attention_case.hpp>
#include <local_mha/io/attention_layers.hpp>
#include <local_mha/local_mha.hpp>

#include "support/golden_file.hpp"

namespace attention_layers_test {

using local_mha::Index;
using local_mha::LocalMHA;
using local_mha::LocalMHAParameters;
using local_mha::PaddingMask;
using local_mha::RandomSequence;
using local_mha::Tensor;
using local_mha::TensorView;
namespace io = local_mha::io;
using io::AttentionLayer;
using io::SafetensorsFile;
using Json = nlohmann::json;

template <typename Scalar>
using Numbers = std::map<std::string, std::vector<Scalar>>;

/// `[B, N, C]` from `[B, C, N]`, and the reverse.
template <typename Scalar>
Tensor<Scalar, 3> transposed(const Tensor<Scalar, 3>& t) {
  return t.shuffle(std::array<Index, 3>{0, 2, 1});
}

template <typename Scalar>
std::vector<Scalar> numbers(const Tensor<Scalar, 3>& t) {
  return {t.data(), t.data() + t.size()};
}

double largest(const std::vector<double>& numbers) {
  double most = 0;
  for (const double number : numbers) most = std::max(most, std::abs(number));
  return most;
}

/// \param size of which the tolerance is a share
template <typename Scalar>
testing::AssertionResult close(const std::vector<Scalar>& got, const std::vector<double>& expected,
                               double tolerance, std::optional<double> size = {}) {
  if (got.size() != expected.size())
    return testing::AssertionFailure() << got.size() << " numbers, not " << expected.size();
  const double most = tolerance * size.value_or(largest(expected));
  for (std::size_t i = 0; i < got.size(); ++i)
    if (!(std::abs(static_cast<double>(got[i]) - expected[i]) <= most))
      return testing::AssertionFailure()
             << got[i] << " at " << i << ", not " << expected[i] << " up to " << most;
  return testing::AssertionSuccess();
}

/// A module of a model, with what it takes, and what it gives.
template <typename Scalar>
class Module {
 public:
  explicit Module(const SafetensorsFile& file)
      : file_(file),
        layer_(io::read_attention_case(file)),
        mha_(layer_.config, io::load_attention_parameters<Scalar>(file, "param/", layer_)),
        x_(rows("input/x")) {
    if (file.contains("input/keep_mask"))
      mask_ = PaddingMask::keep(file.tensor<bool, 2>("input/keep_mask"));
  }

  const LocalMHA<Scalar>& mha() const { return mha_; }
  const Tensor<Scalar, 3>& x() const { return x_; }
  const PaddingMask& mask() const { return mask_; }

  std::vector<Scalar> output() const { return output(mha_.forward(x_, mask_)); }

  /// What the module gives, without the rows of padding.
  std::vector<Scalar> output(Tensor<Scalar, 3> y) const {
    if (layer_.residual) y += x_;
    clear_padding(y);
    return numbers(layer_.channels_first ? transposed(y) : y);
  }
  std::vector<double> expected_output() const {
    Tensor<double, 3> y = file_.tensor<double, 3>("output/y");
    clear_padding(y);
    return numbers(y);
  }

  /// By the names of the file.
  Numbers<Scalar> gradients() const {
    auto gradients = LocalMHAParameters<Scalar>::zeros(mha_.config());
    typename LocalMHA<Scalar>::Saved saved;
    mha_.forward_saving(saved, x_, mask_);
    const auto grad_y = rows("input/grad_y");
    Tensor<Scalar, 3> grad_x = mha_.backward(gradients, saved, grad_y, x_, mask_);
    if (layer_.residual) grad_x += grad_y;
    Numbers<Scalar> all;
    for (auto& [name, gradient] : io::attention_gradients(layer_, gradients))
      all["grad/param/" + name] = std::move(gradient);
    all["grad/x"] = numbers(layer_.channels_first ? transposed(grad_x) : grad_x);
    return all;
  }

 private:
  Tensor<Scalar, 3> rows(const char* name) const {
    auto t = file_.tensor<Scalar, 3>(name);
    return layer_.channels_first ? transposed(t) : t;
  }
  template <typename Real>
  void clear_padding(Tensor<Real, 3>& y) const {
    for (Index b = 0; mask_ && b < y.dimension(0); ++b)
      for (Index i = 0; i < y.dimension(1); ++i)
        if (mask_.row(b)[i] != 0) y.chip(b, 0).chip(i, 0).setZero();
  }

  SafetensorsFile file_;
  AttentionLayer layer_;
  LocalMHA<Scalar> mha_;
  Tensor<Scalar, 3> x_;
  PaddingMask mask_;
};

template <typename Scalar>
constexpr double tolerance = std::is_same_v<Scalar, float> ? 2e-5 : 1e-10;
template <typename Scalar>
constexpr double gradient_tolerance = std::is_same_v<Scalar, float> ? 1e-4 : 1e-9;

template <typename Scalar>
void expect_output_and_gradients(const SafetensorsFile& file) {
  const Module<Scalar> module(file);
  EXPECT_TRUE(close(module.output(), module.expected_output(), tolerance<Scalar>));

  Numbers<double> expected;
  double largest_of_all = 0;
  for (const std::string& name : file.names())
    if (name.starts_with("grad/")) {
      expected[name] = file.read<double>(name);
      largest_of_all = std::max(largest_of_all, largest(expected[name]));
    }
  ASSERT_FALSE(expected.empty());
  const Numbers<Scalar> got = module.gradients();
  EXPECT_EQ(got.size(), expected.size());
  for (const auto& [name, gradient] : expected) {
    ASSERT_TRUE(got.contains(name)) << name;
    // One that is 0 by its nature is the rounding of larger ones.
    const double size = largest(gradient);
    EXPECT_TRUE(close(got.at(name), gradient, gradient_tolerance<Scalar>,
                      size < 1e-12 * largest_of_all ? largest_of_all : size))
        << name;
  }
}

/// Rows `[begin, begin + size)`.
template <typename Scalar>
Tensor<Scalar, 3> rows_of(const Tensor<Scalar, 3>& t, Index begin, Index size) {
  return t.slice(std::array<Index, 3>{0, begin, 0},
                 std::array<Index, 3>{t.dimension(0), size, t.dimension(2)});
}
PaddingMask rows_of(const PaddingMask& mask, Index begin, Index size) {
  if (!mask) return {};
  Tensor<bool, 2> masked(mask.shape()[0], size);
  for (Index b = 0; b < masked.dimension(0); ++b)
    for (Index i = 0; i < size; ++i) masked(b, i) = mask.row(b)[begin + i] != 0;
  return PaddingMask::masked(masked);
}

/// \param chunk rows; 0: random, from 0 to 9
template <typename Scalar>
void expect_stream(const SafetensorsFile& file, Index chunk) {
  const Module<Scalar> module(file);
  const auto& x = module.x();
  typename LocalMHA<Scalar>::Stream stream(module.mha(), {.batch = x.dimension(0)});
  Tensor<Scalar, 3> y(x.dimensions());
  Index answered = 0;
  const auto take = [&](const Tensor<Scalar, 3>& part) {
    for (Index i = 0; i < part.dimension(1); ++i) y.chip(answered++, 1) = part.chip(i, 1);
  };
  RandomSequence random(7);
  for (Index begin = 0; begin < x.dimension(1);) {
    const Index wanted = chunk > 0 ? chunk : static_cast<Index>(10 * random.uniform());
    const Index size = std::min(wanted, x.dimension(1) - begin);
    take(stream.push(rows_of(x, begin, size), {.mask = rows_of(module.mask(), begin, size)}));
    begin += size;
  }
  take(stream.flush());
  ASSERT_EQ(answered, x.dimension(1));
  EXPECT_TRUE(close(module.output(y), module.expected_output(), tolerance<Scalar>));
}

class AttentionLayers : public testing::TestWithParam<std::filesystem::path> {
 protected:
  SafetensorsFile file_{GetParam()};
};

TEST_P(AttentionLayers, GiveTheModelsOutputAndGradientsInDouble) {
  expect_output_and_gradients<double>(file_);
}

TEST_P(AttentionLayers, GiveTheModelsOutputAndGradientsInFloat) {
  expect_output_and_gradients<float>(file_);
}

TEST_P(AttentionLayers, GiveTheSameAsAStream) {
  for (const Index chunk : {1, 3, 7, 0}) {
    expect_stream<double>(file_, chunk);
    expect_stream<float>(file_, chunk);
  }
}

/// What a golden file has in the place of a model's: the configuration, with its model_type.
Json config_of(const SafetensorsFile& file) {
  const Json described = Json::parse(file.metadata().at("case"));
  Json config = described["config"];
  config["model_type"] = described["family"];
  return config;
}

/// The weights of a golden file as they stand in a model's, behind a prefix.
SafetensorsFile model_file(const SafetensorsFile& file, const std::string& prefix) {
  io::SafetensorsWriter writer;
  for (const std::string& name : file.names())
    if (name.starts_with("param/"))
      writer.add(prefix + '.' + name.substr(6), file.entry(name).shape, file.read<double>(name));
  writer.add("model.embed_tokens.weight", {1, 1}, std::vector<double>{1});
  return SafetensorsFile::from_bytes(writer.bytes(), "model");
}

TEST_P(AttentionLayers, AreLoadedByThePrefixOfTheModule) {
  const Json described = Json::parse(file_.metadata().at("case"));
  const std::string prefix =
      "model.layers." + std::to_string(described["layer"].get<int>()) + ".self_attn";
  const Module<double> module(file_);
  const auto layer =
      io::load_attention<double>(model_file(file_, prefix), prefix, config_of(file_));
  // The model rounds frequencies that are stretched to float.
  const bool rounds = described["family"] == "gpt_oss";
  EXPECT_TRUE(close(module.output(layer.forward(module.x(), module.mask())),
                    module.expected_output(), rounds ? 1e-6 : 1e-10));
}

std::string name_of(const testing::TestParamInfo<std::filesystem::path>& info) {
  return info.param.stem().string();
}

/// The files whose module is a LocalMHA.
std::vector<std::filesystem::path> files() {
  auto all = golden::files(LOCAL_MHA_TEST_DATA_DIR "/golden_sliding");
  std::erase_if(all, [](const auto& path) { return path.stem() == "longformer"; });
  return all;
}

INSTANTIATE_TEST_SUITE_P(Golden, AttentionLayers, testing::ValuesIn(files()), name_of);

}  // namespace attention_layers_test
