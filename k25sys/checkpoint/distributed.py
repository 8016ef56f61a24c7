"""Checkpoints that all ranks write and any other grid of ranks reads: safetensors, an index in JSON, a manifest.

    index.json       {"format", "step", "sizes", "extra", "tensors": [{"name", "key", "dtype", "shape", "parts":
                     [{"file", "box", "begin", "end"}]}]}
    rank-R-N.safetensors   what rank R writes, flat: "KEY/NAME[begin:end]"; see `reshard` for box, begin and end
    manifest.json    see `store`

No tensor is gathered: each element is written by one of the ranks that hold it, and read by those that want it. Memory:
beside the caller's tensors `save` holds one file's worth of numbers (`file_bytes`) on the CPU where they lie on another
device, `load` nothing: it copies out of the mapped file into them.
"""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from k25sys.checkpoint import store
from k25sys.checkpoint.reshard import Copy, Part, Piece, assign_writers, check_complete, copies
from k25sys.checkpoint.safetensors import read_json
from k25sys.errors import ArgumentTypeError, ArgumentValueError, CheckpointError, listing, message
from k25sys.parallel.grid import GridSizes, RankGrid

INDEX = "index.json"
FORMAT = "k25sys distributed checkpoint 1"
FILE_BYTES = 1 << 30
_T = TypeVar("_T")
Steps = Generator["Send", list[Any], _T]
"""Work of one rank between exchanges with the others: what it yields goes to them, what it is sent is that of all."""


@dataclass(frozen=True)
class Send:
    """JSON for all ranks, or for rank 0 alone, which is then the only one that is sent anything."""

    value: Any
    to_all: bool = True


class OtherRanksError(CheckpointError):
    """Other ranks failed; the message names them, with their errors."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a checkpoint holds beside tensors."""

    step: int
    extra: dict[str, Any]
    sizes: GridSizes
    """Of the grid that wrote it."""


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """One of the index: the file and the place of each part."""

    dtype: str
    shape: tuple[int, ...]
    parts: list[tuple[str, Part]]


