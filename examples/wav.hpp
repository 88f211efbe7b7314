// SPDX-License-Identifier: MIT
/// \file
/// Samples of WAV files, and raw ones, as they come.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <istream>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace local_mha::examples {

/// How samples are stored, little-endian.
struct SampleFormat {
  bool is_float = false;
  int bits = 16;  ///< integers: 8 (unsigned), 16, 24 or 32; floating-point numbers: 32 or 64
  int channels = 1;

  std::size_t bytes() const { return static_cast<std::size_t>(bits / 8); }
  /// Of one sample in every channel.
  std::size_t frame_bytes() const { return bytes() * static_cast<std::size_t>(channels); }
};

/// The size of data that go on as long as there is input.
inline constexpr std::uint64_t until_the_end = std::numeric_limits<std::uint64_t>::max();

/// Samples of a stream of bytes, one at a time: the mean of the channels, in `[-1, 1]` if they are
/// integers.
class SampleReader {
 public:
  /// \param name of the source, for errors
  /// \param format at most 64 channels
  /// \param size bytes of samples, or until_the_end
  /// \param begun the first of them, if they have been read already
  SampleReader(std::istream& in, std::string name, const SampleFormat& format,
               std::uint64_t size = until_the_end, std::string begun = {})
      : in_(&in),
        name_(std::move(name)),
        format_(format),
        size_(size),
        left_(size),
        begun_(std::move(begun)) {}

  const SampleFormat& format() const { return format_; }

  /// The next sample. False at the end.
  /// \throws std::runtime_error if the data end within a sample, or one is not finite
  bool next(float& sample) {
    std::array<char, most_bytes> bytes{};
    if (!read(bytes)) return false;
    double sum = 0;
    for (int channel = 0; channel < format_.channels; ++channel)
      sum += decoded(bytes.data() + static_cast<std::size_t>(channel) * format_.bytes());
    sample = static_cast<float>(sum / format_.channels);
    if (!std::isfinite(sample)) fail("expected finite samples, got one that is not");
    ++count_;
    return true;
  }

 private:
  static constexpr std::size_t most_bytes = 64 * 8;

  [[noreturn]] void fail(const std::string& problem) const {
    throw std::runtime_error(name_ + ": sample " + std::to_string(count_) + ": " + problem);
  }

  // One sample of every channel. False at the end.
  bool read(std::array<char, most_bytes>& bytes) {
    const std::size_t wanted = format_.frame_bytes();
    if (left_ == 0) return false;
    if (left_ < wanted) fail("expected whole samples, got a part of one");
    std::size_t got = begun_.copy(bytes.data(), wanted);
    begun_.erase(0, got);
    in_->read(bytes.data() + got, static_cast<std::streamsize>(wanted - got));
    got += static_cast<std::size_t>(in_->gcount());
    if (in_->bad()) fail("cannot be read");
    if (size_ == until_the_end) {
      // A chunk of an odd number of bytes has one more, 0.
      const bool is_odd = wanted % 2 == 1 && count_ % 2 == 1;
      if (got == 0 || (is_odd && got == 1 && wanted > 1 && bytes[0] == 0)) return false;
      if (got % format_.bytes() != 0) fail("expected whole samples, got a part of one");
      if (got < wanted)
        fail("expected " + std::to_string(format_.channels) + " channels of every sample, got " +
             std::to_string(got / format_.bytes()) + " of the last");
      return true;
    }
    if (got < wanted) fail("expected " + std::to_string(left_) + " more bytes, got the end");
    left_ -= got;
    return true;
  }

  double decoded(const char* bytes) const {
    std::uint64_t word = 0;
    for (std::size_t i = 0; i < format_.bytes(); ++i)
      word |= std::uint64_t{static_cast<unsigned char>(bytes[i])} << (8 * i);
    if (format_.is_float)
      return format_.bits == 64
                 ? std::bit_cast<double>(word)
                 : static_cast<double>(std::bit_cast<float>(static_cast<std::uint32_t>(word)));
    if (format_.bits == 8) return (static_cast<double>(word) - 128) / 128;
    // The sign bit becomes that of 64 bits.
    const int unused = 64 - format_.bits;
    const auto value = static_cast<std::int64_t>(word << unused) >> unused;
    return static_cast<double>(value) / std::ldexp(1.0, format_.bits - 1);
  }

  std::istream* in_;
  std::string name_;
  SampleFormat format_;
  std::uint64_t size_;
  std::uint64_t left_;
  std::string begun_;
  std::uint64_t count_ = 0;
};

/// What stands before the samples of a WAV file.
struct WavHeader {
  SampleFormat format;
  std::uint32_t rate = 0;        ///< samples per second
  std::uint64_t data_bytes = 0;  ///< of the samples, or until_the_end
};

namespace detail {

/// What programs write for a size that they do not know yet and that a pipe does not let them mend:
/// the most that 31 or 32 bits hold, less a header, a block or a page.
inline bool stands_for_unknown(std::uint32_t size) {
  return (size >= 0x7FFF'0000 && size <= 0x8000'FFFF) || size >= 0xFFFF'0000;
}

}  // namespace detail

