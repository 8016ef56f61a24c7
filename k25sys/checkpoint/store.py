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
LATEST = "latest"
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
    temporary = begin_publishing(folder)
    try:
        yield temporary
        files = describe_files(temporary, _paths(temporary))
        for path in temporary.rglob("*"):
            _sync(path)
        finish_publishing(temporary, folder, files, step=step, **fields)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def begin_publishing(folder: str | os.PathLike[str]) -> Path:
    """Makes the temporary folder beside `folder`; for several processes that write into it. See `publish`."""
    folder = Path(folder)
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise CheckpointError(f"{folder}: got something that exists, accepted a new name; remove it or choose another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.unpublished-{uuid.uuid4().hex}"
    temporary.mkdir()
    return temporary


def finish_publishing(
    temporary: Path,
    folder: str | os.PathLike[str],
    files: dict[str, dict[str, Any]],
    *,
    step: int | None = None,
    **fields: Any,
) -> None:
    """Writes the manifest of `files`, which whoever wrote them has described and synced, and renames the folder.

    Raises:
        CheckpointError: `temporary` does not hold just these files, of these sizes. OSError: as `publish`.
    """
    problems = _differences(temporary, files)
    if problems:
        raise CheckpointError(listing(problems, separator="; "))
    (temporary / MANIFEST).write_bytes(_manifest_text({**fields, "step": step, "files": files}))
    for path in [temporary / MANIFEST, *(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
        _sync(path)
    os.rename(temporary, folder)
    _sync(Path(folder).parent)


def move_latest(folder: str | os.PathLike[str]) -> None:
    """Makes the text file `latest` beside `folder` name it; the old one stays until the new one is on the disk."""
    folder = Path(folder)
    temporary = folder.parent / f".{LATEST}.{uuid.uuid4().hex}"
    try:
        temporary.write_text(folder.name + "\n")
        _sync(temporary)
        os.rename(temporary, folder.parent / LATEST)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(folder.parent)


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
    check_files(folder, manifest, list(manifest["files"]))
    return manifest


def check_files(folder: Path, manifest: dict[str, Any], names: list[str]) -> None:
    """That `folder` holds the files of its manifest and no others, and that those of `names` are not altered.

    Raises:
        CheckpointError: as `verify_manifest`.
    """
    files = manifest["files"]
    problems = _differences(folder, files)
    unharmed = [name for name in names if not any(problem.startswith(f"{folder / name}: ") for problem in problems)]
    for name, found in describe_files(folder, unharmed).items():
        if found["sha256"] != files[name]["sha256"]:
            problems.append(f"{folder / name}: altered: its sha256 is not that of the manifest")
    if problems:
        raise CheckpointError(listing(sorted(problems), separator="; "))


def _differences(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """What is missing, extra, of another size or no file, without reading anything."""
    present = set(_paths(folder))
    problems = {name: "missing" for name in files if name not in present}
    problems |= {name: "extra: not in the manifest" for name in present - {MANIFEST, *files}}
    for name in present & files.keys():
        path, written = folder / name, files[name]["bytes"]
        if not path.is_file():
            problems[name] = "not a regular file"
        elif path.stat().st_size != written:
            problems[name] = f"{path.stat().st_size} bytes, written were {written}"
    return [f"{folder / name}: {problem}" for name, problem in sorted(problems.items())]


def _manifest_text(contents: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**contents, "manifest_sha256": digest}, sort_keys=True, indent=1) + "\n").encode()


def _paths(folder: Path) -> list[str]:
    """Everything below `folder` but folders; a link to a folder counts as a file, so that nothing hides behind it."""
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()]


def describe_files(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """What a manifest says of each file: its sha256 and bytes."""
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


def sync_files(folder: Path, names: list[str]) -> None:
    """Returns when the files are on the disk."""
    for name in names:
        _sync(folder / name)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