def save(
    folder: str | os.PathLike[str],
    grid: RankGrid,
    *,
    step: int,
    pieces: Iterable[Piece],
    extra: dict[str, Any] | None = None,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Publishes a checkpoint of all ranks under `folder`, then makes `latest` beside it name it. Collective.

    Each element of each (key, name) must be held by some rank; of copies, one is written, by the holder with least to
    write. Every rank hashes and syncs what it wrote, rank 0 writes index and manifest and renames. When a rank fails,
    nothing is published: the others raise too, and the temporary folder is removed (by the next `save` under this name
    where rank 0 itself died).

    Args:
        folder: a new name on a file system that all ranks share.
        grid: of all ranks.
        step: the training step.
        pieces: what this rank holds.
        extra: JSON, the same on every rank: a schedule's state, a data loader's position, ...
        file_bytes: the most bytes in a file, and on the CPU.

    Raises:
        CheckpointError: `folder` exists, parts are missing or overlap, ranks disagree, another rank failed.
        TypeError, ValueError: a piece that does not fit its layout; `extra` that is not JSON. OSError: of the disk.
    """
    drive(grid, save_steps(Path(folder), grid, step, pieces, extra, file_bytes))


def load(
    folder: str | os.PathLike[str], grid: RankGrid, wanted: Iterable[Piece], *, step: int | None = None,
    partly: bool = False,
) -> Loaded:  # fmt: skip
    """Verifies a checkpoint and fills the tensors of `wanted` from it, whatever grid wrote it. Collective.

    Of each key that some rank wants, the ranks together must want every name, unless `partly`. Nothing is filled unless
    every file is intact (each rank hashes its share of the files) and every rank finds what it wants.

    Args:
        folder: a published checkpoint.
        grid: of all ranks; any sizes.
        wanted: pieces, whose tensors are written in place.
        step: if given, the one that the checkpoint must be of.
        partly: the rest of what is stored is not asked for.

    Returns:
        Step, extra and the sizes of the grid that wrote it.

    Raises:
        CheckpointError: a missing, extra, truncated or altered file, with its name; a tensor that is missing, is not
            wanted, or has another shape or dtype; another rank failed. TypeError, ValueError: as `save`.
    """
    return drive(grid, load_steps(Path(folder), grid, wanted, step, partly=partly))


def save_steps(
    folder: Path, grid: RankGrid, step: int, pieces: Iterable[Piece], extra: dict[str, Any] | None, file_bytes: int
) -> Steps[None]:
    """`save` as one rank's steps."""
    temporary = None
    try:
        extra = {} if extra is None else extra
        common = _common(folder, step, extra, file_bytes)
        parts = _own_parts(grid, pieces, file_bytes)
        if grid.rank == 0:
            for left in folder.parent.glob(f".{escape(folder.name)}.unpublished-*"):
                shutil.rmtree(left, ignore_errors=True)
            temporary = store.begin_publishing(folder)
        held = [(digest, part.num_bytes) for digest, (part, _) in parts.items()]
        everyone = yield Send({"temporary": temporary and str(temporary), "common": common, "held": held})
        for rank, one in enumerate(everyone):
            if one["common"] != everyone[0]["common"]:
                raise CheckpointError(f"{folder}: rank {rank} saves {one['common']}, rank 0 {everyone[0]['common']}")
        writers = assign_writers([one["held"] for one in everyone])
        mine = [entry for digest, entry in parts.items() if writers[digest] == grid.rank]
        written = _write(Path(everyone[0]["temporary"]), grid.rank, mine, file_bytes)
        reports = yield Send(written, to_all=False)
        if temporary is not None:
            _publish(temporary, folder, grid.sizes, step, extra, reports)
            store.move_latest(folder)
        yield Send(None)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _common(folder: Path, step: int, extra: dict[str, Any], file_bytes: int) -> str:
    """What must be the same on every rank."""
    for name, value, least in (("step", step, 0), ("file_bytes", file_bytes, 64)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArgumentValueError(message("save", name, repr(value), f"an int >= {least}"))
    if not isinstance(extra, dict):
        raise ArgumentTypeError(message("save", "extra", type(extra).__name__, "a dict"))
    value = {"step": step, "extra": extra, "folder": folder.name, "file_bytes": file_bytes}
    try:
        text = json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        accepted = "JSON: dicts with texts as keys, lists, texts, finite numbers"
        raise ArgumentTypeError(message("save", "extra", error, accepted)) from error
    if json.loads(text) != value:
        hint = "keys must be texts, sequences lists"
        raise ArgumentTypeError(message("save", "extra", repr(extra)[:200], "JSON that reads back as it was", hint))
    return text


def _own_parts(grid: RankGrid, pieces: Iterable[Piece], file_bytes: int) -> dict[int, tuple[Part, Piece]]:
    """By digest, of a file's size at most."""
    parts: dict[int, tuple[Part, Piece]] = {}
    for piece in pieces:
        for part in piece.where(grid.sizes, grid.rank).split(file_bytes):
            if part.digest() in parts:
                raise ArgumentValueError(message("save", "pieces", f"{part.entry} twice", "each part once"))
            parts[part.digest()] = part, piece
    return parts


def _write(folder: Path, rank: int, mine: list[tuple[Part, Piece]], file_bytes: int) -> dict[str, Any]:
    """Writes this rank's files; what they are, and what they hold."""
    names, described = [], []
    for number, batch in enumerate(_batches(sorted(mine, key=lambda entry: entry[0].entry), file_bytes)):
        name = f"rank-{rank:05d}-{number:05d}.safetensors"
        names.append(name)
        tensors = {}
        for part, piece in batch:
            flat = piece.tensor.detach().view(-1)
            tensors[part.entry] = flat[part.begin - piece.begin : part.end - piece.begin].cpu()
            own = {"name": part.name, "key": part.key, "dtype": part.dtype, "shape": part.shape}
            described.append({**own, "part": {"file": name, "box": part.box, "begin": part.begin, "end": part.end}})
        try:
            save_file(tensors, str(folder / name), metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / name}: cannot be written: {error}") from error
    store.sync_files(folder, names)
    return {"files": store.describe_files(folder, names), "parts": described}


def _batches(entries: list[tuple[Part, Piece]], most_bytes: int) -> Iterator[list[tuple[Part, Piece]]]:
    batch: list[tuple[Part, Piece]] = []
    size = 0
    for part, piece in entries:
        if batch and size + part.num_bytes > most_bytes:
            yield batch
            batch, size = [], 0
        batch.append((part, piece))
        size += part.num_bytes
    if batch:
        yield batch


def _publish(
    temporary: Path, folder: Path, sizes: GridSizes, step: int, extra: dict[str, Any], reports: list[dict[str, Any]]
) -> None:
    """Rank 0: the index of all ranks' parts, the manifest, the name."""
    tensors: dict[tuple[str, str], dict[str, Any]] = {}
    for rank, report in enumerate(reports):
        for described in report["parts"]:
            own = {name: described[name] for name in ("name", "key", "dtype", "shape")}
            tensor = tensors.setdefault((own["key"], own["name"]), {**own, "parts": []})
            for field, value in own.items():
                if tensor[field] != value:
                    what = f"{folder}: {own['key']} of {own['name']}: {field}"
                    raise CheckpointError(f"{what} is {value} on rank {rank}, {tensor[field]} on another")
            tensor["parts"].append(described["part"])
    for (key, name), tensor in tensors.items():
        read = _tensor(tensor)
        check_complete(f"{folder}: {key} of {name}", read.shape, [part for _, part in read.parts])
    index = {
        "format": FORMAT, "step": step, "sizes": asdict(sizes), "extra": extra,
        "tensors": [tensors[key] for key in sorted(tensors)],
    }  # fmt: skip
    (temporary / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    store.sync_files(temporary, [INDEX])
    files = store.describe_files(temporary, [INDEX])
    for report in reports:
        files |= report["files"]
    store.finish_publishing(temporary, folder, files, step=step)


def load_steps(
    folder: Path, grid: RankGrid, wanted: Iterable[Piece], step: int | None = None, *, partly: bool = False
) -> Steps[Loaded]:
    """`load` as one rank's steps."""
    wanted = list(wanted)
    manifest = store.read_manifest(folder)
    if step is not None and manifest.get("step") != step:
        raise CheckpointError(f"{folder / store.MANIFEST}: of step {manifest.get('step')}, wanted {step}")
    _check_share(folder, manifest, grid)
    loaded, tensors = _read_index(folder, manifest)
    if loaded.step != manifest.get("step"):
        raise CheckpointError(f"{folder / INDEX}: of step {loaded.step}, {store.MANIFEST} of {manifest.get('step')}")
    plan: defaultdict[str, list[tuple[Part, Tensor, list[Copy]]]] = defaultdict(list)
    for piece in wanted:
        _plan(folder, piece, piece.where(grid.sizes, grid.rank), tensors, plan)
    names = sorted({(piece.key, piece.name) for piece in wanted})
    positions = yield Send(_positions(names, tensors))
    if not partly:
        _check_wanted(folder, tensors, positions)
    for file, entries in sorted(plan.items()):
        _fill(folder / file, entries)
    yield Send(None)
    return loaded


def _check_share(folder: Path, manifest: dict[str, Any], grid: RankGrid) -> None:
    """Files are dealt out by size, the largest first, to the rank with least to hash."""
    files = manifest["files"]
    if INDEX not in files:
        raise CheckpointError(f"{folder / INDEX}: missing: not a checkpoint that ranks wrote together")
    names = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    load = [0] * grid.sizes.world_size
    mine = []
    for name in names:
        rank = load.index(min(load))
        load[rank] += files[name]["bytes"] + 1
        if rank == grid.rank:
            mine.append(name)
    store.check_files(folder, manifest, mine)


def _read_index(folder: Path, manifest: dict[str, Any]) -> tuple[Loaded, dict[tuple[str, str], _Tensor]]:
    path = folder / INDEX
    index = read_json(path)
    if index.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format: got {index.get('format')!r}, accepted {FORMAT!r}")
    try:
        sizes, step, extra = GridSizes(**index["sizes"]), int(index["step"]), dict(index["extra"])
        tensors = {(tensor["key"], tensor["name"]): _tensor(tensor) for tensor in index["tensors"]}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: not the index of a checkpoint: {type(error).__name__}: {error}") from error
    strange = {file for tensor in tensors.values() for file, _ in tensor.parts if file not in manifest["files"]}
    if strange:
        raise CheckpointError(f"{path}: names {listing(sorted(strange))}, which is not in the manifest")
    return Loaded(step=step, extra=extra, sizes=sizes), tensors


def _tensor(described: dict[str, Any]) -> _Tensor:
    own = {"name": described["name"], "key": described["key"], "dtype": described["dtype"]}
    shape = tuple(described["shape"])
    parts = []
    for part in described["parts"]:
        box = tuple((first, last) for first, last in part["box"])
        here = Part(**own, shape=shape, box=box, begin=part["begin"], end=part["end"])
        here.check()
        parts.append((str(part["file"]), here))
    return _Tensor(dtype=described["dtype"], shape=shape, parts=parts)


def _plan(
    folder: Path, piece: Piece, target: Part, tensors: dict[tuple[str, str], _Tensor],
    plan: defaultdict[str, list[tuple[Part, Tensor, list[Copy]]]],
) -> None:  # fmt: skip
    what = f"{folder / INDEX}: {piece.key} of {piece.name}"
    tensor = tensors.get((piece.key, piece.name))
    if tensor is None:
        raise CheckpointError(f"{what}: missing")
    for field in ("shape", "dtype"):
        if getattr(tensor, field) != getattr(target, field):
            raise CheckpointError(f"{what}: {field} is {getattr(tensor, field)}, wanted {getattr(target, field)}")
    found = 0
    for file, source in tensor.parts:
        here = list(copies(source, target))
        if here:
            plan[file].append((source, piece.tensor, here))
            found += sum(copy.num_elements for copy in here)
    if found != target.end - target.begin:
        raise CheckpointError(f"{what}: has {found} of {target.end - target.begin} elements")


def _positions(names: list[tuple[str, str]], tensors: dict[tuple[str, str], _Tensor]) -> str:
    """Which tensors of the index these are, a bit each."""
    places = {key: place for place, key in enumerate(tensors)}
    bits = 0
    for name in names:
        bits |= 1 << places[name]
    return hex(bits)


def _check_wanted(folder: Path, tensors: dict[tuple[str, str], _Tensor], positions: list[str]) -> None:
    bits = 0
    for one in positions:
        bits |= int(one, 16)
    wanted = {key for place, key in enumerate(tensors) if bits >> place & 1}
    keys = {key for key, _ in wanted}
    left = [f"{key} of {name}" for key, name in tensors if key in keys and (key, name) not in wanted]
    if left:
        raise CheckpointError(f"{folder / INDEX}: {len(left)} tensors that no rank wants: {listing(left)}")


def _fill(path: Path, entries: list[tuple[Part, Tensor, list[Copy]]]) -> None:
    try:
        with safe_open(str(path), framework="pt") as file:
            for part, target, here in entries:
                stored = file.get_slice(part.entry)
                if stored.get_dtype() != part.dtype or stored.get_shape() != [part.end - part.begin]:
                    got = f"{stored.get_dtype()} {stored.get_shape()}"
                    raise CheckpointError(f"{path}: {part.entry} is {got}, which {INDEX} says it is not")
                source = stored[:]  # of the mapped file: only what is copied is read
                for copy in here:
                    with torch.no_grad():
                        copy.run(source, target.detach().view(-1))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def drive(grid: RankGrid, steps: Steps[_T]) -> _T:
    """Runs the steps with exchanges over the grid. What a rank raises, every rank raises, at the same exchange: the
    others as OtherRanksError."""
    received: list[Any] | None = None
    while True:
        try:
            send = steps.send(received) if received is not None else next(steps)
        except StopIteration as stop:
            return stop.value
        except BaseException as error:
            with suppress(RuntimeError):  # of a rank that died: this one has its own error to raise
                _exchange(grid, Send(f"{type(error).__name__}: {error}"), failed=True)
            raise
        try:
            received, failures = _exchange(grid, send, failed=False)
        except BaseException as error:
            _end(steps, error)
            raise
        if failures:
            error = OtherRanksError("; ".join(f"rank {rank} failed: {text}" for rank, text in sorted(failures.items())))
            _end(steps, error)
            raise error


def _end(steps: Steps[Any], error: BaseException) -> None:
    """Lets the steps clean up."""
    try:
        steps.throw(error)
    except BaseException as raised:
        if raised is not error:
            raise


def _exchange(grid: RankGrid, send: Send, *, failed: bool) -> tuple[list[Any], dict[int, str]]:
    """What every rank sent, or what the failed ones said."""
    world = grid.group("world")
    data = json.dumps(send.value).encode()
    if world is None:
        return [json.loads(data)], {}
    states = _all_gather(grid, torch.tensor([failed, len(data)]))
    sizes = [int(size) for _, size in states]
    if any(bool(state) for state, _ in states):
        texts = _gather_bytes(grid, data, sizes, to_all=True)
        return [], {rank: json.loads(texts[rank]) for rank, (state, _) in enumerate(states) if state}
    return [json.loads(text) for text in _gather_bytes(grid, data, sizes, to_all=send.to_all)], {}


def _all_gather(grid: RankGrid, tensor: Tensor) -> list[Tensor]:
    tensor = tensor.to(grid.device_type)
    gathered = [torch.empty_like(tensor) for _ in range(grid.sizes.world_size)]
    dist.all_gather(gathered, tensor, group=grid.group("world"))
    return [one.cpu() for one in gathered]


def _gather_bytes(grid: RankGrid, data: bytes, sizes: list[int], *, to_all: bool) -> list[bytes]:
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if to_all:
        gathered = _all_gather(grid, padded)
    else:
        padded = padded.to(grid.device_type)
        room = [torch.empty_like(padded) for _ in sizes] if grid.rank == 0 else None
        dist.gather(padded, room, dst=0, group=grid.group("world"))
        gathered = [one.cpu() for one in room or []]
    return [one[:size].numpy().tobytes() for one, size in zip(gathered, sizes, strict=False)]
