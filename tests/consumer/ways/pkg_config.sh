#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# The fourth argument is a prefix into which local_mha is installed. It is moved, for the files say
# where they are themselves.
source "$(dirname "$0")/common.sh"
cp -r "$4" moved
export PKG_CONFIG_PATH=$work/moved/share/pkgconfig
version=$(sed -n 's/#define LOCAL_MHA_VERSION_[A-Z]* //p' "$source_dir/include/local_mha/version.hpp" | paste -sd.)
[ "$(pkg-config --modversion local_mha)" = "$version" ] || fail "local_mha.pc has another version"
pkg-config --exists 'local_mha >= 0.2' 'local_mha-io >= 0.2'
# An include directory of the tree, beside it, would hide that of the package.
flags=$(pkg-config --cflags local_mha)
include=$(pkg-config --variable=includedir local_mha)
[ "$(realpath "$include")" = "$work/moved/include" ] || fail "includedir is $include"
"$cxx" -std=c++20 $flags "-I$here/without_json" "$here/consumer.cpp" -o consumer
./consumer
# local_mha-io gives the include directories of local_mha, Eigen and nlohmann_json.
cat > read_names.cpp <<'PROGRAM'
#include <local_mha/io/safetensors.hpp>
int main(int, char** argv) {
  return local_mha::io::SafetensorsFile(argv[1]).names().empty() ? 1 : 0;
}
PROGRAM
flags=$(pkg-config --cflags local_mha-io)
"$cxx" -std=c++20 $flags read_names.cpp -o read_names
./read_names "$source_dir/examples/data/shakespeare.safetensors"
