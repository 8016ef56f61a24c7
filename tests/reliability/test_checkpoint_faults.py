"""A folder of checkpoints in which something is wrong: the last good one is loaded, one line names the bad one, and
nothing of it runs. The cases are generated; together they are more than a thousand."""

import builtins
import errno
import hashlib
import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from k25sys.checkpoint import distributed, store
from k25sys.errors import CheckpointError
from k25sys.parallel import RankGrid
from k25sys.training import checkpointing
from k25sys.training.checkpointing import Checkpoints
from tests.training.test_checkpointing import ONE, Small

Fault = tuple[str, Callable[[Path], Any]]
"""What it is, and how it is done to the newest checkpoint."""
STEPS = (2, 4, 6)
NEWEST = "step-00000006"
MANIFEST, INDEX = "manifest.json", "index.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of a few hundred numbers, in several files each."""
    folder = tmp_path_factory.mktemp("original") / "checkpoints"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing, "FILE_BYTES", 128)
        grid = RankGrid.create(ONE)
        checkpoints, state = Checkpoints(folder, grid, every=2, keep=3), Small(grid)
        for step in STEPS:
            state.fill(float(step))
            checkpoints.save(step, state.model, state.optimizer, {"step": step})
        checkpoints.wait()
    assert len(files_of(folder / NEWEST)) >= 5
    return folder


class Bench:
    """A copy of the folder that is damaged and mended again, and a state to load into."""

    def __init__(self, original: Path, parent: Path) -> None:
        self.original, self.folder = original, parent / "checkpoints"
        self.newest, self.marker = self.folder / NEWEST, parent / "something ran"
        self.grid = RankGrid.create(ONE)
        self.state = Small(self.grid)
        self.cases = 0
        self.mend()

    def mend(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.original, self.folder)

    def load(self) -> tuple[int | None, list[str]]:
        """The step that is loaded, of which every number must be, and the lines."""
        lines: list[str] = []
        self.state.fill(-1.0)
        checkpoints = Checkpoints(self.folder, self.grid, every=2, report=lines.append)
        loaded = checkpoints.load_latest(self.state.model, self.state.optimizer)
        assert not self.marker.exists()
        if loaded is not None:
            assert self.state.value() == loaded.step == loaded.extra["step"]
        return (None if loaded is None else loaded.step), lines

    def check(self, what: str, damage: Callable[[Path], Any]) -> None:
        """The newest is passed over with one line that names it."""
        damage(self.newest)
        step, lines = self.load()
        assert step == STEPS[-2], what
        assert len(lines) == 1, (what, lines)
        assert lines[0].startswith(f"{self.newest}: cannot be loaded: "), (what, lines)
        assert "\n" not in lines[0]
        self.cases += 1

    def run(self, faults: Iterator[Fault]) -> int:
        """All of them, each on a whole folder."""
        for what, damage in faults:
            self.check(what, damage)
            shutil.rmtree(
                self.newest
            ) if self.newest.is_dir() and not self.newest.is_symlink() else self.newest.unlink()
            shutil.copytree(self.original / NEWEST, self.newest)
        assert self.load() == (STEPS[-1], [])
        return self.cases


@pytest.fixture
def bench(original: Path, tmp_path: Path) -> Bench:
    return Bench(original, tmp_path)


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def change(name: str, new: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        changed = new(data)
        assert changed != data
        (folder / name).write_bytes(changed)

    return damage


def sign(folder: Path) -> None:
    """Makes the manifest agree with the folder, as somebody who wants it to be loaded would."""
    old = json.loads((folder / MANIFEST).read_text())
    files = {
        path.relative_to(folder).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size,
        }
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }  # fmt: skip
    contents = {**{key: value for key, value in old.items() if key != "manifest_sha256"}, "files": files}
    (folder / MANIFEST).write_bytes(store._manifest_text(contents))


# --- the kinds of faults --------------------------------------------------------------------------------------------


