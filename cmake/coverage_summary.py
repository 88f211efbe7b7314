#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Says which lines of the headers ran, and fails if they are too few, or if one did not without a reason:

    coverage_summary.py LLVM_COV PROFILE INCLUDE_DIR LEAST_PERCENT REASONS MISSING PROGRAM...

A line ran if it did in one of the programs, in one instance of its template: llvm-cov is asked of each
program alone, for of many it takes the first that knows a function, also where nothing calls it. The
lines that did not run are written to MISSING, those without a reason first. REASONS is coverage_reasons.txt.
"""
import collections
import pathlib
import re
import subprocess
import sys


def lines_with_reasons(path, include_dir):
    """(file, number) of the lines that are listed, each under a reason, and what is wrong with the list.

    Each entry is one line: of several with its text, it says which."""
    listed, wrong, reason = set(), [], False
    for number, line in enumerate(pathlib.Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("= "):
            reason = True
        elif line and not line.startswith("#"):
            entry = re.fullmatch(r"([^:#]+)(?:#(\d+))?: (.+)", line)
            if not reason or not entry:
                sys.exit(f"{path}:{number}: expected `file: text`, or `file#2: text`, under a line `= reason`")
            name, which, text = entry.group(1), int(entry.group(2) or 0), entry.group(3).strip()
            header = include_dir / name
            lines = header.read_text(encoding="utf-8").splitlines() if header.exists() else []
            found = [at for at, other in enumerate(lines, 1) if other.strip() == text]
            if which > len(found) or not found:
                wrong.append(f"{path}:{number}: there is no such line: {line}")
            elif which == 0 and len(found) > 1:
                wrong.append(f"{path}:{number}: which of the {len(found)} (lines {', '.join(map(str, found))})? "
                             f"{name}#1 is the first: {line}")
            else:
                listed.add((name, found[max(which, 1) - 1]))
    return listed, wrong


def has_code(text):
    """Whether there is more than brackets, a comment or what the preprocessor reads."""
    return re.fullmatch(r"[\s{}()\[\];,]*(?:else|\}? ?else \{)?[\s{}()\[\];,]*", re.sub(r"//.*|^\s*#.*", "", text)) is None


def main():
    llvm_cov, profile, include_dir, least, reasons, missing = sys.argv[1:7]
    include_dir = pathlib.Path(include_dir)
    listed, wrong = lines_with_reasons(reasons, include_dir)
    lines, branches = collections.defaultdict(dict), collections.defaultdict(dict)
    for program in sys.argv[7:]:
        exported = subprocess.run(
            [llvm_cov, "export", "-format=lcov", f"-instr-profile={profile}", program, "-sources",
             str(include_dir)], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        name = None
        for record in exported.stdout.splitlines():
            kind, _, value = record.partition(":")
            if kind == "SF":
                path = pathlib.Path(value)
                name = path.relative_to(include_dir) if include_dir in path.parents else None
            elif name and kind == "DA":
                line, count = map(int, value.split(",")[:2])
                lines[name][line] = lines[name].get(line, 0) + count
            elif name and kind == "BRDA":
                *place, count = value.split(",")
                place = tuple(place)
                branches[name][place] = branches[name].get(place, 0) + (0 if count == "-" else int(count))
    if not lines:
        sys.exit(f"none of the programs says anything of {include_dir}")

    not_run = {name: [n for n, count in of.items() if count == 0] for name, of in lines.items()}
    texts = {name: (include_dir / name).read_text(encoding="utf-8").splitlines() for name in not_run}
    explained, unexplained, without_code = [], [], 0
    for name in sorted(not_run):
        for number in sorted(not_run[name]):
            text = texts[name][number - 1].strip()
            if not has_code(text):
                without_code += 1
            else:
                (explained if (str(name), number) in listed else unexplained).append(f"{name}:{number}: {text}")
    pathlib.Path(missing).write_text("".join(f"{line}\n" for line in unexplained + explained), encoding="utf-8")
    print("lines that did not run, of all, in the headers that have most of them:")
    for name in sorted(not_run, key=lambda name: -len(not_run[name]))[:15]:
        if not_run[name]:
            print(f"{len(not_run[name]):5} {len(lines[name]):6}  {name}")
    headers = {path.relative_to(include_dir) for path in include_dir.rglob("*.hpp")}
    print("headers without functions:", ", ".join(map(str, sorted(headers - set(lines)))) or "none")

    def share(counts):
        every = [count > 0 for of in counts.values() for count in of.values()]
        return sum(every), len(every), 100 * sum(every) / max(1, len(every))

    of_lines, of_branches = share(lines), share(branches)
    print("lines: %d of %d, %.2f %%; branches: %d of %d, %.2f %%" % (*of_lines, *of_branches))
    print(f"of those that did not run, {len(explained)} have a reason, {len(unexplained)} have none, and "
          f"{without_code} are without code")
    if unexplained:
        wrong += [f"lines that did not run, of which {reasons} does not say why:", *unexplained]
    if wrong:
        sys.exit("\n".join(wrong))
    if of_lines[2] < float(least):
        sys.exit(f"less than {least} % of the lines; those that did not run are in {missing}")


main()
