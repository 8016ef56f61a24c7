"""Peak memory of loading, saving and converting, in a process of its own: `python -m tests.checkpoint.peak_memory
{load, save, convert} SMALL_SRC SRC DST EXPERTS LAYOUT`, with the layout and experts of DST.

Prints how far the resident memory, mapped files included, rose above what it was before, in bytes. SMALL_SRC, of the
layout of SRC, goes first: what code and libraries take once does not count.
"""

import json
import sys
from pathlib import Path

import torch

from k25sys.checkpoint import convert, load_hf, save_hf
from k25sys.models.config import KimiK25Config
from k25sys.models.kimi_k25 import KimiK25

SHARD_BYTES = 16 * 2**20


def status(field: str) -> int:
    """VmRSS or VmHWM in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(task: str, source: Path, folder: Path, experts: str, layout: str) -> int:
    """Runs one task and returns the rise."""
    config = KimiK25Config.from_hf_config(json.loads((source / "config.json").read_text()))
    model = None
    if task != "convert":
        with torch.device("meta"):
            model = KimiK25(config)
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        for tensor in model.state_dict().values():
            tensor.zero_()  # touched, so that it is counted before
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    if model is None:
        convert(source, folder, layout=layout, experts=experts, max_shard_bytes=SHARD_BYTES)
    elif task == "load":
        load_hf(model, source)
    else:
        save_hf(model, folder, experts=experts, layout=layout, max_shard_bytes=SHARD_BYTES)
    return status("VmHWM") - before


if __name__ == "__main__":
    task, small, source, folder, experts, layout = sys.argv[1:]
    measure(task, Path(small), Path(folder + "-small"), experts, layout)
    print(measure(task, Path(source), Path(folder), experts, layout))
