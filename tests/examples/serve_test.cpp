// SPDX-License-Identifier: MIT
// serve_language_model over its socket: many clients at once, each of whom gets what the model
// would write for it alone; wrong requests; clients that vanish; and its end.
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include <local_mha/io/weights.hpp>
#include <local_mha/local_mha.hpp>

#include "text_request.hpp"

namespace {

namespace fs = std::filesystem;
using local_mha::Index;
using local_mha::examples::read_text_request;
using Clock = std::chrono::steady_clock;

const std::string model_path = LOCAL_MHA_EXAMPLE_DATA "/shakespeare.safetensors";

/// What `file` gives until its end, in three minutes at most, or until it begins with `text`.
std::string read_all(int file, const std::string& text = {}) {
  std::string all;
  char bytes[4096];
  const auto end = Clock::now() + std::chrono::minutes(3);
  while (Clock::now() < end && (text.empty() || all.find(text) == std::string::npos)) {
    const ssize_t got = ::read(file, bytes, sizeof bytes);
    if (got <= 0) break;
    all.append(bytes, static_cast<std::size_t>(got));
  }
  return all;
}

/// The program, until it is told to end.
class Server {
 public:
  explicit Server(const std::string& name, int streams)
      : socket_((fs::temp_directory_path() / (name + std::to_string(::getpid()))).string()) {
    int ends[2];
    EXPECT_EQ(::pipe(ends), 0);
    child_ = ::fork();
    if (child_ == 0) {
      ::dup2(ends[1], STDOUT_FILENO);
      ::close(ends[0]);
      ::close(ends[1]);
      ::execl(SERVE_LANGUAGE_MODEL, SERVE_LANGUAGE_MODEL, model_path.c_str(), socket_.c_str(),
              "--streams", std::to_string(streams).c_str(), "--threads", "2", nullptr);
      ::_exit(127);
    }
    ::close(ends[1]);
    out_ = ends[0];
    EXPECT_EQ(read_all(out_, "\n"),
              "Up to " + std::to_string(streams) + " streams at once on " + socket_ + "\n");
  }
  ~Server() {
    if (child_ > 0) {
      ::kill(child_, SIGKILL);
      ::waitpid(child_, nullptr, 0);
    }
    ::close(out_);
  }

  const std::string& socket() const { return socket_; }

  /// Ends it in ten seconds at most.
  /// \return what it says
  std::string end(int signal) {
    ::kill(child_, signal);
    int status = -1;
    const auto latest = Clock::now() + std::chrono::seconds(10);
    while (::waitpid(child_, &status, WNOHANG) == 0 && Clock::now() < latest)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
    if (WIFEXITED(status)) child_ = -1;
    EXPECT_FALSE(fs::exists(socket_));
    return read_all(out_);
  }

