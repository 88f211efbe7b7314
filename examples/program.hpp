// SPDX-License-Identifier: MIT
/// \file
/// What the programs have in common: how they parse arguments, fail and exit.
#pragma once

#include <exception>
#include <iostream>
#include <new>
#include <optional>
#include <string_view>

#include <CLI/CLI.hpp>

namespace local_mha::examples {

/// Exit status of a program that could not do its work; 1 says that it did and the answer is no.
inline constexpr int exit_error = 2;

/// Writes `program: message` on stderr.
inline int fail(std::string_view program, std::string_view message) {
  std::cerr << program << ": " << message << '\n';
  return exit_error;
}

/// Calls `program()` and returns the exit status: the program's, or exit_error after a message if
/// something throws or standard output cannot be written.
template <typename Program>
int run_program(std::string_view name, const Program& program) {
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
