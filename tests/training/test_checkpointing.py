"""A run that is saved and loaded, into any grid, goes on as if it had not ended; saved is what was at `save`."""

import errno
import os
import threading
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from k25sys.checkpoint import distributed, verify_folder
from k25sys.checkpoint.distributed import Loaded
from k25sys.errors import ArgumentValueError, CheckpointError
from k25sys.optim import MuonClipConfig, ZeroOptimizer
from k25sys.parallel import GridSizes, ParameterLayout, RankGrid
from k25sys.parallel.balance import ExpertBalancer
from k25sys.parallel.weight_grads import WeightGradStore
from k25sys.training import checkpointing
from k25sys.training.checkpointing import Checkpoints, pieces_of
from k25sys.training.parallelize import ParallelModel
from k25sys.training.step import TrainStep
from tests.parallel.processes import DIED, run_failing_ranks, run_ranks
from tests.training.batches import make_microbatches, small_config
from tests.training.test_grids import GridCase, build, relative_error
from tests.training.test_steps import CONFIG, RATE, case, decouple, media_of

SEQUENCES, LAYERS, DTYPE = 4, 4, torch.float64
EXTRA = {"data": [{"documents": 3}, {"documents": 5}], "epoch": 1}
Box = tuple[tuple[int, int], ...]
Dump = dict[tuple[str, str], list[tuple[Box, tuple[int, ...], int, int, Tensor]]]


class Run:
    """A model in training on one rank."""

    def __init__(self, of: GridCase, grid: RankGrid, *, vision: str = "stage0", bucket_bytes: int = 20_000) -> None:
        torch.set_num_threads(1)
        self.case, self.grid = of, grid
        self.per_rank = SEQUENCES // of.sizes.data
        config = small_config(layers=LAYERS)
        runtime, self.model = build(of, config, DTYPE, grid, vision, num_microbatches=self.per_rank)
        encoder_names = [name for name in self.model.parameters if not name.startswith("language_model.")]
        self.optimizer = ZeroOptimizer(
            self.model.parameters, self.model.layouts, grid, CONFIG, bucket_bytes=bucket_bytes, irregular=encoder_names
        )
        modules = [named for stage in self.model.stages.values() for named in stage.model.named_modules()]
        routers = {name: module for name, module in modules if hasattr(module, "e_score_correction_bias")}
        balancer = ExpertBalancer(routers, grid, rate=0.01)
        decoupled = decouple(of, self.model, grid, DTYPE) if vision == "dep" else None
        self.step = TrainStep(self.model, runtime, self.optimizer, grid, balancer=balancer, decoupled=decoupled)

    def train(self, step: int) -> float:
        """On the same sequences, however many data ranks have them."""
        batches = make_microbatches(data_ranks=self.case.sizes.data, per_rank=self.per_rank, dtype=DTYPE, seed=step)
        media = media_of(batches, self.grid, self.step.decoupled) if self.step.decoupled else None
        outcome = self.step.run(batches[self.grid.index("data")], learning_rate=RATE, media=media)
        assert outcome.finite
        return outcome.loss

    def dump(self) -> Dump:
        """All state of this rank, and its parameters, with the place of each."""
        found: Dump = {}
        sizes, rank = self.grid.sizes, self.grid.rank
        for piece in pieces_of(self.model, self.optimizer):
            box, local = piece.layout.box(sizes, rank), piece.layout.local_shape(sizes)
            end = prod(local) if piece.end is None else piece.end
            place = (box, local, piece.begin, end)
            found.setdefault((piece.key, piece.name), []).append((*place, piece.tensor.reshape(-1).clone()))
        for name, parameter in self.model.parameters.items():
            layout = self.model.layouts[name]
            box, local = layout.box(sizes, rank), layout.local_shape(sizes)
            place = (box, local, 0, prod(local))
            found["all parameters", name] = [(*place, parameter.detach().reshape(-1).clone())]
        return found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: layout.shape for name, layout in self.model.layouts.items()}


