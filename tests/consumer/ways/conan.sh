#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# By Conan, if there is one; else the recipe's own methods, by stand-ins for what it imports.
source "$(dirname "$0")/common.sh"
recipe=$source_dir/cmake/packaging/conan
if command -v conan > /dev/null; then
  export CONAN_HOME=$work/conan
  conan profile detect
  conan create "$recipe" -s compiler.cppstd=20 --build=missing
  exit
fi
echo "by stand-ins, for there is no conan" | tee how
python3 "$here/ways/conan_methods.py" "$recipe" "$work" "$cxx"
build_consumer find_package "-DCMAKE_PREFIX_PATH=$work/package"
grep -q "^local_mha_DIR:PATH=$work/package" build-find_package/CMakeCache.txt || fail "another package was found"
