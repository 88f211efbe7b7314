#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Makes one header of many: what a program includes of local_mha, for projects that copy a file.

    single_header.py > local_mha_single.hpp
    single_header.py local_mha/local_mha.hpp local_mha/io/weights.hpp > local_mha_single.hpp

Headers of local_mha are put in the place of their first inclusion; all others (the standard
library, Eigen, nlohmann_json for io/) are still included. Without arguments it is
local_mha/local_mha.hpp, which needs Eigen alone.
"""
import argparse
import pathlib
import re
import sys

INCLUDE_DIR = pathlib.Path(__file__).resolve().parents[2] / "include"
INCLUDE = re.compile(r"#\s*include\s*<(local_mha/[^>]*)>\s*(//.*)?$")


class Amalgamation:
    def __init__(self):
        self.seen = set()
        self.lines = []

    def add(self, header, included_by):
        if header in self.seen:
            return
        self.seen.add(header)
        path = INCLUDE_DIR / header
        if not path.is_file():
            sys.exit(f"{included_by}: there is no {header} in {INCLUDE_DIR}")
        self.lines.append(f"// ---- {header}")
        depth = 0
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.startswith("// SPDX-License-Identifier") or line.strip() == "#pragma once":
                continue
            if re.match(r"\s*#\s*if", line):
                depth += 1
            elif re.match(r"\s*#\s*endif", line):
                depth -= 1
            found = INCLUDE.match(line)
            if not found:
                self.lines.append(line)
            elif depth > 0 and found[1] not in self.seen:
                # Under a condition, its text would be missing where the condition does not hold.
                sys.exit(f"{header}:{number}: {found[1]} is included under a condition")
            else:
                self.add(found[1], f"{header}:{number}")


def version():
    text = (INCLUDE_DIR / "local_mha/version.hpp").read_text(encoding="utf-8")
    return ".".join(re.findall(r"#define LOCAL_MHA_VERSION_\w+ (\d+)", text))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("headers", nargs="*", default=["local_mha/local_mha.hpp"], metavar="HEADER")
    parser.add_argument("-o", "--output", help="a file, in place of the standard output")
    arguments = parser.parse_args()
    license_text = (INCLUDE_DIR.parent / "LICENSE").read_text(encoding="utf-8")
    made = Amalgamation()
    for header in arguments.headers:
        made.add(header, "command line")
    text = "\n".join(
        ["// SPDX-License-Identifier: MIT",
         f"// local_mha {version()}, made of {len(made.seen)} headers by cmake/packaging/single_header.py",
         "//"]
        + [("// " + line).rstrip() for line in license_text.splitlines()]
        + ["#pragma once", ""] + made.lines) + "\n"
    if arguments.output:
        pathlib.Path(arguments.output).write_text(text, encoding="utf-8")
    else:
        sys.stdout.reconfigure(encoding="utf-8")
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
