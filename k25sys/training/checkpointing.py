"""Checkpoints of a training run: which to save, when, in the background; which to load, and what to do with a bad one.

    FOLDER/step-00000200/    a checkpoint of k25sys.checkpoint.distributed, published by renaming
    FOLDER/latest            names the newest; it is moved last, and read by people: loading looks at the folders
    FOLDER/.*.unpublished-*  what a crash left, removed at the next start

What is stored is all state of a run under any grid: of every trained parameter its float32 master ("master") and
moments ("momentum" of Muon, "exp_avg" and "exp_avg_sq" of AdamW), of a frozen one itself ("parameter"), and the biases
of the routers ("bias"). Parameters are not stored beside their masters: ZeroOptimizer.publish rounds them from those.
Who wants weights alone asks `distributed.load` for pieces of key "master" (and "parameter" and "bias").
"""

import os
import re
import shutil
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from k25sys.checkpoint import store
from k25sys.checkpoint.distributed import (
    FILE_BYTES,
    Loaded,
    OtherRanksError,
    Send,
    Steps,
    drive,
    load_steps,
    save_steps,
)
from k25sys.checkpoint.reshard import Piece
from k25sys.errors import ArgumentValueError, CheckpointError, listing, message
from k25sys.optim.zero import ZeroOptimizer
from k25sys.parallel.grid import RankGrid
from k25sys.training.parallelize import ParallelModel

_PUBLISHED = re.compile(r"step-(\d{8,})")
_MOST_OF_LATEST = 256  # bytes