/// Reads a WAV file up to its samples. Understands integers of 8 to 32 bits and floating-point
/// numbers, of 1 to 64 channels. Where the header was written before the end was known, as into a
/// pipe, the samples go on until the end.
/// \param begun the first bytes, at most 12, if they have been read already
/// \throws std::runtime_error saying what was expected and what is there
inline WavHeader read_wav_header(std::istream& in, const std::string& name,
                                 std::string_view begun = {}) {
  const auto fail = [&](const std::string& problem) {
    throw std::runtime_error(name + ": " + problem);
  };
  const auto read = [&](char* to, std::size_t size, std::string_view what) {
    in.read(to, static_cast<std::streamsize>(size));
    if (in.bad()) fail("cannot be read");
    if (static_cast<std::size_t>(in.gcount()) < size)
      fail("expected " + std::string(what) + ", got the end of the file");
  };
  const auto number = [](const char* bytes, std::size_t size) {
    std::uint32_t value = 0;
    for (std::size_t i = 0; i < size; ++i)
      value |= std::uint32_t{static_cast<unsigned char>(bytes[i])} << (8 * i);
    return value;
  };
  std::array<char, 12> riff{};
  begun.copy(riff.data(), riff.size());
  read(riff.data() + begun.size(), riff.size() - begun.size(), "a WAV file's header");
  if (std::memcmp(riff.data(), "RIFF", 4) != 0 || std::memcmp(riff.data() + 8, "WAVE", 4) != 0)
    fail("expected a WAV file, which begins with RIFF and WAVE, got other bytes");

  const std::uint32_t riff_bytes = number(riff.data() + 4, 4);
  std::uint64_t position = riff.size();
  WavHeader header;
  while (true) {
    std::array<char, 8> chunk{};
    read(chunk.data(), chunk.size(), "a chunk of samples (data)");
    const std::uint32_t size = number(chunk.data() + 4, 4);
    position += chunk.size();
    if (std::memcmp(chunk.data(), "data", 4) == 0) {
      if (header.rate == 0) fail("expected the samples' format (fmt) before them, got none");
      // None at all, if the file has other chunks behind them.
      const bool is_empty = size == 0 && !detail::stands_for_unknown(riff_bytes) &&
                            std::uint64_t{riff_bytes} + 8 > position;
      const bool is_known = size > 0 ? !detail::stands_for_unknown(size) : is_empty;
      const std::size_t of_a_sample = header.format.frame_bytes();
      if (is_known && size % of_a_sample != 0)
        fail("data: expected a multiple of " + std::to_string(of_a_sample) + " bytes, got " +
             std::to_string(size));
      header.data_bytes = is_known ? size : until_the_end;
      return header;
    }
    position += std::uint64_t{size} + size % 2;
    if (std::memcmp(chunk.data(), "fmt ", 4) != 0) {
      // A chunk of odd size has a byte of padding.
      in.ignore(static_cast<std::streamsize>(size) + size % 2);
      continue;
    }
    std::array<char, 40> fmt{};
    if (size < 16) fail("fmt: expected at least 16 bytes, got " + std::to_string(size));
    const std::size_t used = size < fmt.size() ? size : fmt.size();
    read(fmt.data(), used, "the samples' format");
    in.ignore(static_cast<std::streamsize>(size - used) + size % 2);
    std::uint32_t tag = number(fmt.data(), 2);
    if (tag == 0xFFFE) {
      if (size < 26) fail("fmt: expected at least 26 bytes, got " + std::to_string(size));
      tag = number(fmt.data() + 24, 2);
    }
    const std::uint32_t channels = number(fmt.data() + 2, 2);
    const std::uint32_t rate = number(fmt.data() + 4, 4);
    const std::uint32_t align = number(fmt.data() + 12, 2);
    const std::uint32_t bits = number(fmt.data() + 14, 2);
    if (tag != 1 && tag != 3)
      fail("fmt: expected integers (1) or floating-point numbers (3), got format " +
           std::to_string(tag));
    const bool fits =
        tag == 3 ? bits == 32 || bits == 64 : bits == 8 || bits == 16 || bits == 24 || bits == 32;
    if (!fits)
      fail("fmt: expected " + std::string(tag == 3 ? "32 or 64" : "8, 16, 24 or 32") +
           " bits in a number, got " + std::to_string(bits));
    if (channels < 1 || channels > 64)
      fail("fmt: expected 1 to 64 channels, got " + std::to_string(channels));
    if (rate < 1 || rate > 10'000'000)
      fail("fmt: expected 1 to 10000000 samples per second, got " + std::to_string(rate));
    if (align != channels * bits / 8)
      fail("fmt: expected " + std::to_string(channels * bits / 8) + " bytes in a sample, got " +
           std::to_string(align));
    header.format = {.is_float = tag == 3,
                     .bits = static_cast<int>(bits),
                     .channels = static_cast<int>(channels)};
    header.rate = rate;
  }
}

}  // namespace local_mha::examples
