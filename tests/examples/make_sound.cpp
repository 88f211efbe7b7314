// SPDX-License-Identifier: MIT
// Writes a tone into a folder: sound.wav, 2000 samples of two channels at 8000 a second in 16 bits,
// sound.f32, 4000 samples as raw numbers, and the WAV file again with sizes as they are written
// into a pipe: sound_0.wav, sound_7fffff00.wav and sound_ffffffff.wav.
#include <bit>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <string>
#include <utility>

namespace {

void put(std::ostream& out, std::uint32_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) out.put(static_cast<char>(value >> (8 * i) & 255));
}

double tone(int sample) { return 0.5 * std::sin(0.3 * sample); }

constexpr std::uint32_t channels = 2, rate = 8000, bytes = 2, align = channels * bytes;

/// \param size of the data, as the header says
void write_wav(std::ostream& out, std::uint32_t samples, std::uint32_t size) {
  out << "RIFF";
  put(out, 36 + size, 4);
  out << "WAVEfmt ";
  put(out, 16, 4);
  put(out, 1, 2);  // integers
  put(out, channels, 2);
  put(out, rate, 4);
  put(out, rate * align, 4);
  put(out, align, 2);
  put(out, 8 * bytes, 2);
  out << "data";
  put(out, size, 4);
  for (std::uint32_t i = 0; i < samples; ++i)
    for (std::uint32_t channel = 0; channel < channels; ++channel)
      put(out, static_cast<std::uint32_t>(std::lround(32767 * tone(static_cast<int>(i)))), bytes);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: make_sound FOLDER\n";
    return 2;
  }
  const std::string folder = argv[1];
  std::ofstream wav(folder + "/sound.wav", std::ios::binary);
  write_wav(wav, 2000, 2000 * align);
  bool written = true;
  for (const auto& [name, size] : {std::pair{"0", 0U}, std::pair{"7fffff00", 0x7FFFFF00U},
                                   std::pair{"ffffffff", 0xFFFFFFFFU}}) {
    std::ofstream from_a_pipe(folder + "/sound_" + name + ".wav", std::ios::binary);
    write_wav(from_a_pipe, 2000, size);
    written = written && from_a_pipe.flush();
  }
  std::ofstream raw(folder + "/sound.f32", std::ios::binary);
  for (int i = 0; i < 4000; ++i)
    put(raw, std::bit_cast<std::uint32_t>(static_cast<float>(tone(i))), 4);
  return written && wav.flush() && raw.flush() ? 0 : 1;
}
