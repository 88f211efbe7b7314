#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Mutates the headers, one place at a time, and sees whether the tests notice.

    mutants.py [--mutants N] [--only FILE] [--first FILE] [--jobs N] [--list] ...
    mutants.py --check

A mutant is killed by the compiler, by a test, or by taking too long. All meet a few fast tests, and those that
survive them most of the tests. What survives these is listed in equivalent.json beside this file, with the reason
why no test can see it, or the run fails. Each result is written when it is there, and a run that was ended goes on
where it was. It needs a C++20 compiler and Python alone: --include and --gtest say where Eigen, nlohmann_json and
GoogleTest's sources are, if not where the compiler looks.
"""
import argparse
import collections
import concurrent.futures
import fnmatch
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import operators
import programs

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = pathlib.Path(__file__).resolve().parent
MACROS = ["-DEIGEN_USE_THREADS=", "-DEIGEN_RUNTIME_NO_MALLOC=", "-DLOCAL_MHA_TEST_FEWER_CASES",
          f'-DLOCAL_MHA_TEST_DATA_DIR="{ROOT}/tests"', f'-DLOCAL_MHA_EXAMPLE_DATA_DIR="{ROOT}/examples/data"',
          f'-DLOCAL_MHA_INCLUDE_DIR="{ROOT}/include"']
# With these, the mutated instances tell what they read and write that is not theirs.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size,alignment,vptr",
            "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS"]
# What every file includes sooner or later, and no mutant changes.
PRECOMPILED = ["algorithm", "array", "atomic", "bit", "charconv", "cmath", "concepts", "condition_variable", "cstdint",
               "cstring", "filesystem", "fstream", "functional", "iostream", "limits", "map", "memory", "mutex",
               "numbers", "numeric", "optional", "random", "ranges", "set", "span", "sstream", "stdexcept", "string",
               "string_view", "system_error", "thread", "tuple", "type_traits", "utility", "variant", "vector",
               "Eigen/Core", "unsupported/Eigen/CXX11/Tensor"]


# What Open MPI needs for more ranks than cores, as any user; as in tests/mpi/CMakeLists.txt.
OPEN_MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "OMPI_MCA_rmaps_base_oversubscribe": "1", "OMPI_MCA_mpi_yield_when_idle": "1",
            "OMPI_MCA_hwloc_base_binding_policy": "none", "OMPI_MCA_btl": "self,vader",
            "OMPI_MCA_btl_vader_single_copy_mechanism": "none"}


class Failed(Exception):
    """A command that ended with an error, or did not end in time."""

    def __init__(self, what, output, late=False):
        super().__init__(what)
        self.output, self.late = output, late


def command(arguments, seconds, memory_gb, cwd=None, environment=None):
    """Runs a command within a time and a memory of its own (None: as much as it likes). Returns what it says."""
    limit = "unlimited" if memory_gb is None else str(int(memory_gb * 2**20))
    limited = ["sh", "-c", 'ulimit -v "$1"; ulimit -c 0; shift; exec "$@"', "sh", limit]
    process = subprocess.Popen(limited + [str(a) for a in arguments], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, cwd=cwd, start_new_session=True,
                               env={**os.environ, **(environment or {})})
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise Failed("too late", output.decode(errors="replace"), late=True) from None
    text = output.decode(errors="replace")
    if process.returncode != 0:
        code = process.returncode
        raise Failed(f"signal {-code}" if code < 0 else f"exit status {code}", text)
    return text


class Bench:
    """What is compiled once, and where."""

    def __init__(self, options):
        self.options = options
        self.dir = options.build.resolve()
        self.dir.mkdir(parents=True, exist_ok=True)
        self.include = ROOT / "include"
        self.extern = (self.include / "local_mha/extern.hpp").read_text(encoding="utf-8")
        self.flags = ["-std=c++20", f"-march={options.march}", "-pthread", "-w"] + MACROS
        self.places = []
        for place in options.include:
            self.places += ["-isystem", str(place.resolve())]
        self.gtest = options.gtest.resolve()
        self.tests = ROOT / "tests"
        self.times = {}
        self.sanitizers = None
        self.mpi = self.flags_of_mpi()

    @staticmethod
    def flags_of_mpi():
        """(for the compiler, for the linker), or None where there is no Open MPI."""
        if shutil.which("mpirun") is None or shutil.which("mpicxx") is None:
            return None
        try:
            return tuple(command(["mpicxx", f"--showme:{of}"], 60, None).split() for of in ("compile", "link"))
        except Failed:
            return None

    def can_run(self, run):
        return run[0] != "ranks" or self.mpi is not None

    # --- compiling

    def compile(self, source, to, optimize, mutated=None, extra=(), precompiled=True, seconds=900):
        """mutated: a folder whose headers come before those of the library"""
        overlay = ["-I", str(mutated)] if mutated else []
        header = ["-include", str(self.dir / f"precompiled{optimize}" / "all.hpp")] if precompiled else []
        command([self.options.cxx, *self.flags, optimize, *header, *overlay, "-I", str(self.include), "-I",
                 str(self.tests), *self.places, "-isystem", str(self.gtest / "include"), *extra, "-c", str(source),
                 "-o", str(to), *(["-MMD"] if mutated is None else [])], seconds, 12)

    def precompile(self, optimize):
        folder = self.dir / f"precompiled{optimize}"
        folder.mkdir(exist_ok=True)
        header = folder / "all.hpp"
        header.write_text("#pragma once\n" + "".join(f"#include <{name}>\n" for name in PRECOMPILED +
                          (["gtest/gtest.h", "nlohmann/json.hpp"] if optimize == "-O0" else [])))
        command([self.options.cxx, *self.flags, optimize, *self.places, "-isystem", str(self.gtest / "include"), "-x",
                 "c++-header", str(header), "-o", str(header) + ".gch"], 300, 8)

    def object(self, name):
        return self.dir / "kept" / (re.sub(r"[^\w]", "_", name) + ".o")

    def keep(self, names):
        """Compiles what is kept, of what is not there."""
        (self.dir / "kept").mkdir(exist_ok=True)
        for optimize in ("-O0", "-O1"):
            if not (self.dir / f"precompiled{optimize}" / "all.hpp.gch").exists():
                self.precompile(optimize)
        todo = [name for name in names if not self.is_fresh(self.object(name))]
        with concurrent.futures.ThreadPoolExecutor(self.options.jobs) as pool:
            for name, seconds in zip(todo, pool.map(self.keep_one, todo)):
                print(f"kept {name}: {seconds:.0f} s", flush=True)

    @staticmethod
    def is_fresh(to):
        """Whether it is there, and newer than all that it was made of."""
        made_of = to.with_suffix(".d")
        if not to.exists() or not made_of.exists():
            return False
        paths = made_of.read_text().replace("\\\n", " ").partition(": ")[2].split()
        return all(os.path.exists(p) and os.stat(p).st_mtime_ns < to.stat().st_mtime_ns for p in paths)

    def keep_one(self, name):
        begin = time.monotonic()
        to = self.object(name)
        part = to.with_suffix(".part.o")
        if name.startswith("instances "):
            source = self.write_instances(*name.split()[1:])
            self.compile(source, part, "-O1")
        elif name == "reference":
            self.compile(self.tests / "reference/instances.cpp", part, "-O2", precompiled=False)
        elif name in ("gtest-all", "gtest_main"):
            self.compile(self.gtest / f"src/{name}.cc", part, "-O0", precompiled=False,
                         extra=["-I", str(self.gtest)])
        elif name.startswith("mpi/"):
            self.compile(self.tests / name, part, "-O1", extra=[
                "-include", "local_mha/extern.hpp", "-include", "reference/extern.hpp", *self.mpi[0]])
        elif name.startswith("soak/"):
            self.compile(self.tests / name, part, "-O1", extra=["-include", "local_mha/extern.hpp"])
        else:
            self.compile_unit(name, part)
        part.rename(to)
        part.with_suffix(".d").rename(to.with_suffix(".d"))
        return time.monotonic() - begin

    def compile_unit(self, name, to, mutated=None, flags=()):
        self.compile(self.tests / name, to, programs.UNITS.get(name, "-O0"), mutated, precompiled=not flags,
                     extra=["-include", "local_mha/extern.hpp", "-include", "reference/extern.hpp",
                            "-I", str(ROOT / "benchmarks"), *flags])

    def write_instances(self, group, scalar):
        source = self.dir / f"{group}_{scalar}.cpp"
        text = programs.instances(self.extern, group, scalar)
        if not source.exists() or source.read_text() != text:
            source.write_text(text)
        return source

    # --- linking and running

    def all_instances(self):
        return [f"instances {group} {scalar}" for group in programs.GROUPS for scalar in ("float", "double")]

    def names_of(self, program):
        """What a program is linked of, beside objects of a mutant."""
        if program == "soak":
            return ["soak/" + name for name in programs.SOAK] + self.all_instances() + ["reference", "gtest-all"]
        if program == "ranks":
            return ["mpi/" + name for name in programs.RANKS_OF] + self.all_instances() + ["reference", "gtest-all"]
        kept = self.all_instances() + ["reference", "gtest-all", "gtest_main"]
        return (list(programs.UNITS) if program == "units" else []) + kept

    def link(self, program, first, to, flags=()):
        objects = [self.object(name) for name in self.names_of(program)]
        wrap = ["-Wl,--wrap=malloc"] if program == "soak" else []
        libraries = ["-ldl"] + (self.mpi[1] if program == "ranks" else [])
        command([self.options.cxx, "-pthread", *flags, *wrap, *first, *objects, *libraries, "-o", to], 300, 8)

    def has_sanitizers(self):
        """Whether there is a runtime of them."""
        if self.sanitizers is None:
            source = self.dir / "empty.cpp"
            source.write_text("int main() {}\n")
            try:
                command([self.options.cxx, *SANITIZE, source, "-o", self.dir / "empty"], 60, None)
                command([self.dir / "empty"], 60, None)
                self.sanitizers = True
            except Failed:
                self.sanitizers = False
        return self.sanitizers

    def run(self, program, arguments, folder, memory_gb=8):
        """Throws Failed."""
        seconds = 20 + 10 * self.times.get((pathlib.Path(program).name, *arguments), 180)
        ranks = ["mpirun", "-n", 3] if pathlib.Path(program).name == "ranks" else []
        # The name of a socket is short.
        with tempfile.TemporaryDirectory(prefix="m", ignore_cleanup_errors=True) as temporary:
            return command([*ranks, program, *arguments], seconds, memory_gb, cwd=folder,
                           environment={"TMPDIR": temporary, "ASAN_OPTIONS": "detect_leaks=0", **OPEN_MPI})

    # --- the headers as they are

    def compiled_lines(self):
        """Lines that this compiler compiles for this processor, of each header."""
        headers = [p for p in sorted(self.include.rglob("*.hpp")) if "mpi" not in p.name and p.parent.name != "mpi"]
        source = self.dir / "all_headers.cpp"
        source.write_text("".join(f"#include <{p.relative_to(self.include)}>\n" for p in headers))
        text = command([self.options.cxx, *self.flags, "-O1", "-I", str(self.include), *self.places, "-E",
                        str(source)], 120, 8)
        lines, of, number = collections.defaultdict(set), None, 0
        for line in text.splitlines():
            mark = re.match(r'# (\d+) "([^"]*)"', line)
            if mark:
                number = int(mark.group(1)) - 1
                path = pathlib.Path(mark.group(2))
                of = str(path.relative_to(self.include)) if self.include in path.parents else None
                continue
            number += 1
            if of and line.strip():
                lines[of].add(number)
        return lines


class Run:
    def __init__(self, options):
        self.options = options
        self.bench = Bench(options)
        self.lock = threading.Lock()
        self.results = {}
        if options.result.exists():
            self.results = {m["id"]: m for m in json.loads(options.result.read_text())["mutants"]}
        self.equivalent = json.loads((HERE / "equivalent.json").read_text(encoding="utf-8"))
        self.begin = time.monotonic()

    def all_mutants(self, of_all_lines=False):
        lines = None if of_all_lines else self.bench.compiled_lines()
        found = []
        for path in sorted((self.bench.include / "local_mha").rglob("*.hpp")):
            name = str(path.relative_to(self.bench.include))
            if programs.part_of(name) is None:
                continue
            text = path.read_text(encoding="utf-8")
            found += operators.mutants_of(name, text,
                                          lambda number, name=name: lines is None or number in lines[name])
        return found

    def choose(self, mutants):
        """Those of this run: of the files asked for, as many as asked for."""
        if self.options.only:
            mutants = [m for m in mutants if any(m.file.endswith(name) for name in self.options.only)]
        return operators.chosen(mutants, self.options.mutants, lambda file: programs.part_of(file).weight,
                                self.options.seed)

    def reason(self, m):
        for entry in self.equivalent:
            if (entry["file"], entry["operator"], entry["line"], entry.get("becomes", m.becomes)) == \
                    (m.file, m.operator, m.line, m.becomes):
                return entry["reason"]
        return None

    def stale(self, mutants):
        """Entries of the list that no mutant is any more."""
        keys = {(m.file, m.operator, m.line, m.becomes) for m in mutants}
        short = {key[:3] for key in keys}
        files = {m.file for m in mutants}
        return [e for e in self.equivalent if e["file"] in files and
                ((e["file"], e["operator"], e["line"], e["becomes"]) not in keys if "becomes" in e
                 else (e["file"], e["operator"], e["line"]) not in short)]

    def check(self, mutants):
        stale = self.stale(mutants)
        for entry in stale:
            print(f"equivalent.json explains what is no mutant: {entry['file']}: {entry['operator']}: {entry['line']}")
        return 1 if stale else 0

    # --- one mutant

    def test(self, m, stage):
        """(outcome, by whom)"""
        part = programs.part_of(m.file)
        folder = self.bench.dir / "work" / m.id
        shutil.rmtree(folder, ignore_errors=True)
        header = folder / "include" / m.file
        header.parent.mkdir(parents=True)
        text = (self.bench.include / m.file).read_text(encoding="utf-8")
        header.write_text(text[:m.begin] + m.replacement + text[m.end:], encoding="utf-8")
        try:
            try:
                (self.fast if stage == "fast" else self.slow)(part, folder)
                return "survived", stage
            except Failed as failed:
                return self.judge(failed)
        finally:
            if not self.options.keep:
                shutil.rmtree(folder, ignore_errors=True)

    @staticmethod
    def judge(failed):
        output = failed.output
        if failed.late:
            return "timeout", str(failed)
        failed_test = "[  FAILED  ]" in output or "runtime error:" in output
        if not failed_test and re.search(
                r"No space left|Killed signal|out of memory|internal compiler error|Cannot allocate", output):
            return "error", output[-300:]
        if not failed_test and re.search(r"error:|undefined reference", output):
            line = next((l for l in output.splitlines() if "error:" in l or "undefined reference" in l), "")
            return "compiler", re.sub(r"^\S*?(?=local_mha/)", "", line)[:160]
        name = re.search(r"\[  FAILED  \] ([\w/.]+)", output) or re.search(r"(AddressSanitizer: [\w-]+)", output) or \
            re.search(r"(soak --seed[^#]*)", output)
        if "cc1plus" in output or "ld returned" in output:
            return "error", output[-300:]
        return "test", (name.group(1) if name else output[-120:].strip()) + f" ({failed})"

    def run_all(self, runs, first, folder):
        made = {}
        for program, *arguments in filter(self.bench.can_run, runs):
            if program not in made:
                made[program] = folder / program
                self.bench.link(program, first.get(program, first["*"]), made[program])
            self.bench.run(made[program], tuple(arguments), folder)

    def fast(self, part, folder):
        first = {"*": []}
        if part.group:
            self.bench.compile(self.bench.write_instances(part.group, "float"), folder / "group.o", "-O1",
                               folder / "include")
            first["*"] = [folder / "group.o"]
        for name in programs.WHOLE:
            if any(run[0] == name for run in part.fast):
                first[name] = self.own_program(name, folder)
        self.run_all(part.fast, first, folder)

    def own_program(self, name, folder):
        source = folder / f"{name}.cpp"
        source.write_text("".join(f'#include "{unit}"\n' for unit in programs.WHOLE[name]))
        self.bench.compile(source, folder / f"{name}.o", "-O0", folder / "include",
                           extra=["-include", "local_mha/extern.hpp", "-include", "reference/extern.hpp"])
        return [folder / f"{name}.o"]

    def slow(self, part, folder):
        first = {"*": []}

        def compile_groups(*groups):
            for group, scalar in groups:
                to = folder / f"{group}_{scalar}.o"
                if part.group and not to.exists():
                    self.bench.compile(self.bench.write_instances(group, scalar), to, "-O1", folder / "include")
                    first["*"].append(to)

        # What is cheap, and kills most of what comes so far.
        compile_groups((part.group, "float"), (part.group, "double"))
        for unit in part.units:
            self.run_unit(unit, first["*"], folder, folder / "include")
        # Layers have heads of their own.
        compile_groups(("layer", "float"))
        for name in programs.WHOLE:
            if any(run[0] == name for run in part.slow):
                first[name] = self.own_program(name, folder)
        runs = [run for run in part.fast if run[0] == "soak"] + list(part.sanitized)
        if part.group and self.bench.has_sanitizers():
            sanitized = [folder / "sanitized.o"]
            self.bench.compile(self.bench.write_instances(part.group, "float"), sanitized[0], "-O1",
                               folder / "include", extra=SANITIZE, precompiled=False)
            for unit in part.sanitized_units:
                self.run_unit(unit, sanitized, folder, folder / "include", SANITIZE)
            for program in dict.fromkeys(run[0] for run in runs):
                self.bench.link(program, sanitized, folder / program, SANITIZE)
            for program, *arguments in runs:
                self.bench.run(folder / program, tuple(arguments), folder, None)
        else:
            for unit in part.sanitized_units:
                self.run_unit(unit, first["*"], folder, folder / "include")
        self.run_all(part.slow, first, folder)

    def run_unit(self, unit, first, folder, mutated, flags=()):
        """Compiles a test file from the mutated headers, and runs it."""
        to = folder / (re.sub(r"\W", "_", unit) + ".o")
        self.bench.compile_unit(unit, to, mutated, flags)
        objects = [self.bench.object(name) for name in self.bench.names_of("") + programs.UNIT_NEEDS.get(unit, [])]
        own = to.with_suffix("")
        command([self.options.cxx, "-pthread", *flags, *first, to, *objects, "-ldl", "-o", own], 300, 8)
        self.bench.run(own, ("--gtest_brief=1", "--gtest_fail_fast"), folder, None if flags else 8)

    # --- all of them

    def save(self):
        part = self.options.result.with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"mutants": sorted(self.results.values(), key=lambda m: (m["file"], m["number"]))},
                                   indent=1))
        part.replace(self.options.result)

    def one(self, m, stage):
        if not self.is_in_time():
            return
        begin = time.monotonic()
        try:
            outcome, by = self.test(m, stage)
        except OSError as error:
            outcome, by = "error", str(error)
        seconds = time.monotonic() - begin
        entry = {"id": m.id, "file": m.file, "number": m.number, "operator": m.operator, "line": m.line,
                 "becomes": m.becomes, "outcome": outcome, "by": by, "seconds": round(seconds, 1)}
        with self.lock:
            self.results[m.id] = entry
            self.save()
            done = len(self.results)
        print(f"{done:4} {outcome:8} {m.file}:{m.number} {m.operator}: {m.line}  ->  {m.becomes}"
              f"  [{by}] {seconds:.0f} s", flush=True)

    def main(self):
        if self.options.check:
            return self.check(self.all_mutants(of_all_lines=True))
        everything = self.all_mutants()
        mutants = self.choose(everything)
        if self.options.list:
            for m in sorted(mutants, key=lambda m: (m.file, m.number)):
                print(f"{m.id} {m.file}:{m.number} {m.operator}: {m.line}  ->  {m.becomes}")
            print(f"{len(mutants)} of {len(everything)} mutants")
            return 0
        if self.options.again:
            for m in mutants:
                if self.results.get(m.id, {}).get("outcome") in self.options.again:
                    del self.results[m.id]
        mutants_left = [m for m in mutants if self.reason(m) is None]
        mutants_left.sort(key=lambda m: next(
            (place for place, name in enumerate(self.options.first) if fnmatch.fnmatch(m.file, f"*{name}")),
            len(self.options.first)))
        stages = [("fast", [m for m in mutants_left if m.id not in self.results])]
        if not self.options.fast_only:
            stages.append(("slow", mutants_left))
        for stage, of in stages:
            todo = [m for m in of if stage == "fast" or
                    self.results.get(m.id, {}).get("outcome") == "survived" and self.results[m.id]["by"] == "fast"]
            if todo and self.is_in_time():
                self.prepare(todo, stage)
            with concurrent.futures.ThreadPoolExecutor(self.options.jobs) as pool:
                list(pool.map(lambda m, stage=stage: self.one(m, stage), todo))
        return self.report(mutants, everything)

    def is_in_time(self):
        return not self.options.budget or time.monotonic() - self.begin < self.options.budget

    def prepare(self, todo, stage):
        """What all need, compiled; and tests that pass on the headers as they are, whose time is the measure."""
        parts = {programs.part_of(m.file) for m in todo}
        runs = sorted({run for part in parts for run in (part.fast if stage == "fast" else part.slow + part.sanitized)
                       if self.bench.can_run(run)})
        units = sorted({unit for part in parts for unit in part.units + part.sanitized_units}
                       if stage == "slow" else ())
        names = dict.fromkeys(name for run in runs for name in self.bench.names_of(run[0]))
        names.update(dict.fromkeys(name for unit in units for name in programs.UNIT_NEEDS.get(unit, [])))
        self.bench.keep(list(names))
        folder = self.bench.dir / "work" / "as_it_is"
        (folder / "include").mkdir(parents=True, exist_ok=True)
        made = {}
        for program in {run[0] for run in runs}:
            made[program] = folder / program
            own = self.own_program(program, folder) if program in programs.WHOLE else []
            self.bench.link(program, own, made[program])

        def measure(run):
            begin = time.monotonic()
            try:
                self.bench.run(made[run[0]], run[1:], folder)
            except Failed as failed:
                sys.exit(f"without a mutant, {' '.join(run)} fails: {failed}\n{failed.output[-3000:]}\n"
                         f"(in {folder})")
            return time.monotonic() - begin

        def try_unit(unit):
            try:
                self.run_unit(unit, [], folder, folder / "include")
            except Failed as failed:
                sys.exit(f"without a mutant, {unit} fails: {failed}\n{failed.output[-3000:]}")

        with concurrent.futures.ThreadPoolExecutor(self.options.jobs) as pool:
            tried = pool.map(try_unit, units)
            for run, seconds in zip(runs, pool.map(measure, runs)):
                self.bench.times[(made[run[0]].name, *run[1:])] = seconds
                print(f"as it is, {' '.join(run)}: {seconds:.1f} s", flush=True)
            list(tried)

    def report(self, mutants, everything):
        outcomes = ["compiler", "test", "timeout", "equivalent", "survived", "error", "not run"]
        counts = {}
        survivors = []
        for m in mutants:
            outcome = self.results.get(m.id, {"outcome": "not run"})["outcome"]
            if outcome in ("survived", "not run") and self.reason(m) is not None:
                outcome = "equivalent"
            if outcome in ("survived", "error"):
                survivors.append(m)
            for row in (("file", m.file), ("operator", m.operator), ("all", "all")):
                counts.setdefault(row, collections.Counter())[outcome] += 1
        for kind in ("file", "operator", "all"):
            print(f"\n{kind:45}" + "".join(f"{o:>11}" for o in outcomes))
            for row in sorted(r for r in counts if r[0] == kind):
                print(f"{row[1]:45}" + "".join(f"{counts[row][o] or '':>11}" for o in outcomes))
        for m in survivors:
            print(f"survived: {m.file}:{m.number} {m.operator}: {m.line}  ->  {m.becomes}")
        stale = self.check(everything)
        total = counts[("all", "all")] if counts else collections.Counter()
        return 1 if survivors or stale or total["not run"] else 0


def options():
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=400, metavar="N", help="so many, %(default)s")
    parser.add_argument("--only", action="append", metavar="FILE", help="of a header; may be repeated")
    parser.add_argument("--first", action="append", default=[], metavar="FILE",
                        help="begin with those of a header, or of a pattern such as io/*; may be repeated")
    parser.add_argument("--seed", default="1", help="by which mutants are chosen, %(default)s")
    parser.add_argument("--jobs", type=int, default=cores, metavar="N", help="at a time, %(default)s")
    parser.add_argument("--list", action="store_true", help="say which they are, and end")
    parser.add_argument("--check", action="store_true",
                        help="say whether equivalent.json explains what is no mutant, and end; needs no compiler")
    parser.add_argument("--fast-only", action="store_true", help="leave out the second stage")
    parser.add_argument("--again", action="append", metavar="OUTCOME", help="run those that had it before again")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin none later than this")
    parser.add_argument("--keep", action="store_true", help="leave the mutants' folders")
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build/mutants", metavar="DIR")
    parser.add_argument("--result", type=pathlib.Path, metavar="FILE", help="JSON, build/mutants/result.json")
    parser.add_argument("--cxx", default="g++", metavar="COMPILER")
    parser.add_argument("--march", default="x86-64-v3", help="processor, %(default)s")
    parser.add_argument("--include", type=pathlib.Path, action="append", metavar="DIR",
                        default=None, help="where Eigen and nlohmann_json are; may be repeated")
    parser.add_argument("--gtest", type=pathlib.Path, default=pathlib.Path("/usr/src/googletest/googletest"),
                        metavar="DIR", help="GoogleTest, with include and src, %(default)s")
    given = parser.parse_args()
    given.include = given.include or [pathlib.Path("/usr/include/eigen3")]
    given.result = given.result or given.build / "result.json"
    return given


if __name__ == "__main__":
    sys.exit(Run(options()).main())
