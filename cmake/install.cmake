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

# pkg-config: found from the file's own place, so that the prefix may move.
set(pc_dir "${CMAKE_INSTALL_DATADIR}/pkgconfig")
file(RELATIVE_PATH to_prefix "${CMAKE_INSTALL_PREFIX}/${pc_dir}" "${CMAKE_INSTALL_PREFIX}")
string(REGEX REPLACE "/$" "" to_prefix "${to_prefix}")
foreach(file local_mha local_mha-io)
  configure_file(cmake/packaging/${file}.pc.in "${PROJECT_BINARY_DIR}/${file}.pc" @ONLY)
  install(FILES "${PROJECT_BINARY_DIR}/${file}.pc" DESTINATION "${pc_dir}")
endforeach()

# cpack -G DEB, or TGZ. Only for who packs this project itself: an enclosing one has packages of its own.
if(PROJECT_IS_TOP_LEVEL)
  set(CPACK_GENERATOR TGZ)
  set(CPACK_PACKAGE_NAME local_mha)
  set(CPACK_PACKAGE_VENDOR local_mha)
  # Whoever makes a package answers for it; .invalid is no place (RFC 2606).
  set(LOCAL_MHA_PACKAGE_MAINTAINER "Maintainer not set <not-set@local-mha.invalid>"
      CACHE STRING "Who maintains the Debian package, as `Name <address>`")
  set(CPACK_PACKAGE_CONTACT "${LOCAL_MHA_PACKAGE_MAINTAINER}")
  set(CPACK_RESOURCE_FILE_LICENSE "${PROJECT_SOURCE_DIR}/LICENSE")
  set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
  set(CPACK_DEBIAN_PACKAGE_NAME liblocal-mha-dev)
  set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
  set(CPACK_DEBIAN_PACKAGE_ARCHITECTURE all)
  set(CPACK_DEBIAN_PACKAGE_SECTION libdevel)
  set(CPACK_DEBIAN_PACKAGE_DEPENDS "libeigen3-dev (>= 3.4)")
  set(CPACK_DEBIAN_PACKAGE_SUGGESTS "nlohmann-json3-dev (>= 3.10), libopenmpi-dev | libmpich-dev")
  include(CPack)
endif()
