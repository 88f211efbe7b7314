// SPDX-License-Identifier: MIT
// send_signal [--terminal] SIGNAL TEXT COUNT PERCENT program argument...
//
// Runs a program, and sends it the signal (INT, TERM or KILL) when it has written the text so many
// times to standard output or error, and has gone on for so many percent of the time that the last
// of them took. So the signal comes where it should on any machine, however slow. With --terminal,
// both streams are a terminal. Passes on what the program writes, and its exit status; one that a
// signal ended has 128 and the signal's number, and a line says so.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <stdexcept>
#include <string>
#include <thread>

#include "pseudo_terminal.hpp"

namespace {

int signal_of(const std::string& name) {
  if (name == "INT") return SIGINT;
  if (name == "TERM") return SIGTERM;
  if (name == "KILL") return SIGKILL;
  throw std::invalid_argument("expected INT, TERM or KILL, got " + name);
}

/// The end to read from, and the one that the program writes to.
PseudoTerminal connect(bool to_terminal) {
  if (to_terminal) return PseudoTerminal::open();
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) throw std::runtime_error("no pipe");
  return {ends[0], ends[1]};
}

int run(int argc, char** argv) {
  const bool to_terminal = argc > 1 && argv[1] == std::string("--terminal");
  if (to_terminal) ++argv, --argc;
  if (argc < 6) throw std::invalid_argument("expected SIGNAL TEXT COUNT PERCENT program");
  const int signal = signal_of(argv[1]);
  const std::string text = argv[2];
  const int count = std::stoi(argv[3]);
  const double share = std::stod(argv[4]) / 100;

  const PseudoTerminal ends = connect(to_terminal);
  using Clock = std::chrono::steady_clock;
  Clock::time_point last = Clock::now();
  const pid_t child = ::fork();
  if (child == -1) throw std::runtime_error("cannot fork");
  if (child == 0) {
    ::signal(signal, SIG_DFL);
    ::dup2(ends.terminal, STDOUT_FILENO);
    ::dup2(ends.terminal, STDERR_FILENO);
    ::execv(argv[5], argv + 5);
    ::_exit(127);
  }
  ::close(ends.terminal);

  int seen = 0;
  bool sent = false;
  std::string unseen;  // the output behind the last text
  char block[4096];
  do {
    auto waited = Clock::duration::zero();
    for (std::size_t at = 0; (at = unseen.find(text)) != std::string::npos; ++seen) {
      unseen.erase(0, at + text.size());
      const auto now = Clock::now();
      waited = now - last;
      last = now;
    }
    if (!sent && seen >= count) {
      std::this_thread::sleep_for(share * waited);
      ::kill(child, signal);
      sent = true;
    }
    const ssize_t got = ::read(ends.master, block, sizeof block);
    if (got <= 0) break;  // of a terminal, the end is an error
    std::cout.write(block, got).flush();
    unseen.append(block, static_cast<std::size_t>(got));
  } while (true);

  int status = 0;
  ::waitpid(child, &status, 0);
  if (!WIFSIGNALED(status)) return WEXITSTATUS(status);
  std::cout << "\nended by signal " << WTERMSIG(status) << '\n';
  return 128 + WTERMSIG(status);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "send_signal: " << error.what() << '\n';
    return 125;
  }
}
