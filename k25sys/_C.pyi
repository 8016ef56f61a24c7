"""The native extension (csrc/python_api.cpp)."""

from typing import Any

version: str
compiler: str
cpu: Any
cuda: Any

def cuda_info() -> dict[str, Any]: ...
