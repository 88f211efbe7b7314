# SPDX-License-Identifier: MIT
# What the tests and examples use of the library in float and double, compiled once for all of them:
# see extern.hpp. Programs of one scalar link local_mha_float or local_mha_double alone.
find_package(Threads REQUIRED)

add_library(local_mha_instances INTERFACE)
foreach(scalar float double)
  set(source "${CMAKE_CURRENT_BINARY_DIR}/${scalar}_instances.cpp")
  file(CONFIGURE OUTPUT "${source}" @ONLY CONTENT
       "#define LOCAL_MHA_INSTANTIATE ${scalar}\n#include <local_mha/extern.hpp>\n")
  add_library(local_mha_${scalar} STATIC EXCLUDE_FROM_ALL "${source}")
  target_link_libraries(local_mha_${scalar} PUBLIC local_mha Threads::Threads)
  # Of one kind in all files. The second lets a test forbid Eigen's own allocations.
  target_compile_definitions(local_mha_${scalar} PUBLIC EIGEN_USE_THREADS= EIGEN_RUNTIME_NO_MALLOC=)
  target_link_libraries(local_mha_instances INTERFACE local_mha_${scalar})
endforeach()

# local_mha_precompile(NAME header...): a precompiled header for programs that link these, for
# target_precompile_headers(... REUSE_FROM NAME). Such programs get extern.hpp before all else.
function(local_mha_precompile name)
  set(source "${CMAKE_CURRENT_BINARY_DIR}/${name}.cpp")
  file(CONFIGURE OUTPUT "${source}" CONTENT "// All is in the precompiled header.\n")
  add_library(${name} OBJECT EXCLUDE_FROM_ALL "${source}")
  target_link_libraries(${name} PRIVATE local_mha_instances)
  target_precompile_headers(${name} PRIVATE <local_mha/extern.hpp> ${ARGN})
endfunction()
