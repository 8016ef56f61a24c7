"""The training loop: the same losses on any grid, resumed as if nothing had happened, ended when asked to."""

import errno
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from k25sys.checkpoint import load_hf, save_hf
from k25sys.errors import CheckpointError, ConfigError, DivergenceError, GridError
from k25sys.models import KimiK25
from k25sys.models.presets import preset
from k25sys.parallel import RankGrid
from k25sys.training import checkpointing
from k25sys.training.config import (
    BatchOptions,
    CheckpointOptions,
    OptimizerOptions,
    ReportOptions,
    RunConfig,
    override,
)
from k25sys.training.loop import Trainer
from k25sys.training.weights import checkpoint_folder, load_model
from tests.parallel.processes import run_ranks
from tests.training.toy_sources import toy_mixture

CONFIG = RunConfig(
    recipe="toy",
    steps=4,
    batch=BatchOptions(sequences=4, sequence_length=128),
    checkpoint=CheckpointOptions(every=2),
    report=ReportOptions(progress=False),
)


def make_trainer(folder: str | Path, *settings: str, config: RunConfig = CONFIG) -> Trainer:
    config = override(config, settings)
    grid = RankGrid.create(config.grid.sizes(torch.distributed.get_world_size() if _is_distributed() else 1))
    return Trainer(config, preset(config.preset), toy_mixture(), grid, folder)


def _is_distributed() -> bool:
    return torch.distributed.is_initialized()


def train(folder: str | Path, *settings: str, resume: bool = False) -> dict[str, torch.Tensor]:
    """One run; the parameters that it ends with."""
    torch.set_num_threads(1)
    trainer = make_trainer(folder, *settings)
    trainer.run(resume=resume)
    return {name: value.detach().clone() for name, value in trainer.parts.model.parameters.items()}


def losses(folder: str | Path) -> list[float]:
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder)


def test_a_run_learns_and_leaves_its_files(whole: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, parameters = whole
    found = losses(folder)
    assert found[-1] < found[0] - 0.1
    resolved = override(CONFIG, ["grid.data=1", "pipeline.microbatches=4"])
    assert json.loads((folder / "config.json").read_text()) == resolved.to_json()
    (rank,) = json.loads((folder / "ranks.json").read_text())
    assert rank["parameters"] == sum(value.numel() for value in parameters.values())
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert line["tokens"] == 4 * 128
    assert sum(line["tokens_by_source"].values()) <= line["tokens"]
    assert rank["vision_patches"] == sum(
        json.loads(each)["patches"] for each in (folder / "metrics.jsonl").read_text().splitlines()
    )
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "latest", "step-00000002", "step-00000004",
    ]  # fmt: skip
    model = load_model(folder / "checkpoints" / "step-00000004")
    for name, value in model.named_parameters():
        if name in parameters:
            assert torch.equal(value, parameters[name]), name


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_run_that_is_resumed_is_bitwise_the_whole_one(
    whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, workers: str
) -> None:
    train(tmp_path, "steps=3", f"data.workers={workers}")  # saved after 2 and 3
    (tmp_path / "checkpoints" / "step-00000003" / "index.json").write_text("{}")  # and 3 is damaged
    parameters = train(tmp_path, f"data.workers={workers}", resume=True)
    assert losses(tmp_path) == losses(whole[0])
    assert all(torch.equal(value, whole[1][name]) for name, value in parameters.items())


