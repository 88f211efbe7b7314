#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# The fourth argument is Eigen's include directory. Beside it and the compiler's own there is none.
source "$(dirname "$0")/common.sh"
python3 "$source_dir/cmake/packaging/single_header.py" -o local_mha.hpp
if grep -n '#include <local_mha/' local_mha.hpp; then fail "not single"; fi
sed -e 's|<local_mha/local_mha.hpp>|"local_mha.hpp"|' -e '/local_mha\/version.hpp/d' \
  "$here/consumer.cpp" > consumer.cpp
ln -s "$(realpath "$4")" eigen
"$cxx" -std=c++20 -Wall -Wextra -Werror "-I$here/without_json" -isystem eigen consumer.cpp -o consumer
./consumer
# Twice in a program, which is what a header must stand.
printf '#include "local_mha.hpp"\n#include "local_mha.hpp"\n' > twice.cpp
"$cxx" -std=c++20 -isystem eigen -fsyntax-only twice.cpp
# A header that is not there is named.
if python3 "$source_dir/cmake/packaging/single_header.py" local_mha/nothing.hpp 2> message; then
  fail "made of a header that is not there"
fi
grep -q 'there is no local_mha/nothing.hpp' message
