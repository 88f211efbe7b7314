#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
source "$(dirname "$0")/common.sh"
make_repository
build_consumer fetch_content "-DLOCAL_MHA_REPOSITORY=file://$work/repository" \
  -DCMAKE_DISABLE_FIND_PACKAGE_nlohmann_json=ON
[ ! -e build-fetch_content/_deps/local_mha-src/tests ] || fail "not the repository that was made"
