// SPDX-License-Identifier: MIT
/// \file
/// A noise gate that lets speech through and nothing else, in blocks of 20 ms as they come. It
/// learns from a voice in noise of four kinds, and is judged by other sentences in noise of five.
#include <iomanip>

#include <CLI/CLI.hpp>

#include <local_mha/local_mha.hpp>

#include "durations.hpp"
#include "noisy_speech.hpp"
#include "program.hpp"
#include "spectrum.hpp"
#include "terminal.hpp"

namespace {

using namespace local_mha;
constexpr Index bins = examples::Spectrum::bins, dim = 32, batch = 8, seqlen = 200;

struct Weights {
  LinearParameters<float> in, out;
  EncoderParameters<float> encoder;
  static void visit_each(auto& set, auto&& visit) {
    visit("in", set.in);
    visit("encoder", set.encoder);
    visit("out", set.out);
  }
};

/// From loudness through layers that see half a second back to the logits of noise and speech.
struct Model {
  LocalMHAConfig layer{
      .dim = dim, .window_size = 25, .dim_head = 16, .heads = 2, .causal = true, .prenorm = true};
  Linear<float> in{{.in_features = bins, .out_features = dim}, 1};
  Encoder<float> encoder{{.depth = 2, .layers = {layer}}, 2};
  Linear<float> out{{.in_features = dim, .out_features = 2}, 3};

  void train(const examples::NoisySpeech& heard, examples::Spectrum spectrum, Index steps) {
    RowMatrix<float> loudness(std::ssize(heard.speech), bins);
    for (Index b = 0; b < loudness.rows(); ++b)
      spectrum(heard.samples.data() + b * spectrum.block(), &loudness(b, 0));
    Weights weights{in.parameters(), out.parameters(), encoder.parameters()}, gradients = weights;
    AdamW optimizer({.weight_decay = 0.01}, weights);
    const CosineSchedule rate(3e-3, 1e-4, steps / 10, steps);
    Tensor<float, 3> x(batch, seqlen, bins);
    Tensor<std::int64_t, 2> labels(batch, seqlen);
    RandomSequence random(4);
    for (Index step = 0; step < steps; ++step) {
      for (Index b = 0; b < batch; ++b) {
        const auto first = Index(random.uniform() * double(loudness.rows() - seqlen + 1));
        std::copy_n(&loudness(first, 0), seqlen * bins, &x(b, 0, 0));
        std::copy_n(heard.speech.data() + first, seqlen, &labels(b, 0));
      }
      Linear<float>::Saved of_in, of_out;
      Encoder<float>::Saved of_encoder;
      const auto h = in.forward_saving(of_in, x), y = encoder.forward_saving(of_encoder, h);
      const auto logits = out.forward_saving(of_out, y);
      set_zero(gradients);
      auto grad = out.backward(gradients.out, of_out, cross_entropy_gradient(logits, labels), y);
      grad = encoder.backward(gradients.encoder, of_encoder, grad);
      in.backward(gradients.in, of_in, grad, x);
      clip_gradients(gradients, 1.0);
      optimizer.step(weights, gradients, rate(step));
      in.set_parameters(weights.in);
      encoder.set_parameters(weights.encoder);
      out.set_parameters(weights.out);
    }
  }
};

/// Whether there is speech in blocks, as they come. Takes no memory after the first one.
struct Gate {
  Gate(const Model& model, std::uint32_t rate)
      : spectrum(rate), in(model.in), out(model.out), stream(model.encoder) {}
  examples::Spectrum spectrum;
  Linear<float> in, out;
  Linear<float>::Workspace in_workspace, out_workspace;
  Encoder<float>::Stream stream;
  Tensor<float, 3> loudness{1, 1, bins}, x{1, 1, dim}, y{1, 1, dim}, logits{1, 1, 2};
  examples::Durations times;
  bool operator()(const float* samples) {
    const examples::Stopwatch watch;
    spectrum(samples, loudness.data());
    in.forward_into(x, in_workspace, loudness);
    stream.push_into(y, x);
    out.forward_into(logits, out_workspace, y);
    times.add(watch.seconds());
    return logits(0, 0, 1) > logits(0, 0, 0);
  }
};

/// A sound block by block: the gate opens and closes within one, and stays open for 100 ms more.
void let_through(Gate& gate, examples::Sound& sound) {
  const auto block = static_cast<std::size_t>(gate.spectrum.block()), length = sound.samples.size();
  sound.samples.resize((length + block - 1) / block * block);  // the last one is filled up
  float open = 0;
  for (std::size_t first = 0, silent = 9; first < length; first += block) {
    silent = gate(&sound.samples[first]) ? 0 : silent + 1;
    const float step = ((silent <= 5 ? 1.0F : 0.0F) - open) / static_cast<float>(block);
    for (std::size_t i = 0; i < block; ++i) sound.samples[first + i] *= open += step;
  }
  sound.samples.resize(length);
}

int run(int argc, char** argv) {
  CLI::App app("Lets speech through and no noise, once it has learned what is what.", "noise_gate");
  std::string input, output, voice = LOCAL_MHA_EXAMPLE_DATA "/speech.wav";
  std::string held_out = LOCAL_MHA_EXAMPLE_DATA "/speech_held_out.wav";
  bool quick = false;
  auto* from = app.add_option("input", input, "A WAV file; without one, it only says how well");
  from->needs(app.add_option("output", output, "Where what is let through goes, as WAV"));
  app.add_option("--voice", voice, "To learn from: somebody who speaks, without noise");
  app.add_option("--held-out", held_out, "To be judged by: the same");
  app.add_flag("--quick", quick, "Learns for some seconds only");
  if (const auto status = examples::parse(app, argc, argv)) return *status;
  auto sound = input.empty() ? examples::Sound() : examples::read_wav(input, 8000, 0.02);
  const auto speaker = examples::read_wav(voice, 8000, 2);
  const auto other = examples::read_wav(held_out, 8000, 2);
  if (!output.empty()) io::AtomicFile probe(output);  // before the work, not after it
  const examples::Stopwatch watch;
  Model model;
  model.train(examples::make_noisy_speech(speaker, quick ? 100 : 300, 4, 1),
              examples::Spectrum(speaker.rate), quick ? 150 : 600);
  std::cout << std::fixed << std::setprecision(1) << "learned for " << watch.seconds() << " s\n";
  const auto heard = examples::make_noisy_speech(other, 100, 5, 2);
  Gate gate(model, other.rate);
  const auto [shut, open] = examples::share_right(heard, gate.spectrum.block(), gate);
  std::cout << "held out: open in " << 100 * open << " % of blocks with speech, shut in "
            << 100 * shut << " % of the others: " << 50 * (open + shut)
            << " % in the mean; by the best threshold of loudness "
            << 100 * examples::best_by_loudness(heard, other.rate / 50) << " %\n";
  if (!input.empty()) {
    gate = Gate(model, sound.rate);
    let_through(gate, sound);
    examples::write_wav(output, sound);
  }
  const auto ms = [&](double share) { return 1e3 * gate.times.quantile(share); };
  std::cout << std::setprecision(3) << gate.times.count() << " blocks: half within " << ms(0.5)
            << " ms, 99.9 % within " << ms(0.999) << " ms, the longest " << ms(1) << " of 20 ms\n";
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return examples::run_program("noise_gate", [&] { return run(argc, argv); });
}