def flips(original: Path, count: int) -> Iterator[Fault]:
    """A bit, anywhere: every file in turn, every eighth of it in turn."""
    rng, names = random.Random(0), files_of(original / NEWEST)
    for i in range(count):
        name = names[i % len(names)]
        size = (original / NEWEST / name).stat().st_size
        eighth = i // len(names) % 8
        at, bit = rng.randrange(size * eighth // 8, size * (eighth + 1) // 8), rng.randrange(8)
        flip = lambda data, at=at, bit=bit: data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]  # noqa: E731
        yield f"bit {bit} of byte {at} of {name}", change(name, flip)


def lengths(original: Path) -> Iterator[Fault]:
    """Shorter, longer, of the same length but zeroed: what a crash of the machine makes of files."""
    for name in files_of(original / NEWEST):
        size = (original / NEWEST / name).stat().st_size
        for keep in (0, 1, 7, 8, 9, size // 3, size // 2, size - 8, size - 1):
            yield f"{keep} bytes of {name}", change(name, lambda data, keep=keep: data[:keep])
            yield (
                f"{name} zero from {keep}",
                change(name, lambda data, keep=keep: data[:keep] + bytes(len(data) - keep - 1) + b"\1"),
            )
        for more in (b"\0", b" ", b"\n", b"}", b"\0" * 512):
            yield f"{name} and {more[:4]!r}", change(name, lambda data, more=more: data + more)


def missing(original: Path) -> Iterator[Fault]:
    names = files_of(original / NEWEST)
    for name in names:
        yield f"without {name}", lambda folder, name=name: (folder / name).unlink()
        for other in names:
            if other > name:
                yield (
                    f"without {name}, {other}",
                    lambda folder, pair=(name, other): [(folder / n).unlink() for n in pair],
                )

    def instead(make: Callable[[Path], Any], folder: Path) -> None:
        shutil.rmtree(folder)
        make(folder)

    yield "an empty folder", partial(instead, Path.mkdir)
    yield "a file", partial(instead, Path.touch)
    for to in ("/nowhere", "/etc", "step-00000004", NEWEST, "."):
        yield f"a link to {to}", partial(instead, lambda path, to=to: path.symlink_to(to))


def swapped(original: Path) -> Iterator[Fault]:
    """Files of the right kind in the wrong place."""
    names = files_of(original / NEWEST)

    def swap(a: str, b: str, folder: Path) -> None:
        first, second = (folder / a).read_bytes(), (folder / b).read_bytes()
        (folder / a).write_bytes(second)
        (folder / b).write_bytes(first)

    def take(step: int, some: tuple[str, ...], folder: Path) -> None:
        for name in some:
            shutil.copy(folder.parent / f"step-{step:08d}" / name, folder / name)

    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            yield f"{a} and {b} swapped", partial(swap, a, b)
            for step in STEPS[:-1]:
                yield f"{a} and {b} of step {step}", partial(take, step, (a, b))
        for step in STEPS[:-1]:
            yield f"{a} of step {step}", partial(take, step, (a,))
    for step in STEPS[:-1]:
        yield f"all of step {step}", partial(take, step, tuple(names))
        numbers = tuple(name for name in names if name != MANIFEST)
        yield f"all of step {step}, signed", lambda f, s=step, n=numbers: (take(s, n, f), sign(f))


def foreign(original: Path) -> Iterator[Fault]:
    """What does not belong there, beside the files and instead of them."""
    inside = ["x", ".hidden", "rank-00000-00099.safetensors", "manifest.json.bak", "index.json~", "a/b/c", "new\nline"]
    for name in inside:
        for data in (b"", b"{}", (original / NEWEST / INDEX).read_bytes()):

            def add(folder: Path, name: str = name, data: bytes = data) -> None:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)

            yield f"{name!r} beside", add
    for name in files_of(original / NEWEST):

        def instead(folder: Path, make: Callable[[Path], Any], name: str = name) -> None:
            (folder / name).unlink()
            make(folder / name)

        makers: dict[str, Callable[[Path], Any]] = {
            "a folder": Path.mkdir,
            "a pipe": os.mkfifo,  # whoever opened it would wait without end
            "a link to nothing": lambda path: path.symlink_to("nothing"),
            "a link to itself": lambda path: path.symlink_to(path.name),
            "a link to another step's": lambda path: path.symlink_to(Path("..") / "step-00000004" / path.name),
            "a link to a device": lambda path: path.symlink_to("/dev/zero"),
            "a program": lambda path: path.write_text("#!/bin/sh\n"),
            "a tensor of somebody else": lambda path: distributed.save_file({"x": torch.ones(3)}, str(path)),
        }
        for kind, make in makers.items():
            yield f"{kind} for {name}", partial(instead, make=make)