def assemble(parent: Path, name: str) -> dict[tuple[str, str], Tensor]:
    """Whole tensors out of the dumps of all ranks: a reading of layouts that shares nothing with checkpoints."""
    whole: dict[tuple[str, str], Tensor] = {}
    for path in sorted(parent.glob(f"{name}-*.pt")):
        dump, shapes = torch.load(path)
        for (key, parameter), parts in dump.items():
            target = whole.setdefault((key, parameter), torch.full(shapes[parameter], float("nan"), dtype=DTYPE))
            for box, local, begin, end, tensor in parts:
                place = tuple(slice(*bounds) for bounds in box)
                part = target[place].reshape(-1).clone()
                part[begin:end] = tensor.to(DTYPE)
                target[place] = part.view(local)
    assert whole
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


def write_dump(run: Run, parent: Path, name: str) -> None:
    torch.save((run.dump(), run.shapes()), parent / f"{name}-{run.grid.rank}.pt")


def compare(dump: Dump, whole: dict[tuple[str, str], Tensor], *, bitwise: bool) -> float:
    """The largest relative error of masters, parameters and biases; all state bit for bit if `bitwise`."""
    worst = 0.0
    for (key, name), parts in dump.items():
        for box, _, begin, end, tensor in parts:
            wanted = whole[key, name][tuple(slice(*bounds) for bounds in box)].reshape(-1)[begin:end]
            if bitwise:
                assert torch.equal(tensor.to(DTYPE), wanted), (key, name)
            elif key in ("all parameters", "bias"):  # moments of the keys' biases are nothing but rounding
                worst = max(worst, relative_error(tensor.to(DTYPE), wanted))
    return worst


def _write(parent: str, of: GridCase, vision: str) -> None:
    """Two steps, saved while the third runs; the same run loaded again makes the same third step, bit for bit.

    With buckets of another size it is the same but for the order in which the squares of the gradient's norm are added.
    """
    folder, grid = Path(parent), RankGrid.create(of.sizes)
    run = Run(of, grid, vision=vision)
    checkpoints = Checkpoints(folder / "checkpoints", grid, every=2)
    run.train(0)
    run.train(1)
    assert checkpoints.due(2)
    trained, write = threading.Event(), distributed.save_file

    def write_later(*args: Any, **options: Any) -> None:
        assert grid.rank > 0 or trained.wait(60)  # the other ranks' threads are in an exchange all the while
        write(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "save_file", write_later)
        checkpoints.save(2, run.model, run.optimizer, EXTRA)
        write_dump(run, folder, "second")
        loss = run.train(2)
        trained.set()
        checkpoints.wait()
    write_dump(run, folder, "third")
    if grid.group("world") is not None:
        dist.barrier()
    third = assemble(folder, "third")
    for again in (run, Run(of, grid, vision=vision, bucket_bytes=7_000)):
        loaded = checkpoints.load_latest(again.model, again.optimizer)
        assert loaded == Loaded(step=2, extra=EXTRA, sizes=of.sizes)
        assert again.optimizer.num_steps == 2
        compare(again.dump(), assemble(folder, "second"), bitwise=True)
        assert again.train(2) == loss
        assert compare(again.dump(), third, bitwise=again is run) <= 1e-12


def _read(parent: str, cases: list[GridCase], vision: str) -> float:
    """The state is the same bit for bit in other grids, and so is the third step but for the order of sums."""
    folder, worst = Path(parent), 0.0
    second, third = assemble(folder, "second"), assemble(folder, "third")
    for of in cases:
        grid = RankGrid.create(of.sizes)
        run = Run(of, grid, vision=vision)
        loaded = Checkpoints(folder / "checkpoints", grid, every=2).load_latest(run.model, run.optimizer)
        assert loaded is not None
        assert (loaded.step, loaded.extra) == (2, EXTRA)
        compare(run.dump(), second, bitwise=True)
        run.train(2)
        worst = max(worst, compare(run.dump(), third, bitwise=False))
    assert worst <= 1e-12
    return worst


