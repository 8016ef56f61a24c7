"""Drives CMake for `pip install`; everything else about the package is in pyproject.toml.

The build folder persists between installs and nothing in its cache may name a build environment that pip has deleted
since: pybind11's headers are copied next to it, and the current ninja is passed on every run.
"""

import filecmp
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def copy_when_changed(source: Path, target: Path) -> None:
    """Copies a tree, leaving files (and their times, which ninja compares) alone where the content is the same."""
    for file in source.rglob("*"):
        to = target / file.relative_to(source)
        if file.is_file() and not (to.is_file() and filecmp.cmp(file, to, shallow=False)):
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to)


class CMakeBuild(build_ext):
    """Builds k25sys._C in build/cmake-<abi> and copies it to where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        if os.environ.get("K25_BUILD_CUDA", "auto") not in ("auto", "0"):
            raise SystemExit(
                "K25_BUILD_CUDA: got {!r}; this version has no CUDA library yet (nvcc is not used), so only auto and 0 "
                "are accepted".format(os.environ["K25_BUILD_CUDA"])
            )
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        folder = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        headers = ROOT / "build" / f"pybind11-{pybind11.__version__}"
        copy_when_changed(Path(pybind11.get_include()), headers)
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if not cmake or not ninja:
            raise SystemExit("k25sys needs cmake >= 3.24 and ninja on PATH: pip install cmake ninja")
        subprocess.run(
            [
                cmake, "-S", ROOT, "-B", folder, "-G", "Ninja",
                f"-DCMAKE_MAKE_PROGRAM={ninja}",
                f"-DK25_VERSION={self.distribution.get_version()}",
                f"-DK25_PYTHON_INCLUDE={sysconfig.get_path('include')}",
                f"-DK25_PYBIND11_INCLUDE={headers}",
                f"-DK25_EXTENSION_SUFFIX={suffix}",
            ],
            check=True,
        )  # fmt: skip
        subprocess.run([cmake, "--build", folder, "--target", "_C"], check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / f"_C{suffix}", target)


if sys.platform != "linux":
    raise SystemExit(f"k25sys builds on Linux only, got {sys.platform}")
setup(ext_modules=[Extension("k25sys._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
