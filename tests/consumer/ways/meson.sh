#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
source "$(dirname "$0")/common.sh"
make_repository
mkdir project
cp "$here/meson/meson.build" "$here/consumer.cpp" "$here/io/read_weights.cpp" project
"$source_dir/cmake/packaging/meson/make_wrap.sh" "file://$work/repository" main project/subprojects
CXX=$cxx meson setup build project
meson compile -C build
build/consumer
build/read_weights "$source_dir/examples/data/shakespeare.safetensors"
