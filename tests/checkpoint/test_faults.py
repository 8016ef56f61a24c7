"""Damaged folders through the command line and the loader: one clear line that names the file, whatever was damaged."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k25sys.__main__ import main
from k25sys.checkpoint import convert, load_hf, save_hf, verify_folder
from k25sys.errors import ArgumentValueError, CheckpointError
from k25sys.models.kimi_k25 import KimiK25
from tests.checkpoint.folders import INDEX, random_tensors, read_folder, small_config, write_folder
from tests.checkpoint.peak_memory import SHARD_BYTES

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process: exit status, stdout, stderr."""

    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["k25sys", *map(str, words)])
        try:
            status = main()
        except SystemExit as stopped:  # argparse
            status = int(str(stopped.code))
        out, err = capsys.readouterr()
        return status, out, err

    return command


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_hf(KimiK25(small_config()), tmp_path / "saved", experts="int4", max_shard_bytes=200_000)
    return tmp_path / "saved"


@pytest.fixture
def downloaded(tmp_path: Path) -> Path:
    config = small_config()
    return write_folder(tmp_path / "downloaded", config, random_tensors(config))


def test_every_flipped_bit_of_a_saved_folder_is_found(saved: Path, run: Run) -> None:
    rng = random.Random(0)
    paths = sorted(saved.iterdir())
    assert {"config.json", "manifest.json", INDEX} < {path.name for path in paths}
    for i in range(400):
        path = paths[i % len(paths)]
        data = path.read_bytes()
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        status, out, err = run("verify", saved)
        assert (status, out) == (1, ""), path
        assert path.name in err
        assert err.count("\n") == 1
        path.write_bytes(data)
    assert run("verify", saved)[0] == 0


def test_a_damaged_folder_is_not_loaded(saved: Path) -> None:
    model = KimiK25(small_config())
    path = sorted(saved.glob("*.safetensors"))[1]
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 4]) + data[-8:])
    with pytest.raises(CheckpointError, match=path.name):
        load_hf(model, saved)
    with pytest.raises(CheckpointError, match=path.name):
        convert(saved, saved.parent / "new", layout="released", experts="bf16")
    load_hf(model, saved, verify=False)  # at one's own risk


def test_files_added_to_a_saved_folder_do_not_hinder_loading(saved: Path, run: Run) -> None:
    """A tokenizer, a README, what git and downloads leave; `verify` still names each."""
    added = ("tiktoken.model", ".gitattributes", "README.md", "figures/logo.svg")
    (saved / "figures").mkdir()
    for name in added:
        (saved / name).write_text(name)
    model = KimiK25(small_config())
    load_hf(model, saved)
    assert model.int4_origin is not None
    new = saved.parent / "new"
    convert(saved, new, layout="released", experts="int4")
    for name in added:
        assert (new / name).read_text() == name
    assert run("verify", new)[0] == 0
    for name in added:
        status, _, err = run("verify", saved)
        assert (status, f"{saved / name}: extra" in err) == (1, True)
        (saved / name).unlink()
    assert run("verify", saved)[0] == 0


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00002-of-00003.safetensors"])
def test_what_is_read_must_be_as_it_was_written(saved: Path, name: str) -> None:
    text = (saved / name).read_bytes()
    model = KimiK25(small_config())

    def refused(error: str) -> None:
        for read in (load_hf, lambda *_: convert(saved, saved.parent / "new", layout="released", experts="bf16")):
            with pytest.raises(CheckpointError, match=error):
                read(model, saved)

    (saved / name).write_bytes(text + b" ")
    refused(rf"{name}: {len(text) + 1} bytes, written were {len(text)}")
    (saved / name).write_bytes(text[:-1] + b" ")
    refused(f"{name}: altered")
    (saved / name).unlink()
    refused(f"{name}: missing")
    (saved / name).write_bytes(text)
    (saved / "model-00004.safetensors").write_bytes(text)
    refused("model-00004.safetensors: extra")


def test_other_files_may_change_but_are_not_copied_then(tmp_path: Path) -> None:
    (tmp_path / "tiktoken.model").write_text("YQ== 0")
    model, saved = KimiK25(small_config()), tmp_path / "saved"
    save_hf(model, saved, others=[tmp_path / "tiktoken.model"])
    verify_folder(saved)
    assert (saved / "tiktoken.model").read_text() == "YQ== 0"
    (saved / "tiktoken.model").write_text("YQ== 1")
    load_hf(model, saved)
    with pytest.raises(CheckpointError, match=r"tiktoken\.model: altered"):
        convert(saved, tmp_path / "new", layout="released", experts="bf16")
    with pytest.raises(CheckpointError, match=r"tiktoken\.model: altered"):
        verify_folder(saved)


