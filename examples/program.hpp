// SPDX-License-Identifier: MIT
/// \file
/// What the programs have in common: how they parse arguments, fail and exit.
#pragma once

#include <exception>
#include <iostream>
#include <new>
#include <stdexcept>
#include <string>

#include <CLI/CLI.hpp>

namespace local_mha::examples {

/// Exit status of a program that could not do its work; 1 says that it did and the answer is no.
inline constexpr int exit_error = 2;

/// Parses the arguments, calls `body()` and returns the exit status: the body's, or exit_error
/// after `program: message` on stderr if something throws or the output cannot be written.
/// \param app has the program's name
template <typename Body>
int run_program(CLI::App& app, int argc, char** argv, const Body& body) {
  const auto fail = [&](const std::string& message) {
    std::cout.flush();
    std::cerr << app.get_name() << ": " << message << '\n';
    return exit_error;
  };
  try {
    try {
      app.parse(argc, argv);
    } catch (const CLI::Success& help) {
      return app.exit(help);
    } catch (const CLI::ParseError& error) {
      return fail(std::string(error.what()) + "\nRun '" + app.get_name() + " --help'.");
    }
    const int status = body();
    if (!std::cout.flush()) return fail("cannot write to standard output");
    return status;
  } catch (const std::bad_alloc&) {
    return fail("not enough memory");
  } catch (const std::exception& error) {
    return fail(error.what());
  }
}

}  // namespace local_mha::examples
