// SPDX-License-Identifier: MIT
// Stacks of layers of the PyTorch package, from its files through io/: outputs, gradients, streams.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <local_mha/io/encoder_weights.hpp>

#include "support/golden_file.hpp"
#include "support/library.hpp"
#include "support/random.hpp"
#include "support/temporary_folder.hpp"

namespace golden_stack_test {

namespace io = local_mha::io;
using local_mha::Index;
using local_mha::Tensor;

/// What the tests hold outputs and gradients against, of the largest number.
template <typename Scalar>
constexpr double tolerance = std::is_same_v<Scalar, float> ? 2e-5 : 1e-10;
template <typename Scalar>
constexpr double gradient_tolerance = std::is_same_v<Scalar, float> ? 1e-4 : 1e-9;

local_mha::PaddingMask mask(const io::SafetensorsFile& file, Index begin, Index size) {
  if (!file.contains("input/keep_mask")) return {};
  const auto all = file.tensor<bool, 2>("input/keep_mask");
  Tensor<bool, 2> some(all.dimension(0), size);
  for (Index b = 0; b < all.dimension(0); ++b)
    for (Index i = 0; i < size; ++i) some(b, i) = all(b, begin + i);
  return local_mha::PaddingMask::keep(some);
}
local_mha::PaddingMask mask(const io::SafetensorsFile& file) {
  if (!file.contains("input/keep_mask")) return {};
  return local_mha::PaddingMask::keep(file.tensor<bool, 2>("input/keep_mask"));
}

template <typename Scalar, int Rank>
testing::AssertionResult is_output(const Tensor<Scalar, Rank>& got, const io::SafetensorsFile& file,
                                   const std::string& name) {
  const auto expected = support::array(file.tensor<double, Rank>(name));
  return support::close(support::array(got), expected,
                        tolerance<Scalar> * support::largest(expected));
}

/// \param branch what stands before a module's names in the file
template <typename Parameters>
void expect_gradients(const Parameters& gradients, const golden::Case& file,
                      const std::string& branch) {
  using Scalar = typename std::decay_t<decltype(gradients.layers[0].attention.to_qkv)>::Scalar;
  const auto expected = file.below("grad/param/");
  double largest = 0;
  for (const auto& [name, gradient] : expected)
    largest = std::max(largest, support::largest(gradient));
  std::size_t compared = 0;
  for (const auto& [library_name, gradient] : support::named<Scalar>(gradients)) {
    std::string name = library_name;
    if (const auto at = name.find("branch."); at != std::string::npos) name.replace(at, 7, branch);
    ASSERT_EQ(expected.count(name), 1U) << name;
    double size = support::largest(expected.at(name));
    if (size < 1e-12 * largest) size = largest;
    // A single number is the sum of terms as large as its module's other gradients.
    if (gradient.data.size() == 1)
      size = std::max(
          size, support::largest(expected.at(name.substr(0, name.rfind('.')) + ".static_alpha")));
    EXPECT_TRUE(support::close(gradient, expected.at(name), gradient_tolerance<Scalar> * size))
        << name;
    ++compared;
  }
  EXPECT_EQ(compared, expected.size());
}

/// `n` positions of rows `[B, N, …]` from `begin` on.
template <typename T, int Rank>
Tensor<T, Rank> positions(const Tensor<T, Rank>& t, Index begin, Index n) {
  std::array<Index, static_cast<std::size_t>(Rank)> offset{};
  auto extent = local_mha::TensorView<const T, Rank>(t).dimensions();
  offset[1] = begin;
  extent[1] = n;
  return t.slice(offset, extent);
}

/// What a stream gives of `n` positions, in chunks of a size or, if it is 0, of random sizes.
template <typename Stream, typename Push>
auto streamed(Stream& stream, Index n, Index size, Push&& push) {
  Random random(3);
  std::vector<decltype(stream.flush())> parts;
  const auto take = [&](auto part) {
    if (part.dimension(1) > 0) parts.push_back(std::move(part));
  };
  for (Index i = 0; i < n;) {
    const Index some = std::min<Index>(n - i, size > 0 ? size : random.integer(0, 9));
    take(push(i, some));
    i += some;
  }
  take(stream.flush());
  auto all = parts.at(0);
  for (std::size_t i = 1; i < parts.size(); ++i) {
    const decltype(all) joined = all.concatenate(parts[i], 1);
    all = joined;
  }
  return all;
}

template <typename Scalar>
void expect_encoder(const std::filesystem::path& path) {
  const io::SafetensorsFile file(path);
  const golden::Case naive = golden::read(path);
  auto [config, parameters] = io::load_encoder<Scalar>(file);
  const local_mha::Encoder<Scalar> encoder(config, std::move(parameters));
  const auto x = file.tensor<Scalar, 3>("input/x");
  EXPECT_TRUE(is_output(encoder.forward(x, {.mask = mask(file)}), file, "output/y"));

  typename local_mha::Encoder<Scalar>::Saved saved;
  EXPECT_TRUE(is_output(encoder.forward_saving(saved, x, {.mask = mask(file)}), file, "output/y"));
  auto gradients = local_mha::EncoderParameters<Scalar>::zeros(config);
  const auto grad_x = encoder.backward(gradients, saved, file.tensor<Scalar, 3>("input/grad_y"));
  EXPECT_TRUE(support::close(support::array(grad_x), naive.at("grad/x"),
                             gradient_tolerance<Scalar> * support::largest(naive.at("grad/x"))));
  expect_gradients(gradients, naive, naive.kind == "Stack" ? "" : "branch.");

  for (const Index chunk : {1, 3, 0}) {
    typename local_mha::Encoder<Scalar>::Stream stream(encoder, {.batch = x.dimension(0)});
    const auto y = streamed(stream, x.dimension(1), chunk, [&](Index begin, Index n) {
      return stream.push(positions(x, begin, n), {.mask = mask(file, begin, n)});
    });
    EXPECT_TRUE(is_output(y, file, "output/y")) << "in chunks of " << chunk;
  }
}

template <typename Scalar>
void expect_transformer(const std::filesystem::path& path) {
  const io::SafetensorsFile file(path);
  auto [config, parameters] = io::load_local_transformer<Scalar>(file);
  const local_mha::LocalTransformer<Scalar> model(config, std::move(parameters));
  const auto tokens = file.tensor<std::int64_t, 2>("input/tokens");
  const auto inputs = positions(tokens, 0, tokens.dimension(1) - 1);
  EXPECT_TRUE(is_output(model.forward(inputs), file, "output/logits"));
  auto gradients = local_mha::LocalTransformerParameters<Scalar>::zeros(config);
  const auto loss = file.scalar<double>("output/loss");
  EXPECT_NEAR(static_cast<double>(model.loss(tokens)), loss, tolerance<Scalar> * loss);
  EXPECT_NEAR(static_cast<double>(model.backward(gradients, tokens)), loss,
              tolerance<Scalar> * loss);
  expect_gradients(gradients, golden::read(path), "branch.");
  for (const Index chunk : {1, 3, 0}) {
    typename local_mha::LocalTransformer<Scalar>::Stream stream(model,
                                                                {.batch = tokens.dimension(0)});
    const auto logits = streamed(stream, inputs.dimension(1), chunk, [&](Index begin, Index n) {
      return stream.push(positions(inputs, begin, n));
    });
    EXPECT_TRUE(is_output(logits, file, "output/logits")) << "in chunks of " << chunk;
  }
}

class GoldenStack : public testing::TestWithParam<std::filesystem::path> {
 protected:
  template <typename Scalar>
  static void expect_all() {
    if (io::SafetensorsFile(GetParam()).contains("input/tokens"))
      expect_transformer<Scalar>(GetParam());
    else
      expect_encoder<Scalar>(GetParam());
  }
};

TEST_P(GoldenStack, InDouble) { expect_all<double>(); }
TEST_P(GoldenStack, InFloat) { expect_all<float>(); }

/// Names and dtypes and shapes and values of a state dict.
std::set<std::string> state_dict(const io::SafetensorsFile& file) {
  std::set<std::string> all;
  for (const std::string& name : file.names()) {
    if (!name.starts_with("param/")) continue;
    std::string text = name + " " + to_string(file.entry(name));
    for (const double value : file.read<double>(name)) text += " " + std::to_string(value);
    all.insert(text);
  }
  return all;
}

// What is written has Python's names and shapes, down to those of single numbers.
TEST_P(GoldenStack, IsWrittenAsPythonDoes) {
  const io::SafetensorsFile file(GetParam());
  io::SafetensorsWriter writer;
  if (file.contains("input/tokens")) {
    const auto [config, parameters] = io::load_local_transformer<double>(file);
    io::add_local_transformer(writer, config, parameters);
  } else {
    const auto [config, parameters] = io::load_encoder<double>(file);
    const bool is_list = io::read_case(file).kind == "Stack";
    io::add_encoder(writer, config, parameters,
                    is_list ? io::EncoderForm::module_list : io::EncoderForm::local_transformer);
  }
  const support::TemporaryFolder folder;
  const auto path = folder / "written.safetensors";
  writer.write(path);
  const io::SafetensorsFile written(path);
  EXPECT_EQ(state_dict(written), state_dict(file));
  EXPECT_EQ(io::read_case(written).kind, io::read_case(file).kind);
  if (!file.contains("input/tokens")) {
    EXPECT_EQ(io::load_encoder<double>(written).config, io::load_encoder<double>(file).config);
  }
}

std::vector<std::filesystem::path> files() {
  return golden::files(LOCAL_MHA_TEST_DATA_DIR "/golden_stack");
}

INSTANTIATE_TEST_SUITE_P(, GoldenStack, testing::ValuesIn(files()),
                         [](const auto& file) { return file.param.stem().string(); });

}  // namespace golden_stack_test
