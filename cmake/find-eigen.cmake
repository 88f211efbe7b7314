# SPDX-License-Identifier: MIT
# Makes the target Eigen3::Eigen, of Eigen 3.4 or 5, unless the enclosing project has one. A version
# asked for takes the same major version alone, so each is asked for.
foreach(version 3.4 5)
  if(NOT TARGET Eigen3::Eigen)
    find_package(Eigen3 ${version} QUIET NO_MODULE)
  endif()
endforeach()
