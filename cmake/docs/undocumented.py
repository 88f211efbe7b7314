#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Reads Doxygen's warnings and fails if there is one that counts: undocumented.py WARNINGS INCLUDE_DIR

An undocumented public name counts, and so does whatever Doxygen did not understand. Not counted are
copies, moves, comparisons and deduction guides, which say what they do by their signature; what is
protected, which is for the library; and macros but those of the version.
"""
import pathlib
import re
import sys

SAYS_IT_ITSELF = re.compile(
    r"operator(=|==|<=>)\(|\) *-> |\(macro definition\)"
    r"|(?P<name>\w+)\((const )?(?P=name)(< [^>]* >)? *(&&|&)[ \w]*\)(=default)? \(function\)")


def is_protected(path, number):
    """Whether the access specifier of the line's own class, which is indented by one less, says so."""
    lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    indent = len(lines[number - 1]) - len(lines[number - 1].lstrip())
    for line in reversed(lines[:number - 1]):
        found = re.match(r"( *)(public|protected|private):", line)
        if found and len(found[1]) == indent - 1:
            return found[2] != "public"
        if line.strip() and not line.startswith("#") and len(line) - len(line.lstrip()) < indent - 1:
            return False  # the class itself
    return False


def main():
    warnings, include_dir = sys.argv[1:]
    text = pathlib.Path(warnings).read_text(encoding="utf-8")
    if not pathlib.Path(include_dir, "local_mha/local_mha.hpp").is_file():
        sys.exit(f"{include_dir} has no local_mha")
    counted = []
    for line in sorted(set(text.splitlines())):
        found = re.match(r"(.+?):(\d+): warning: (.*)$", line)
        if not found:
            continue
        path, number, said = found[1], int(found[2]), found[3]
        if said.endswith("is not documented.") and (SAYS_IT_ITSELF.search(said) or is_protected(path, number)):
            continue
        # Doxygen's parser does not match a constructor of an explicit specialization with its class.
        if said.startswith("no uniquely matching class member found"):
            continue
        counted.append(f"{pathlib.Path(path).name}:{number}: {said}")
    print("\n".join(counted))
    if counted:
        sys.exit(f"{len(counted)} undocumented or misunderstood")


main()