def test_other_files_that_cannot_be_put_beside_are_refused(tmp_path: Path) -> None:
    model = KimiK25(small_config())
    for name in ("config.json", INDEX, "manifest.json", "model-00001-of-00001.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(ArgumentValueError, match=f"others: got '{name}', accepted names that differ"):
            save_hf(model, tmp_path / "new", others=[tmp_path / name])
    (tmp_path / "a").mkdir()
    for path in ("a/README", "README"):
        (tmp_path / path).touch()
    with pytest.raises(ArgumentValueError, match="others: got 'README'"):
        save_hf(model, tmp_path / "new", others=[tmp_path / "a" / "README", tmp_path / "README"])
    for path in ("none", "a"):
        with pytest.raises(CheckpointError, match=f"{tmp_path / path}: missing, or not a file"):
            save_hf(model, tmp_path / "new", others=[tmp_path / path])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -5000, -1])
def test_truncated_downloads_name_the_file(downloaded: Path, keep: int, run: Run) -> None:
    path = downloaded / "model-00002-of-000003.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    status, _, err = run("verify", downloaded)
    assert status == 1
    assert path.name in err
    with pytest.raises(CheckpointError, match=path.name):
        load_hf(KimiK25(small_config()), downloaded)


def test_missing_swapped_and_extra_files_of_a_download_are_named(downloaded: Path, run: Run) -> None:
    assert run("verify", downloaded)[0] == 0
    first, second = downloaded / "model-00001-of-000003.safetensors", downloaded / "model-00002-of-000003.safetensors"
    other = downloaded / "other"
    first.rename(other)
    status, _, err = run("verify", downloaded)
    assert (status, f"{first}: missing" in err) == (1, True)
    second.rename(first)
    other.rename(second)
    status, _, err = run("verify", downloaded)
    assert (status, INDEX in err, first.name in err) == (1, True, True)
    second.rename(other)
    first.rename(second)
    other.rename(first)
    shutil.copy(first, downloaded / "stray.safetensors")
    status, _, err = run("verify", downloaded)
    assert (status, "extra: not in the index: stray.safetensors" in err) == (1, True)
    (downloaded / "stray.safetensors").unlink()
    (downloaded / INDEX).unlink()
    status, _, err = run("verify", downloaded)
    assert (status, f"{INDEX}: missing" in err) == (1, True)


def test_config_and_tensors_must_agree(downloaded: Path) -> None:
    path = downloaded / "config.json"
    description = json.loads(path.read_text())

    def refused(match: str, change: Callable[[dict[str, Any]], Any]) -> None:
        changed = json.loads(json.dumps(description))
        change(changed)
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=match):
            verify_folder(downloaded)

    refused("missing", lambda c: c["text_config"].update(num_hidden_layers=4))
    refused("cannot be those of 1000000002 layers", lambda c: c["text_config"].update(num_hidden_layers=10**9))
    refused("mis-shaped", lambda c: c["vision_config"].update(vt_intermediate_size=41))
    refused("mis-typed.*says float32", lambda c: c.update(dtype="float32"))
    refused("mis-typed.*got packed", lambda c: c["text_config"].pop("quantization_config"))
    refused("text_config", lambda c: c.pop("text_config"))
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        verify_folder(downloaded)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        verify_folder(downloaded)


