// SPDX-License-Identifier: MIT
/// \file
/// Whole WAV files.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <string>
#include <vector>

#include <local_mha/core/error.hpp>

#include "input_file.hpp"
#include "output_file.hpp"
#include "wav.hpp"

namespace local_mha::examples {

/// Samples of one channel.
struct Sound {
  std::uint32_t rate = 0;  ///< samples per second
  std::vector<float> samples;
};

/// Reads a WAV file to its end: the mean of the channels.
/// \throws std::runtime_error naming the file and what is wrong with it
/// \throws std::invalid_argument if it has fewer samples a second, or is shorter
inline Sound read_wav(const std::string& path, std::uint32_t least_rate = 1,
                      double least_seconds = 0) {
  std::ifstream file = open_input(path);
  const WavHeader header = read_wav_header(file, path);
  SampleReader reader(file, path, header.format, header.data_bytes);
  Sound sound{header.rate, {}};
  for (float sample = 0; reader.next(sample);) sound.samples.push_back(sample);
  const double seconds = static_cast<double>(sound.samples.size()) / sound.rate;
  if (sound.rate < least_rate || seconds < least_seconds)
    reject(path,
           std::to_string(least_rate) + " samples a second or more, for at least " +
               std::to_string(std::lround(1000 * least_seconds)) + " ms",
           sound.rate, " for ", std::lround(1000 * seconds));
  return sound;
}

/// Writes samples of `[-1, 1]` as 16 bits; what is beyond is cut off.
/// \throws io::SafetensorsError if the file cannot be written; what was there stays then
/// \throws std::invalid_argument if there are more samples than the format can count
inline void write_wav(const std::string& path, const Sound& sound) {
  constexpr std::size_t most = (std::size_t{1} << 31) - 32;
  if (sound.samples.size() > most)
    reject("sound", "at most " + std::to_string(most) + " samples", sound.samples.size());
  std::string bytes;
  const auto put = [&](std::uint32_t value, int size) {
    for (int i = 0; i < size; ++i) bytes += static_cast<char>(value >> (8 * i) & 255);
  };
  const auto size = static_cast<std::uint32_t>(2 * sound.samples.size());
  bytes += "RIFF";
  put(36 + size, 4);
  bytes += "WAVEfmt ";
  put(16, 4);
  put(1, 2);  // integers
  put(1, 2);  // channel
  put(sound.rate, 4);
  put(2 * sound.rate, 4);
  put(2, 2);
  put(16, 2);
  bytes += "data";
  put(size, 4);
  for (const float sample : sound.samples)
    put(static_cast<std::uint32_t>(std::lround(32767 * std::clamp(sample, -1.0F, 1.0F))), 2);
  write_file(path, bytes);
}

}  // namespace local_mha::examples
