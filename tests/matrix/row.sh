#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Compiles one file and runs what comes out:
#
#   row.sh SOURCE_DIR WORK_DIR ROOT RUNNER FILE COMPILER flag...
#
# ROOT: a system of make_roots.sh in which both happen, or /. RUNNER: what runs the program, none, or
# `syntax`, which compiles to nothing. Ends with 77 where the compiler, the root or Eigen is missing. For
# tried.cmake, WORK_DIR/skipped says why, or WORK_DIR/how with what.
set -euo pipefail
source_dir=$1 work=$2 root=$3 runner=$4 file=$5 compiler=$6
shift 6

skip() { echo "skipped: $*" | tee "$work/skipped"; exit 77; }

rm -rf "$work"
mkdir -p "$work"
if [ "$root" = / ]; then
  command -v "$compiler" > /dev/null || skip "there is no $compiler"
  for flag; do
    case $flag in
      -I/* | -isystem/*) directory=${flag#-I} directory=${directory#-isystem}
                         [ -d "$directory" ] || skip "there is no $directory" ;;
      -m32) echo '#include <cstddef>' | "$compiler" -m32 -x c++ -fsyntax-only - 2> /dev/null ||
              skip "there are no headers for -m32" ;;
    esac
  done
  if [ "$runner" != none ] && [ "$runner" != syntax ]; then
    command -v "$runner" > /dev/null || skip "there is no $runner"
  fi
  in_root=() here=$source_dir to=$work
else
  [ -e "$root/made" ] || skip "tests/matrix/make_roots.sh has not made $root"
  [ "$(id -u)" -eq 0 ] || skip "a change of root takes root"
  [ -x "$root/usr/bin/$compiler" ] || skip "there is no $compiler in $root"
  in_root=(chroot "$root")
  here=/local_mha/$(basename "$work") to=$here
  rm -rf "$root$here"
  mkdir -p "$root$here/tests"
  cp -r "$source_dir/include" "$root$here/include"
  cp -r "$source_dir/tests/portability" "$source_dir/tests/matrix" "$root$here/tests"
  trap 'rm -rf "$root$here"' EXIT
  if [ ! -d "$root/usr/include/eigen3" ]; then
    # Eigen of this system, for one that has an older one.
    [ -d /usr/include/eigen3 ] || skip "there is no /usr/include/eigen3"
    cp -r /usr/include/eigen3 "$root$here/eigen3"
    set -- "$@" "-isystem$here/eigen3"
  fi
fi
defined=$(echo '#include <Eigen/Core>' | "${in_root[@]}" "$compiler" -std=c++20 "$@" \
  -isystem/usr/include/eigen3 -x c++ -dM -E - 2> /dev/null) || defined=
eigen_version() { sed -n "s/^#define EIGEN_$1_VERSION //p" <<< "$defined"; }
# 3.4.0 is 3 4 0, and 5.0.1 is 3 5 0 1.
{
  "${in_root[@]}" "$compiler" --version | head -n 1
  echo "Eigen $(for part in WORLD MAJOR MINOR PATCH; do eigen_version $part; done | paste -sd. | sed 's/^3\.\(.*\..*\..*\)/\1/')"
} | tee "$work/how"
compile=("${in_root[@]}" "$compiler" -std=c++20 "-I$here/include" "$@" -isystem/usr/include/eigen3
         "$here/tests/$file")
if [ "$runner" = syntax ]; then
  "${compile[@]}" -fsyntax-only
  exit
fi
"${compile[@]}" -o "$to/program"
case $runner in
  none) "${in_root[@]}" "$to/program" ;;
  *) "$runner" "$work/program" ;;
esac
