# SPDX-License-Identifier: MIT
# Toolchain of the presets that use clang: the version that setup.sh prefers, or a newer
# one. Older ones lack parts of C++20 that the headers use.
if(NOT CMAKE_CXX_COMPILER)
  foreach(version RANGE 19 30)
    list(APPEND names clang++-${version})
  endforeach()
  find_program(LOCAL_MHA_CLANG NAMES ${names} clang++ REQUIRED)
  set(CMAKE_CXX_COMPILER "${LOCAL_MHA_CLANG}")
endif()
