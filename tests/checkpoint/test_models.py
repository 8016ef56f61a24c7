"""load_hf and save_hf with a model in memory, and against transformers' own reader and writer."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from k25sys.checkpoint import load_hf, save_hf, verify_folder
from k25sys.checkpoint.config_files import config_json
from k25sys.errors import ArgumentTypeError, ArgumentValueError, CheckpointError, DeviceError
from k25sys.models.config import KimiK25Config
from k25sys.models.kimi_k25 import KimiK25
from tests.checkpoint.folders import (
    INDEX,
    assert_same_tensors,
    random_tensors,
    read_folder,
    small_config,
    write_folder,
)

transformers: Any = pytest.importorskip("transformers", reason="the other implementation of Kimi-K2.5")
GATE_UP = "language_model.model.layers.1.mlp.experts.gate_up_proj"


def new_model(config: KimiK25Config, dtype: torch.dtype = torch.float32, seed: int = 0) -> KimiK25:
    """Every number random, biases and gains too."""
    model = KimiK25(config).to(dtype).eval()
    randomise(model, seed)
    return model


def randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05 + (tensor.dim() == 1))


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("experts", ["int4", "bf16"])
def test_released_to_a_model_and_back_changes_no_bit(tmp_path: Path, experts: str, dtype: torch.dtype) -> None:
    config = small_config()
    tensors = random_tensors(config, experts)  # codes and scales that follow no rule
    model = new_model(config, dtype)
    load_hf(model, write_folder(tmp_path / "source", config, tensors))
    save_hf(model, tmp_path / "saved", experts=experts, dtype=torch.bfloat16, max_shard_bytes=100_000)
    assert_same_tensors(read_folder(tmp_path / "saved"), tensors)
    verify_folder(tmp_path / "saved")


def test_changed_experts_are_quantised_and_others_written_as_they_were(tmp_path: Path) -> None:
    config = small_config()
    tensors = random_tensors(config)
    model = new_model(config, torch.bfloat16)
    load_hf(model, write_folder(tmp_path / "source", config, tensors))
    with torch.no_grad():
        model.get_parameter(GATE_UP)[2, 5, 7] += 0.01  # row 5 of 32 gate rows of expert 2
    save_hf(model, tmp_path / "saved", experts="int4")
    saved = read_folder(tmp_path / "saved")
    changed = {name for name in tensors if not torch.equal(tensors[name], saved[name])}
    stem = "language_model.model.layers.1.mlp.experts.2.gate_proj.weight_"
    assert changed == {stem + "packed", stem + "scale"}


@pytest.mark.parametrize("layout", ["released", "transformers"])
def test_logits_survive_a_round_trip(tmp_path: Path, layout: str) -> None:
    config = small_config()
    model, other = new_model(config), new_model(config, seed=1)
    save_hf(model, tmp_path / "saved", layout=layout)
    load_hf(other, tmp_path / "saved")
    assert_same_tensors(copy_of(model), copy_of(other))
    ids = torch.arange(11).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids), other(ids))


def their_config(config: KimiK25Config) -> Any:
    """transformers' Kimi_K25Config. Of a released config.json it reads the text part only, and takes the encoder's
    sizes to be the released ones."""
    description = config_json(config, "transformers", dtype=torch.float32, int4=False)
    return transformers.Kimi_K25Config(**description)


def their_model(config: KimiK25Config) -> Any:
    """transformers' model with random numbers everywhere."""
    theirs = transformers.Kimi_K25ForConditionalGeneration(their_config(config)).eval()
    randomise(theirs, seed=3)
    return theirs


def assert_same_logits(ours: KimiK25, theirs: Any, config: KimiK25Config) -> None:
    """Text and two images, to 1e-5 of the largest logit."""
    pad = config.tokens.media_pad
    grid = torch.tensor([[1, 4, 6], [1, 2, 2]])
    pixels = torch.randn(28, 3, 14, 14)
    ids = torch.tensor([[1, 2, *[pad] * 6, 3, 4, pad, 5, 6, 7]])
    with torch.no_grad():
        a = ours(ids, pixels, grid)
        b = theirs(input_ids=ids, pixel_values=pixels, image_grid_thw=grid).logits
    assert float((a - b).abs().max() / b.abs().max()) <= 1e-5


@pytest.mark.parametrize("layout", ["released", "transformers"])
def test_transformers_reads_what_we_save(tmp_path: Path, layout: str) -> None:
    config = small_config()
    model = new_model(config)
    save_hf(model, tmp_path / "saved", layout=layout, max_shard_bytes=200_000)
    theirs, report = transformers.Kimi_K25ForConditionalGeneration.from_pretrained(
        tmp_path / "saved", output_loading_info=True, dtype=torch.float32,
        config=their_config(config) if layout == "released" else None,
    )  # fmt: skip
    assert not any(report.values()), report
    assert_same_logits(model, theirs.eval(), config)


