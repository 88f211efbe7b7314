# SPDX-License-Identifier: MIT
# Targets coverage_tests, the programs that tell which lines they run, and coverage_report, which says it
# of include/ after they ran. Flags are those of the preset coverage.
string(REGEX MATCH "^[0-9]+" clang_version "${CMAKE_CXX_COMPILER_VERSION}")
find_program(LOCAL_MHA_LLVM_COV NAMES llvm-cov-${clang_version} llvm-cov REQUIRED)
find_program(LOCAL_MHA_LLVM_PROFDATA NAMES llvm-profdata-${clang_version} llvm-profdata REQUIRED)
set(LOCAL_MHA_COVERAGE_LEAST 97 CACHE STRING "Share of lines of include/ that is enough, in percent")

add_custom_target(coverage_tests)
set(programs "")
foreach(directory tests tests/mpi)
  if(NOT EXISTS "${PROJECT_BINARY_DIR}/${directory}")
    continue()
  endif()
  get_property(targets DIRECTORY ${directory} PROPERTY BUILDSYSTEM_TARGETS)
  foreach(target IN LISTS targets)
    get_target_property(type ${target} TYPE)
    if(type STREQUAL "EXECUTABLE" AND target MATCHES "_tests$" AND NOT target STREQUAL "reference_tests")
      add_dependencies(coverage_tests ${target})
      list(APPEND programs $<TARGET_FILE:${target}>)
    endif()
  endforeach()
endforeach()
if(TARGET readme_split_sequence)
  add_dependencies(coverage_tests readme_split_sequence)
endif()

set(profiles "${PROJECT_BINARY_DIR}/profiles")
file(MAKE_DIRECTORY "${profiles}")
add_custom_target(
  coverage_report
  COMMAND ${LOCAL_MHA_LLVM_PROFDATA} merge -sparse "${profiles}" -o "${PROJECT_BINARY_DIR}/tests.profdata"
  COMMAND python3 "${PROJECT_SOURCE_DIR}/cmake/coverage_summary.py" "${LOCAL_MHA_LLVM_COV}"
          "${PROJECT_BINARY_DIR}/tests.profdata" "${PROJECT_SOURCE_DIR}/include" ${LOCAL_MHA_COVERAGE_LEAST}
          "${PROJECT_SOURCE_DIR}/cmake/coverage_reasons.txt" "${PROJECT_BINARY_DIR}/missing.txt" ${programs}
  COMMENT "Lines of include/ that the tests run; those that did not run in ${PROJECT_BINARY_DIR}/missing.txt"
  VERBATIM)