def edited_manifests(original: Path) -> Iterator[Fault]:
    """By hand, without the sha256 that belongs to it; and what is no manifest at all."""
    text = (original / NEWEST / MANIFEST).read_text()
    contents = json.loads(text)
    for name in contents["files"]:
        for field, value in (("sha256", "0" * 64), ("bytes", 1), ("bytes", None), ("sha256", None), ("bytes", True)):
            edited = json.loads(text)
            edited["files"][name][field] = value
            yield f"{field} of {name} {value}", change(MANIFEST, lambda _, e=edited: json.dumps(e).encode())
        edited = json.loads(text)
        del edited["files"][name]
        yield f"{name} not named", change(MANIFEST, lambda _, e=edited: json.dumps(e).encode())
    for field, value in (("step", 7), ("step", None), ("step", "6"), ("manifest_sha256", ""), ("files", {}), ("a", 1)):
        edited = {**contents, field: value}
        yield f"{field} {value}", change(MANIFEST, lambda _, e=edited: json.dumps(e, sort_keys=True, indent=1).encode())
    for other in (text.replace("\n", "\r\n"), text.replace(" ", ""), json.dumps(contents), text.upper()):
        yield "written otherwise", change(MANIFEST, lambda _, other=other: other.encode())
    for data in (b"", b"null", b"[]", b"1", b'"x"', b"{", b"[" * 99_999, b"\xff\xfe", b'{"files": []}', b"9" * 9999):
        yield f"{data[:9]!r}", change(MANIFEST, lambda _, data=data: data)
    for name in ("../step-00000004/index.json", "/etc/hostname", "a//b", "./index.json", "..", "\0", ""):
        signed = {**contents, "files": {**contents["files"], name: {"sha256": "0" * 64, "bytes": 1}}}
        del signed["manifest_sha256"]
        yield f"names {name!r}", change(MANIFEST, lambda _, signed=signed: store._manifest_text(signed))


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def pickles(original: Path, marker: Path) -> Iterator[Fault]:
    """Code where tensors should be, in each of the forms in which loaders would run it; signed or not."""

    def zipped(path: Path) -> None:
        data = io.BytesIO()
        torch.save(Payload(marker), data)
        path.write_bytes(data.getvalue())

    def dumped(protocol: int, path: Path) -> None:
        path.write_bytes(pickle.dumps(Payload(marker), protocol))

    def replaced(name: str, write: Callable[[Path], Any], signed: bool, folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        write(folder / name)
        if signed:
            sign(folder)

    forms = {"zip": zipped, **{f"protocol {number}": partial(dumped, number) for number in (0, 2, 4, 5)}}
    for form, write in forms.items():
        for name in files_of(original / NEWEST):
            for signed in (False, True) if name not in (MANIFEST,) else (False,):
                yield f"{form} as {name}, signed {signed}", partial(replaced, name, write, signed)
        for name in (
            ".metadata",
            "__0_0.distcp",
            "model.pt",
            "data.pkl",
            "pytorch_model.bin",
            "state.ckpt",
            "x.pickle",
        ):
            yield f"{form} as {name}", partial(replaced, name, write, False)


def test_a_payload_would_run(tmp_path: Path) -> None:
    """The control: what the pickles of the next test are for."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_no_fault_is_loaded_or_run(bench: Bench, original: Path) -> None:
    total, cases = 0, {}
    kinds: dict[str, Iterator[Fault]] = {
        "flips": flips(original, 700), "lengths": lengths(original), "missing": missing(original),
        "swapped": swapped(original), "foreign": foreign(original), "manifests": edited_manifests(original),
        "pickles": pickles(original, bench.marker),
    }  # fmt: skip
    for kind, faults in kinds.items():
        before, total = total, bench.run(faults)
        cases[kind] = total - before
    print(f"{total} cases: {cases}")
    assert total >= 1000


def test_several_bad_ones_are_each_named(bench: Bench) -> None:
    (bench.newest / INDEX).unlink()
    (bench.folder / "step-00000004" / INDEX).write_text("{}")
    step, lines = bench.load()
    assert step == 2
    assert [NEWEST in lines[0], "step-00000004" in lines[1], len(lines)] == [True, True, 2]
    (bench.folder / "step-00000002" / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint is intact"):
        bench.load()


def test_latest_is_not_believed(bench: Bench) -> None:
    """Wherever it points, the newest intact checkpoint is loaded; a line says so when it points at none."""
    latest = bench.folder / "latest"
    wrong = ["../..", "/etc/passwd", "step-00000099", "", "\0\1", "step-00000006\nstep-00000004", "x" * 5000, "."]
    for text in wrong:
        latest.write_text(text)
        step, lines = bench.load()
        assert (step, len(lines), lines[0].startswith(f"{latest}: ")) == (6, 1, True), text
        assert len(lines[0]) < 600
    for make in (lambda: latest.symlink_to("/etc/passwd"), lambda: latest.symlink_to("."), latest.mkdir,
                 lambda: os.mkfifo(latest)):  # fmt: skip
        latest.rmdir() if latest.is_dir() and not latest.is_symlink() else latest.unlink()
        make()
        step, lines = bench.load()
        assert (step, len(lines), lines[0].startswith(f"{latest}: ")) == (6, 1, True)
    latest.unlink()
    assert bench.load() == (6, [])
    latest.symlink_to("step-00000006")
    assert bench.load() == (6, [])
    latest.unlink()
    latest.write_text("step-00000004\n")  # the crash between publishing and moving it
    assert bench.load() == (6, [])


def test_names_that_are_no_checkpoints_are_passed_over(bench: Bench) -> None:
    for name in ("step-6", "step-000000007", "step-00000008.bak", "step-0000000x", "Step-00000009", "step-00000009 "):
        shutil.copytree(bench.newest, bench.folder / name)
    shutil.copytree(bench.newest, bench.folder / ".step-00000010.unpublished-ab")
    assert bench.load() == (6, [])
    shutil.copytree(bench.newest, bench.folder / "step-00000008")  # renamed by hand
    step, lines = bench.load()
    assert step == 6
    assert len(lines) == 1
    assert "step-00000008: cannot be loaded" in lines[0]
    assert "of step 6, wanted 8" in lines[0]


def test_files_that_cannot_be_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk's own errors are those of one checkpoint, not of the run."""
    for name in files_of(bench.newest):
        for code in (errno.EIO, errno.EACCES, errno.ESTALE):

            def failing(path: Any, *args: Any, code: int = code, name: str = name, **options: Any) -> Any:
                if Path(path) == bench.newest / name:
                    raise OSError(code, os.strerror(code), str(path))
                return builtins.open(path, *args, **options)

            with monkeypatch.context() as patch:
                patch.setattr(store, "open", failing, raising=False)
                patch.setattr(Path, "read_bytes", lambda self, failing=failing: failing(self, "rb").read())
                bench.check(f"{name}: {os.strerror(code)}", lambda folder: None)


def test_signed_nonsense_is_refused_or_harmless(bench: Bench) -> None:
    """Indices that a program has garbled and signed: another error than a checkpoint's would end the run."""
    rng = random.Random(1)
    text = (bench.newest / INDEX).read_text()
    values = [None, -1, 0, 1, 10**30, 1.5, float("inf"), "", "x", [], [[0, 1]], {}, True, [1, 2], {"file": "x"}]

    def places(value: Any) -> Iterator[tuple[Any, Any]]:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            yield value, key
            yield from places(value[key])

    refused = 0
    for _ in range(300):
        index = json.loads(text)
        holder, key = rng.choice(list(places(index)))
        if rng.random() < 0.2:
            del holder[key]
        else:
            holder[key] = rng.choice(values)
        (bench.newest / INDEX).write_text(json.dumps(index))
        sign(bench.newest)
        try:
            _, lines = bench.load()
        except AssertionError:  # numbers, or a caller's values, that are others than were saved: as signed
            continue
        refused += len(lines) == 1
    assert refused > 250


# --- saving ---------------------------------------------------------------------------------------------------------


class Disk:
    """Fails at one operation that writes: before it, or in its middle."""

    def __init__(self, patch: pytest.MonkeyPatch, fail_at: int, code: int) -> None:
        self.count, self.fail_at, self.code = 0, fail_at, code
        for target, name in (
            (Path, "mkdir"), (Path, "write_text"), (Path, "write_bytes"), (os, "rename"), (os, "fsync"),
            (distributed, "save_file"),
        ):  # fmt: skip
            patch.setattr(target, name, self._failing(getattr(target, name), name))

    def _failing(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            self.count += 1
            if self.count - 1 == self.fail_at:
                if name in ("write_text", "write_bytes"):
                    real(args[0], args[1][: len(args[1]) // 2])
                elif name == "save_file":
                    Path(args[1]).touch()
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **options)

        return run


@pytest.mark.parametrize(
    ("code", "asynchronous"),
    [(errno.ENOSPC, True), (errno.ENOSPC, False), (errno.EROFS, True), (errno.EIO, True)],
)
def test_a_disk_that_fails_at_any_write(
    bench: Bench, code: int, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is raised with its cause, what was published stays, and the next save succeeds."""
    monkeypatch.setattr(checkpointing, "FILE_BYTES", 128)
    fail_at, failed = 0, True
    while failed:
        bench.mend()
        lines: list[str] = []
        checkpoints = Checkpoints(bench.folder, bench.grid, every=2, asynchronous=asynchronous, report=lines.append)
        loaded = checkpoints.load_latest(bench.state.model, bench.state.optimizer)
        assert loaded is not None
        bench.state.fill(8.0)
        with monkeypatch.context() as patch:
            disk = Disk(patch, fail_at, code)
            problem = None
            try:
                checkpoints.save(8, bench.state.model, bench.state.optimizer, {"step": 8})
                checkpoints.wait()
            except CheckpointError as error:
                problem = str(error)
            failed = disk.count > fail_at
        assert problem is None or f"step-00000008: not saved: on rank 0: OSError: [Errno {code}]" in problem
        assert failed == (problem is not None or len(lines) == 1)  # an old one that cannot be removed is a line
        left = files_of(bench.folder)
        published = "step-00000008" in left  # and `latest` was not moved, or an older one not removed
        assert [name for name in left if name.startswith(".")] == []
        assert {"step-00000004", "step-00000006"} <= set(left) or published
        assert bench.load() == (8 if published else 6, [])
        bench.state.fill(10.0)
        checkpoints.save(10, bench.state.model, bench.state.optimizer, {"step": 10})
        checkpoints.wait()
        assert bench.load() == (10, [])
        fail_at += 1
    assert fail_at > 20


def test_loading_writes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a read-only folder, leftovers of a crash in it."""
    (bench.folder / ".step-00000008.unpublished-ab").mkdir()

    def read_only(*args: Any, **options: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("rmdir", "unlink", "remove", "rename", "mkdir"):
        monkeypatch.setattr(os, name, read_only)
    assert bench.load() == (6, [])