@pytest.mark.parametrize("original", [True, False])
def test_we_read_what_transformers_saves(tmp_path: Path, original: bool) -> None:
    config = small_config()
    theirs = their_model(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "saved", save_original_format=original, max_shard_size="300KB")
    names = json.loads((tmp_path / "saved" / INDEX).read_text())["weight_map"]
    assert ("language_model.model.blocks.0.mlp.up_proj.weight" in names) == original
    model = new_model(config)
    load_hf(model, tmp_path / "saved")
    assert_same_logits(model, theirs, config)
    assert "unchecked" in verify_folder(tmp_path / "saved")


def test_transformers_saves_again_what_it_read_from_us(tmp_path: Path) -> None:
    config = small_config()
    tensors = random_tensors(config, "bf16")
    source = write_folder(tmp_path / "source", config, tensors)
    theirs = transformers.Kimi_K25ForConditionalGeneration.from_pretrained(
        source, dtype=torch.bfloat16, config=their_config(config)
    )
    theirs.save_pretrained(tmp_path / "saved")
    model = new_model(config, torch.bfloat16)
    load_hf(model, tmp_path / "saved")
    save_hf(model, tmp_path / "back")
    assert_same_tensors(read_folder(tmp_path / "back"), tensors)


FAULTS = ("missing", "extra", "mis-shaped", "mis-typed", "again", "part")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), faults=st.sets(st.sampled_from(FAULTS), min_size=1), experts=st.sampled_from(("int4", "bf16")))
def test_wrong_tensors_are_named_before_the_model_changes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, faults: set[str], experts: str
) -> None:
    config = small_config()
    tensors = random_tensors(config, experts)
    names = [name for name in tensors if not name.endswith(("_packed", "_scale", "_shape"))]
    victims = iter(data.draw(st.lists(st.sampled_from(names), min_size=5, max_size=5, unique=True)))
    named = []
    for fault in sorted(faults):
        name = next(victims, "")
        named.append(name)
        if fault == "missing":
            del tensors[name]
        elif fault == "extra":
            named[-1] = name + ".more"
            tensors[name + ".more"] = torch.zeros(2)
        elif fault == "mis-shaped":
            tensors[name] = tensors[name][None]
        elif fault == "mis-typed":
            tensors[name] = tensors[name].to(torch.int32)
        elif fault == "again":
            tensors["module." + name] = tensors[name].clone()
        elif experts == "int4":
            named[-1] = "language_model.model.layers.2.mlp.experts.1.up_proj.weight_scale"
            del tensors[named[-1]]
        else:
            named.pop()
    model = new_model(config)
    before = copy_of(model)
    folder = write_folder(tmp_path_factory.mktemp("folder") / "source", config, tensors)
    if not named:
        return load_hf(model, folder)
    with pytest.raises(CheckpointError) as error:
        load_hf(model, folder)
    text = str(error.value)
    assert "\n" not in text
    for name in named:
        assert name in text
    assert_same_tensors(copy_of(model), before)


def test_a_long_list_is_cut_with_its_count(tmp_path: Path) -> None:
    config = small_config()
    tensors = random_tensors(config, "bf16")
    few = {name: tensor for name, tensor in tensors.items() if "mlp.experts" not in name}
    with pytest.raises(CheckpointError, match=r"24 missing: .*, and 14 more") as error:
        load_hf(new_model(config), write_folder(tmp_path / "source", config, few))
    assert len(str(error.value)) < 1500
    tensors = random_tensors(config)
    tensors["language_model.model.layers.2.mlp.experts.1.up_proj.weight_shape"][1] = 64
    folder = write_folder(tmp_path / "shape", config, tensors)
    with pytest.raises(CheckpointError, match=r"weight_shape \(says \(32, 64\), accepted \(32, 96\)\)"):
        load_hf(new_model(config), folder)


def test_a_model_that_cannot_be_loaded_or_saved_is_refused(tmp_path: Path) -> None:
    config = small_config()
    source = write_folder(tmp_path / "source", config, random_tensors(config))
    with torch.device("meta"):
        meta = KimiK25(config)
    with pytest.raises(DeviceError, match="to_empty"):
        load_hf(meta, source)
    with pytest.raises(ArgumentTypeError, match="KimiK25"):
        load_hf(nn.Linear(2, 2), source)
    model = new_model(config)
    with pytest.raises(ArgumentValueError, match="'bf16'"):
        save_hf(model, tmp_path / "new", experts="int4", layout="transformers")
    with pytest.raises(ArgumentValueError, match="'released' or 'transformers'"):
        save_hf(model, tmp_path / "new", layout="megatron")
    with pytest.raises(CheckpointError, match="choose another"):
        save_hf(model, source)
    with torch.no_grad():
        model.get_parameter(GATE_UP)[0, 0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate_proj\.weight: got NaN"):
        save_hf(model, tmp_path / "new", experts="int4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
