"""Builds the executor: csrc's .cu files through nvcc's PTX and through g++, with the runtime, as a Python module.

Everything lies in build/cuda_on_cpu under the hash of what it was made from, so a second run compiles nothing and a
planted bug recompiles one op.
"""

import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

from tests.cuda_on_cpu.ptx.translate import translate

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
RUNTIME = Path(__file__).resolve().parent / "runtime"
# The gemm module is apart: it takes long to build.
OPS = (
    "dispatch", "fp8_quantize", "plan_dispatch", "policy_loss", "pool_temporal_patches", "route_tokens", "swiglu",
)  # fmt: skip
PRODUCTS = ("fp8_gemm", "grouped_gemm")  # ops that gemm's kernels run

# In the symbol of an instance for another type of element (or, of dispatch, another unit than those of float32).
NOT_FLOAT32 = r"_kernelI(?:NS0_4Bf16E|d|y|t)"

_CXX = ["g++", "-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-fno-gnu-unique", "-mfma", "-ffp-contract=off"]
_WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
_SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


def find_nvcc() -> str | None:
    """nvcc as setup.py looks for it: K25_CUDA_HOME, CUDA_HOME, PATH."""
    for home in (os.environ.get("K25_CUDA_HOME"), os.environ.get("CUDA_HOME")):
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def _digest(parts: Sequence[str], files: Sequence[Path]) -> str:
    hasher = hashlib.sha256("\0".join(parts).encode())
    for file in files:
        hasher.update(file.name.encode() + b"\0" + file.read_bytes())
    return hasher.hexdigest()[:24]


