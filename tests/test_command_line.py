"""`python -m k25sys generate`: real text, a photograph and a video through a model."""

from pathlib import Path

import pytest
import torch

from k25sys.__main__ import main
from k25sys.checkpoint import save_hf
from k25sys.data import sample_file
from k25sys.errors import ArgumentValueError
from k25sys.models import KimiK25
from k25sys.models.presets import preset


def generate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["k25sys", "generate", "What is this?", "--max-new-tokens", "4", *arguments])
    return main()


def test_text_photograph_and_video(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    media = ("--image", "sample:china.jpg", "--video", "sample:carphone_distorted.mp4")
    assert generate(monkeypatch, *media) == 0
    first = capsys.readouterr().out
    # 32 x 46 patches make 368 tokens; 120 frames at 29.97 a second, two a second kept, are eight: two clips of 12 x 14.
    assert "3 clips" in first
    assert "logits (1, 533, 512)" in first
    assert generate(monkeypatch) == 0
    assert "0 clips" in capsys.readouterr().out


def test_weights_of_a_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The same weights, as a seed's and out of a folder, answer the same."""
    save_hf(
        KimiK25(preset("tiny"), generator=torch.Generator().manual_seed(7)), tmp_path / "saved", dtype=torch.float32
    )
    assert generate(monkeypatch, "--checkpoint", str(tmp_path / "saved")) == 0
    loaded = capsys.readouterr().out
    assert generate(monkeypatch, "--seed", "7") == 0
    assert capsys.readouterr().out == loaded


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--preset", "large"), "accepted tiny, small, moonlight, k25"),
        (("--preset", "k25"), "this machine has"),
        (("--image", "missing.png"), "missing.png"),
        (("--image", "sample:moon.png"), "sample_file: name"),
        (("--checkpoint", "missing"), "missing"),
        (("--tokenizer", "missing.model"), "missing.model"),
        (("--top-p", "0"), "top_p"),
    ],
)
def test_bad_input_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], text: str
) -> None:
    assert generate(monkeypatch, *arguments) == 1
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_sample_file() -> None:
    assert sample_file("china.jpg").is_file()
    with pytest.raises(ArgumentValueError, match="sample_file: name"):
        sample_file("moon.png")