def _cases(vision: str) -> tuple[GridCase, dict[int, list[GridCase]]]:
    if vision == "dep":
        return case(pipeline=2), {1: [case()], 4: [case(pipeline=2, data=2, expert=2)]}
    return case("interleaved_1f1b", 2, pipeline=2, data=2, expert=2), {
        1: [case()],
        2: [case(tensor=2), case(data=2, expert=2)],
        4: [case(context=2, tensor=2, expert=4), case(data=4), case(pipeline=2, tensor=2, expert_tensor=2)],
        8: [case(pipeline=2, data=2, tensor=2, expert=4)],
    }


@pytest.mark.parametrize("vision", ["stage0", "dep"])
def test_a_run_goes_on_in_any_grid(tmp_path: Path, vision: str) -> None:
    written, read = _cases(vision)
    run_ranks(written.sizes.world_size, _write, str(tmp_path), written, vision)
    assert "each with its sha256" in verify_folder(tmp_path / "checkpoints" / "step-00000002")
    for world_size, cases in read.items():
        worst = run_ranks(world_size, _read, str(tmp_path), cases, vision)
        print(f"{vision}: {world_size} ranks: {max(worst):.1e}")


# --- a model of a few numbers ---------------------------------------------------------------------------------------

LAYOUTS = {
    "matrix": ParameterLayout(shape=(6, 4), splits=((0, "tensor"),), matrix=True),
    "gain": ParameterLayout(shape=(8,)),
    "frozen": ParameterLayout(shape=(4,)),
    "bias": ParameterLayout(shape=(3,)),
}
ONE = GridSizes()


class Small:
    """State without a forward: every number of it is `value`, or what `fill` is given."""

    def __init__(self, grid: RankGrid, value: float = 0.0) -> None:
        tensors = {name: torch.zeros(layout.local_shape(grid.sizes)) for name, layout in LAYOUTS.items()}
        parameters = {name: nn.Parameter(tensors[name]) for name in ("matrix", "gain", "frozen")}
        self.model = ParallelModel({}, parameters, LAYOUTS, WeightGradStore(), None, (), {"bias": tensors["bias"]})
        trained = {name: parameter for name, parameter in parameters.items() if name != "frozen"}
        self.optimizer = ZeroOptimizer(trained, LAYOUTS, grid, MuonClipConfig(max_logit=None))
        self.fill(value)

    def fill(self, value: float) -> None:
        """As steps do: in place."""
        for piece in pieces_of(self.model, self.optimizer):
            piece.tensor.fill_(value)
        self.optimizer.num_steps = int(value)
        self.optimizer.publish()

    def value(self) -> float:
        """The number that it all is; NaN where it is several."""
        tensors = [piece.tensor for piece in pieces_of(self.model, self.optimizer)]
        values = {float(value) for tensor in tensors for value in tensor.view(-1)}
        values |= {float(value) for p in self.model.parameters.values() for value in p.detach().view(-1)}
        values.add(float(self.optimizer.num_steps))
        return values.pop() if len(values) == 1 else float("nan")


def make(folder: Path, grid: RankGrid | None = None, **options: Any) -> tuple[Checkpoints, Small, list[str]]:
    """Checkpoints, a state, and the lines that are reported."""
    grid = grid or RankGrid.create(ONE)
    lines: list[str] = []
    return Checkpoints(folder, grid, every=1, report=lines.append, **options), Small(grid), lines


def save(checkpoints: Checkpoints, state: Small, *steps: int) -> None:
    for step in steps:
        state.fill(float(step))
        checkpoints.save(step, state.model, state.optimizer)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("planted", [False, True])
