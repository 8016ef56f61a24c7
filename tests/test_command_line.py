"""`python -m k25sys generate`: real text, a photograph and a video through a model."""

import base64
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from k25sys.__main__ import main
from k25sys.checkpoint import save_hf
from k25sys.data import TiktokenTokenizer, sample_file
from k25sys.errors import ArgumentValueError
from k25sys.models import KimiK25, TokenIds
from k25sys.models.decoder import Decoder
from k25sys.models.presets import preset


def generate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["k25sys", "generate", "What is this?", "--max-new-tokens", "4", *arguments])
    return main()


def test_text_photograph_and_video(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    media = ("--image", "sample:china.jpg", "--video", "sample:carphone_distorted.mp4")
    assert generate(monkeypatch, *media) == 0
    first = capsys.readouterr().out
    # 32 x 46 patches make 368 tokens; 120 frames at 29.97 a second, two a second kept, are eight: two clips of 12 x 14.
    assert "533 tokens, 3 clips; model in torch.float32" in first
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


def test_the_prompt_is_computed_once_and_in_the_dtype_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heads: list[tuple[int, torch.dtype]] = []

    def record(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, Decoder):
            heads.append((inputs[0].shape[0], inputs[0].dtype))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(record)
    try:
        assert generate(monkeypatch, "--dtype", "bfloat16") == 0
    finally:
        hook.remove()
    assert "model in torch.bfloat16" in capsys.readouterr().out
    assert [dtype for _, dtype in heads] == [torch.bfloat16]


def test_a_tokenizer_beside_the_weights_is_used_and_must_have_the_models_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Added to the folder after it was saved, as a user does. The byte tokens alone as a tiktoken vocabulary have other
    places of the special tokens than the tiny preset, but the same number of bytes before them."""
    ranks = tmp_path / "tiktoken.model"
    ranks.write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    special = TiktokenTokenizer(ranks).special
    tokens = TokenIds(**vars(special), stop=special.stop_ids)
    fitting = replace(preset("tiny"), tokens=tokens)
    one_off = replace(fitting, tokens=replace(tokens, end_think=511))
    for name, config in (("fitting", fitting), ("one_off", one_off)):
        save_hf(KimiK25(config), tmp_path / name)
        shutil.copy(ranks, tmp_path / name)
    assert generate(monkeypatch, "--checkpoint", str(tmp_path / "fitting")) == 0
    assert generate(monkeypatch, "--checkpoint", str(tmp_path / "one_off")) == 1
    error = capsys.readouterr().err
    differ = f"got the model's end_think 511, the tokenizer's {special.end_think}, accepted the same; give"
    assert f"{differ} the model's own vocabulary: --tokenizer FILE" in error


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
