// SPDX-License-Identifier: MIT
/// \file
/// What the programs have in common: how they parse arguments, fail and exit.
#pragma once

#include <cerrno>
#include <csignal>
#include <exception>
#include <iostream>
#include <locale>
#include <new>
#include <optional>
#include <string_view>

#include <CLI/CLI.hpp>

#if __has_include(<unistd.h>)
#include <fcntl.h>
#include <unistd.h>
#endif

namespace local_mha::examples {

/// Exit status of a program that could not do its work; 1 says that it did and the answer is no.
inline constexpr int exit_error = 2;

/// Writes `program: message` on stderr.
inline int fail(std::string_view program, std::string_view message) {
  std::cerr << program << ": " << message << '\n';
  return exit_error;
}

namespace detail {

/// Numbers are read and written the same way wherever the program runs.
inline void use_classic_locale() {
  std::locale::global(std::locale::classic());
  std::cin.imbue(std::locale::classic());
  std::cout.imbue(std::locale::classic());
  std::cerr.imbue(std::locale::classic());
}

/// Writing to a pipe that nobody reads, or past the largest size of a file, is an error like others
/// and does not end the program.
inline void ignore_signals_of_writing() {
#ifdef SIGPIPE
  std::signal(SIGPIPE, SIG_IGN);
#endif
#ifdef SIGXFSZ
  std::signal(SIGXFSZ, SIG_IGN);
#endif
}

/// Where the program was started without a standard stream, the first file that it opens would take
/// its place, and what it says would be written into the file. Instead, using the stream fails.
inline void occupy_closed_streams() {
#if __has_include(<unistd.h>)
  for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
    if (::fcntl(stream, F_GETFD) == -1 && errno == EBADF)
      ::open("/dev/null", stream == STDIN_FILENO ? O_WRONLY : O_RDONLY);
#endif
}

}  // namespace detail

/// Calls `program()` and returns the exit status: the program's, or exit_error after a message if
/// something throws or standard output cannot be written. Whatever the locale, a closed standard
/// stream, a pipe without a reader or a limit on the size of files: it goes on or fails like that.
template <typename Program>
int run_program(std::string_view name, const Program& program) {
  detail::use_classic_locale();
  detail::ignore_signals_of_writing();
  detail::occupy_closed_streams();
  try {
    const int status = program();
    if (!std::cout.flush()) return fail(name, "cannot write to standard output");
    return status;
  } catch (const std::bad_alloc&) {
    return fail(name, "not enough memory");
  } catch (const std::exception& error) {
    return fail(name, error.what());
  }
}

/// Parses the arguments.
/// \param app has the program's name
/// \return the exit status if there is nothing left to do: help was asked for, or they are wrong
inline std::optional<int> parse(CLI::App& app, int argc, char** argv) {
  try {
    app.parse(argc, argv);
    return std::nullopt;
  } catch (const CLI::Success& help) {
    return app.exit(help);
  } catch (const CLI::ParseError& error) {
    fail(app.get_name(), error.what());
    std::cerr << "Run '" << app.get_name() << " --help'.\n";
    return exit_error;
  }
}

}  // namespace local_mha::examples
