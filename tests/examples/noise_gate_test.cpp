// SPDX-License-Identifier: MIT
// noise_gate: how well it tells speech from noise, in what time, and what it lets through; and what
// it is made of.
#include <gtest/gtest.h>
#include <stdio.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <filesystem>
#include <string>
#include <vector>

#include <local_mha/local_mha.hpp>

#include "noisy_speech.hpp"
#include "spectrum.hpp"

namespace {

using namespace local_mha::examples;
using local_mha::Index;

std::string output_of(const std::string& command) {
  FILE* const pipe = ::popen(command.c_str(), "r");
  std::string text;
  for (int c = pipe != nullptr ? std::fgetc(pipe) : EOF; c != EOF; c = std::fgetc(pipe))
    text += static_cast<char>(c);
  EXPECT_EQ(pipe != nullptr ? ::pclose(pipe) : -1, 0) << text;
  return text;
}

double number_behind(const std::string& text, const std::string& words) {
  const std::size_t place = text.find(words);
  EXPECT_NE(place, std::string::npos) << text;
  return place == std::string::npos ? 0 : std::stod(text.substr(place + words.size()));
}

/// What it says of blocks with speech and without, and of time.
/// \param steps of 600
void expect_right(const std::string& text, double least, int steps, const std::string& blocks) {
  EXPECT_GT(number_behind(text, "held out: open in "), least - 4) << text;
  EXPECT_GT(number_behind(text, "shut in "), least - 4) << text;
  const double right = number_behind(text, "of the others: ");
  EXPECT_GT(right, least) << text;
  EXPECT_GT(right, 20 + number_behind(text, "threshold of loudness ")) << text;
  // All steps take three minutes at most, and a block, of 20 ms, a tenth of that: the median, as a
  // machine that is busy with something else may hold any of them up.
  EXPECT_LT(number_behind(text, "learned for "), 180.0 * steps / 600) << text;
  EXPECT_NE(text.find("\n" + blocks + " blocks: "), std::string::npos) << text;
  EXPECT_LT(number_behind(text, " blocks: half within "), 2) << text;
  EXPECT_GT(number_behind(text, "the longest "), 0) << text;
}

// A gate that opens at random has 50 %, one that learned labels half a second off 81 %.
#ifndef LOCAL_MHA_TEST_FEWER_CASES
TEST(NoiseGate, IsRightOnOtherSentences) { expect_right(output_of(NOISE_GATE), 91, 600, "10000"); }
#endif

TEST(NoiseGate, LetsSpeechThroughAndNoNoise) {
  const Sound voice = read_wav(LOCAL_MHA_EXAMPLE_DATA "/speech_held_out.wav");
  const NoisySpeech heard = make_noisy_speech(voice, 20, 5, 77);
  const std::string in = "noisy.wav";
  const std::string out = "gated.wav";
  std::filesystem::remove(out);
  write_wav(in, {voice.rate, heard.samples});
  const std::string text = output_of(std::string(NOISE_GATE) + " --quick " + in + " " + out);

  expect_right(text, 86, 150, "2000");

  const Sound before = read_wav(in);
  const Sound after = read_wav(out);
  ASSERT_EQ(after.rate, 8000U);
  ASSERT_EQ(after.samples.size(), before.samples.size());
  // Of the power of speech, and of noise that comes alone for two seconds: the gate stays open for
  // a moment after speech, which may have ended where they begin.
  double speech = 0;
  double passed_speech = 0;
  double noise = 0;
  double passed_noise = 0;
  for (std::size_t b = 0; b < heard.speech.size(); ++b) {
    const double power = power_of(before.samples.data() + 160 * b, 160);
    const double passed = power_of(after.samples.data() + 160 * b, 160);
    ASSERT_LE(passed, power * (1 + 1e-3) + 1e-8);
    const auto stretch = heard.speech.begin() + static_cast<std::ptrdiff_t>(b / 100 * 100);
    if (heard.speech[b] == 1) {
      speech += power;
      passed_speech += passed;
    } else if (b % 100 >= 10 && std::count(stretch, stretch + 100, 1) == 0) {
      noise += power;
      passed_noise += passed;
    }
  }
  EXPECT_GT(passed_speech / speech, 0.8);
  EXPECT_LT(passed_noise / noise, 0.3);
}

TEST(NoisySpeech, SaysWhereThereIsSpeech) {
  // A voice that is heard in every other block.
  Sound voice{8000, std::vector<float>(32'000)};
  for (std::size_t i = 0; i < voice.samples.size(); ++i)
    voice.samples[i] = i / 160 % 2 == 0 ? 0.3F * std::sin(0.4F * static_cast<float>(i)) : 0;
  const NoisySpeech heard = make_noisy_speech(voice, 30, 1, 5);
  ASSERT_EQ(heard.samples.size(), 30 * 16'000U);
  ASSERT_EQ(heard.speech.size(), 30 * 100U);
  double with = 0;
  for (const auto speech : heard.speech) with += static_cast<double>(speech);
  // Half of the stretches have the voice; where blocks do not begin as its own do, there is some in
  // each.
  EXPECT_GT(with, 500);
  EXPECT_LT(with, 2500);
  std::vector<double> power(2), blocks(2);
  for (std::size_t b = 0; b < heard.speech.size(); ++b) {
    const auto kind = static_cast<std::size_t>(heard.speech[b]);
    power[kind] += power_of(heard.samples.data() + 160 * b, 160);
    blocks[kind] += 1;
  }
  EXPECT_GT(power[1] / blocks[1], 3 * power[0] / blocks[0]);
  // Another seed is another sound, the same one the same.
  EXPECT_EQ(make_noisy_speech(voice, 30, 1, 5).samples, heard.samples);
  EXPECT_NE(make_noisy_speech(voice, 30, 1, 6).samples, heard.samples);
}

TEST(NoisySpeech, CountsWhatIsRight) {
  NoisySpeech heard;
  for (const float level : {0.1F, 0.2F, 0.3F, 0.4F})
    heard.samples.insert(heard.samples.end(), 2, level);
  heard.speech = {0, 1, 0, 1};
  const auto above = [](float least) { return [=](const float* x) { return *x > least; }; };
  const auto right = share_right(heard, 2, above(0.15F));
  EXPECT_EQ(right[0], 0.5);
  EXPECT_EQ(right[1], 1);
  EXPECT_EQ(best_by_loudness(heard, 2), 0.75);
  heard.speech = {0, 0, 1, 1};
  EXPECT_EQ(best_by_loudness(heard, 2), 1);
  heard.speech = {1, 1, 0, 0};
  EXPECT_EQ(best_by_loudness(heard, 2), 0.5);
}

TEST(Spectrum, IsLoudestWhereAToneIs) {
  for (const std::uint32_t rate : {8000U, 22'050U, 48'000U}) {
    Spectrum spectrum(rate);
    std::vector<float> samples(static_cast<std::size_t>(spectrum.block()));
    for (const Index bin : {0, 4, 37}) {
      for (std::size_t i = 0; i < samples.size(); ++i)
        samples[i] = static_cast<float>(
            0.5 * std::sin(6.283185307179586 * 100 * static_cast<double>(bin + 1) *
                               static_cast<double>(i) / rate +
                           0.3));
      std::vector<float> loudness(Spectrum::bins);
      spectrum(samples.data(), loudness.data());
      EXPECT_EQ(std::ranges::max_element(loudness) - loudness.begin(), bin) << rate;
      // A sine of amplitude a has the power a² / 4 there, in Hann's window.
      EXPECT_NEAR(loudness[static_cast<std::size_t>(bin)], 2.5 + 0.25 * std::log(0.25 / 4), 0.02);
    }
  }
}

TEST(WavFile, IsReadAsItWasWritten) {
  const Sound sound{11'025, {0, 0.5F, -0.25F, 1, -1, 3, -3}};
  write_wav("written.wav", sound);
  const Sound read = read_wav("written.wav");
  EXPECT_EQ(read.rate, 11'025U);
  ASSERT_EQ(read.samples.size(), 7U);
  for (std::size_t i = 0; i < 7; ++i)
    EXPECT_NEAR(read.samples[i], std::clamp(sound.samples[i], -1.0F, 1.0F), 1e-4);
  EXPECT_THROW(read_wav("written.wav", 11'026), std::invalid_argument);
  EXPECT_THROW(read_wav("written.wav", 1, 0.001), std::invalid_argument);
}

}  // namespace
