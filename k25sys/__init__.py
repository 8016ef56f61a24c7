"""k25sys: a systems library for training Kimi-K2.5-like models.

Importing the package imports neither torch nor the native extension; `k25sys.ops` does both.
"""

from typing import Any

__all__ = ["build_info"]


def build_info() -> dict[str, Any]:
    """What was built into this installation, and why not the rest.

    Returns:
        {"version": str,
         "cpu": {"built": bool, "reason": str, "compiler": str, "isa": str, "available_isas": [str], "threads": str},
         "cuda": {"built": bool, "reason": str, "num_devices": int}}.
        "reason" is empty where "built" is true. "isa" is the instruction set in use (K25_CPU_ISA overrides it) and
        "threads" is "openmp" where the process shares torch's OpenMP runtime, else "threads".
    """
    try:
        from k25sys import _C
    except ImportError as error:
        missing = {"built": False, "reason": f"the extension k25sys._C cannot be imported ({error}): pip install -e ."}
        return {"version": None, "cpu": missing, "cuda": {**missing, "num_devices": 0}}
    cpu = {
        "built": True,
        "reason": "",
        "compiler": _C.compiler,
        "isa": _C.cpu.isa(),
        "available_isas": _C.cpu.available_isas(),
        "threads": _C.cpu.thread_runtime(),
    }
    return {"version": _C.version, "cpu": cpu, "cuda": dict(_C.cuda_info())}
