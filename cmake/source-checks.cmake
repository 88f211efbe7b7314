# SPDX-License-Identifier: MIT
# Targets format, format-check and tidy. Formatting differs between versions of clang-format, so
# the one that .clang-format was written for comes first.
find_program(LOCAL_MHA_CLANG_FORMAT NAMES clang-format-19 clang-format)
find_program(LOCAL_MHA_CLANG_TIDY NAMES clang-tidy-19 clang-tidy)
mark_as_advanced(LOCAL_MHA_CLANG_FORMAT LOCAL_MHA_CLANG_TIDY)

foreach(directory include tests benchmarks examples)
  file(GLOB_RECURSE found CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/${directory}/*.hpp"
       "${PROJECT_SOURCE_DIR}/${directory}/*.cpp")
  list(APPEND sources ${found})
endforeach()

if(LOCAL_MHA_CLANG_FORMAT AND sources)
  add_custom_target(format COMMAND ${LOCAL_MHA_CLANG_FORMAT} -i ${sources})
  add_custom_target(
    format-check COMMAND ${LOCAL_MHA_CLANG_FORMAT} --dry-run --Werror ${sources}
    COMMENT "Checking the format of all C++ files")
endif()

# This program includes every header of the library but autodiff.hpp and extern.hpp. What is precompiled and what is
# instantiated elsewhere, clang-tidy does not see, so it gets neither; of float and double, it sees one. What is not
# ours is of the system, whose warnings nobody shows.
if(LOCAL_MHA_CLANG_TIDY AND CMAKE_CXX_COMPILER_ID STREQUAL "Clang" AND TARGET verify_layer)
  string(TOUPPER "${CMAKE_BUILD_TYPE}" build_type)
  separate_arguments(flags UNIX_COMMAND "${CMAKE_CXX_FLAGS} ${CMAKE_CXX_FLAGS_${build_type}}")
  set(of_others "$<REMOVE_DUPLICATES:$<TARGET_PROPERTY:verify_layer,INCLUDE_DIRECTORIES>>")
  # The compiler's own order of what it includes must stay.
  set(of_others "$<FILTER:${of_others},EXCLUDE,^/usr/include$|/include$>")
  add_custom_target(
    tidy
    COMMAND
      ${LOCAL_MHA_CLANG_TIDY} --quiet --warnings-as-errors=*
      "${PROJECT_SOURCE_DIR}/examples/verify_layer.cpp" -- -std=c++20 ${flags} -I "${PROJECT_SOURCE_DIR}/include"
      "$<$<BOOL:${of_others}>:-isystem;$<JOIN:${of_others},;-isystem;>>"
    COMMENT "Running clang-tidy over the library by way of verify_layer"
    COMMAND_EXPAND_LISTS VERBATIM)
endif()
