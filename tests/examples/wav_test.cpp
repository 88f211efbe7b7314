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
using local_mha::examples::until_the_end;

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
  EXPECT_EQ(samples_of(riff(chunk("fmt ", format(1, 1, 16)) + chunk("data", ""))), Samples{});
}

// What is stored for samples of 1/2, -1/4, 3/8, 0 and -1, of which each channel has its own: the
// mean of the channels is what is read.
struct Form {
  unsigned tag;  // 1: integers, 3: floating-point numbers
  unsigned channels;
  unsigned bits;
  unsigned rate;
  unsigned fmt_bytes;  // 16; 18: with a size of 0 behind; 40: the extensible format

  std::string name() const {
    return std::to_string(tag) + " of " + std::to_string(bits) + " bits, " +
           std::to_string(channels) + " channels, fmt of " + std::to_string(fmt_bytes);
  }
  std::string header_chunks() const {
    if (fmt_bytes < 40)
      return chunk("fmt ", format(tag, channels, bits, rate) + std::string(fmt_bytes - 16, '\0'));
    const std::string guid = std::string("\0\0\0\0\x10\0\x80\0\0\xAA\0\x38\x9B\x71", 14);
    return chunk("fmt ", format(0xFFFE, channels, bits, rate) + number(22, 2) + number(bits, 2) +
                             number((1U << channels) - 1, 4) + number(tag, 2) + guid);
  }
  std::string value(double sample) const {
    const unsigned bytes = bits / 8;
    if (tag == 3 && bits == 64) return number(std::bit_cast<std::uint64_t>(sample), 8);
    if (tag == 3) return number(std::bit_cast<std::uint32_t>(static_cast<float>(sample)), 4);
    const double scaled = sample * static_cast<double>(std::uint64_t{1} << (bits - 1));
    const auto whole = static_cast<std::int64_t>(scaled) + (bits == 8 ? 128 : 0);
    return number(static_cast<std::uint64_t>(whole), static_cast<int>(bytes));
  }
  std::string data() const {
    std::string data;
    for (const double sample : {0.5, -0.25, 0.375, 0.0, -1.0})
      for (unsigned channel = 0; channel < channels; ++channel) {
        // 1/8 of the first channel is in the last.
        const double moved = channels == 1 || sample == -1 ? 0
                             : channel == 0                ? -0.125
                             : channel == channels - 1     ? 0.125
                                                           : 0;
        data += value(sample + moved);
      }
    return data;
  }
};

const std::vector<float> samples_of_forms{0.5F, -0.25F, 0.375F, 0.0F, -1.0F};

const std::vector<Form> forms{
    {1, 1, 8, 8000, 16},   {1, 2, 8, 11025, 16},   {1, 1, 16, 8000, 16},   {1, 2, 16, 44100, 16},
    {1, 6, 16, 48000, 16}, {1, 64, 16, 48000, 16}, {1, 1, 24, 44100, 16},  {1, 2, 24, 96000, 16},
    {1, 3, 24, 48000, 16}, {1, 1, 32, 48000, 16},  {1, 2, 32, 192000, 16}, {3, 1, 32, 16000, 16},
    {3, 2, 32, 48000, 16}, {3, 1, 64, 48000, 16},  {3, 2, 64, 48000, 16},  {1, 1, 16, 22050, 18},
    {1, 2, 24, 48000, 18}, {3, 1, 32, 48000, 18},  {3, 2, 64, 48000, 18},  {1, 1, 8, 8000, 40},
    {1, 2, 16, 48000, 40}, {1, 1, 24, 48000, 40},  {1, 2, 32, 48000, 40},  {3, 1, 32, 48000, 40},
    {3, 2, 64, 48000, 40}};

TEST(Wav, ReadsEveryFormWithAnyChunksAround) {
  const std::string fact = chunk("fact", number(5, 4));
  const std::string list = chunk("LIST", std::string("INFOISFT\5\0\0\0Lavf\0", 17));
  const std::string junk = chunk("JUNK", std::string(28, '\0'));
  for (const Form& form : forms) {
    SCOPED_TRACE(form.name());
    const std::string fmt = form.header_chunks();
    const std::string data = chunk("data", form.data());
    for (const std::string& chunks :
         {fmt + data, fmt + fact + data, fmt + list + data, junk + fmt + data, fmt + data + list,
          list + fmt + data + junk}) {
      EXPECT_EQ(samples_of(riff(chunks)), samples_of_forms);
      std::istringstream in(riff(chunks));
      const auto header = read_wav_header(in, "x.wav");
      EXPECT_EQ(header.rate, form.rate);
      EXPECT_EQ(header.data_bytes, form.data().size());
    }
  }
}

// Into a pipe, whoever writes the header does not know the size: sox, arecord, ffmpeg and others
// have a number of their own for it, whether or not samples of this form divide it.
TEST(Wav, OfUnknownSizeGoesOnUntilTheEnd) {
  for (const Form& form : forms) {
    const std::string fmt = form.header_chunks();
    for (const std::uint64_t size :
         {0x0U, 0x7FFF0000U, 0x7FFFF000U, 0x7FFFFF00U, 0x7FFFFFDBU, 0x7FFFFFFFU, 0x80000000U,
          0x80000024U, 0xFFFFFF00U, 0xFFFFFFDBU, 0xFFFFFFFEU, 0xFFFFFFFFU})
      for (const std::uint64_t riff_size :
           {std::uint64_t{0}, fmt.size() + 12, size + 36, std::uint64_t{0xFFFFFFFF}}) {
        SCOPED_TRACE(form.name() + ", data of " + std::to_string(size));
        const std::string begin =
            "RIFF" + number(riff_size, 4) + "WAVE" + fmt + "data" + number(size, 4);
        EXPECT_EQ(samples_of(begin), std::vector<float>{});
        EXPECT_EQ(samples_of(begin + form.data()), samples_of_forms);
        // What a chunk of odd size ends with is no sample. Of one byte it would be one.
        if (form.data().size() % 2 == 1 && form.bits > 8) {
          EXPECT_EQ(samples_of(begin + form.data() + '\0'), samples_of_forms);
        }
      }
  }
}

TEST(Wav, OfNoSamplesDoesNotTakeOtherChunksForThem) {
  EXPECT_EQ(samples_of(riff(chunk("fmt ", format(1, 1, 16)) + chunk("data", "") +
                            chunk("LIST", std::string(26, 'x')))),
            std::vector<float>{});
}

// A size that nobody writes for one that is not known is what it says.
TEST(Wav, OfALargeSizeEndsWhereItSays) {
  for (const std::uint32_t size : {2U, 0x7FFEFFFEU, 0x80010000U, 0xC0000000U, 0xFFFEFFFEU}) {
    std::istringstream in(riff(chunk("fmt ", format(1, 1, 16)) + "data" + number(size, 4)));
    EXPECT_EQ(read_wav_header(in, "x.wav").data_bytes, size);
  }
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
    SampleReader reader(in, "x", {.is_float = true, .bits = 32}, until_the_end,
                        raw.substr(0, begun));
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
  expect(riff(chunk("fmt ", format(1, 1, 24)) + "data" + number(0xFFFFFFFF, 4) + "abcd"),
         "sample 1: expected whole samples, got a part of one");
  expect(
      riff(chunk("fmt ", format(1, 1, 24)) + "data" + number(0xFFFFFFFF, 4) + std::string(7, '\0')),
      "sample 2: expected whole samples, got a part of one");
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