def _run(command: Sequence[str | Path]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def _made(suffix: str, parts: Sequence[str], files: Sequence[Path], make: Callable[[Path], object]) -> Path:
    """The file that make(path) writes, or the one that it wrote for the same `parts` and `files`."""
    folder = ROOT / "build" / "cuda_on_cpu"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / (_digest(parts, files) + suffix)
    if not target.exists():
        partial = target.with_name(f"{os.getpid()}-{target.name}")
        make(partial)
        try:
            partial.rename(target)
        except OSError:  # a folder, which another process made meanwhile
            if not target.exists():
                raise
            shutil.rmtree(partial)
    return target


def _sources_of(csrc: Path, op: str, source: Path | None = None) -> list[Path]:
    folders = (csrc / "common", csrc / op, *([source.parent] if source else []))
    return sorted(file for folder in folders for file in folder.iterdir() if file.suffix in (".h", ".cuh", ".cu"))


def _runtime_headers() -> list[Path]:
    return sorted(RUNTIME.glob("*.h"))


@functools.cache
def _cuda_include() -> str:
    """The folder of cuda.h, as nvcc says it."""
    nvcc = find_nvcc()
    assert nvcc
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cu"
        source.touch()
        said = _run([nvcc, "--dryrun", "-E", source])
    found = re.search(r'INCLUDES="-I([^"]+)"', said)
    if not found:
        raise RuntimeError(f"nvcc --dryrun names no include folder: {said}")
    return found[1].strip()


def _includes(*others: Path | str) -> list[Path | str]:
    return [*others, RUNTIME, _cuda_include()]


def _compile(source: Path, dependencies: Sequence[Path], includes: Sequence[Path | str], flags: Sequence[str]) -> Path:
    command = [*_CXX, *flags]
    paths = [f"-I{folder}" for folder in includes]
    make = lambda target: _run([*command, *paths, "-x", "c++", "-c", source, "-o", target])  # noqa: E731
    return _made(".o", command, [source, *dependencies], make)


def ptx_of(csrc: Path, op: str, source: Path | None = None, flags: Sequence[str] = ()) -> Path:
    """The PTX that nvcc writes for one op, with the flags of the real build; of `source` instead of its cuda.cu."""
    nvcc = find_nvcc()
    assert nvcc
    command = [nvcc, "-std=c++17", "-O3", "-arch=sm_90a", "-ptx", *flags]
    file = source or csrc / op / "cuda.cu"
    make = lambda target: _run([*command, f"-I{csrc}", file, "-o", target])  # noqa: E731
    return _made(".ptx", [_version(nvcc), *command[1:], file.name, op], _sources_of(csrc, op, source), make)


def compiled(source: Path, dependencies: Sequence[Path], csrc: Path = CSRC, flags: Sequence[str] = ()) -> Path:
    """A folder with the machine code of one .cu file, kernels.cubin, and what ptxas said of it, usage.txt."""
    nvcc = find_nvcc()
    assert nvcc
    command = [nvcc, "-std=c++17", "-O3", "-arch=sm_90a", "-cubin", "-Xptxas", "-v", *flags]

    def make(target: Path) -> None:
        target.mkdir()
        text = _run([*command, f"-I{csrc}", source, "-o", target / "kernels.cubin"])
        (target / "usage.txt").write_text(text)

    return _made(".compiled", [_version(nvcc), *command[1:], source.parent.name], [source, *dependencies], make)


def compiled_op(op: str) -> Path:
    """The same of one op of csrc."""
    return compiled(CSRC / op / "cuda.cu", _sources_of(CSRC, op))


def compiled_small_gemm(instance: int, csrc: Path) -> Path:
    """The same of one instance of small_gemm.cu, with the headers of `csrc`."""
    source = RUNTIME.parent / "small_gemm.cu"
    return compiled(source, _sources_of(csrc, "gemm"), csrc, [f"-DK25_INSTANCE={instance}"])


def _version(nvcc: str) -> str:
    return _run([nvcc, "--version"])


def translated_object(ptx: Path, flags: Sequence[str] = (), without: str = "") -> Path:
    """The translated PTX, compiled. Raises PtxError for what the translator does not know."""
    translator = sorted((RUNTIME.parent / "ptx").glob("*.py"))
    make = lambda target: target.write_text(translate(ptx.read_text(), without))  # noqa: E731
    cpp = _made(".cpp", [without], [ptx, *translator], make)
    return _compile(cpp, _runtime_headers(), _includes(), ["-w", *flags])


def _source_object(csrc: Path, op: str, flags: Sequence[str] = (), source: Path | None = None) -> Path:
    others = sorted(csrc.glob("*/api.h")) if op in PRODUCTS else []
    dependencies = [*_sources_of(csrc, op, source), *others, *_runtime_headers()]
    return _compile(source or csrc / op / "cuda.cu", dependencies, _includes(csrc), [*_WARNINGS, *flags])


def _tensor_map_object(csrc: Path, flags: Sequence[str] = ()) -> Path:
    headers = [*sorted((csrc / "common").glob("*.*h")), *_runtime_headers()]
    return _compile(csrc / "common" / "tensor_map.cu", headers, _includes(csrc), [*_WARNINGS, *flags])


def _runtime_objects(flags: Sequence[str] = ()) -> list[Path]:
    sources = sorted(path for path in RUNTIME.glob("*.cpp") if not path.stem.endswith(("module", "main")))
    # The loops of wgmma and of joined clocks are most of the time.
    vectorized = ("wgmma.cpp", "clocks.cpp")
    level = {path: ["-O3", "-mavx2"] if path.name in vectorized else ["-O2"] for path in sources}
    return [_compile(path, _runtime_headers(), _includes(), [*level[path], *_WARNINGS, *flags]) for path in sources]


def _module(objects: Sequence[Path], flags: Sequence[str]) -> ModuleType:
    includes = _includes(CSRC, pybind11.get_include(), sysconfig.get_path("include"))
    headers = [*_runtime_headers(), *sorted(CSRC.glob("*/api.h")), CSRC / "bindings.h"]
    binding = _compile(RUNTIME / "module.cpp", headers, includes, ["-O0", "-fvisibility=hidden", *flags])
    parts = [binding, *_runtime_objects(), *objects]
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    make = lambda target: _run(["g++", "-shared", "-Wl,-Bsymbolic", *parts, "-o", target, "-ldl"])  # noqa: E731
    path = _made(suffix, [part.name for part in parts], [], make)
    # pybind11 keeps modules by full name, the file's function PyInit_* is found by the last part of it.
    name = f"built_{path.name.split('.')[0]}.cuda_on_cpu_executor"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def executor_module(csrc: Path = CSRC) -> ModuleType:
    """Every op of `csrc`, in both executors."""
    with ThreadPoolExecutor(2) as pool:
        translated = [pool.submit(lambda op=op: translated_object(ptx_of(csrc, op))) for op in OPS]
        sources = [pool.submit(_source_object, csrc, op) for op in OPS]
        return _module([job.result() for job in (*translated, *sources)], ["-DCUDA_ON_CPU_ROUTING"])


def planted_module(csrc: Path, op: str, host: Path = CSRC) -> ModuleType:
    """One op's kernels of `csrc` for float32, as PTX; `host` is where the code of its launches comes from.

    Other ops run as source only. Built without optimization: that takes most of the time, and the cases are small.
    """
    translated = translated_object(ptx_of(csrc, op), ["-O0"], without=NOT_FLOAT32)
    with ThreadPoolExecutor(2) as pool:
        sources = list(pool.map(lambda each: _source_object(host if each == op else CSRC, each), OPS))
    return _module([translated, *sources], ["-DCUDA_ON_CPU_ROUTING"])


def gemm_module() -> ModuleType:
    """The matrix products of csrc, in both executors."""
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            # Its translated kernels are large, and their time is in wgmma, which is the runtime's.
            pool.submit(lambda: translated_object(ptx_of(CSRC, "gemm"), ["-O0"])),
            pool.submit(_source_object, CSRC, "gemm"),
            *(pool.submit(_source_object, CSRC, op) for op in PRODUCTS),
            pool.submit(_tensor_map_object, CSRC),
        ]
        return _module([job.result() for job in jobs], ["-DCUDA_ON_CPU_GEMM", "-DCUDA_ON_CPU_PRODUCTS"])


