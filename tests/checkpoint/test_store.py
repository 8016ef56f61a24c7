"""Publishing: whole or not at all, and every changed bit is found."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from k25sys.checkpoint import publish, read_manifest, verify_manifest
from k25sys.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = random.Random(0)
    with publish(tmp_path / "step-7", step=7, config_sha256="abc") as temporary:
        (temporary / "weights.safetensors").write_bytes(rng.randbytes(3000))
        (temporary / "empty").touch()
        (temporary / "ranks").mkdir()
        (temporary / "ranks" / "0.safetensors").write_bytes(rng.randbytes(500))
    return tmp_path / "step-7"


def test_manifest_names_every_file(folder: Path) -> None:
    manifest = verify_manifest(folder)
    assert manifest["step"] == 7
    assert manifest["config_sha256"] == "abc"
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        "weights.safetensors": 3000, "empty": 0, "ranks/0.safetensors": 500,
    }  # fmt: skip
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step-7"]


def test_every_flipped_bit_is_found_and_its_file_named(folder: Path) -> None:
    rng = random.Random(1)
    paths = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    for _ in range(600):
        path = rng.choice(paths)
        data = path.read_bytes()
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=path.name):
            verify_manifest(folder)
        path.write_bytes(data)
    verify_manifest(folder)


def test_every_byte_of_the_manifest_counts(folder: Path) -> None:
    path = folder / "manifest.json"
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            read_manifest(folder)
        path.write_bytes(data[:i])
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            read_manifest(folder)


def test_missing_extra_swapped_and_truncated_files_are_named(folder: Path) -> None:
    weights, other = folder / "weights.safetensors", folder / "ranks" / "0.safetensors"
    data, other_data = weights.read_bytes(), other.read_bytes()
    (folder / "stray.txt").touch()
    with pytest.raises(CheckpointError, match=r"stray\.txt: extra"):
        verify_manifest(folder)
    (folder / "stray.txt").unlink()
    weights.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: 2999 bytes, written were 3000"):
        verify_manifest(folder)
    weights.write_bytes(other_data)
    other.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"ranks/0\.safetensors: .*weights\.safetensors: "):
        verify_manifest(folder)
    other.unlink()
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"0\.safetensors: missing; .*weights\.safetensors: missing"):
        verify_manifest(folder)


def test_what_is_no_regular_file_is_refused_without_reading_it(folder: Path) -> None:
    (folder / "empty").unlink()
    os.mkfifo(folder / "empty")  # reading it would wait for ever
    with pytest.raises(CheckpointError, match="empty: not a regular file"):
        verify_manifest(folder)
    shutil.rmtree(folder / "ranks")
    (folder / "ranks").symlink_to(folder)
    with pytest.raises(CheckpointError, match="ranks: extra"):
        verify_manifest(folder)


@pytest.mark.parametrize("name", ["/etc/hostname", "../other", "a/../b", "a//b"])
def test_a_manifest_stays_inside_its_folder(tmp_path: Path, name: str) -> None:
    contents = {"step": None, "files": {name: {"sha256": "", "bytes": 0}}}
    digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    text = json.dumps({**contents, "manifest_sha256": digest}, sort_keys=True, indent=1) + "\n"
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="accepted paths inside"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "7", "{}", '{"files": 3}', "[" * 100_000, '{"files": {"a": 1}}'])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="altered"):
        read_manifest(tmp_path)
    with pytest.raises(CheckpointError, match="missing"):
        read_manifest(tmp_path / "nowhere")


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> None:
        with publish(tmp_path / "new") as temporary:
            (temporary / "file").write_text("half")
            assert not (tmp_path / "new").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_overwritten(folder: Path) -> None:
    before = json.loads((folder / "manifest.json").read_text())
    with pytest.raises(CheckpointError, match="remove it or choose another"), publish(folder):
        pass
    assert verify_manifest(folder) == before
    (folder.parent / "empty").mkdir()
    with publish(folder.parent / "empty") as temporary:
        (temporary / "file").touch()
    verify_manifest(folder.parent / "empty")
