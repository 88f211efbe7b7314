// SPDX-License-Identifier: MIT
// A program's global locale, which says how numbers are written, changes neither the state of a
// stream nor an error message.
#include <gtest/gtest.h>

#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>

#include <local_mha/local_mha.hpp>

namespace locale_test {

using local_mha::Index;
using local_mha::Tensor;

/// Numbers as German writes them, and words for true and false.
struct Separated : std::numpunct<char> {
  char do_decimal_point() const override { return ','; }
  char do_thousands_sep() const override { return '.'; }
  std::string do_grouping() const override { return "\3"; }
  std::string do_truename() const override { return "wahr"; }
};

class GlobalLocale : public testing::Test {
 protected:
  GlobalLocale() : before_(std::locale::global({std::locale::classic(), new Separated})) {}
  ~GlobalLocale() override { std::locale::global(before_); }

  /// Runs a call in the classic locale.
  template <typename Call>
  static auto plainly(Call&& call) {
    const std::locale separated = std::locale::global(std::locale::classic());
    auto result = call();
    std::locale::global(separated);
    return result;
  }

 private:
  std::locale before_;
};

/// The state of a stream, written in one locale, is taken in the other.
template <typename Stream, typename Module, typename... Sizes>
void expect_state_passes(const Module& module, const Sizes&... sizes) {
  std::ostringstream written(std::ios::binary);
  Stream(module, sizes...).save(written);
  const std::locale here = std::locale::global(std::locale::classic());
  std::istringstream state(written.str(), std::ios::binary);
  EXPECT_NO_THROW(Stream(module, sizes...).load(state));
  std::locale::global(here);
}

TEST_F(GlobalLocale, DoesNotChangeStatesOfStreams) {
  ASSERT_EQ((std::ostringstream() << std::boolalpha << 1024 << true).str(), "1.024wahr");
  const local_mha::LocalAttention<float> attention(
      {.window_size = 1024, .causal = true, .scale = 0.25});
  expect_state_passes<local_mha::LocalAttention<float>::Stream>(attention, Index{2}, Index{8});
  local_mha::LocalMHAConfig config{.dim = 16, .window_size = 1024, .dim_head = 8, .heads = 2};
  config.causal = config.use_xpos = true;
  config.xpos_scale_base = 512.5;
  expect_state_passes<local_mha::LocalMHA<float>::Stream>(local_mha::LocalMHA<float>(config));
  const local_mha::LocalTransformer<float> model({.num_tokens = 2000,
                                                  .max_seq_len = 3000,
                                                  .dim = 8,
                                                  .depth = 1,
                                                  .local_attn_window_size = 1024,
                                                  .dim_head = 4,
                                                  .heads = 2,
                                                  .ff_mult = 2.5});
  expect_state_passes<local_mha::LocalTransformer<float>::Stream>(model);
}

TEST_F(GlobalLocale, DoesNotChangeErrorMessages) {
  const auto message = [](auto&& call) {
    try {
      call();
    } catch (const std::invalid_argument& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  const auto shape = [&] {
    return message([] {
      Tensor<float, 3> x(1, 2, 3000);
      local_mha::LocalMHA<float>({.dim = 1024, .window_size = 4, .dim_head = 2, .heads = 1})
          .forward(x);
    });
  };
  EXPECT_EQ(shape(), "x: expected shape [any, any, 1024], got [1, 2, 3000]");
  EXPECT_EQ(shape(), plainly(shape));
  const auto number = [&] {
    return message([] { local_mha::LocalAttention<float>({.window_size = 4, .dropout = 1234.5}); });
  };
  EXPECT_NE(number().find("got 1234.5"), std::string::npos) << number();
}

}  // namespace locale_test
