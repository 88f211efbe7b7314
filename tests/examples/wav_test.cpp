// SPDX-License-Identifier: MIT
// WAV files as they are, and as they should not be.
#include "wav.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using local_mha::examples::read_wav_header;
using local_mha::examples::SampleReader;

std::string number(std::uint64_t value, int bytes) {
  std::string text;
  for (int i = 0; i < bytes; ++i) text += static_cast<char>(value >> (8 * i) & 255);
  return text;
}

std::string chunk(const std::string& name, const std::string& data) {
  return name + number(data.size(), 4) + data + std::string(data.size() % 2, '\0');
}

std::string format(unsigned tag, unsigned channels, unsigned bits, unsigned rate = 8000) {
  const unsigned align = channels * bits / 8;
  return number(tag, 2) + number(channels, 2) + number(rate, 4) +
         number(std::uint64_t{rate} * align, 4) + number(align, 2) + number(bits, 2);
}

std::string riff(const std::string& chunks) {
  return "RIFF" + number(chunks.size() + 4, 4) + "WAVE" + chunks;
}

std::vector<float> samples_of(const std::string& file) {
  std::istringstream in(file);
  const auto header = read_wav_header(in, "x.wav");
  SampleReader reader(in, "x.wav", header.format, header.data_bytes);
  std::vector<float> samples;
  for (float sample = 0; reader.next(sample);) samples.push_back(sample);
  return samples;
}

