#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# A Debian package: built, installed into a root of its own, used, removed.
source "$(dirname "$0")/common.sh"
maintainer='A. Packager <packager@example.org>'
cmake -S "$source_dir" -B build "${library_alone[@]}" "-DLOCAL_MHA_PACKAGE_MAINTAINER=$maintainer"
(cd build && cpack -G DEB)
packages=(build/*.deb)
[ ${#packages[@]} -eq 1 ] || fail "${#packages[@]} packages"
dpkg-deb --info "${packages[0]}"
[ "$(dpkg-deb -f "${packages[0]}" Package Architecture)" = $'Package: liblocal-mha-dev\nArchitecture: all' ] ||
  fail "another package"
[ "$(dpkg-deb -f "${packages[0]}" Maintainer)" = "$maintainer" ] || fail "another maintainer"
dpkg-deb -f "${packages[0]}" Depends | grep -q 'libeigen3-dev (>= 3.4)' || fail "does not need Eigen"

mkdir -p root/var/lib/dpkg/info root/var/lib/dpkg/updates
touch root/var/lib/dpkg/status root/var/lib/dpkg/available
# Eigen is not in this root: --force-depends.
in_root=(dpkg "--root=$work/root" --force-not-root --force-depends --force-script-chrootless --log=dpkg.log)
"${in_root[@]}" --install "${packages[0]}"
[ -f root/usr/include/local_mha/local_mha.hpp ] || fail "no header in usr/include"
[ "$(find root/usr/include -name '*.hpp' | wc -l)" -eq "$(find "$source_dir/include" -name '*.hpp' | wc -l)" ] ||
  fail "not all headers"
build_consumer find_package "-DCMAKE_PREFIX_PATH=$work/root/usr" \
  -DCMAKE_DISABLE_FIND_PACKAGE_nlohmann_json=ON
grep -q "^local_mha_DIR:PATH=$work/root/usr" build-find_package/CMakeCache.txt || fail "another package was found"
"${in_root[@]}" --purge liblocal-mha-dev
left=$(find root -path root/var -prune -o ! -type d -print)
[ -z "$left" ] || fail "left behind: $left"