def small_gemm_module(instance: int, csrc: Path = CSRC) -> ModuleType:
    """One instance in small_gemm.cu, for the PTX executor; device code is that of `csrc`, the host's that of CSRC."""
    source, flag = RUNTIME.parent / "small_gemm.cu", f"-DK25_INSTANCE={instance}"
    translated = translated_object(ptx_of(csrc, "gemm", source, [flag]), ["-O0"])
    host = [_source_object(CSRC, "gemm", [flag], source), _tensor_map_object(CSRC)]
    return _module([translated, *host], ["-DCUDA_ON_CPU_GEMM"])


def kernels_module(ptx_text: str) -> ModuleType:
    """The kernels of a PTX text alone, to be run with `run_kernel`."""
    ptx = _made(".ptx", [ptx_text], [], lambda target: target.write_text(ptx_text))
    return _module([translated_object(ptx)], [])


def sanitizer_program(kind: str, csrc: Path = CSRC) -> Path:
    """sanitize_main.cpp with the ops compiled from source under a sanitizer (address or thread)."""
    flags = [*_SANITIZERS[kind], "-g", "-O1"]
    # ThreadSanitizer must not see the runtime: it is told what a barrier orders.
    runtime_flags = ["-DCUDA_ON_CPU_TSAN", "-g"] if kind == "thread" else flags
    headers = [*_runtime_headers(), *sorted(csrc.glob("*/api.h"))]
    main = _compile(RUNTIME / "sanitize_main.cpp", headers, _includes(csrc), [*_WARNINGS, *flags])
    parts = [main, *(_source_object(csrc, op, flags) for op in OPS), *_runtime_objects(runtime_flags)]
    command = ["g++", *_SANITIZERS[kind], "-rdynamic", *parts, "-ldl", "-o"]
    return _made("", [*_SANITIZERS[kind], *(part.name for part in parts)], [], lambda target: _run([*command, target]))


def gemm_sanitizer_program() -> Path:
    """sanitize_gemm_main.cpp under AddressSanitizer; ThreadSanitizer cannot tell what asynchronous copies order."""
    flags = [*_SANITIZERS["address"], "-g", "-O1"]
    headers = [*_runtime_headers(), *sorted(CSRC.glob("*/api.h"))]
    main = _compile(RUNTIME / "sanitize_gemm_main.cpp", headers, _includes(CSRC), [*_WARNINGS, *flags])
    parts = [main, _source_object(CSRC, "gemm", flags), _tensor_map_object(CSRC, flags), *_runtime_objects(flags)]
    command = ["g++", *_SANITIZERS["address"], "-rdynamic", *parts, "-ldl", "-o"]
    return _made("", [*_SANITIZERS["address"], *(part.name for part in parts)], [], lambda to: _run([*command, to]))
