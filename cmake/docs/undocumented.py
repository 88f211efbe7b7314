#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Fails if a public name is undocumented: undocumented.py SITE INCLUDE_DIR HEADER...

Of Doxygen's warnings, SITE/warnings*.txt, an undocumented public name counts, and so does whatever Doxygen did not
understand. Not counted are copies, moves, comparisons and deduction guides, which say what they do by their
signature; what is protected, which is for the library; and macros but those of the version. Of the headers, whose
names are relative to INCLUDE_DIR, count concepts and empty classes without a comment, of which Doxygen says nothing,
and comments that begin with a parameter, a result or an error, so that the page of a class has no sentence for them;
not what lies in a namespace detail.
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


def of_warnings(text):
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
        yield f"{pathlib.Path(path).name}:{number}: {said}"


def of_header(path):
    in_detail, comment = False, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        opened = re.match(r"namespace [\w: ]*?(\w+) \{", line)
        in_detail = bool(opened and opened[1] == "detail") or (in_detail and not line.startswith("}  // namespace"))
        text = re.match(r" *///(?!<) ?(.*)", line)
        if text:
            if not comment and re.match(r"[\\@](param|tparam|returns?|throws?)\b", text[1]) and not in_detail:
                yield f"{path.name}:{number}: a comment begins without a sentence"
            comment.append(text[1])
            continue
        named = re.match(r" *(concept|(?:struct|class)(?=.*\{\};)) (\w+)", line)
        if named and not comment and not in_detail:
            yield f"{path.name}:{number}: {named[1].capitalize()} {named[2]} is not documented."
        if not re.match(r" *(template|requires)\b", line):
            comment = []


def main():
    site, include_dir, *headers = sys.argv[1:]
    files = sorted(pathlib.Path(site).glob("warnings*.txt"))
    if not files or not headers:
        sys.exit("no warnings, or no headers are given")
    counted = list(of_warnings("".join(file.read_text(encoding="utf-8") for file in files)))
    for header in headers:
        counted += of_header(pathlib.Path(include_dir, header))
    print("\n".join(counted))
    if counted:
        sys.exit(f"{len(counted)} undocumented or misunderstood")


main()
