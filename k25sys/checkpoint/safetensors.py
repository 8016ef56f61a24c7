"""Folders of safetensors files with an index: read one tensor at a time, written in shards of limited size."""

import json
import os
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from k25sys.errors import CheckpointError, listing

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_OPEN_FILES = 16
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A stored tensor: its file's name, shape and dtype (a torch.dtype, or the file's own word for another one)."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str


class SafetensorsFolder:
    """The tensors of a folder, found by reading the headers of its files.

    What is read has memory of its own, so that a file costs nothing but what is being read of it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Reads the index, or the one file there is, and every header.

        Raises:
            CheckpointError: no safetensors, an index that disagrees with the files, a truncated or broken file. Pickles
                are never opened.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such folder")
        index = self.folder / INDEX
        expected = _read_index(index) if index.exists() else None
        files = sorted(set(expected.values())) if expected is not None else [_single_file(self.folder)]
        self._read: OrderedDict[str, Any] = OrderedDict()
        self.entries: dict[str, Entry] = {}
        for file in files:
            for name, entry in self._header(file):
                if name in self.entries:
                    other = self.entries[name].file
                    raise CheckpointError(f"{self.folder / file}: holds {name}, which {other} holds too")
                self.entries[name] = entry
        if expected is not None:
            _compare_with_index(index, expected, {name: entry.file for name, entry in self.entries.items()})

    def __enter__(self) -> "SafetensorsFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the open files; reading opens them again."""
        while self._read:
            _close(self._read.popitem()[1])

    def read(self, name: str, expert: int | None = None, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or matrix `expert` of it, or rows [start, stop) of that.

        Raises:
            CheckpointError: the file cannot be read.
        """
        file = self.entries[name].file
        try:
            if expert is None and rows is None:
                return self._reader(file).get_tensor(name)
            within = slice(None) if rows is None else slice(*rows)
            # Mapped anew each time: the pages of earlier parts would stay in memory as long as the mapping.
            with safe_open(str(self.folder / file), framework="pt") as mapped:
                view = mapped.get_slice(name)
                return (view[within] if expert is None else view[expert, within]).clone()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / file}: {name} cannot be read: {error}") from error

    def _reader(self, file: str) -> Any:
        """The parts of an expert may lie in different files, so that some stay open."""
        if file not in self._read:
            if len(self._read) == _OPEN_FILES:
                _close(self._read.popitem(last=False)[1])
            self._read[file] = safe_open(str(self.folder / file), framework="pt", backend="pread")
        self._read.move_to_end(file)
        return self._read[file]

    def _header(self, file: str) -> Iterable[tuple[str, Entry]]:
        path = self.folder / file
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        try:
            with safe_open(str(path), framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (no dict: it cannot be iterated)
                    view = handle.get_slice(name)
                    word = str(view.get_dtype())
                    yield name, Entry(file=file, shape=tuple(view.get_shape()), dtype=DTYPES.get(word, word))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: truncated, altered, or not a safetensors file: {error}") from error


def _close(handle: Any) -> None:
    handle.__exit__(None, None, None)


def _single_file(folder: Path) -> str:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise CheckpointError(f"{folder / INDEX}: missing, and there are {len(files)} safetensors files")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    hint = f"; {pickles[0]} may run code when it is read and is refused: convert it to safetensors" if pickles else ""
    raise CheckpointError(f"{folder}: no safetensors files, accepted {INDEX} with its files or {SINGLE}{hint}")


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path)
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f'{path}: no "weight_map" of names to files')
    for file in set(files.values()):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path}: names the file {file!r}, accepted safetensors files of the same folder")
    return files


def _compare_with_index(path: Path, expected: dict[str, str], found: dict[str, str]) -> None:
    absent = [f"{name} (not in {file})" for name, file in expected.items() if found.get(name) != file]
    unlisted = [f"{name} ({file} holds it, the index does not)" for name, file in found.items() if name not in expected]
    if absent or unlisted:
        raise CheckpointError(f"{path}: disagrees with the files: {listing(absent + unlisted)}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: missing, or something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: got a {type(value).__name__}, accepted a JSON object")
    return value


class ShardWriter:
    """Writes tensors into files of at most `max_shard_bytes` (a larger tensor has a file to itself) and their index.

    Holds the tensors of one file at a time.
    """

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self._folder, self._most = folder, max_shard_bytes
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def make_room(self, size: int) -> None:
        """Writes what it holds if `size` bytes more would not fit: call it before making a large tensor to add."""
        if self._waiting_bytes + size > self._most:
            self._flush()

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor; it must not change until `finish`."""
        size = tensor.numel() * tensor.element_size()
        self.make_room(size)
        self._waiting[name] = tensor.detach().to("cpu").contiguous()
        self._waiting_bytes += size
        self._total_bytes += size

    def finish(self) -> None:
        """Writes what is left and the index."""
        self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            os.rename(self._folder / _partial(i), self._folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _flush(self) -> None:
        if not self._waiting:
            return
        path = self._folder / _partial(len(self._shards))
        try:
            save_file(self._waiting, str(path), metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from error
        self._shards.append(list(self._waiting))
        self._waiting, self._waiting_bytes = {}, 0


def _partial(i: int) -> str:
    return f"shard-{i}.partial"
