"""transformers' Kimi-K2.5 processors as oracles. Their modules import torchvision, whose wheels fit few torches:
the functions that matter are taken from the source by name and run with torch's own resize, the one torchvision has."""

import ast
import functools
import importlib.util
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F


@functools.cache
def function_of(module: str, name: str) -> Callable[..., Any]:
    """The function or method `name` of transformers/models/kimi_k25/`module`.py, without importing the module."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        pytest.skip("transformers, the oracle, is not installed")
    source = Path(spec.origin).parent / "models" / "kimi_k25" / f"{module}.py"
    tree = ast.parse(source.read_text())
    node = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name)
    node.args.args = [argument for argument in node.args.args if argument.arg != "self"]
    for argument in node.args.args:
        argument.annotation = None
    node.returns, node.decorator_list = None, []
    space: dict[str, Any] = {"math": math, "np": np, "time": time, "torch": torch}
    exec(compile(ast.Module([node], []), str(source), "exec"), space)
    return space[name]


def transformers_patches(module: str, frames_TCHW: Tensor, max_patches: int) -> tuple[Tensor, list[int]]:
    """Patches (P, 3, 14, 14) and grid [t, h, w] of frames (T, 3, H, W) uint8, by transformers' rule and arrangement."""
    height, width = frames_TCHW.shape[-2:]
    resized, padded = function_of(module, "navit_resize")(height, width, 14, 2, max_patches, 512)
    if resized != (height, width):
        frames_TCHW = F.interpolate(frames_TCHW, resized, mode="bicubic", antialias=True)
    frames_TCHW = F.pad(frames_TCHW, (0, padded[1] - resized[1], 0, padded[0] - resized[0]))
    pixels = (frames_TCHW.float() / 255 - 0.5) / 0.5
    if module.startswith("video"):
        patches, *grid = function_of(module, "patchify")(pixels[None], patch_size=14)
        return patches[0], grid
    patches, *grid = function_of(module, "patchify")(pixels, patch_size=14)
    return patches[0], [1, *grid]


def transformers_video_prompt(grids: list[list[int]], frame_times: list[float]) -> str:
    """The text that transformers' processor puts for one video, with `P` for a media token."""
    replace = function_of("processing_kimi_k25", "replace_video_token")
    replace.__globals__["self"] = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=4), video_token="P"
    )
    inputs = {
        "num_chunks_per_video": [len(grids)],
        "video_grid_thw": torch.tensor(grids),
        "video_metadata": [SimpleNamespace(fps=1.0, timestamps=frame_times)],
    }
    return replace(inputs, 0)