def test_resume_in_an_empty_folder_starts_from_nothing(
    whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    train(tmp_path / "new", "steps=1", resume=True)
    assert losses(tmp_path / "new") == losses(whole[0])[:1]


def test_a_folder_with_another_run_is_refused(whole: tuple[Path, dict[str, torch.Tensor]]) -> None:
    with pytest.raises(ConfigError, match="which holds a run, accepted a new folder; --resume goes on with it"):
        train(whole[0])
    with pytest.raises(ConfigError, match=r"seed=1, it was 0.*accepted the values that the run began with"):
        train(whole[0], "seed=1", resume=True)
    with pytest.raises(ConfigError, match=r"optimizer.frozen=\['vision_tower.\*'\], it was \[\]"):
        train(whole[0], "optimizer.frozen=vision_tower.*", resume=True)
    with pytest.raises(ConfigError, match="steps: got 3, accepted at least 4, which the run has done"):
        train(whole[0], "steps=3", resume=True)
    with pytest.raises(ConfigError, match="steps=8, it was 4"):  # the injection would move
        train(whole[0], "steps=8", "data.inject=0.5", resume=True)
    ranks = (whole[0] / "ranks.json").read_text()
    train(whole[0], resume=True)  # has nothing left to do
    assert (whole[0] / "ranks.json").read_text() == ranks
    assert len(losses(whole[0])) == 4


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_save_that_fails_does_not_end_the_run(
    whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, asynchronous: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    save_steps, calls = checkpointing.save_steps, []

    def failing(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "no room")
        return save_steps(*arguments)

    monkeypatch.setattr(checkpointing, "save_steps", failing)
    train(tmp_path, f"checkpoint.asynchronous={asynchronous}")
    assert losses(tmp_path) == losses(whole[0])
    (line,) = capsys.readouterr().err.splitlines()
    assert "step-00000002: not saved: on rank 0: OSError: [Errno 28] no room" in line
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000004"]
    calls.clear()
    with pytest.raises(CheckpointError, match="step-00000001: not saved"):
        train(tmp_path / "last", "steps=1", f"checkpoint.asynchronous={asynchronous}")


def test_without_an_intact_checkpoint_nothing_is_resumed(tmp_path: Path) -> None:
    train(tmp_path, "steps=1")
    (tmp_path / "checkpoints" / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is intact"):
        train(tmp_path, resume=True)


GRIDS = [
    ("grid.pipeline=2", "grid.expert=2", "vision.mode=dep"),
    ("grid.pipeline=2", "grid.tensor=2", "vision.mode=dep", "vision.projector=stage0"),
    ("grid.tensor=2", "grid.data=2", "vision.mode=dep", "pipeline.microbatches=1", "vision.max_patches=32"),
    ("grid.context=2", "grid.pipeline=2", "pipeline.schedule=zb_h1", "vision.max_patches=16"),
]


@pytest.mark.parametrize("settings", GRIDS, ids=" ".join)
def test_losses_do_not_depend_on_the_grid(
    whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, settings: tuple[str, ...]
) -> None:
    run_ranks(4, _train_on_grid, str(tmp_path), settings)
    assert losses(tmp_path) == pytest.approx(losses(whole[0]), rel=1e-5)
    ranks = json.loads((tmp_path / "ranks.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [rank["rank"] for rank in ranks] == [0, 1, 2, 3]
    if "vision.mode=dep" in settings:
        assert sum(rank["vision_patches"] for rank in ranks) == sum(line["patches"] for line in lines[2:])
        assert all(rank["vision_patches"] > 0 for rank in ranks)


def _train_on_grid(folder: str, settings: tuple[str, ...]) -> None:
    """Two steps, and two more after a resume."""
    train(folder, "steps=2", *settings)
    train(folder, *settings, resume=True)


def test_a_run_goes_on_on_another_grid(whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    train(tmp_path, "steps=2")
    run_ranks(2, _resume_on_grid, str(tmp_path))
    assert losses(tmp_path) == pytest.approx(losses(whole[0]), rel=1e-5)


def _resume_on_grid(folder: str) -> None:
    train(folder, "grid.pipeline=2", "vision.mode=dep", resume=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_saves_and_ends(
    whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, number: signal.Signals
) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    trainer = make_trainer(tmp_path)
    _before_step(trainer, 3, lambda: os.kill(os.getpid(), number))
    assert trainer.run() == 3
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000003\n"
    train(tmp_path, resume=True)
    assert losses(tmp_path) == losses(whole[0])
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


def _before_step(trainer: Trainer, step: int, action: Callable[[], Any]) -> None:
    run, done = trainer.parts.step.run, []

    def counted(*args: Any, **options: Any) -> Any:
        done.append(None)
        if len(done) == step:
            action()
        return run(*args, **options)

    trainer.parts.step.run = counted


def test_gradients_that_are_not_finite_change_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "steps=20", "checkpoint.every=100")
    name = "language_model.model.norm.weight"
    parameter = trainer.parts.model.parameters[name]
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    before = {key: value.detach().clone() for key, value in trainer.parts.model.parameters.items()}
    with pytest.raises(DivergenceError, match="step 10: gradients that are not finite for 10 steps in a row"):
        trainer.run()
    assert all(torch.equal(value, before[key]) for key, value in trainer.parts.model.parameters.items())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["finite"] for line in lines] == [False] * 10
    assert all(line["gradient_norm"] is None for line in lines)


@pytest.mark.parametrize("settings", [(), ("grid.pipeline=2", "vision.mode=dep")], ids=["alone", "dep"])
def test_a_frozen_decoder_passes_gradients_to_the_encoder(tmp_path: Path, settings: tuple[str, ...]) -> None:
    if settings:
        run_ranks(2, _check_frozen, str(tmp_path), settings)
    else:
        _check_frozen(str(tmp_path), settings)


def _check_frozen(folder: str, settings: tuple[str, ...]) -> None:
    frozen = replace(CONFIG, steps=2, optimizer=OptimizerOptions(frozen=("language_model.*",), max_logit=None))
    trainer = make_trainer(folder, *settings, config=frozen)
    before = {key: value.detach().clone() for key, value in trainer.parts.model.parameters.items()}
    trainer.run()
    moved = {k for k, value in trainer.parts.model.parameters.items() if not torch.equal(value, before[k])}
    assert moved == {key for key in before if not key.startswith("language_model.")}


def test_weights_of_another_run_begin_this_one(whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    start = f"checkpoint.start_from={whole[0] / 'checkpoints' / 'step-00000004'}"
    trainer = make_trainer(tmp_path, start, "steps=1", "optimizer.frozen=vision_tower.*")
    trainer.run()
    assert losses(tmp_path)[0] < losses(whole[0])[0] - 0.1
    tower = {k: v for k, v in trainer.parts.model.parameters.items() if k.startswith("vision_tower.")}
    assert all(torch.equal(value, whole[1][name]) for name, value in tower.items())
    later = make_trainer(tmp_path / "later", f"checkpoint.start_from={tmp_path / 'checkpoints' / 'step-00000001'}")
    later.run()  # from weights of which some were frozen and stored as they are
    with pytest.raises(CheckpointError, match=r"index\.json: missing"):
        make_trainer(tmp_path / "none", f"checkpoint.start_from={tmp_path / 'later' / 'profile'}").run()


def test_parts_of_a_model_begin_from_several_runs(
    whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen = "optimizer.frozen=*"
    fresh = train(tmp_path / "fresh", "seed=3", "steps=1", frozen)
    text = f"checkpoint.start_from={whole[0]}:language_model.*"
    found = train(tmp_path / "text", "seed=3", "steps=1", frozen, text)
    assert "no checkpoint.start_from has vision_tower, mm_projector: begun from the seed" in capsys.readouterr().err
    both = train(tmp_path / "both", "seed=3", "steps=1", frozen, f"{text},{tmp_path / 'fresh'}:mm_projector.*")
    for name, value in found.items():
        assert torch.equal(value, (whole[1] if name.startswith("language_model.") else fresh)[name]), name
        assert torch.equal(both[name], value)
    assert capsys.readouterr().err.count("vision_tower: begun from the seed") == 1
    with pytest.raises(CheckpointError, match=r"no weight matches 'vision\.\*'; it has "):
        train(tmp_path / "a", f"checkpoint.start_from={whole[0]}:vision.*")
    with pytest.raises(CheckpointError, match="gives weights of language_model, but no language_model"):
        train(tmp_path / "b", f"checkpoint.start_from={whole[0]}:*norm*")


@pytest.mark.parametrize("settings", [(), ("grid.expert=2", "grid.data=2"), ("grid.tensor=2", "grid.expert_tensor=2")])
def test_weights_in_a_released_layout_begin_a_run(tmp_path: Path, settings: tuple[str, ...]) -> None:
    config = preset("tiny")
    for folder, layout, seed in (("released", "released", 5), ("hf", "transformers", 6)):
        model = KimiK25(config)
        model.reset_parameters(torch.Generator().manual_seed(seed))
        for name, parameter in model.named_parameters():
            if name.endswith("e_score_correction_bias"):
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
        save_hf(model, tmp_path / folder, layout=layout)
    config = replace(config, text=replace(config.text, vocab_size=config.text.vocab_size * 2))
    save_hf(KimiK25(config), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"other: language_model\..* of shape \(.*, this model's has \("):
        make_trainer(tmp_path / "refused", f"checkpoint.start_from={tmp_path / 'other'}").run()
    if settings:
        run_ranks(2, _check_released, str(tmp_path), settings)
    else:
        _check_released(str(tmp_path), settings)


def _check_released(folder: str, settings: tuple[str, ...]) -> None:
    """The language model of one folder, the rest of another, saved by a run that changes nothing."""
    start = f"checkpoint.start_from={folder}/hf,{folder}/released:language_model.*"
    trainer = make_trainer(f"{folder}/run", "steps=1", "optimizer.learning_rate=0", "optimizer.balance_rate=0",
                           "optimizer.final_learning_rate=0", "optimizer.max_logit=null", start, *settings)  # fmt: skip
    trainer.run()
    if trainer.grid.rank == 0:
        found = load_model(checkpoint_folder(f"{folder}/run")).state_dict()
        for part, name in (("language_model.", "released"), ("", "hf")):
            model = KimiK25(preset("tiny"))
            load_hf(model, f"{folder}/{name}")
            for key, value in model.state_dict().items():
                if part == "language_model." or not key.startswith("language_model."):
                    assert not key.startswith(part) or torch.equal(found[key], value), key


def test_a_folder_means_its_newest_checkpoint(whole: tuple[Path, dict[str, torch.Tensor]]) -> None:
    newest = whole[0] / "checkpoints" / "step-00000004"
    for path in (whole[0], newest.parent, newest.parent / "latest", newest):
        assert checkpoint_folder(path) == newest
    assert checkpoint_folder(whole[0] / "nothing") == whole[0] / "nothing"


def test_bf16_trains_with_float32_masters(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "precision=bf16", "steps=3")
    trainer.run()
    assert {parameter.dtype for parameter in trainer.parts.model.parameters.values()} == {torch.bfloat16}
    assert {shard.tensor.dtype for shard in trainer.parts.optimizer.shards()} == {torch.float32}
    found = losses(tmp_path)
    assert found[-1] < found[0]


def test_a_profile_has_a_range_for_each_action(tmp_path: Path) -> None:
    train(tmp_path, "report.profile_step=2", "steps=2", "vision.mode=dep")
    events = json.loads((tmp_path / "profile" / "step-2-rank-0.json").read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"0VF0", "0F0", "0B0", "0VB0"} <= names


@pytest.mark.parametrize(
    ("setting", "error", "text"),
    [
        ("grid.pipelines=2", ConfigError, "--set: got grid.pipelines, accepted one of .*did you mean grid.pipeline?"),
        ("grid=2", ConfigError, "--set: got grid, "),
        ("seed.x=2", ConfigError, "--set: got seed.x, "),
        ("seed", ConfigError, "--set: got 'seed', accepted PATH=VALUE"),
        ("seed=a", ConfigError, "seed: got 'a', accepted a value of type int"),
        ("checkpoint.asynchronous=1", ConfigError, "accepted a value of type bool"),
        ("vision.mode=both", ConfigError, "vision.mode: got 'both', accepted stage0, dep"),
        ("precision=fp8", ConfigError, "precision: got 'fp8', accepted fp32, bf16, fp64"),
        ("steps=0", ConfigError, "steps: got 0, accepted an int >= 1"),
        ("grid.tensor=0", ConfigError, "grid.tensor: got 0, accepted an int >= 1"),
        ("pipeline.microbatches=0", ConfigError, "pipeline.microbatches: got 0, accepted an int >= 1"),
        ("vision.ranks_per_node=0", ConfigError, "vision.ranks_per_node: got 0"),
        ("validation.every=0", ConfigError, "validation.every: got 0"),
        ("validation.every=1", ConfigError, "validation.every: got 1, accepted null: toy holds nothing out, or"),
        ("report.profile_step=5", ConfigError, "report.profile_step: got 5, accepted 1 to 4"),
        ("recipe=sft", ConfigError, "--set: got recipe, accepted the recipe's name"),
        ("preset=small", ConfigError, "--set: got preset, accepted --preset"),
        ("grid.pipeline=2", GridError, "grid: got axes of 2 ranks, accepted 1; start as many processes"),
        ("pipeline.microbatches=3", GridError, "pipeline.microbatches: got 3, accepted a divisor of 4 sequences"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_a_line(tmp_path: Path, setting: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make_trainer(tmp_path, setting)


def test_values_are_read_by_their_type() -> None:
    config = override(
        CONFIG,
        ["optimizer.learning_rate=1", "checkpoint.asynchronous=false", "optimizer.max_logit=null", "grid.data=2",
         "optimizer.frozen=a.*,b", "data.files=", "checkpoint.start_from=x=y,z:a.*"],
    )  # fmt: skip
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert not config.checkpoint.asynchronous
    assert config.optimizer.max_logit is None
    assert config.grid.data == 2
    assert config.optimizer.frozen == ("a.*", "b")
    assert config.data.files == ()
    assert config.checkpoint.start_from == ("x=y", "z:a.*")
