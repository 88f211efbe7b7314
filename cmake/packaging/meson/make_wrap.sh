#!/bin/sh
# SPDX-License-Identifier: MIT
# Makes the wrap by which a Meson project fetches local_mha from a git repository:
#
#   make_wrap.sh URL REVISION SUBPROJECTS
#
# writes SUBPROJECTS/local_mha.wrap, and packagefiles/local_mha/meson.build beside it. Then
# dependency('local_mha') gives the library, and dependency('local_mha-io') its io/.
set -eu
if [ $# -ne 3 ]; then sed -n '3,8s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
here=$(dirname "$0")
mkdir -p "$3/packagefiles/local_mha"
cp "$here/meson.build" "$3/packagefiles/local_mha/"
cat > "$3/local_mha.wrap" <<WRAP
[wrap-git]
url = $1
revision = $2
depth = 1
patch_directory = local_mha

[provide]
dependency_names = local_mha, local_mha-io
WRAP
