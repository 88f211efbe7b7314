# SPDX-License-Identifier: MIT
# For the scripts beside it: SCRIPT SOURCE_DIR WORK_DIR CXX. Each begins with nothing.
set -euo pipefail
source_dir=$1 work=$2 cxx=$3
here=$source_dir/tests/consumer
rm -rf "$work"
mkdir -p "$work"
cd "$work"

fail() { echo "$*" >&2; exit 1; }

# What a release holds of the tree, in a git repository of its own, branch main.
make_repository() {
  mkdir repository
  cp -r "$source_dir/CMakeLists.txt" "$source_dir/LICENSE" "$source_dir/cmake" "$source_dir/include" repository
  git -C repository -c init.defaultBranch=main init -q
  git -C repository add -A
  git -C repository -c user.name=test -c user.email=test@localhost commit -q -m "A release"
}

# local_mha's own configuration, of its library alone.
library_alone=(-DLOCAL_MHA_BUILD_TESTS=OFF -DLOCAL_MHA_BUILD_BENCHMARKS=OFF
               -DLOCAL_MHA_BUILD_EXAMPLES=OFF "-DCMAKE_CXX_COMPILER=$cxx")

# build_consumer PROJECT option...: configures, builds and runs it, with $consumer_arguments.
consumer_arguments=()
build_consumer() {
  local project=$1
  shift
  cmake -S "$here/$project" -B "build-$project" "-DCMAKE_CXX_COMPILER=$cxx" "$@"
  cmake --build "build-$project"
  "build-$project/consumer" "${consumer_arguments[@]}"
}