std::string error_of(const std::string& file) {
  try {
    samples_of(file);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no error";
}

TEST(Wav, ReadsEveryFormat) {
  using Samples = std::vector<float>;
  EXPECT_EQ(samples_of(riff(chunk("fmt ", format(1, 1, 16)) +
                            chunk("data", number(0x8000, 2) + number(0x4000, 2) + number(0, 2)))),
            (Samples{-1, 0.5, 0}));
  EXPECT_EQ(samples_of(riff(chunk("fmt ", format(1, 1, 8)) + chunk("data", "\xC0\x40\x80"))),
            (Samples{0.5, -0.5, 0}));
  EXPECT_EQ(samples_of(riff(chunk("fmt ", format(1, 1, 24)) +
                            chunk("data", number(0xC00000, 3) + number(0x400000, 3)))),
            (Samples{-0.5, 0.5}));
  EXPECT_EQ(
      samples_of(riff(chunk("fmt ", format(1, 1, 32)) + chunk("data", number(0x20000000, 4)))),
      (Samples{0.25}));
  EXPECT_EQ(samples_of(riff(chunk("fmt ", format(3, 1, 32)) +
                            chunk("data", number(std::bit_cast<std::uint32_t>(-1.5F), 4)))),
            (Samples{-1.5}));
  EXPECT_EQ(samples_of(riff(chunk("fmt ", format(3, 1, 64)) +
                            chunk("data", number(std::bit_cast<std::uint64_t>(0.125), 8)))),
            (Samples{0.125}));
  // Two channels, their mean; other chunks around, of odd size.
  EXPECT_EQ(
      samples_of(riff(
          chunk("LIST", "odd") + chunk("fmt ", format(1, 2, 16) + "ab") + chunk("junk", "more!") +
          chunk("data", number(0x4000, 2) + number(0xC000, 2) + number(0x4000, 2) + number(0, 2)) +
          chunk("tail", "x"))),
      (Samples{0, 0.25}));
  // The extensible format says its own behind.
  EXPECT_EQ(samples_of(riff(chunk("fmt ", format(0xFFFE, 1, 16) + number(22, 2) + number(16, 2) +
                                              number(4, 4) + number(1, 2) + std::string(14, '\0')) +
                            chunk("data", number(0x4000, 2)))),
            (Samples{0.5}));
  // A recorder that does not know its end.
  EXPECT_EQ(samples_of(riff(chunk("fmt ", format(1, 1, 16)) + "data" + number(0xFFFFFFFF, 4) +
                            number(0x4000, 2) + number(0x2000, 2))),
            (Samples{0.5, 0.25}));
  EXPECT_EQ(samples_of(riff(chunk("fmt ", format(1, 1, 16)) + chunk("data", ""))), Samples{});
}

TEST(Wav, GoesOnBehindWhatHasBeenReadAlready) {
  const std::string file =
      riff(chunk("fmt ", format(1, 1, 16)) + chunk("data", number(0x4000, 2) + number(0x2000, 2)));
  for (std::size_t begun = 0; begun <= 12; ++begun) {
    std::istringstream in(file.substr(begun));
    const auto header = read_wav_header(in, "x.wav", file.substr(0, begun));
    EXPECT_EQ(header.rate, 8000U);
    EXPECT_EQ(header.data_bytes, 4U);
  }
  // Raw numbers of 4 bytes, of which some have been read, and not all of the next.
  const std::string raw = number(std::bit_cast<std::uint32_t>(0.5F), 4) +
                          number(std::bit_cast<std::uint32_t>(-2.0F), 4);
  for (std::size_t begun = 0; begun <= 8; ++begun) {
    std::istringstream in(raw.substr(begun));
    SampleReader reader(in, "x", {.is_float = true, .bits = 32},
                        std::numeric_limits<std::uint64_t>::max(), raw.substr(0, begun));
    float sample = 0;
    ASSERT_TRUE(reader.next(sample));
    EXPECT_EQ(sample, 0.5F);
    ASSERT_TRUE(reader.next(sample));
    EXPECT_EQ(sample, -2.0F);
    EXPECT_FALSE(reader.next(sample));
  }
}

TEST(Wav, SaysWhatIsWrong) {
  const std::string fmt = chunk("fmt ", format(1, 2, 16));
  const std::string data = chunk("data", std::string(8, '\0'));
  const auto expect = [](const std::string& file, const std::string& error) {
    EXPECT_EQ(error_of(file), "x.wav: " + error);
  };
  expect("", "expected a WAV file's header, got the end of the file");
  expect("RIFX" + riff(fmt + data).substr(4),
         "expected a WAV file, which begins with RIFF and WAVE, got other bytes");
  expect(riff(data), "expected the samples' format (fmt) before them, got none");
  expect(riff(fmt), "expected a chunk of samples (data), got the end of the file");
  expect(riff("fmt " + number(16, 4) + "abc"),
         "expected the samples' format, got the end of the file");
  expect(riff(chunk("fmt ", "short") + data), "fmt: expected at least 16 bytes, got 5");
  expect(riff(chunk("fmt ", format(2, 1, 4)) + data),
         "fmt: expected integers (1) or floating-point numbers (3), got format 2");
  expect(riff(chunk("fmt ", format(0xFFFE, 1, 16)) + data),
         "fmt: expected at least 26 bytes, got 16");
  expect(riff(chunk("fmt ", format(1, 1, 12)) + data),
         "fmt: expected 8, 16, 24 or 32 bits in a number, got 12");
  expect(riff(chunk("fmt ", format(3, 1, 16)) + data),
         "fmt: expected 32 or 64 bits in a number, got 16");
  expect(riff(chunk("fmt ", format(1, 0, 16)) + data), "fmt: expected 1 to 64 channels, got 0");
  expect(riff(chunk("fmt ", format(1, 65, 16)) + data), "fmt: expected 1 to 64 channels, got 65");
  expect(riff(chunk("fmt ", format(1, 1, 16, 0)) + data),
         "fmt: expected 1 to 10000000 samples per second, got 0");
  std::string odd_align = format(1, 2, 16);
  odd_align[12] = 3;
  expect(riff(chunk("fmt ", odd_align) + data), "fmt: expected 4 bytes in a sample, got 3");
  expect(riff(fmt + chunk("data", std::string(7, '\0'))),
         "data: expected a multiple of 4 bytes, got 7");
  expect(riff(fmt + "data" + number(400, 4) + std::string(8, '\0')),
         "sample 2: expected 392 more bytes, got the end");
  expect(riff(chunk("fmt ", format(1, 1, 16)) + "data" + number(0xFFFFFFFF, 4) + "abc"),
         "sample 1: expected whole samples, got a part of one");
  expect(riff(fmt + "data" + number(0xFFFFFFFF, 4) + "abcdef"),
         "sample 1: expected 2 channels of every sample, got 1 of the last");
  expect(
      riff(chunk("fmt ", format(3, 1, 32)) +
           chunk("data",
                 number(std::bit_cast<std::uint32_t>(std::numeric_limits<float>::quiet_NaN()), 4))),
      "sample 0: expected finite samples, got one that is not");
}

// No file makes it read what is not there, or go on for ever.
TEST(Wav, EndsWithEveryByteChanged) {
  const std::string file = riff(chunk("LIST", "odd") + chunk("fmt ", format(1, 2, 16)) +
                                chunk("data", std::string(64, '\x11')));
  ASSERT_EQ(error_of(file), "no error");
  for (std::size_t size = 0; size < file.size(); ++size)
    EXPECT_NE(error_of(file.substr(0, size)), "no error");
  for (std::size_t at = 0; at < file.size(); ++at)
    for (int byte = 0; byte < 256; ++byte) {
      std::string damaged = file;
      damaged[at] = static_cast<char>(byte);
      error_of(damaged);
    }
}

}  // namespace
