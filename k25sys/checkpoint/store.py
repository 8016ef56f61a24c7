"""Folders that are published whole or not at all, with a manifest in which every changed bit is found.

manifest.json: {"step": int or null, "files": {path: {"sha256", "bytes"}}, ..., "manifest_sha256"}. Paths are relative,
with "/". manifest_sha256 is that of the manifest without it, and a manifest is accepted only if it is, byte for byte,
what its own contents are written as: so a flipped bit in it is found too, white space included.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from k25sys.errors import CheckpointError, listing

MANIFEST = "manifest.json"
_BLOCK = 1 << 20


@contextmanager
def publish(folder: str | os.PathLike[str], *, step: int | None = None, **fields: Any) -> Iterator[Path]:
    """Gives a temporary folder to write in; on leaving, hashes and syncs it and renames it to `folder`.

    Whatever is raised inside, or while publishing, removes the temporary folder and leaves `folder` as it was.

    Args:
        folder: the name to publish under. It must not exist, or be empty.
        step: the training step for the manifest.
        fields: further JSON values for the manifest.

    Raises:
        CheckpointError: `folder` exists and is not an empty folder.
        OSError: the disk is full, the folder cannot be written, ...
    """
    folder = Path(folder)
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise CheckpointError(f"{folder}: got something that exists, accepted a new name; remove it or choose another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.unpublished-{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        yield temporary
        files = _describe(temporary, _paths(temporary))
        text = _manifest_text({**fields, "step": step, "files": files})
        (temporary / MANIFEST).write_bytes(text)
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        os.rename(temporary, folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of a folder's manifest.

    Raises:
        CheckpointError: there is none, or it is not what was written.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    data = path.read_bytes()
    try:
        manifest = json.loads(data)
        genuine = data == _manifest_text({k: v for k, v in manifest.items() if k != "manifest_sha256"})
        files = manifest["files"]
        genuine = genuine and all(
            isinstance(entry["sha256"], str) and isinstance(entry["bytes"], int) for entry in files.values()
        )
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        genuine, files = False, {}
    if not genuine:
        raise CheckpointError(f"{path}: altered: its contents do not have the sha256 that it states")
    for name in files:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or str(pure) != name:
            raise CheckpointError(f"{path}: names {name!r}, accepted paths inside the folder")
    return manifest


def verify_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads every file of a published folder and compares it with the manifest.

    Returns:
        The manifest.

    Raises:
        CheckpointError: names each file that is missing, extra, shorter or longer, or altered.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    files = manifest["files"]
    present = set(_paths(folder))
    problems = {name: "missing" for name in files if name not in present}
    problems |= {name: "extra: not in the manifest" for name in present - {MANIFEST, *files}}
    regular = [name for name in files if name in present and (folder / name).is_file()]
    problems |= {name: "not a regular file" for name in (present & files.keys()).difference(regular)}
    for name, found in _describe(folder, regular).items():
        if found["bytes"] != files[name]["bytes"]:
            problems[name] = f"{found['bytes']} bytes, written were {files[name]['bytes']}"
        elif found["sha256"] != files[name]["sha256"]:
            problems[name] = "altered: its sha256 is not that of the manifest"
    if problems:
        found = [f"{folder / name}: {problem}" for name, problem in sorted(problems.items())]
        raise CheckpointError(listing(found, separator="; "))
    return manifest


def _manifest_text(contents: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**contents, "manifest_sha256": digest}, sort_keys=True, indent=1) + "\n").encode()


def _paths(folder: Path) -> list[str]:
    """Everything below `folder` but folders; a link to a folder counts as a file, so that nothing hides behind it."""
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()]


def _describe(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing does not hold the interpreter's lock
        hashes = pool.map(lambda name: _sha256(folder / name), names)
        return {
            name: {"sha256": sha256, "bytes": (folder / name).stat().st_size}
            for name, sha256 in zip(names, hashes, strict=True)
        }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