 private:
  std::string socket_;
  pid_t child_ = -1;
  int out_ = -1;
};

/// Connects, and sends this; waits three minutes at most for whatever comes.
int connect_and_send(const Server& server, const std::string& text) {
  const int file = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const timeval limit{180, 0};
  ::setsockopt(file, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  ::setsockopt(file, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  server.socket().copy(address.sun_path, sizeof address.sun_path - 1);
  EXPECT_EQ(::connect(file, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  EXPECT_EQ(::send(file, text.data(), text.size(), MSG_NOSIGNAL),
            static_cast<ssize_t>(text.size()));
  return file;
}

std::string answer_to(const Server& server, const std::string& text) {
  const int file = connect_and_send(server, text);
  const std::string answer = read_all(file);
  ::close(file);
  return answer;
}

/// What the model writes for a request that nobody else disturbs.
std::string alone(const std::string& line) {
  static const auto model = [] {
    auto [config, parameters] =
        local_mha::io::load_local_transformer<float>(local_mha::io::SafetensorsFile(model_path));
    return local_mha::LocalTransformer<float>(config, std::move(parameters));
  }();
  const auto request = read_text_request(line, model.config().max_seq_len, 256);
  std::string text = "ok\n";
  const auto size = static_cast<Index>(request.prompt.size());
  model.generate({request.prompt.data(), {1, size}},
                 {.length = request.length,
                  .sampling = {.temperature = request.temperature},
                  .seed = request.seed},
                 [&](const auto& tokens) { text += static_cast<char>(tokens[0]); });
  return text;
}

TEST(ServeLanguageModel, GivesEachOfManyClientsItsOwnText) {
  Server server("many", 5);
  constexpr std::size_t clients = 12;  // more than there are places
  std::vector<std::string> lines;
  for (std::size_t i = 0; i < clients; ++i) {
    const std::string prompt = i % 3 == 0 ? std::string(100, 'a' + static_cast<char>(i)) : "KING";
    lines.push_back(R"({"prompt": ")" + prompt + R"(", "length": )" + std::to_string(5 + 2 * i) +
                    R"(, "seed": )" + std::to_string(i) + "}");
  }
  std::vector<std::string> answers(clients);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < clients; ++i)
    threads.emplace_back([&, i] { answers[i] = answer_to(server, lines[i] + "\n"); });
  for (std::thread& thread : threads) thread.join();
  for (std::size_t i = 0; i < clients; ++i) EXPECT_EQ(answers[i], alone(lines[i])) << i;
  const std::string report = server.end(SIGTERM);
  EXPECT_EQ(report.find("12 answered, 0 refused, 0 gone\n"), 0U) << report;
  EXPECT_NE(report.find("Waited for the first byte: p50 "), std::string::npos) << report;
  EXPECT_NE(report.find("Waited for the next byte: p50 "), std::string::npos) << report;
  EXPECT_NE(report.find(" tokens a second\n"), std::string::npos) << report;
}

TEST(ServeLanguageModel, ServesThirtyTwoClientsAtOnce) {
  Server server("at_once", 32);
  const auto line = [](std::size_t client, int length) {
    std::string request = R"({"prompt": "ROMEO:", "length": )";
    request += std::to_string(length);
    request += R"(, "seed": )";
    request += std::to_string(client);
    return request += '}';
  };
  constexpr int begun = 20;
  std::vector<std::string> beginnings;
  for (std::size_t i = 0; i < 33; ++i) beginnings.push_back(alone(line(i, begun)));
  std::vector<int> files;
  for (std::size_t i = 0; i < 32; ++i)
    files.push_back(connect_and_send(server, line(i, 10'000) + "\n"));
  // Each has the beginning of its own text while none has all of it.
  for (std::size_t i = 0; i < 32; ++i) {
    std::string text(beginnings[i].size(), ' ');
    EXPECT_EQ(::recv(files[i], text.data(), text.size(), MSG_WAITALL),
              static_cast<ssize_t>(text.size()));
    EXPECT_EQ(text, beginnings[i]) << i;
  }
  for (const int file : files) {
    pollfd hung_up{file, 0, 0};
    EXPECT_EQ(::poll(&hung_up, 1, 0), 0);
  }
  // One more waits for a place.
  files.push_back(connect_and_send(server, line(32, begun) + "\n"));
  pollfd answered{files.back(), POLLIN, 0};
  EXPECT_EQ(::poll(&answered, 1, 300), 0);
  ::close(files.front());
  EXPECT_EQ(read_all(files.back()), beginnings[32]);
  const std::string report = server.end(SIGTERM);
  EXPECT_EQ(report.find("1 answered, 0 refused, 1 gone\n"), 0U) << report;
  for (std::size_t i = 1; i < files.size(); ++i) ::close(files[i]);
}

TEST(ServeLanguageModel, SaysWhatIsWrongAndEndsOnlyWhoVanishes) {
  Server server("wrong", 3);
  const std::string endless = "{\"prompt\": \"ROMEO:\", \"length\": 10000}\n";
  // One who stays, and one who is gone in the middle of the text; another before the request's end.
  const int stays = connect_and_send(server, endless);
  const int vanishes = connect_and_send(server, endless);
  EXPECT_EQ(read_all(vanishes, "ok\n").find("ok\n"), 0U);
  ::close(vanishes);
  ::close(connect_and_send(server, "{\"prompt\": "));

  const std::string example =
      R"(request: expected a line such as {"prompt": "ROMEO:", "length": 100}, got )";
  EXPECT_EQ(answer_to(server, "hello\n"), "error: " + example + "\"hello\"\n");
  EXPECT_EQ(answer_to(server, "\n"), "error: " + example + "\"\"\n");
  EXPECT_EQ(answer_to(server, "{\"prompt\": 5}\n"),
            "error: " + example + R"("{\"prompt\": 5}")" + "\n");
  EXPECT_EQ(answer_to(server, std::string(200'000, 'x') + "\n"),
            "error: " + example + '"' + std::string(70, 'x') + "\"\n");
  const auto wrong = [&](const std::string& members) {
    return answer_to(server, R"({"prompt": "KING")" + members + "}\n");
  };
  EXPECT_EQ(wrong(R"(, "length": -1)"),
            "error: length: expected a whole number of 1 to 10000, got -1\n");
  EXPECT_EQ(wrong(R"(, "length": 0)"),
            "error: length: expected a whole number of 1 to 10000, got 0\n");
  EXPECT_EQ(wrong(R"(, "length": 10001)"),
            "error: length: expected a whole number of 1 to 10000, got 10001\n");
  EXPECT_EQ(wrong(R"(, "seed": 0.5)"),
            "error: seed: expected a whole number of 0 to 4294967295, got 0.5\n");
  EXPECT_EQ(wrong(R"(, "temperature": "hot")"),
            "error: temperature: expected 0 to 100, got \"hot\"\n");
  EXPECT_EQ(wrong(R"(, "size": 1)"),
            "error: request: expected prompt, length, seed or temperature, got \"size\"\n");
  EXPECT_EQ(answer_to(server, R"({"prompt": ""})"
                              "\n"),
            "error: prompt: expected 1 to 512 bytes, got 0\n");
  EXPECT_EQ(answer_to(server, R"({"prompt": ")" + std::string(513, 'a') + "\"}\n"),
            "error: prompt: expected 1 to 512 bytes, got 513\n");
  // Others go on, also after all of this.
  const std::string line = R"({"prompt": "KING", "length": 20, "seed": 3})";
  EXPECT_EQ(answer_to(server, line + "\n"), alone(line));
  EXPECT_EQ(read_all(stays, "ok\n").find("ok\n"), 0U);
  // The one who stays is hung up on with the rest.
  const std::string report = server.end(SIGINT);
  read_all(stays);
  ::close(stays);
  // By then, that one may have been sent all.
  EXPECT_TRUE(report.starts_with("1 answered, 12 refused, 2 gone\n") ||
              report.starts_with("2 answered, 12 refused, 2 gone\n"))
      << report;
}

TEST(TextRequest, HasBytesThatTheModelKnows) {
  const auto request = read_text_request("{\"prompt\": \"caf\u00e9\", \"temperature\": 1}", 5, 256);
  EXPECT_EQ(request.prompt, (std::vector<std::int64_t>{'c', 'a', 'f', 0xC3, 0xA9}));
  EXPECT_EQ(request.temperature, 1);
  EXPECT_EQ(request.length, 100);
  EXPECT_THROW(read_text_request("{\"prompt\": \"caf\u00e9\"}", 5, 128), std::invalid_argument);
  EXPECT_THROW(read_text_request("{\"prompt\": \"caf\u00e9\"}", 4, 256), std::invalid_argument);
  EXPECT_THROW(read_text_request("[]", 4, 256), std::invalid_argument);
}

TEST(TextRequest, IsNotSentBackAsItIs) {
  const auto error = [](const std::string& line) {
    try {
      read_text_request(line, 5, 256);
    } catch (const std::invalid_argument& problem) {
      return std::string(problem.what());
    }
    return std::string("none");
  };
  EXPECT_EQ(error(R"({"prompt": "a", "length": )" + std::string(32000, '[') +
                  std::string(32000, ']') + "}"),
            "length: expected a whole number of 1 to 10000, got array");
  EXPECT_EQ(error(R"({"prompt": "a", "x\n\u001b[31m": 1})"),
            R"(request: expected prompt, length, seed or temperature, got "x\n\u001b[31m")");
  EXPECT_LT(error(R"({"prompt": "a", ")" + std::string(60000, 'x') + R"(": 1})").size(), 200U);
}

}  // namespace