def test_an_index_stays_inside_its_folder_and_pickles_are_refused(downloaded: Path) -> None:
    index = json.loads((downloaded / INDEX).read_text())
    for file in ("../other.safetensors", "/etc/hostname", "pytorch_model.bin"):
        (downloaded / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(index["weight_map"], file)}))
        with pytest.raises(CheckpointError, match="accepted safetensors files of the same folder"):
            verify_folder(downloaded)
    for text in ("[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 99_999):
        (downloaded / INDEX).write_text(text)
        with pytest.raises(CheckpointError, match=INDEX):
            verify_folder(downloaded)
    for path in [downloaded / INDEX, *downloaded.glob("*.safetensors")]:
        path.unlink()
    (downloaded / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo never'\ntR.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin may run code when it is read and is refused"):
        verify_folder(downloaded)


def test_any_damage_to_a_download_is_an_error_or_harmless(downloaded: Path, run: Run) -> None:
    """Bits of headers, index and config, where no manifest finds them: never another exception, never a hang."""
    rng = random.Random(2)
    paths = sorted(downloaded.iterdir())
    found = 0
    for i in range(400):
        path = paths[i % len(paths)]
        data = path.read_bytes()
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 8))):
            changed[rng.randrange(min(len(data), 4000))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        status, out, err = run("verify", downloaded)
        assert (out + err).count("\n") == 1
        found += status
        path.write_bytes(data)
    assert found > 200


def test_convert_and_verify_from_the_command_line(downloaded: Path, tmp_path: Path, run: Run) -> None:
    new = tmp_path / "new"
    assert run("convert", downloaded, new, "--layout", "transformers", "--experts", "bf16") == (
        0,
        f"{new}: written\n",
        "",
    )
    assert run("verify", new)[0] == 0
    status, _, err = run("convert", downloaded, new, "--layout", "released", "--experts", "int4")
    assert (status, "choose another" in err) == (1, True)
    status, _, err = run("convert", downloaded, tmp_path / "x", "--layout", "transformers", "--experts", "int4")
    assert (status, "accepted 'bf16'" in err) == (1, True)
    status, _, err = run("convert", tmp_path / "none", tmp_path / "x", "--layout", "released", "--experts", "int4")
    assert (status, f"{tmp_path / 'none'}" in err) == (1, True)
    assert run("convert", downloaded, tmp_path / "x", "--layout", "megatron", "--experts", "int4")[0] == 2
    assert run("verify", tmp_path / "none")[0] == 1
    packed = tmp_path / "packed"
    words = ("--layout", "released", "--experts", "int4", "--scale-rule", "amax/7.5")
    assert run("convert", new, packed, *words)[0] == 0
    assert not (tmp_path / "x").exists()
    assert read_folder(packed).keys() == read_folder(downloaded).keys()


def test_a_full_disk_leaves_nothing_behind(downloaded: Path, tmp_path: Path) -> None:
    words = ["convert", str(downloaded), str(tmp_path / "new"), "--layout", "released", "--experts", "bf16"]
    done = subprocess.run(
        [sys.executable, "-m", "k25sys", *words], capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "cannot be written" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["downloaded"]


Folders = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """By form, a small folder and one of 200 MiB, packed 60 MiB, in many shards; a stack of experts is 65 MiB."""
    made: Folders = {}
    for form in ("int4", "bf16", "transformers"):
        pair = []
        for sizes in ({}, {"hidden_size": 512, "moe_intermediate_size": 256, "n_routed_experts": 130}):
            config = small_config(**sizes)
            folder = tmp_path_factory.mktemp("memory") / form
            if form == "transformers":
                released = made["bf16"][len(pair)]
                convert(released, folder, layout=form, experts="bf16", max_shard_bytes=SHARD_BYTES)
            else:
                tensors = random_tensors(config, form)
                num_shards = 1 + sum(t.numel() * t.element_size() for t in tensors.values()) // SHARD_BYTES
                write_folder(folder, config, tensors, num_shards)
            pair.append(folder)
        made[form] = (pair[0], pair[1])
    return made


STACK_BYTES = 130 * 512 * 512 * 2
MARGIN = 8 * 2**20  # temporaries of a matrix


@pytest.mark.parametrize(
    ("task", "source", "experts", "layout", "most"),
    [
        ("load", "int4", "-", "-", SHARD_BYTES),  # a tensor at a time
        ("load", "bf16", "-", "-", SHARD_BYTES),
        ("load", "transformers", "-", "-", SHARD_BYTES),
        ("save", "bf16", "int4", "released", SHARD_BYTES + MARGIN),
        ("save", "bf16", "bf16", "released", SHARD_BYTES + MARGIN),
        ("save", "bf16", "bf16", "transformers", STACK_BYTES + MARGIN),  # a stack has a shard to itself
        ("convert", "int4", "int4", "released", SHARD_BYTES + MARGIN),
        ("convert", "bf16", "bf16", "released", SHARD_BYTES + MARGIN),
        ("convert", "int4", "bf16", "transformers", STACK_BYTES + MARGIN),
        ("convert", "transformers", "bf16", "released", SHARD_BYTES + MARGIN),
        ("convert", "transformers", "bf16", "transformers", STACK_BYTES + MARGIN),
    ],
)
def test_memory_never_exceeds_the_model_and_a_shard(
    folders: Folders, task: str, source: str, experts: str, layout: str, most: int, tmp_path: Path
) -> None:
    small, large = folders[source]
    words = [task, str(small), str(large), str(tmp_path / "new"), experts, layout]
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.peak_memory", *words],
        capture_output=True, text=True, timeout=120, check=True,
        # Freed memory goes back at once, as it does at real sizes, where matrices are above glibc's 32 MiB.
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "32768"},
    )  # fmt: skip
    assert int(done.stdout) <= most, f"{int(done.stdout) / 2**20:.1f} MiB"
