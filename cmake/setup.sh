#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Installs what building local_mha needs and is missing, through apt. Safe to run again.
#
#   cmake/setup.sh              what the presets demo, release and bench need
#   cmake/setup.sh --test       and clang, which compiles the tests fastest
#   cmake/setup.sh --developer  and its sanitizer and fuzzer runtimes, clang-format, clang-tidy, and what
#                               builds and runs programs for AArch64, and compiles for Windows
#   cmake/setup.sh --mpi        what --test does, and Open MPI, for the preset mpi
#   cmake/setup.sh --matrix     what --developer does, and further compilers, processors and build
#                               systems, some from other suites of Debian, for the preset matrix
#   cmake/setup.sh --docs       Doxygen, MathJax and Chromium, for the preset docs
#   cmake/setup.sh --coverage   what --mpi does, and llvm-cov, for the preset coverage
set -euo pipefail

usage() { sed -n '3,13s/^# \{0,1\}//p' "$0"; }

clang=false
developer=false
mpi=false
matrix=false
docs=false
coverage=false
case "${1-}" in
  "") ;;
  --test) clang=true ;;
  --developer) clang=true developer=true ;;
  --mpi) clang=true mpi=true ;;
  --matrix) clang=true developer=true matrix=true ;;
  --docs) docs=true ;;
  --coverage) clang=true mpi=true coverage=true ;;
  -h | --help) usage; exit 0 ;;
  *) echo "setup.sh: unknown argument '$1'" >&2; usage >&2; exit 2 ;;
esac

say() { echo "setup: $*"; }

packages=(
  g++              # a C++20 compiler, g++ 11 or newer
  cmake            # 3.25 or newer
  ninja-build
  libeigen3-dev    # 3.4 or newer
  nlohmann-json3-dev
  libcli11-dev
  libstb-dev
  libgtest-dev
  libbenchmark-dev
)

if ! command -v apt-get >/dev/null; then
  say "there is no apt-get here, so nothing was installed. Please see to these:"
  cat <<'LIST'
  g++ 11 or newer, CMake 3.25 or newer, Ninja,
  Eigen 3.4 or newer, nlohmann_json 3.10, CLI11 2.1, stb, GoogleTest 1.12, Google Benchmark 1.7
LIST
  if $clang; then echo "  clang 19"; fi
  if $developer; then
    echo "  its sanitizer and fuzzer runtimes, clang-format 19, clang-tidy 19,"
    echo "  g++ for AArch64, qemu-user"
  fi
  if $mpi; then echo "  an implementation of MPI 3, such as Open MPI"; fi
  if $matrix; then echo "  the compilers of tests/matrix/CMakeLists.txt, Meson, pkg-config"; fi
  if $docs; then echo "  Doxygen 1.9, MathJax 2, Chromium"; fi
  if $coverage; then echo "  llvm-cov and llvm-profdata of clang's version, and its runtime for profiles"; fi
  exit 0
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then as_root=(sudo); fi

installed() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }
available() { [ -n "$(apt-cache madison "$1" 2>/dev/null)" ]; }

updated=false
update_once() {
  if $updated; then return; fi
  if [ ${#as_root[@]} -gt 0 ] && ! command -v sudo >/dev/null; then
    say "packages are missing, and installing them takes root or sudo" >&2
    exit 1
  fi
  say "updating the package lists"
  "${as_root[@]}" apt-get update -q
  updated=true
}

if $clang; then
  # 19, on which .clang-format and the presets are tried, or else the newest there is.
  choose_clang() {
    for version in 19 $(seq 30 -1 20) $(seq 18 -1 16); do
      if available "clang-$version"; then echo "$version"; return; fi
    done
  }
  available clang-19 || update_once
  version=$(choose_clang)
  if [ -z "$version" ]; then say "apt knows no clang from version 16 on" >&2; exit 1; fi
  packages+=("clang-$version")
fi
if $developer; then
  packages+=("libclang-rt-$version-dev" "clang-format-$version" "clang-tidy-$version")
  packages+=(g++-aarch64-linux-gnu qemu-user g++-mingw-w64-x86-64-posix pkg-config python3)
fi
if $mpi; then packages+=(openmpi-bin libopenmpi-dev); fi
if $matrix; then
  packages+=(libc6-dev-i386 lib32stdc++-12-dev g++-s390x-linux-gnu libncurses-dev meson pkg-config python3
             git debootstrap)
  for package in g++-11 clang-13 clang-14 clang-15 clang-16; do
    if available "$package"; then packages+=("$package"); fi
  done
fi
if $coverage; then packages+=("llvm-$version" "libclang-rt-$version-dev" python3); fi
if $docs; then packages+=(doxygen libjs-mathjax chromium python3); fi

missing=()
for package in "${packages[@]}"; do
  installed "$package" || missing+=("$package")
done

if [ ${#missing[@]} -eq 0 ]; then
  say "nothing to do, everything is installed"
else
  update_once
  say "installing ${missing[*]}"
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -q -y --no-install-recommends "${missing[@]}"
fi

version=$(cmake --version | sed -n '1s/[^0-9]*//p')
if [ "$(printf '%s\n' 3.25 "$version" | sort -V | head -n 1)" != 3.25 ]; then
  say "cmake is version $version, but 3.25 or newer is needed (https://cmake.org/download)" >&2
  exit 1
fi
if $matrix; then
  "${as_root[@]}" "$(dirname "$0")/../tests/matrix/make_roots.sh" "$(dirname "$0")/../build/roots"
fi
say "ready"
