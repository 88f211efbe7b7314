// SPDX-License-Identifier: MIT
// Writes a tone into a folder: sound.wav, 2000 samples of two channels at 8000 a second in 16 bits,
// and sound.f32, 4000 samples as raw numbers.
#include <bit>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <string>

namespace {

void put(std::ostream& out, std::uint32_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) out.put(static_cast<char>(value >> (8 * i) & 255));
}

double tone(int sample) { return 0.5 * std::sin(0.3 * sample); }

void write_wav(std::ostream& out, std::uint32_t samples) {
  constexpr std::uint32_t channels = 2, rate = 8000, bytes = 2, align = channels * bytes;
  out << "RIFF";
  put(out, 36 + samples * align, 4);
  out << "WAVEfmt ";
  put(out, 16, 4);
  put(out, 1, 2);  // integers
  put(out, channels, 2);
  put(out, rate, 4);
  put(out, rate * align, 4);
  put(out, align, 2);
  put(out, 8 * bytes, 2);
  out << "data";
  put(out, samples * align, 4);
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
  write_wav(wav, 2000);
  std::ofstream raw(folder + "/sound.f32", std::ios::binary);
  for (int i = 0; i < 4000; ++i)
    put(raw, std::bit_cast<std::uint32_t>(static_cast<float>(tone(i))), 4);
  return wav.flush() && raw.flush() ? 0 : 1;
}
