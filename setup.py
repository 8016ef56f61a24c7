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
import tempfile
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


def find_nvcc() -> str:
    """nvcc in K25_CUDA_HOME, CUDA_HOME or PATH; "" where there is none."""
    for home in (os.environ.get("K25_CUDA_HOME"), os.environ.get("CUDA_HOME")):
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc") or ""


def choose_nvcc() -> tuple[str, str]:
    """nvcc to build with and "", or "" and the reason why not, as K25_BUILD_CUDA says."""
    mode = os.environ.get("K25_BUILD_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"K25_BUILD_CUDA: got {mode!r}, accepted auto, 1 or 0")
    if mode == "0":
        return "", "K25_BUILD_CUDA=0"
    nvcc = find_nvcc()
    if not nvcc:
        reason = "nvcc is not in K25_CUDA_HOME/bin, CUDA_HOME/bin or PATH"
    else:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cu"
            source.write_text("#include <cuda_runtime.h>\n__global__ void probe() {}\n")
            command = [nvcc, "-std=c++17", "-arch=sm_90a", "-c", source, "-o", f"{source}.o"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return nvcc, ""
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        reason = f"{nvcc} cannot compile for sm_90a: {lines[0]}"
    if mode == "1":
        raise SystemExit(f"K25_BUILD_CUDA=1, but {reason}")
    return "", reason.replace(";", ",")  # a semicolon would end the value in CMake


class CMakeBuild(build_ext):
    """Builds k25sys._C in build/cmake-<abi> and copies it to where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        nvcc, reason = choose_nvcc()
        print(f"k25sys: CUDA kernels: {f'built with {nvcc}' if nvcc else f'not built: {reason}'}", flush=True)
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
                f"-DK25_NVCC={nvcc}",
                f"-DK25_CUDA_REASON={reason}",
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