def test_what_is_saved_is_what_was_at_save(tmp_path: Path, planted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that change while they are written; planted: without copies, the changed ones are found in the file."""
    if planted:
        monkeypatch.setattr(Checkpoints, "_copies", lambda self, pieces: list(pieces))
    changed, write = threading.Event(), distributed.save_file

    def write_later(*args: Any, **options: Any) -> None:
        assert changed.wait(30)
        write(*args, **options)

    monkeypatch.setattr(distributed, "save_file", write_later)
    checkpoints, state, lines = make(tmp_path)
    for first in (1.0, 5.0):  # the second time, memory of the first is used again
        changed.clear()
        extra: dict[str, Any] = {"documents": [first]}
        state.fill(first)
        checkpoints.save(int(first), state.model, state.optimizer, extra)
        state.fill(first + 1)
        extra["documents"].append("changed")
        changed.set()
        checkpoints.wait()
        other = Small(RankGrid.create(ONE))
        loaded = checkpoints.load_latest(other.model, other.optimizer)
        assert loaded is not None
        assert loaded.extra == {"documents": [first]}
        assert (other.value() == first) is not planted
    assert not lines


def test_a_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, state, _ = make(tmp_path)
    waiting, write, wait = threading.Event(), distributed.save_file, checkpoints.wait
    seen = []

    def write_later(*args: Any, **options: Any) -> None:
        assert waiting.wait(30)  # until the next save, or the end, waits
        seen.append([name for name in names(tmp_path) if not name.startswith(".")])
        write(*args, **options)

    def say_and_wait() -> None:
        if checkpoints._thread is not None:
            waiting.set()
        wait()
        waiting.clear()

    monkeypatch.setattr(distributed, "save_file", write_later)
    monkeypatch.setattr(checkpoints, "wait", say_and_wait)
    save(checkpoints, state, 1, 2)
    checkpoints.wait()
    assert seen == [[], ["latest", "step-00000001"]]


def test_old_ones_go_after_new_ones_are_there(tmp_path: Path) -> None:
    checkpoints, state, lines = make(tmp_path, keep=3)
    save(checkpoints, state, 1, 2, 3, 4, 5)
    checkpoints.wait()
    assert names(tmp_path) == ["latest", "step-00000003", "step-00000004", "step-00000005"]
    assert (tmp_path / "latest").read_text() == "step-00000005\n"
    (tmp_path / "step-00000005" / "index.json").unlink()
    again, state, lines = make(tmp_path)
    assert again.load_latest(state.model, state.optimizer) is not None
    assert state.value() == 4.0
    assert len(lines) == 1
    save(again, state, 5)  # the refused one gives way, and is not counted
    again.wait()
    assert names(tmp_path) == ["latest", "step-00000004", "step-00000005"]
    verify_folder(tmp_path / "step-00000005")
    with pytest.raises(CheckpointError, match=r"step-00000005: not saved: on rank 0: .* remove it or choose another"):
        save(again, state, 5, 6)
    assert names(tmp_path) == ["latest", "step-00000004", "step-00000005"]


def test_refused_ones_do_not_count_as_kept(tmp_path: Path) -> None:
    checkpoints, state, _ = make(tmp_path, keep=3)
    save(checkpoints, state, 3, 4, 5)
    checkpoints.wait()
    for step in (4, 5):
        (tmp_path / f"step-0000000{step}" / "index.json").unlink()
    again, state, lines = make(tmp_path)
    assert again.load_latest(state.model, state.optimizer) is not None
    assert (state.value(), len(lines)) == (3.0, 2)
    kept = {4: [3, 4, 5], 6: [4, 5, 6], 7: [6, 7]}  # two that are good, and what is newer than the older of them
    for step, steps in kept.items():
        save(again, state, step)
        again.wait()
        assert names(tmp_path) == ["latest", *(f"step-0000000{each}" for each in steps)]


def test_none_and_none_intact(tmp_path: Path) -> None:
    checkpoints, state, lines = make(tmp_path / "new")
    assert checkpoints.load_latest(state.model, state.optimizer) is None
    save(checkpoints, state, 1, 2)
    checkpoints.wait()
    for path in (tmp_path / "new").glob("*/manifest.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint is intact: .*00002.*missing; .*00001.*missing"):
        checkpoints.load_latest(state.model, state.optimizer)
    assert len(lines) == 2


def test_what_a_crash_left_is_removed_at_the_start(tmp_path: Path) -> None:
    checkpoints, state, _ = make(tmp_path)
    save(checkpoints, state, 1)
    checkpoints.wait()
    (tmp_path / ".step-00000002.unpublished-ab" / "deep").mkdir(parents=True)
    (tmp_path / ".latest.ab").touch()
    (tmp_path / "notes.txt").touch()
    make(tmp_path)
    assert names(tmp_path) == ["latest", "notes.txt", "step-00000001"]


def test_arguments(tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [{"every": 0}, {"every": 1, "keep": 1}, {"every": True}]
    for options in wrong:
        with pytest.raises(ArgumentValueError, match=r"Checkpoints: (every|keep): got"):
            Checkpoints(tmp_path, RankGrid.create(ONE), **options)
    checkpoints = Checkpoints(tmp_path, RankGrid.create(ONE), every=3)
    assert [step for step in range(1, 10) if checkpoints.due(step)] == [3, 6, 9]
    state = Small(RankGrid.create(ONE))
    checkpoints.save(1, state.model, state.optimizer, {"a": (1, 2)})
    with pytest.raises(CheckpointError, match="accepted JSON that reads back"):
        checkpoints.wait()
    distributed.save(
        tmp_path / "step-00000007", RankGrid.create(ONE), step=7, pieces=pieces_of(state.model, state.optimizer)
    )
    with pytest.raises(CheckpointError, match="not of a training run"):
        checkpoints.load_latest(state.model, state.optimizer)


# --- several ranks that fail ----------------------------------------------------------------------------------------


def _no_space(*args: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _fail_on_rank_1(parent: str) -> None:
    sizes = GridSizes(tensor=2, data=2)
    grid = RankGrid.create(sizes)
    checkpoints, state, lines = make(Path(parent), grid)
    save(checkpoints, state, 1, 2)
    checkpoints.wait()
    for target, name in ((distributed, "save_file"), (checkpointing, "replace")):  # in the thread, and before it
        with pytest.MonkeyPatch.context() as patch:
            if grid.rank == 1:
                patch.setattr(target, name, _no_space)
            save(checkpoints, state, 3)
            with pytest.raises(CheckpointError, match=r"step-00000003: not saved: .*rank 1.*No space left"):
                checkpoints.wait()
        dist.barrier()  # rank 0 removes its folder after it has said that it fails
        assert names(Path(parent)) == ["latest", "step-00000001", "step-00000002"]
        dist.barrier()  # before rank 0 makes the next one
    save(checkpoints, state, 3)
    checkpoints.wait()
    dist.barrier()
    assert names(Path(parent)) == ["latest", "step-00000002", "step-00000003"]
    dist.barrier()
    if grid.rank == 0:
        (file,) = (Path(parent) / "step-00000003").glob("rank-00003-*")
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    dist.barrier()
    assert checkpoints.load_latest(state.model, state.optimizer) is not None
    assert state.value() == 2.0  # on every rank, though one alone has hashed the file
    assert len(lines) == (grid.rank == 0)
    assert all("rank-00003-00000.safetensors: altered" in line for line in lines)


def test_ranks_agree_on_what_failed(tmp_path: Path) -> None:
    run_ranks(4, _fail_on_rank_1, str(tmp_path))


def _die_in_the_background(parent: str) -> None:
    grid = RankGrid.create(GridSizes(data=2))
    checkpoints, state, _ = make(Path(parent), grid)
    save(checkpoints, state, 1)
    checkpoints.wait()
    if grid.rank == 1:
        distributed.save_file = lambda *args, **options: os._exit(1)
    save(checkpoints, state, 2)
    checkpoints.wait()


def test_a_rank_that_dies_in_the_background_is_noticed(tmp_path: Path) -> None:
    results, problems = run_failing_ranks(2, _die_in_the_background, str(tmp_path), timeout=60.0)
    assert not results
    assert problems[1] == DIED
    assert "step-00000002: not saved: on rank 0: " in problems[0]
    checkpoints, state, lines = make(tmp_path)
    assert names(tmp_path) == ["latest", "step-00000001"]
    assert checkpoints.load_latest(state.model, state.optimizer) is not None
    assert (state.value(), lines) == (1.0, [])
