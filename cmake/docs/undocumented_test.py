#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Sees that undocumented.py reports what is undocumented, by the settings of a Doxyfile:
undocumented_test.py DOXYGEN DOXYFILE"""
import pathlib
import subprocess
import sys
import tempfile

HEADER = """#pragma once
/// \\file
/// For the test.
namespace local_mha {
/// Has a comment.
struct Documented {
  /// Has a comment.
  int member = 0;
  int silent_member = 0;
  /// \\return the same as ever
  int wordless() const;
  Documented(const Documented&) = default;

 protected:
  int for_the_library = 0;
};
struct SilentStruct {
  /// Has a comment.
  int of_silent = 0;
};
class SilentClass {
  int hidden_ = 0;
};
struct SilentEmpty {};
template <typename T>
concept SilentConcept = sizeof(T) > 1;
/// Has a comment.
template <typename T>
concept DocumentedConcept = sizeof(T) > 1;
int silent_function(int x);
enum class SilentEnum { a };
namespace detail {
struct Own {};
template <typename T>
concept OwnConcept = sizeof(T) > 1;
}  // namespace detail
}  // namespace local_mha
"""
REPORTED = ["silent_member", "begins without a sentence", "SilentStruct", "SilentClass", "SilentEmpty", "SilentConcept",
            "silent_function", "SilentEnum"]


def main():
    doxygen, doxyfile = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        header = folder / "negative.hpp"
        header.write_text(HEADER, encoding="utf-8")
        warnings = folder / "warnings.txt"
        (folder / "Doxyfile").write_text(
            f'@INCLUDE = "{doxyfile}"\nINPUT = "{header}"\nFILTER_PATTERNS =\nUSE_MDFILE_AS_MAINPAGE =\n'
            f'OUTPUT_DIRECTORY = "{folder}"\nWARN_LOGFILE = "{warnings}"\n',
            encoding="utf-8")
        subprocess.run([doxygen, folder / "Doxyfile"], check=True)
        script = pathlib.Path(__file__).with_name("undocumented.py")
        run = subprocess.run([sys.executable, "-B", script, folder, folder, header.name], capture_output=True, text=True)
    lines = run.stdout.splitlines()
    wrong = [f"{name} is not reported" for name in REPORTED if sum(name in line for line in lines) != 1]
    if len(lines) != len(REPORTED):
        wrong.append(f"{len(lines)} names are reported instead of {len(REPORTED)}")
    if run.returncode == 0:
        wrong.append("it passes")
    if wrong:
        sys.exit("\n".join(wrong + [run.stdout + run.stderr]))
    print(f"{len(lines)} reported")


main()
