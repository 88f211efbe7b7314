# SPDX-License-Identifier: MIT
# Conan 2, of the tree that it lies in: conan create cmake/packaging/conan
import os
import re

from conan import ConanFile
from conan.tools.build import check_min_cppstd
from conan.tools.cmake import CMake, CMakeDeps, CMakeToolchain
from conan.tools.files import copy, load

TREE = os.path.join("..", "..", "..")


class LocalMha(ConanFile):
    name = "local_mha"
    license = "MIT"
    description = "Multi-head attention over a local window, header-only"
    package_type = "header-library"
    settings = "os", "arch", "compiler", "build_type"
    options = {"io": [True, False]}
    default_options = {"io": False}
    no_copy_source = True

    def set_version(self):
        header = os.path.join(self.recipe_folder, TREE, "include", "local_mha", "version.hpp")
        self.version = ".".join(re.findall(r"#define LOCAL_MHA_VERSION_\w+ (\d+)", load(self, header)))

    def export_sources(self):
        tree = os.path.join(self.recipe_folder, TREE)
        for pattern in ("CMakeLists.txt", "LICENSE", "cmake/*", "include/*"):
            copy(self, pattern, tree, self.export_sources_folder)

    def requirements(self):
        self.requires("eigen/[>=3.4 <6]", transitive_headers=True)
        if self.options.io:
            self.requires("nlohmann_json/[>=3.10 <4]", transitive_headers=True)

    def validate(self):
        check_min_cppstd(self, 20)

    def package_id(self):
        self.info.clear()

    def generate(self):
        toolchain = CMakeToolchain(self)
        for part in ("TESTS", "BENCHMARKS", "EXAMPLES"):
            toolchain.cache_variables[f"LOCAL_MHA_BUILD_{part}"] = False
        toolchain.cache_variables["LOCAL_MHA_INSTALL"] = True
        toolchain.generate()
        CMakeDeps(self).generate()

    def build(self):
        CMake(self).configure()

    def package(self):
        copy(self, "LICENSE", self.source_folder, os.path.join(self.package_folder, "licenses"))
        CMake(self).install()

    def package_info(self):
        self.cpp_info.bindirs = []
        self.cpp_info.libdirs = []
        self.cpp_info.set_property("cmake_file_name", "local_mha")
        self.cpp_info.set_property("pkg_config_name", "none")
        core = self.cpp_info.components["core"]
        core.set_property("cmake_target_name", "local_mha::local_mha")
        core.set_property("pkg_config_name", "local_mha")
        core.requires = ["eigen::eigen"]
        if self.options.io:
            io = self.cpp_info.components["io"]
            io.set_property("cmake_target_name", "local_mha::io")
            io.set_property("pkg_config_name", "local_mha-io")
            io.requires = ["core", "nlohmann_json::nlohmann_json"]
