# SPDX-License-Identifier: MIT
# An overlay port of the tree that it lies in:
#   vcpkg install local-mha --overlay-ports=PATH/cmake/packaging/vcpkg
get_filename_component(SOURCE_PATH "${CMAKE_CURRENT_LIST_DIR}/../../../.." ABSOLUTE)
set(VCPKG_BUILD_TYPE release) # headers alone
vcpkg_cmake_configure(
  SOURCE_PATH "${SOURCE_PATH}"
  OPTIONS
    -DLOCAL_MHA_BUILD_TESTS=OFF
    -DLOCAL_MHA_BUILD_BENCHMARKS=OFF
    -DLOCAL_MHA_BUILD_EXAMPLES=OFF
    -DLOCAL_MHA_INSTALL=ON)
vcpkg_cmake_install()
vcpkg_cmake_config_fixup(PACKAGE_NAME local_mha CONFIG_PATH share/cmake/local_mha)
vcpkg_fixup_pkgconfig()
file(REMOVE_RECURSE "${CURRENT_PACKAGES_DIR}/lib" "${CURRENT_PACKAGES_DIR}/share/licenses")
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
