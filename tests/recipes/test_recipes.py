"""Each recipe at each preset, from the command line."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from k25sys.data import ByteTokenizer
from k25sys.data.trajectories import TASK_KINDS, generated_conversations
from k25sys.errors import ConfigError
from k25sys.recipes import find_recipe, fusion_ablation, recipes
from k25sys.recipes.fusion_ablation import Curve, draw, table
from k25sys.training.loop import Trainer

NAMES = ("vit", "vit-projector", "pretrain", "long_context", "sft")


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "k25sys", "run", *arguments, "--set", "report.progress=false"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_phases_are_all_there() -> None:
    assert tuple(recipes()) == NAMES
    with pytest.raises(ConfigError, match=r"'pretrian', accepted .*; did you mean pretrain"):
        find_recipe("pretrian")
    with pytest.raises(ConfigError, match="--preset: got 'huge', accepted tiny, small, moonlight, k25"):
        find_recipe("vit").config("huge")


@pytest.mark.parametrize("preset_name", ["tiny", "small", "moonlight", "k25"])
@pytest.mark.parametrize("name", NAMES)
def test_every_preset_resolves(name: str, preset_name: str) -> None:
    recipe = find_recipe(name)
    config = recipe.config(preset_name)
    assert (config.recipe, config.preset) == (name, preset_name)
    sizes = config.grid.sizes(512) if preset_name == "k25" else config.grid.sizes(8)
    assert config.batch.sequences % sizes.data == 0 or preset_name in ("tiny", "small")
    assert ("language_model.*" in config.optimizer.frozen) == name.startswith("vit")
    assert recipe.model(config).vision is not None


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_the_tiny_model(name: str, tmp_path: Path) -> None:
    small = ["--set", "batch.sequences=2", "--set", "batch.sequence_length=448"]
    done = run(name, "--steps", "2", "--output", str(tmp_path / "run"), *small)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'run'}: step 2 of 2, done\n"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    sources = {source for line in lines for source in line["tokens_by_source"]}
    text = {"python-topics", "python-code", "python-functions"}
    if name == "sft":
        assert len(sources) == 1
        assert all(line["patches"] == 0 for line in lines)
        assert sum(line["loss_tokens"] for line in lines) < 0.8 * sum(line["tokens"] for line in lines)
    else:
        assert bool(sources & text) == (not name.startswith("vit"))
        assert all(line["patches"] > 0 for line in lines) or name == "long_context"


def test_own_files_take_the_place_of_the_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be " * 100)
    (tmp_path / "lines.jsonl").write_text(json.dumps({"text": "one line of text " * 50}) + "\n")
    files = f"data.files={tmp_path / 'a.txt'},{tmp_path / 'lines.jsonl'}"
    small = ["--set", "batch.sequences=2", "--set", "batch.sequence_length=448"]
    done = run("pretrain", "--steps", "1", "--output", str(tmp_path / "run"), "--set", files, *small)
    assert done.returncode == 0, done.stderr
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"files", "lines"} & set(line["tokens_by_source"])
    assert not {name for name in line["tokens_by_source"] if name.startswith("python")}


def test_a_model_that_does_not_fit_is_planned() -> None:
    done = run("pretrain", "--preset", "k25")
    assert done.returncode == 0, done.stderr
    config, _ = json.JSONDecoder().raw_decode(done.stdout)
    assert config["grid"]["pipeline"] == 16
    assert "simulated: k25 on 512 h800, pp 16 x vpp 2" in done.stdout
    assert "not run: k25 needs" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["pretrian"], "run: run: RECIPE: got 'pretrian'"),
        (["vit", "--preset", "huge"], "run: run: --preset: got 'huge'"),
        (["vit", "--set", "grid.pipline=2"], "did you mean grid.pipeline?"),
        (["vit", "--set", "grid.pipeline=2"], "grid: got axes of 2 ranks, accepted 1"),
        (["sft", "--set", "data.files=/nowhere.jsonl"], "No such file or directory"),
        (["pretrain", "--set", "data.tokenizer=/nowhere"], "No such file or directory"),
        (["pretrain", "--set", "checkpoint.start_from=/nowhere"], "index.json: missing"),
        (["fusion_ablation", "--set", "seeds=0,a"], "seeds: got '0,a', accepted whole numbers"),
        (["fusion_ablation", "--steps", "0"], "steps: got 0"),
        (["fusion_ablation", "--set", "figure=/nowhere/a.svg"], "figure: got /nowhere/a.svg, accepted a file in"),
        (
            ["fusion_ablation", "--set", "data.vision_budget=0.4"],
            "data.vision_budget: got 0.4, accepted above 0, at most 0.2",
        ),
        (["fusion_ablation", "--set", "validation.every=900"], "validation.every: got 900, accepted 1 to 240"),
        (["fusion_ablation", "--set", "data.inject=0.1"], "--set: got data.inject"),
        (["fusion_ablation", "--preset", "k25"], "--preset: got 'k25', accepted tiny, small"),
        (["pretrain", "--set", "pipeline.schedule=1f2b"], "accepted gpipe, 1f1b, interleaved_1f1b, zb_h1"),
    ],
)
def test_what_cannot_be_ends_with_one_line(arguments: list[str], text: str, tmp_path: Path) -> None:
    done = run(*arguments, "--output", str(tmp_path / "run"))
    assert done.returncode == 1
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_arm_that_was_stopped_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_whole, done = Trainer.run, []

    def stopped_in_the_second(trainer: Trainer, *, resume: bool = False) -> int:
        done.append(trainer.output.name)
        return run_whole(trainer, resume=resume) - (len(done) == 2)

    monkeypatch.setattr(Trainer, "run", stopped_in_the_second)
    settings = ["batch.sequences=1", "batch.sequence_length=320", "validation.batches=1", "seeds=4"]
    arguments = argparse.Namespace(preset="tiny", steps=1, output=str(tmp_path), resume=False, set=settings)
    assert "stopped when asked to, in mid-4; --resume goes on" in fusion_ablation.run(arguments)
    assert done == ["early-4", "mid-4"]
    assert not (tmp_path / "curves.json").exists()
    monkeypatch.undo()
    rows = fusion_ablation.run(argparse.Namespace(**{**vars(arguments), "resume": True})).splitlines()
    assert [row.split()[0] for row in rows] == ["arm", "early", "mid", "late"]


@pytest.mark.parametrize("preset_name", ["tiny", "small"])
def test_a_sequence_of_sft_holds_any_conversation(preset_name: str, tmp_path: Path) -> None:
    config = find_recipe("sft").config(preset_name)
    source = generated_conversations(len(TASK_KINDS), 5, ByteTokenizer(), tmp_path / "conversations.jsonl", jobs=2)
    lengths = [len(source.sample(index, 0).ids_S) for index in range(len(source))]
    assert max(lengths) <= config.batch.sequence_length


def test_the_ablations_table_and_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib")
    dip = {"early": (3.0, 2.0, 1.8, 1.0), "mid": (3.0, 2.5, 2.0, 1.2), "late": (3.0, 2.1, 2.25, 1.0)}
    curves = [
        Curve(arm=arm, seed=seed, losses={
            step: {"text": loss + seed / 100, "vision": loss}
            for step, loss in zip((50, 80, 90, 100), losses, strict=True)
        })
        for arm, losses in dip.items()
        for seed in (0, 1)
    ]  # fmt: skip
    rows = table(curves, 100).splitlines()
    assert rows[1].split() == ["early", "0%", "1.0050", "±", "0.0071", "1.0000", "±", "0.0000"]
    over_early = ["0.0500", "±", "0.0000", "0.2250", "±", "0.0000", "0.2250", "±", "0.0000"]
    assert rows[3].split()[-9:] == over_early  # of the same seed: before the late injection, after it, at the end
    only_end = [replace(curve, losses={100: curve.losses[100]}) for curve in curves]
    assert rows[2].split()[:8] == table(only_end, 100).splitlines()[2].split()[:8]
    draw(str(tmp_path / "a.svg"), curves, 100)
    draw(str(tmp_path / "b.svg"), curves, 100)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
