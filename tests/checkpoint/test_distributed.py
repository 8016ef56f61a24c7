"""Saved under one grid of ranks and loaded under any other: the same bits, or an error with a file's name."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from k25sys.checkpoint import distributed, store, verify_folder
from k25sys.checkpoint.distributed import Piece
from k25sys.checkpoint.reshard import Part, assign_writers, boxes_of_range, copies
from k25sys.errors import ArgumentTypeError, ArgumentValueError, CheckpointError, LayoutError, ShapeError
from k25sys.parallel import GridSizes, ParameterLayout, RankGrid
from tests.checkpoint.peak_memory import status
from tests.checkpoint.ranks_in_one_process import LAYOUTS, Model, load, same_bits, save
from tests.parallel.processes import DIED, run_failing_ranks, run_ranks

ONE = GridSizes()


@st.composite
def grids(draw: st.DrawFn) -> GridSizes:
    """Up to 16 ranks whose axes divide the tensors of LAYOUTS."""
    count = st.sampled_from([1, 2, 3, 4])
    pipeline, data, context, tensor = (draw(count) for _ in range(4))
    while pipeline * data * context * tensor > 16:
        pipeline, data, context = (max(1, n // 2) for n in (pipeline, data, context))
    ranks = data * context * tensor
    experts = draw(st.sampled_from([n for n in range(1, 13) if ranks % n == 0 and 12 % n == 0]))
    expert = draw(st.sampled_from([n for n in range(1, experts + 1) if experts % n == 0]))
    return GridSizes(
        pipeline=pipeline, data=data, context=context, tensor=tensor, expert=expert, expert_tensor=experts // expert
    )


@settings(max_examples=40, deadline=None)
@given(grids(), grids(), st.integers(1, 2), st.integers(-9, 9), st.integers(-9, 9), st.sampled_from([700, 1 << 20]))
def test_any_grid_reads_what_any_other_wrote(
    before: GridSizes, after: GridSizes, num_layers: int, cut: int, other_cut: int, file_bytes: int
) -> None:
    model = Model(num_layers)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "step-3"
        extra = {"seen": [1, 2.5, None], "name": "\u00e9"}
        save(
            folder, before, lambda rank: model.pieces(before, rank, filled=True, cut=cut), extra=extra,
            file_bytes=file_bytes,
        )  # fmt: skip
        assert (Path(parent) / "latest").read_text() == "step-3\n"
        assert sorted(path.name for path in Path(parent).iterdir()) == ["latest", "step-3"]
        assert verify_folder(folder).startswith(f"{len(list(folder.iterdir())) - 1} files")
        filled = [model.pieces(after, rank, filled=False, cut=other_cut) for rank in range(after.world_size)]
        for loaded in load(folder, after, lambda rank: filled[rank]):
            assert (loaded.step, loaded.extra, loaded.sizes) == (3, extra, before)
        for rank, pieces in enumerate(filled):
            assert same_bits(pieces, model.pieces(after, rank, filled=True, cut=other_cut)), rank


@given(st.lists(st.integers(1, 4), max_size=4), st.data())
def test_a_range_is_few_contiguous_boxes(shape: list[int], data: st.DataObject) -> None:
    size = prod(shape)
    begin = data.draw(st.integers(0, size))
    end = data.draw(st.integers(begin, size))
    numbers = torch.arange(size).view(shape)
    boxes = list(boxes_of_range(tuple(shape), begin, end))
    found = [numbers[tuple(slice(*bounds) for bounds in box)].reshape(-1) for box in boxes]
    assert torch.equal(torch.cat([numbers.new_empty(0), *found]), torch.arange(begin, end))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_copies_take_what_two_parts_share(shape: list[int], data: st.DataObject) -> None:
    numbers = torch.arange(prod(shape)).view(shape)

    def part() -> tuple[Part, torch.Tensor]:
        firsts = [data.draw(st.integers(0, n - 1)) for n in shape]
        box = tuple((first, data.draw(st.integers(first + 1, n))) for first, n in zip(firsts, shape, strict=True))
        whole = numbers[tuple(slice(*bounds) for bounds in box)].reshape(-1)
        begin = data.draw(st.integers(0, len(whole)))
        end = data.draw(st.integers(begin, len(whole)))
        described = Part(name="p", key="k", dtype="I64", shape=tuple(shape), box=box, begin=begin, end=end)
        return described, whole[begin:end]

    (source, held), (target, wanted) = part(), part()
    filled = torch.full_like(wanted, -1)
    for copy in copies(source, target):
        copy.run(held, filled)
    assert torch.equal(filled, torch.where(torch.isin(wanted, held), wanted, -1))


def test_copies_are_written_once_and_in_equal_shares(tmp_path: Path) -> None:
    sizes = GridSizes(data=4, tensor=2, expert=2, expert_tensor=2)
    model = Model(6)
    save(tmp_path / "a", sizes, lambda rank: model.pieces(sizes, rank, filled=True), file_bytes=512)
    held = sum(model.whole(f"{i}.{kind}", "parameter").nbytes * 3 for i in range(6) for kind in LAYOUTS)
    held += sum(4 * prod(layout.shape) for layout in LAYOUTS.values() if layout.matrix) * 6
    index = json.loads((tmp_path / "a" / "index.json").read_text())
    written = {rank: 0 for rank in range(8)}
    for tensor in index["tensors"]:
        for part in tensor["parts"]:
            size = (part["end"] - part["begin"]) * (2 if tensor["dtype"] == "BF16" else 4)
            written[int(part["file"].split("-")[1])] += size
    assert sum(written.values()) == held
    assert max(written.values()) < 1.05 * held / 8
    files = json.loads((tmp_path / "a" / "manifest.json").read_text())["files"]
    assert all(entry["bytes"] < 512 + 4096 for name, entry in files.items() if name.endswith(".safetensors"))


def test_writers_are_chosen_among_the_holders() -> None:
    assert assign_writers([[(1, 10), (2, 4)], [(2, 4), (3, 1)], [(3, 1)]]) == {1: 0, 2: 1, 3: 2}
    assert assign_writers([[(1, 0), (2, 0)], [(1, 0), (2, 0)]]) == {1: 0, 2: 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sizes, model = GridSizes(pipeline=2, data=2, expert=2), Model(2)
    save(tmp_path / "step-3", sizes, lambda rank: model.pieces(sizes, rank, filled=True))
    return tmp_path / "step-3"


def _refused(folder: Path, match: str, sizes: GridSizes = ONE) -> None:
    """Loading says what is wrong, and nothing was filled."""
    model = Model(2)
    pieces = [model.pieces(sizes, rank, filled=False) for rank in range(sizes.world_size)]
    with pytest.raises(CheckpointError, match=match):
        load(folder, sizes, lambda rank: pieces[rank])
    for rank, untouched in enumerate(pieces):
        assert same_bits(untouched, model.pieces(sizes, rank, filled=False))


@pytest.mark.parametrize("sizes", [ONE, GridSizes(data=3)])
def test_every_flipped_bit_is_found_and_its_file_named(folder: Path, sizes: GridSizes) -> None:
    rng = random.Random(1)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for _ in range(8):
            changed = bytearray(data)
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            _refused(folder, path.name, sizes)
            with pytest.raises(CheckpointError, match=path.name):
                verify_folder(folder)
        path.write_bytes(data)
    load(folder, ONE, lambda rank: Model(2).pieces(ONE, rank, filled=False))


def test_missing_extra_truncated_and_foreign_files_are_named(folder: Path, tmp_path: Path) -> None:
    sizes = GridSizes(data=2)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(names) == 4
    path = folder / names[0]
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    _refused(folder, rf"{path.name}: {len(data) - 1} bytes, written were {len(data)}", sizes)
    path.unlink()
    _refused(folder, f"{path.name}: missing", sizes)
    path.symlink_to(folder / names[1])
    _refused(folder, f"{path.name}: ", sizes)
    path.unlink()
    path.write_bytes(data)
    (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    _refused(folder, r"\.metadata: extra", sizes)
    (folder / ".metadata").unlink()
    other = Model(2, seed=1)
    grid = GridSizes(pipeline=2, data=2, expert=2)
    save(tmp_path / "other", grid, lambda rank: other.pieces(grid, rank, filled=True))
    assert (tmp_path / "other" / names[0]).stat().st_size == len(data)
    shutil.copyfile(tmp_path / "other" / names[0], path)
    _refused(folder, f"{path.name}: altered", sizes)
    _refused(tmp_path / "nowhere", r"manifest\.json: missing", sizes)
    with store.publish(tmp_path / "hf") as temporary:
        (temporary / "model.safetensors").write_bytes(data)
    _refused(tmp_path / "hf", r"index\.json: missing: not a checkpoint that ranks wrote together", sizes)


def _replace_index(folder: Path, **fields: Any) -> None:
    """As someone would who writes a manifest too."""
    index = {**json.loads((folder / "index.json").read_text()), **fields}
    (folder / "index.json").write_text(json.dumps(index))
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / "index.json").read_bytes()
    manifest["files"]["index.json"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest.pop("manifest_sha256")
    (folder / "manifest.json").write_bytes(store._manifest_text(manifest))


def test_an_index_that_does_not_fit_is_refused(folder: Path) -> None:
    _replace_index(folder, format="torch distributed checkpoint")
    _refused(folder, r"index\.json: format: got 'torch distributed checkpoint', accepted 'k25sys distributed")
    for broken in ({"tensors": 3}, {"tensors": [{}]}, {"sizes": {"pipeline": 0}}, {"sizes": None}, {"step": "x"}):
        original = (folder / "index.json").read_text()
        _replace_index(folder, format=distributed.FORMAT, **broken)
        _refused(folder, r"index\.json: not the index of a checkpoint")
        _replace_index(folder, **json.loads(original))
    tensors = json.loads((folder / "index.json").read_text())["tensors"]
    tensors[0]["parts"][0]["file"] = "../../elsewhere.safetensors"
    _replace_index(folder, format=distributed.FORMAT, tensors=tensors)
    _refused(folder, r"elsewhere\.safetensors, which is not in the manifest")


def test_what_is_wanted_must_be_there_and_what_is_there_wanted(folder: Path) -> None:
    tensor = torch.zeros(24, 5)
    layout = LAYOUTS["embed"]
    for wanted, match in (
        ({"name": "9.embed"}, r"index\.json: parameter of 9\.embed: missing"),
        ({"key": "exp_avg"}, r"index\.json: exp_avg of 0\.embed: missing"),
        ({"tensor": tensor}, r"parameter of 0\.embed: dtype is BF16, wanted F32"),
        ({"layout": ParameterLayout(shape=(5, 24))}, r"embed: shape is \(24, 5\), wanted \(5, 24\)"),
        ({}, r"index\.json: 13 tensors that no rank wants: parameter of 0\.down"),
    ):
        piece: dict[str, Any] = {"name": "0.embed", "key": "parameter", "layout": layout, "tensor": tensor.bfloat16()}
        with pytest.raises(CheckpointError, match=match):
            load(folder, ONE, lambda rank, piece=piece, wanted=wanted: [Piece(**{**piece, **wanted})])
    # Of a key that nobody wants, nothing need be wanted.
    parameters = [p for p in Model(2).pieces(ONE, 0, filled=False) if p.key == "parameter"]
    load(folder, ONE, lambda rank: parameters)
    assert same_bits(parameters, [p for p in Model(2).pieces(ONE, 0, filled=True) if p.key == "parameter"])


def _piece(**fields: Any) -> Piece:
    whole = {"name": "w", "key": "parameter", "layout": ParameterLayout(shape=(4, 6)), "tensor": torch.zeros(4, 6)}
    return Piece(**{**whole, **fields})


@pytest.mark.parametrize(
    ("piece", "error", "match"),
    [
        (_piece(tensor=torch.zeros(4, 5)), ShapeError, "parameter of w: got 20 elements, accepted 24"),
        (_piece(tensor=torch.zeros(6, 4).T), LayoutError, "strides"),
        (
            _piece(tensor=torch.zeros(3), begin=22, end=25),
            ArgumentValueError,
            r"got \[22, 25\), accepted a range of",
        ),
        (_piece(tensor=torch.zeros(4, 6, dtype=torch.complex64)), TypeError, "got torch.complex64, accepted torch.b"),
        (_piece(tensor=[0.0]), ArgumentTypeError, "got list, accepted a torch.Tensor"),
        (_piece(layout=ParameterLayout(shape=(0, 6)), tensor=torch.zeros(0, 6)), ShapeError, "at least one element"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(tmp_path: Path, piece: Piece, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        save(tmp_path / "a", ONE, lambda rank: [piece])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"extra": {"a": (1, 2)}}, ArgumentTypeError, "accepted JSON that reads back as it was; keys must be texts"),
        ({"extra": {"a": float("nan")}}, ArgumentTypeError, "save: extra: got Out of range float values"),
        ({"extra": {"a": torch.zeros(1)}}, ArgumentTypeError, "accepted JSON: dicts with texts as keys"),
        ({"extra": [1]}, ArgumentTypeError, "save: extra: got list, accepted a dict"),
        ({"step": -1}, ArgumentValueError, "save: step: got -1, accepted an int >= 0"),
        ({"step": True}, ArgumentValueError, "save: step: got True"),
        ({"file_bytes": 1}, ArgumentValueError, "save: file_bytes: got 1, accepted an int >= 64"),
    ],
)
def test_arguments_are_checked(tmp_path: Path, options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        save(tmp_path / "a", ONE, lambda rank: [_piece()], **options)
    assert list(tmp_path.iterdir()) == []


def test_parts_that_no_rank_or_two_ranks_hold_are_refused(tmp_path: Path) -> None:
    two = GridSizes(data=2)
    split = ParameterLayout(shape=(4, 6), splits=((0, "data"),))
    cases = [
        (lambda rank: [_piece(tensor=torch.zeros(10), begin=10 * rank, end=10 * rank + 10)], "20 to 24 .* by no rank"),
        (lambda rank: [_piece(tensor=torch.zeros(14), begin=10 * rank, end=10 * rank + 14)], "10 to 14 .* held twice"),
        (lambda rank: [_piece(tensor=torch.zeros(10), begin=14 * rank, end=14 * rank + 10)], "10 to 14 .* by no rank"),
        (lambda rank: [_piece(layout=split, tensor=torch.zeros(2, 6))][rank:], "12 of 24 elements are held"),
        (lambda rank: [[_piece(layout=split, tensor=torch.zeros(2, 6))], [_piece()]][rank], "overlap"),
        (lambda rank: [_piece(tensor=torch.zeros(4, 6, dtype=[torch.float, torch.half][rank]))], "dtype is F16 on"),
    ]  # fmt: skip
    for pieces, match in cases:
        with pytest.raises(CheckpointError, match=rf"step-3: parameter of w: .*{match}"):
            save(tmp_path / "step-3", two, pieces)
    with pytest.raises(ArgumentValueError, match=r"parameter/w\[0:24\] twice"):
        save(tmp_path / "step-3", two, lambda rank: [_piece(), _piece()])
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_overwritten_and_what_was_left_is_removed(folder: Path) -> None:
    before = store.verify_manifest(folder)
    with pytest.raises(CheckpointError, match="remove it or choose another"):
        save(folder, ONE, lambda rank: [_piece()])
    assert store.verify_manifest(folder) == before
    left = folder.parent / ".step-4.unpublished-dead"
    left.mkdir()
    (left / "rank-00000-00000.safetensors").write_bytes(b"half")
    save(folder.parent / "step-4", ONE, lambda rank: [_piece()], step=4)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["latest", "step-3", "step-4"]
    assert (folder.parent / "latest").read_text() == "step-4\n"


GRIDS = [
    GridSizes(tensor=2, data=2, expert=4),
    GridSizes(pipeline=2, context=2, expert=2),
    GridSizes(data=4, expert=2, expert_tensor=2),
    GridSizes(pipeline=4),
]


def _disk_is_full(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _save_and_load(parent: str) -> int:
    """Between processes: each grid reads what the one before wrote; a failing rank, ranks that disagree."""
    model, loads = Model(3), 0
    for i, sizes in enumerate(GRIDS):
        grid = RankGrid.create(sizes)
        if i:
            pieces = model.pieces(sizes, grid.rank, filled=False, cut=-i)
            loaded = distributed.load(Path(parent) / f"step-{i - 1}", grid, pieces)
            assert (loaded.step, loaded.sizes, loaded.extra) == (i - 1, GRIDS[i - 1], {"loader": [i - 1]})
            assert same_bits(pieces, model.pieces(sizes, grid.rank, filled=True, cut=-i))
            loads += 1
        pieces = model.pieces(sizes, grid.rank, filled=True, cut=i)
        distributed.save(Path(parent) / f"step-{i}", grid, step=i, pieces=pieces, extra={"loader": [i]})
    grid = RankGrid.create(GRIDS[0])
    pieces = model.pieces(GRIDS[0], grid.rank, filled=True)
    names = sorted(os.listdir(parent))
    dist.barrier()  # before rank 0 makes a folder again

    def iterate() -> Any:
        yield from pieces[:3]
        if grid.rank == 2:
            raise OSError("no memory left")
        yield from pieces[3:]

    with pytest.raises(OSError if grid.rank == 2 else CheckpointError, match="no memory left") as error:
        distributed.save(Path(parent) / "step-9", grid, step=9, pieces=iterate())
    assert grid.rank == 2 or str(error.value) == "rank 2 failed: OSError: no memory left"
    with pytest.raises(CheckpointError, match=r"rank 3 saves .*step.: 3.*, rank 0 .*step.: 9"):
        distributed.save(Path(parent) / "step-9", grid, step=9 if grid.rank < 3 else 3, pieces=pieces)
    with pytest.raises(CheckpointError, match="remove it or choose another"):
        distributed.save(Path(parent) / "step-1", grid, step=9, pieces=pieces)
    with pytest.MonkeyPatch.context() as patch:
        if grid.rank == 1:
            patch.setattr(distributed, "save_file", _disk_is_full)
        with pytest.raises(OSError if grid.rank == 1 else CheckpointError, match="No space left on device"):
            distributed.save(Path(parent) / "step-9", grid, step=9, pieces=pieces)
    dist.barrier()  # rank 0 removes its folder after it has said that it fails
    assert sorted(os.listdir(parent)) == names
    return loads


def test_between_processes(tmp_path: Path) -> None:
    assert run_ranks(4, _save_and_load, str(tmp_path)) == [3] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-0", "step-1", "step-2", "step-3"]
    assert (tmp_path / "latest").read_text() == "step-3\n"
    pieces = Model(3).pieces(ONE, 0, filled=False)
    distributed.load(tmp_path / "step-3", RankGrid.create(ONE), pieces)
    assert same_bits(pieces, Model(3).pieces(ONE, 0, filled=True))


def _rise_of_memory(parent: str) -> tuple[int, int]:
    """Of saving and of loading 64 MiB in files of 4 MiB, mapped files included."""
    grid, tensor = RankGrid.create(ONE), torch.ones(4096, 4096)
    rises = []
    for name, size in (("warm", 64), ("large", 4096)):
        piece = Piece(name="w", key="master", layout=ParameterLayout(shape=(size, 4096)), tensor=tensor[:size])
        for run in (
            lambda name=name, piece=piece: distributed.save(
                Path(parent) / name, grid, step=0, pieces=[piece], file_bytes=1 << 22
            ),
            lambda name=name, piece=piece: distributed.load(Path(parent) / name, grid, [piece]),
        ):
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            before = status("VmRSS")
            run()
            rises.append(status("VmHWM") - before)
    return rises[2], rises[3]


def test_memory_is_bounded_by_a_file(tmp_path: Path) -> None:
    ((saving, loading),) = run_ranks(1, _rise_of_memory, str(tmp_path))
    assert saving < 12 << 20
    assert loading < 12 << 20


def _die_while_saving(parent: str, victim: int) -> None:
    grid = RankGrid.create(GRIDS[0])

    def pieces() -> Any:
        yield from Model(3).pieces(GRIDS[0], grid.rank, filled=True)
        if grid.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    distributed.save(Path(parent) / "step-0", grid, step=0, pieces=pieces())


@pytest.mark.parametrize("victim", [0, 3])
def test_a_rank_that_is_killed_publishes_nothing(tmp_path: Path, victim: int) -> None:
    results, problems = run_failing_ranks(4, _die_while_saving, str(tmp_path), victim, timeout=60.0)
    assert not results
    assert problems.pop(victim) == DIED
    for problem in problems.values():  # a rank that raised leaves, and so the next one learns of it
        assert "Connection closed by peer" in problem or "Connection reset by peer" in problem
    assert not any(not path.name.startswith(".") for path in tmp_path.iterdir())
