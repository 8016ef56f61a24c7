"""Is a folder what was written? All of it (`python -m k25sys verify`), or what a model is loaded from."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from k25sys.checkpoint.config_files import CONFIG
from k25sys.checkpoint.safetensors import INDEX, SafetensorsFolder, read_json
from k25sys.checkpoint.sources import FolderSource
from k25sys.checkpoint.store import MANIFEST, read_manifest, verify_manifest
from k25sys.errors import CheckpointError, listing
from k25sys.models.config import KimiK25Config
from k25sys.models.key_maps import is_expert, is_router_bias, released_shapes


def verify_folder(folder: str | os.PathLike[str]) -> str:
    """Checks a checkpoint without changing anything.

    With a manifest: the sha256 of every file, and that none is missing or extra. Without one (a download): that no file
    is truncated, that index and files agree, and that names, shapes and dtypes are those of config.json; a flipped bit
    among the numbers is not found then.

    Returns:
        What was checked, in one line.

    Raises:
        CheckpointError, ConfigError: with the name of each file or tensor at fault.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if (folder / MANIFEST).exists():
        files = verify_manifest(folder)["files"]
        return f"{len(files)} files, {sum(entry['bytes'] for entry in files.values())} bytes, each with its sha256"
    described = read_json(folder / CONFIG)
    config = KimiK25Config.from_hf_config(described)
    with SafetensorsFolder(folder) as tensors:
        source = FolderSource(tensors, config)
        _check_dtypes(folder, described, source)
        used = {entry.file for entry in tensors.entries.values()}
        stray = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in used)
        if stray:
            raise CheckpointError(f"{folder}: extra: not in the index: {listing(stray)}")
        count = len(tensors.entries)
    return f"no {MANIFEST}: {count} tensors have the names, shapes and dtypes of {CONFIG}; their numbers are unchecked"


def verify_weights(folder: str | os.PathLike[str], *, also: Iterable[str] = ()) -> None:
    """Compares the safetensors files, their index and config.json of a published folder with its manifest: none is
    missing, extra or altered. Other files may have been added or changed, as a tokenizer is, but those of `also` that
    the manifest names.

    Raises:
        CheckpointError: with the name of each file at fault.
    """
    folder = Path(folder)
    files = read_manifest(folder)["files"]
    present = [path.name for path in folder.iterdir()]
    names = {name for name in (*files, *present) if name in (CONFIG, INDEX) or Path(name).match("*.safetensors")}
    names |= files.keys() & set(also)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        faults = list(pool.map(lambda name: _fault(folder / name, files.get(name)), sorted(names)))
    if any(faults):
        raise CheckpointError(listing(filter(None, faults), separator="; "))


def _fault(path: Path, written: dict[str, Any] | None) -> str | None:
    """What is wrong with a file of which the manifest says `written`."""
    if written is None:
        return f"{path}: extra: not in the manifest"
    if not path.is_file():
        return f"{path}: missing"
    if path.stat().st_size != written["bytes"]:
        return f"{path}: {path.stat().st_size} bytes, written were {written['bytes']}"
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return None if digest.hexdigest() == written["sha256"] else f"{path}: altered: its sha256 is not the manifest's"


def _check_dtypes(folder: Path, described: dict[str, object], source: FolderSource) -> None:
    """What config.json says of dtypes holds: of floats, and whether the experts are packed."""
    text = described["text_config"]
    assert isinstance(text, dict)  # from_hf_config has read it
    words = (described.get("dtype"), described.get("torch_dtype"), text.get("dtype"), text.get("torch_dtype"))
    said = [word for word in words if isinstance(word, str) and isinstance(getattr(torch, word, None), torch.dtype)]
    packed = "quantization_config" in described or "quantization_config" in text
    wrong = []
    for name in released_shapes(source.config):
        if is_expert(name) and source.is_packed(name) != packed:
            wrong.append(f"{name} (got {'whole' if packed else 'packed'}, {CONFIG} says otherwise)")
        elif said and not source.is_packed(name) and source.dtype(name) not in (getattr(torch, said[0]), _kept(name)):
            wrong.append(f"{name} (got {source.dtype(name)}, {CONFIG} says {said[0]})")
    if wrong:
        raise CheckpointError(f"{folder}: {len(wrong)} mis-typed: {listing(wrong)}")


def _kept(name: str) -> torch.dtype | None:
    return torch.float32 if is_router_bias(name) else None
