#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Makes small systems of other suites of Debian in DIR, with compilers and versions of Eigen that this
# one lacks: make_roots.sh DIR. Takes root, some minutes, and 4 GB. Safe to run again.
set -euo pipefail
if [ $# -ne 1 ]; then sed -n '3,4s/^# //p' "$0" >&2; exit 2; fi
mkdir -p "$1"
make_root() {
  if [ -e "$1/$2/made" ]; then return; fi
  rm -rf "${1:?}/$2"
  debootstrap --variant=minbase --include="$3" "$2" "$1/$2"
  touch "$1/$2/made"
}
make_root "$1" bullseye g++-10,clang-11
make_root "$1" trixie g++-13,g++-14,clang-17,clang-18,libeigen3-dev
make_root "$1" sid g++-15,g++-16,clang-21,libeigen3-dev
