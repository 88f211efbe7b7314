# SPDX-License-Identifier: MIT
"""Calls the methods of a Conan recipe in Conan's order, where there is no Conan: exports the
sources, configures and packages. What they import is stood in for."""
import fnmatch
import os
import pathlib
import shutil
import subprocess
import sys
import types

recipe_dir, work, cxx = sys.argv[1:]
work = pathlib.Path(work)
required, properties = [], {}


class Attributes:
    def __init__(self):
        self.requires = []

    def set_property(self, name, value):
        properties[name, value] = self


class Components(dict):
    def __missing__(self, name):
        return self.setdefault(name, Attributes())


class ConanFile:
    def __init__(self):
        self.recipe_folder = recipe_dir
        self.export_sources_folder = self.source_folder = str(work / "sources")
        self.package_folder = str(work / "package")
        self.options = types.SimpleNamespace(**self.default_options)
        self.info = types.SimpleNamespace(clear=lambda: None)
        self.cpp_info = Attributes()
        self.cpp_info.components = Components()

    def requires(self, reference, **_):
        required.append(reference)


class CMakeToolchain:
    variables = {}

    def __init__(self, _):
        self.cache_variables = CMakeToolchain.variables

    def generate(self):
        pass


class CMake:
    def __init__(self, conanfile):
        self.of = conanfile

    def configure(self):
        defines = [f"-D{k}={'ON' if v else 'OFF'}" for k, v in CMakeToolchain.variables.items()]
        subprocess.run(["cmake", "-S", self.of.source_folder, "-B", str(work / "build"),
                        f"-DCMAKE_CXX_COMPILER={cxx}", *defines], check=True)

    def install(self):
        subprocess.run(["cmake", "--install", str(work / "build"), "--prefix", self.of.package_folder],
                       check=True)


def copy(_, pattern, source, destination):
    copied = 0
    for path in pathlib.Path(source).rglob("*"):
        name = path.relative_to(source).as_posix()
        if path.is_file() and fnmatch.fnmatch(name, pattern):
            to = pathlib.Path(destination) / name
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to)
            copied += 1
    assert copied > 0, pattern


def module(name, **members):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(members)


module("conan", ConanFile=ConanFile)
module("conan.tools")
module("conan.tools.build", check_min_cppstd=lambda _, standard: standard == 20 or sys.exit("C++20"))
module("conan.tools.cmake", CMake=CMake, CMakeDeps=lambda _: CMakeToolchain(_), CMakeToolchain=CMakeToolchain)
module("conan.tools.files", copy=copy, load=lambda _, path: pathlib.Path(path).read_text())
sys.path.insert(0, recipe_dir)
sys.dont_write_bytecode = True
from conanfile import LocalMha  # noqa: E402

recipe = LocalMha()
for method in ("set_version", "export_sources", "requirements", "validate", "package_id", "generate",
               "build", "package", "package_info"):
    getattr(recipe, method)()
parts = [line.split()[-1] for line in open(os.path.join(recipe_dir, "../../../include/local_mha/version.hpp"))
         if line.startswith("#define LOCAL_MHA_VERSION_")]
assert recipe.version == ".".join(parts), recipe.version
assert required == ["eigen/[>=3.4 <6]"], required
assert ("cmake_target_name", "local_mha::local_mha") in properties
assert (work / "package/licenses/LICENSE").is_file()

# The option io.
required.clear()
LocalMha.default_options = {"io": True}
recipe = LocalMha()
recipe.requirements()
recipe.package_info()
assert required == ["eigen/[>=3.4 <6]", "nlohmann_json/[>=3.10 <4]"], required
assert recipe.cpp_info.components["io"].requires == ["core", "nlohmann_json::nlohmann_json"]
assert ("cmake_target_name", "local_mha::io") in properties