def pieces_of(model: ParallelModel, optimizer: ZeroOptimizer) -> Iterator[Piece]:
    """All state of this rank, as views: saving reads them, loading writes into them.

    `optimizer.num_steps` is not among them, and after loading, `optimizer.publish()` is due. Between steps there is no
    other state: gradients, QK-Clip's largest logits and the balancer's counts begin anew with each.
    """
    trained = {slot.name for bucket in optimizer.gradients.buckets for slot in bucket.slots}
    for shard in optimizer.shards():
        yield Piece(
            name=shard.name, key=shard.key, layout=shard.layout, tensor=shard.tensor, begin=shard.begin, end=shard.end
        )
    for name, parameter in model.parameters.items():
        if name not in trained:
            yield Piece(name=name, key="parameter", layout=model.layouts[name], tensor=parameter.detach())
    for name, bias_E in model.router_biases.items():
        yield Piece(name=name, key="bias", layout=model.layouts[name], tensor=bias_E.detach())


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Checkpoints:
    """The checkpoints of one run.

        checkpoints = Checkpoints(folder, grid, every=200)
        loaded = checkpoints.load_latest(model, optimizer)
        for step in range(loaded.step if loaded else 0, num_steps):
            ...
            if checkpoints.due(step + 1):
                checkpoints.save(step + 1, model, optimizer, {"data": stream.state()})
        checkpoints.wait()

    Collective over the grid, all of it but `due` and `wait`. One run at a time may have the folder.

    Args:
        folder: on a file system that all ranks share; made when the first checkpoint is saved.
        grid: of all ranks.
        every: steps from one checkpoint to the next, see `due`.
        keep: how many good ones stay, at least 2. Older ones are removed after a new one is published.
        asynchronous: `save` returns when the state is copied to this machine's memory, and a thread writes it. Else it
            returns when the checkpoint is published.
        report: gets a line, on rank 0, for each folder that is not what it should be.
        timeout: of waits between ranks for each other's writing; None keeps torch's.

    Raises:
        ArgumentValueError: `every` below 1, `keep` below 2.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        grid: RankGrid,
        *,
        every: int,
        keep: int = 2,
        asynchronous: bool = True,
        report: Callable[[str], None] = _to_stderr,
        timeout: timedelta | None = None,
    ) -> None:
        for name, value, least in (("every", every, 1), ("keep", keep, 2)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ArgumentValueError(message("Checkpoints", name, repr(value), f"an int >= {least}"))
        self.folder, self.every, self.keep, self.asynchronous = Path(folder), every, keep, asynchronous
        self._grid, self._report = _own_group(grid, timeout), report
        self._good: list[int] = []
        """Steps that this run has loaded or saved."""
        self._refused: set[int] = set()
        """Steps whose folders could not be loaded."""
        self._room: dict[tuple[str, str, int], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saving = self.folder
        if grid.rank == 0:
            self._remove_unpublished()

    def steps(self) -> list[int]:
        """Those of the folders that are there, intact or not, the newest first."""
        return drive(self._grid, self._candidates())

    def due(self, step: int) -> bool:
        """Whether the state after `step` steps is to be saved."""
        return step % self.every == 0

    # --- saving -----------------------------------------------------------------------------------------------------

    def save(
        self, step: int, model: ParallelModel, optimizer: ZeroOptimizer, extra: dict[str, Any] | None = None
    ) -> None:
        """Saves the state after `step` steps. Waits for the one before. Collective.

        The state may be changed as soon as this returns. Copies take as much memory of this machine as the state, and
        keep it for the next time.

        Args:
            extra: JSON, the same on every rank: the data's position, the schedule's, ...

        Raises:
            CheckpointError: the save before failed, or, unless `asynchronous`, this one: names the rank and the cause.
                Nothing is published then, and nothing removed.
        """
        self.wait()
        pieces = self._copies(pieces_of(model, optimizer)) if self.asynchronous else pieces_of(model, optimizer)
        contents = {"num_steps": optimizer.num_steps, "extra": deepcopy(extra or {})}

        def run() -> None:
            try:
                drive(self._grid, self._save_steps(step, pieces, contents))
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name=f"checkpoint of step {step}")
        self._saving = self._path(step)
        self._thread.start()
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when what `save` has begun is published.

        Raises:
            CheckpointError: it was not; names the rank and the cause.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            here = "" if isinstance(error, OtherRanksError) else f"on rank {self._grid.rank}: {type(error).__name__}: "
            raise CheckpointError(f"{self._saving}: not saved: {here}{error}") from error

    def _copies(self, pieces: Iterable[Piece]) -> Iterable[Piece]:
        """On the CPU. What fails here is raised by the thread: there the other ranks wait, and learn of it."""
        try:
            copies = []
            for piece in pieces:
                place = (piece.key, piece.name, piece.begin)
                room = self._room.get(place)
                if room is None or room.shape != piece.tensor.shape or room.dtype != piece.tensor.dtype:
                    room = torch.empty_like(piece.tensor, device="cpu", pin_memory=piece.tensor.is_cuda)
                    self._room[place] = room
                room.copy_(piece.tensor, non_blocking=True)
                copies.append(replace(piece, tensor=room))
            if torch.cuda.is_initialized():
                torch.cuda.current_stream().synchronize()
            return copies
        except Exception as error:
            return _raising(error)

    def _save_steps(self, step: int, pieces: Iterable[Piece], contents: dict[str, Any]) -> Steps[None]:
        if self._grid.rank == 0 and step in self._refused and self._path(step).exists():
            _hide(self._path(step))  # save_steps removes it
        yield from save_steps(self._path(step), self._grid, step, pieces, contents, FILE_BYTES)
        self._refused.discard(step)
        self._good.append(step)
        if self._grid.rank == 0 and len(self._good) >= self.keep:
            self._remove_before(sorted(self._good)[-self.keep])

    def _remove_before(self, step: int) -> None:
        for old in _published(self.folder):
            if old < step:
                try:
                    shutil.rmtree(_hide(self._path(old)))
                except OSError as error:
                    self._say(f"{self._path(old)}: cannot be removed: {error}")

    def _remove_unpublished(self) -> None:
        for pattern in (".step-*.unpublished-*", f".{store.LATEST}.*"):
            for path in self.folder.glob(pattern):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with suppress(OSError):  # a folder that is only read from
                        path.unlink()

    # --- loading ----------------------------------------------------------------------------------------------------

    def load_latest(self, model: ParallelModel, optimizer: ZeroOptimizer) -> Loaded | None:
        """Loads the newest checkpoint that is intact, whatever grid wrote it. Collective.

        Each one that is not intact is reported in one line, and the one before is tried; all ranks load the same.
        A refused one gives way to a new one of its step.

        Returns:
            Step, extra and grid sizes of what was loaded; None where there is no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, but none is intact. The state may be that of no step then.
        """
        self.wait()
        wanted = list(pieces_of(model, optimizer))
        problems = []
        for step in drive(self._grid, self._candidates()):
            try:
                loaded = drive(self._grid, load_steps(self._path(step), self._grid, wanted, step))
                optimizer.num_steps, extra = _contents(loaded)
            except (CheckpointError, OSError) as error:
                problems.append(f"{self._path(step)}: cannot be loaded: {error}")
                self._refused.add(step)
                self._say(problems[-1])
                continue
            optimizer.publish()
            self._good.append(step)
            return replace(loaded, extra=extra)
        if problems:
            raise CheckpointError(f"{self.folder}: no checkpoint is intact: {listing(problems, separator='; ')}")
        return None

    def _candidates(self) -> Steps[list[int]]:
        """The steps of all folders, the newest first: what rank 0 sees."""
        found = None
        if self._grid.rank == 0:
            found = _published(self.folder)
            fault = _fault_of_latest(self.folder, [self._path(step).name for step in found])
            if fault is not None:
                self._say(f"{self.folder / store.LATEST}: {fault}; passed over")
        everyone = yield Send(found)
        return everyone[0]

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _say(self, line: str) -> None:
        if self._grid.rank == 0:
            self._report(" ".join(line.split()))


def _own_group(grid: RankGrid, timeout: timedelta | None) -> RankGrid:
    """The same ranks on the CPU, with a group of their own: the thread's exchanges must not meet the step's."""
    groups = {}
    if grid.sizes.world_size > 1:
        group = dist.new_group(backend="gloo", timeout=timeout, group_desc="checkpoints")
        assert isinstance(group, dist.ProcessGroup)
        groups["world"] = group
    return RankGrid(grid.sizes, grid.rank, "cpu", groups)


def _raising(error: Exception) -> Iterator[Piece]:
    raise error
    yield


def _contents(loaded: Loaded) -> tuple[int, dict[str, Any]]:
    """num_steps, and what the caller of `save` gave."""
    num_steps, extra = loaded.extra.get("num_steps"), loaded.extra.get("extra")
    if not isinstance(num_steps, int) or not isinstance(extra, dict):
        raise CheckpointError("not of a training run: without num_steps and extra")
    return num_steps, extra


def _published(folder: Path) -> list[int]:
    """The steps of everything that has the name of a checkpoint, the newest first."""
    names = os.listdir(folder) if folder.is_dir() else []
    steps = [int(found[1]) for name in names if (found := _PUBLISHED.fullmatch(name))]
    return sorted((step for step in steps if f"step-{step:08d}" in names), reverse=True)


def _hide(path: Path) -> Path:
    """Renames a checkpoint, so that one that is half removed is none."""
    hidden = path.parent / f".{path.name}.unpublished-{uuid.uuid4().hex}"
    os.rename(path, hidden)
    return hidden


def _fault_of_latest(folder: Path, names: list[str]) -> str | None:
    """What is wrong with `latest`, a file or a link; None where there is none, or it names one of `names`."""
    path = folder / store.LATEST
    if path.is_symlink():
        named = os.readlink(path)
    elif path.is_file():
        with open(path, "rb") as file:
            named = file.read(_MOST_OF_LATEST).decode(errors="replace").removesuffix("\n")
    else:
        return "neither a file nor a link" if path.exists() else None
    return None if named in names else f"names {named!r}, which is no checkpoint beside it"
