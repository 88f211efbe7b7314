# SPDX-License-Identifier: MIT
# Makes the target Eigen3::Eigen, unless the enclosing project has made one. Sets
# local_mha_eigen_error if there is none of version 3.4 or newer. (Asked for 3.4, Eigen's package
# would refuse to be 5.)
set(local_mha_eigen_error "")
if(NOT TARGET Eigen3::Eigen)
  find_package(Eigen3 QUIET NO_MODULE)
  if(NOT TARGET Eigen3::Eigen)
    set(local_mha_eigen_error "local_mha needs Eigen 3.4 or newer: set Eigen3_DIR")
  elseif(Eigen3_VERSION VERSION_LESS 3.4)
    set(local_mha_eigen_error
        "local_mha needs Eigen 3.4 or newer, found ${Eigen3_VERSION} in ${Eigen3_DIR}")
  endif()
endif()
