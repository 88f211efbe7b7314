#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Says which lines of the headers ran, and fails if they are too few:

    coverage_summary.py LLVM_COV PROFILE INCLUDE_DIR LEAST_PERCENT MISSING PROGRAM...

A line ran if it did in one of the programs, in one instance of its template: llvm-cov is asked of each
program alone, for of many it takes the first that knows a function, also where nothing calls it. The
lines that did not run are written to MISSING.
"""
import collections
import pathlib
import subprocess
import sys


def main():
    llvm_cov, profile, include_dir, least, missing = sys.argv[1:6]
    include_dir = pathlib.Path(include_dir)
    lines, branches = collections.defaultdict(dict), collections.defaultdict(dict)
    for program in sys.argv[6:]:
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
    with open(missing, "w", encoding="utf-8") as out:
        for name in sorted(not_run):
            text = (include_dir / name).read_text(encoding="utf-8").splitlines()
            for number in sorted(not_run[name]):
                out.write(f"{name}:{number}: {text[number - 1].strip()}\n")
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
    if of_lines[2] < float(least):
        sys.exit(f"less than {least} % of the lines; those that did not run are in {missing}")


main()
