// SPDX-License-Identifier: MIT
/// \file
/// Speech among noises that are made here, so that it is known when somebody speaks.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <local_mha/core/index.hpp>
#include <local_mha/core/random.hpp>

#include "wav_file.hpp"

namespace local_mha::examples {

/// Sound in blocks, and of each whether there is speech in it: 1 or 0.
struct NoisySpeech {
  std::vector<float> samples;
  std::vector<std::int64_t> speech;
};

/// The mean square of samples.
inline double power_of(const float* x, std::size_t size) {
  double sum = 0;
  for (std::size_t i = 0; i < size; ++i) sum += static_cast<double>(x[i]) * x[i];
  return sum / static_cast<double>(size);
}

/// Noise of one kind, of no particular loudness.
/// \param kind 0: hiss, 1: rumble, 2: hum, 3: clicks; 4: a sea, which comes and goes as syllables
/// do
inline std::vector<float> make_noise(int kind, std::size_t size, double rate,
                                     RandomSequence& random) {
  constexpr double two_pi = 6.283185307179586;
  std::vector<float> noise(size);
  const double pitch = two_pi * (50 + 100 * random.uniform()) / rate;
  const double beat = two_pi * (1 + 3 * random.uniform()) / rate;
  double low = 0;
  double click = 0;
  for (std::size_t i = 0; i < size; ++i) {
    const auto t = static_cast<double>(i);
    const double white = 2 * random.uniform() - 1;
    low += 0.05 * (white - low);
    click = random.uniform() < 8 / rate ? 1 : click * (1 - 40 / rate);
    double sample = white;
    if (kind == 1) sample = low;
    if (kind == 2)
      sample = std::sin(pitch * t) + 0.6 * std::sin(2 * pitch * t) + 0.4 * std::sin(5 * pitch * t) +
               0.05 * white;
    if (kind == 3) sample = click * white;
    if (kind == 4) sample = (white - low) * (1.1 + std::sin(beat * t));
    noise[i] = static_cast<float>(sample);
  }
  return noise;
}

/// Stretches of two seconds: in each another noise, and in half of them somebody speaks, 0 to 20 dB
/// louder than it.
/// \param voice of at least two seconds, and at least 50 samples a second
/// \param kinds of noise: so many of make_noise()'s
/// \throws std::invalid_argument if the voice is silent
inline NoisySpeech make_noisy_speech(const Sound& voice, Index stretches, int kinds,
                                     std::uint64_t seed) {
  const std::size_t block = voice.rate / 50;
  const std::size_t size = 100 * block;
  const double voice_power = power_of(voice.samples.data(), voice.samples.size());
  if (!(voice_power > 0)) reject("voice", "somebody who speaks", "silence");
  RandomSequence random(seed);
  NoisySpeech made;
  for (Index s = 0; s < stretches; ++s) {
    const auto kind = static_cast<int>(random.uniform() * kinds);
    const std::vector<float> noise = make_noise(kind, size, voice.rate, random);
    const double level = std::pow(10, -1 - 1.5 * random.uniform());
    const auto noise_gain = static_cast<float>(level / std::sqrt(power_of(noise.data(), size)));
    const bool speaks = random.uniform() < 0.5;
    const double louder = std::pow(10, random.uniform());
    const auto gain = static_cast<float>(level * louder / std::sqrt(voice_power));
    const auto places = static_cast<double>(voice.samples.size() - size + 1);
    const float* const said = voice.samples.data() + static_cast<Index>(random.uniform() * places);
    for (std::size_t i = 0; i < size; ++i)
      made.samples.push_back(noise_gain * noise[i] + (speaks ? gain * said[i] : 0));
    // What is 20 dB below the voice as a whole is a pause.
    for (std::size_t b = 0; b < 100; ++b)
      made.speech.push_back(speaks && power_of(said + b * block, block) > 0.01 * voice_power);
  }
  return made;
}

/// How many of the blocks a gate judges rightly.
/// \param opens `opens(samples)` for one block after the other: whether there is speech in it
/// \return the share of those without speech, and that of those with it
template <typename Opens>
std::array<double, 2> share_right(const NoisySpeech& heard, Index block, Opens&& opens) {
  std::array<double, 2> right{};
  std::array<double, 2> all{};
  const float* samples = heard.samples.data();
  for (const std::int64_t speech : heard.speech) {
    const auto kind = static_cast<std::size_t>(speech);
    right[kind] += opens(samples) == (speech == 1) ? 1 : 0;
    all[kind] += 1;
    samples += block;
  }
  return {right[0] / all[0], right[1] / all[1]};
}

/// What could be had by loudness alone: the largest mean, over blocks with speech and without, of
/// the share that is right when blocks count as speech from some loudness on.
inline double best_by_loudness(const NoisySpeech& heard, std::size_t block) {
  std::vector<std::pair<double, std::int64_t>> blocks;
  double with = 0;
  for (std::size_t b = 0; b < heard.speech.size(); ++b) {
    blocks.emplace_back(power_of(heard.samples.data() + b * block, block), heard.speech[b]);
    with += static_cast<double>(heard.speech[b]);
  }
  std::ranges::sort(blocks);
  const double without = static_cast<double>(blocks.size()) - with;
  double best = 0.5;
  double missed = 0;
  double shut = 0;
  for (const auto& [power, speech] : blocks) {
    (speech == 1 ? missed : shut) += 1;
    best = std::max(best, (1 - missed / with + shut / without) / 2);
  }
  return best;
}

}  // namespace local_mha::examples
