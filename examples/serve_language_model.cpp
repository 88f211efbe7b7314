// SPDX-License-Identifier: MIT
/// \file
/// A language model on a Unix socket: many clients at once, a stream for each, and what that comes
/// to in tokens a second.
#define EIGEN_USE_THREADS

#include <csignal>
#include <iomanip>
#include <thread>

#include <CLI/CLI.hpp>

#include <local_mha/io/weights.hpp>
#include <local_mha/local_mha.hpp>

#include "durations.hpp"
#include "program.hpp"
#include "text_request.hpp"
#include "unix_socket.hpp"

namespace {

using namespace local_mha;
using Model = LocalTransformer<float>;

volatile std::sig_atomic_t stopped = 0;

/// What one client is sent. The stream has all of its memory from the beginning.
struct Text {
  explicit Text(const Model& model) : stream(model) {}

  Model::Stream stream;
  Sampler sampler{SamplingConfig{}};
  RandomSequence random{0};
  std::vector<std::int64_t> tokens = {};  // what the stream takes next
  Index left = 0;                         // bytes to make
  bool begun = false;                     // the first byte is made
  std::string made = {};                  // the byte made last, none within the prompt
  examples::Stopwatch waiting = {};       // for the next byte

  void begin(examples::TextRequest request) {
    sampler = Sampler({.temperature = request.temperature});
    random = RandomSequence(request.seed);
    tokens = std::move(request.prompt);
    left = request.length;
    begun = false;
    waiting = {};
    stream.reset();
  }

  /// Takes the prompt, or the byte made last, through the layers, and draws the next byte.
  void advance() {
    // Of a long prompt a part, so that other clients need not wait for all of it.
    const Index n = std::min<Index>(std::ssize(tokens), 64);
    const auto logits = stream.push({tokens.data(), {1, n}});
    tokens.erase(tokens.begin(), tokens.begin() + n);
    made.clear();
    if (!tokens.empty()) return;
    tokens.push_back(sampler(&logits(0, n - 1, 0), logits.dimension(2), random));
    made = {static_cast<char>(tokens.front())};
    --left;
  }
};

/// Answers until a signal comes, and says how fast.
void serve(const Model& model, const std::string& path, std::size_t streams, int threads) {
  examples::LineServer server(path, streams);
  std::vector<Text> texts(streams, Text(model));
  Eigen::ThreadPool pool(threads);
  const Eigen::ThreadPoolDevice device(&pool, threads);
  std::cout << "Up to " << streams << " streams at once on " << path << std::endl;

  Index answered = 0, refused = 0;
  double seconds = 0;
  examples::Durations first, next;
  std::vector<std::size_t> active;  // places of the texts that go on
  while (stopped == 0) {
    for (const std::size_t place : server.exchange(active.empty() ? 100 : 0)) try {
        texts[place].begin(examples::read_text_request(
            server.line(place), model.config().max_seq_len, model.config().num_tokens));
        server.answer(place, "ok\n");
      } catch (const std::exception& error) {
        texts[place].left = 0;
        server.answer(place, "error: " + std::string(error.what()) + '\n');
        server.end(place);
        ++refused;
      }
    active.clear();
    for (std::size_t place = 0; place < streams; ++place) {
      if (!server.here(place)) texts[place].left = 0;
      if (texts[place].left > 0) active.push_back(place);
    }
    const examples::Stopwatch watch;
    parallel_for(device, threads, std::ssize(active),
                 [&](Index, Index i) { texts[active[static_cast<std::size_t>(i)]].advance(); });
    if (!active.empty()) seconds += watch.seconds();
    for (const std::size_t place : active) {
      Text& text = texts[place];
      server.answer(place, text.made);
      if (text.left == 0) {
        server.end(place);
        ++answered;
      }
      if (text.made.empty()) continue;
      (std::exchange(text.begun, true) ? next : first).add(text.waiting.seconds());
      text.waiting = {};
    }
  }
  std::cout << answered << " answered, " << refused << " refused, " << server.gone() << " gone\n"
            << std::fixed << std::setprecision(2);
  for (const auto& [what, waits] : {std::pair{"first", first}, std::pair{"next", next}})
    if (waits.count() > 0)
      std::cout << "Waited for the " << what << " byte: p50 " << 1e3 * waits.quantile(0.5)
                << " ms, p99 " << 1e3 * waits.quantile(0.99) << " ms\n";
  const auto tokens = static_cast<double>(first.count() + next.count());
  if (tokens > 0) std::cout << tokens / seconds << " tokens a second\n";
}

int run(int argc, char** argv) {
  CLI::App app(
      "Serves a language model over bytes on a Unix socket, to many clients at once. A client\n"
      "sends a line of JSON, gets 'ok', a line feed and the text as it is made, or 'error: ' and\n"
      "what is wrong with the line, and is hung up on. Ctrl-C and SIGTERM end it.\n\n"
      R"(echo '{"prompt": "ROMEO:", "length": 100, "seed": 0, "temperature": 0.8}' | nc -U SOCKET)",
      "serve_language_model");
  std::string model_path, path;
  int streams = 32, threads = std::clamp(int(std::thread::hardware_concurrency()), 1, 1024);
  app.add_option("model", model_path, "As train_language_model writes it")->required();
  app.add_option("socket", path, "Made, and removed at the end")->required();
  const CLI::Range range(1, 1000);
  app.add_option("--streams", streams, "Clients at once; others wait")->check(range);
  app.add_option("--threads", threads, "Threads that share the streams")->check(range);
  if (const auto status = examples::parse(app, argc, argv)) return *status;
  auto [config, parameters] = io::load_local_transformer<float>(io::SafetensorsFile(model_path));
  if (config.num_tokens > 256 || !is_causal(config))
    reject("model", "a causal one of at most 256 tokens, for bytes", config.num_tokens,
           " tokens, causal: ", is_causal(config));
  serve(Model(config, std::move(parameters)), path, static_cast<std::size_t>(streams), threads);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGINT, [](int) { stopped = 1; });
  std::signal(SIGTERM, [](int) { stopped = 1; });
  return examples::run_program("serve_language_model", [&] { return run(argc, argv); });
}
