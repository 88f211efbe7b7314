# SPDX-License-Identifier: MIT
# Target mutants: breaks the headers, one place at a time, and sees whether the tests notice. It goes on where the
# last run was.
find_package(Python3 REQUIRED COMPONENTS Interpreter)
find_package(nlohmann_json 3.10 REQUIRED CONFIG)
find_path(LOCAL_MHA_GOOGLETEST_DIR src/gtest-all.cc PATHS /usr/src/googletest/googletest NO_DEFAULT_PATH REQUIRED
          DOC "GoogleTest, with its sources")
set(LOCAL_MHA_MUTANTS 400 CACHE STRING "Mutants of the target that makes them")

set(includes "")
foreach(library Eigen3::Eigen nlohmann_json::nlohmann_json)
  get_target_property(directories ${library} INTERFACE_INCLUDE_DIRECTORIES)
  foreach(directory IN LISTS directories)
    # The compiler's own must keep their place.
    if(NOT directory STREQUAL "/usr/include")
      list(APPEND includes --include "${directory}")
    endif()
  endforeach()
endforeach()
add_custom_target(
  mutants
  COMMAND ${Python3_EXECUTABLE} "${PROJECT_SOURCE_DIR}/cmake/mutants/mutants.py" --mutants ${LOCAL_MHA_MUTANTS} --cxx
          "${CMAKE_CXX_COMPILER}" --build "${PROJECT_BINARY_DIR}" --gtest "${LOCAL_MHA_GOOGLETEST_DIR}" ${includes}
  USES_TERMINAL VERBATIM)
