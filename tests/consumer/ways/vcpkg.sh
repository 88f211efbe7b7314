#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# By vcpkg, if there is one; else the portfile alone, by functions that do what those of vcpkg are
# documented to do.
source "$(dirname "$0")/common.sh"
model=$source_dir/examples/data/shakespeare.safetensors
port=$source_dir/cmake/packaging/vcpkg/local-mha
python3 -c 'import json, sys; json.load(open(sys.argv[1]))' "$port/vcpkg.json"
if command -v vcpkg > /dev/null; then
  vcpkg install 'local-mha[io]' "--overlay-ports=$(dirname "$port")" "--x-install-root=$work/installed"
  prefix=$(echo installed/*/share/local_mha)
  prefix=$work/${prefix%/share/local_mha}
  build_consumer find_package "-DCMAKE_PREFIX_PATH=$prefix"
  consumer_arguments=("$model")
  build_consumer io "-DCMAKE_PREFIX_PATH=$prefix"
  exit
fi
echo "by stand-ins, for there is no vcpkg" | tee how
cmake "-DCURRENT_PACKAGES_DIR=$work/package" "-DCXX=$cxx" "-DPORTFILE=$port/portfile.cmake" "-DWORK=$work" \
  -P "$here/ways/vcpkg_functions.cmake"
[ -f package/share/local-mha/copyright ] || fail "no copyright"
[ -z "$(find package -path '*/lib/*')" ] || fail "files in lib/"
build_consumer find_package "-DCMAKE_PREFIX_PATH=$work/package"
grep -q "^local_mha_DIR:PATH=$work/package/share/local_mha" build-find_package/CMakeCache.txt ||
  fail "another package was found"
# The feature io brings nlohmann_json and nothing else, and here there is one.
consumer_arguments=("$model")
build_consumer io "-DCMAKE_PREFIX_PATH=$work/package"
