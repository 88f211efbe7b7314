# SPDX-License-Identifier: MIT
# Headers and the CMake package. Nothing here depends on the architecture, so it goes to share/.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(package_dir "${CMAKE_INSTALL_DATADIR}/cmake/local_mha")

install(TARGETS local_mha EXPORT local_mha-targets FILE_SET HEADERS)
install(TARGETS local_mha_io EXPORT local_mha-io-targets FILE_SET HEADERS)
install(TARGETS local_mha_mpi EXPORT local_mha-mpi-targets FILE_SET HEADERS COMPONENT mpi)
# Three exports: only the component io names nlohmann_json, and only mpi names MPI.
install(EXPORT local_mha-targets NAMESPACE local_mha:: DESTINATION "${package_dir}")
install(EXPORT local_mha-io-targets NAMESPACE local_mha:: DESTINATION "${package_dir}")
install(EXPORT local_mha-mpi-targets NAMESPACE local_mha:: DESTINATION "${package_dir}"
        COMPONENT mpi)

configure_package_config_file(
  cmake/local_mha-config.cmake.in "${PROJECT_BINARY_DIR}/local_mha-config.cmake"
  INSTALL_DESTINATION "${package_dir}")
write_basic_package_version_file(
  "${PROJECT_BINARY_DIR}/local_mha-config-version.cmake"
  COMPATIBILITY SameMinorVersion
  ARCH_INDEPENDENT)
install(FILES "${PROJECT_BINARY_DIR}/local_mha-config.cmake"
              "${PROJECT_BINARY_DIR}/local_mha-config-version.cmake" cmake/find-eigen.cmake
        DESTINATION "${package_dir}")
install(FILES LICENSE DESTINATION "${CMAKE_INSTALL_DATADIR}/licenses/local_mha")
