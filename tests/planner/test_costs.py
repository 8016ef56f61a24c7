"""Costs from sizes against what the model and torch themselves count."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from k25sys.models import KimiK25
from k25sys.models.presets import preset
from k25sys.planner import costs


@pytest.mark.parametrize("name", ["tiny", "small", "moonlight", "k25"])
def test_parameters_are_those_of_the_model(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = KimiK25(config)
    sizes = {key: value.numel() for key, value in model.state_dict().items()}
    of_layers: dict[int, int] = dict.fromkeys(range(config.text.num_hidden_layers), 0)
    vision = 0
    for key, size in sizes.items():
        if ".layers." in key:
            of_layers[int(key.split(".layers.")[1].split(".")[0])] += size
        elif not key.startswith("language_model."):
            vision += size
    for index, counted in of_layers.items():
        layer = costs.layer_parameters(config.text, index)
        assert layer.dense + layer.expert == counted
    assert costs.vision_parameters(config) == vision
    first, last = costs.edge_parameters(config.text)
    assert first + last + sum(of_layers.values()) + vision == sum(sizes.values())


def test_flops_of_k25_are_those_of_the_specification() -> None:
    text = preset("k25").text
    work = costs.text_work(text, 4096)
    assert work.gemm + work.grouped_gemm == pytest.approx(63.4e9, rel=1e-3)
    assert work.attention == pytest.approx(61 * 2 * 2048 * 64 * (192 + 128), rel=1e-3)
    vision = preset("k25").vision
    assert vision is not None
    clip = costs.vision_work(vision, 7168, (1, 64, 64))
    assert clip.attention / 4096 == pytest.approx(0.51e9, rel=0.02)
    blocks_alone = clip.gemm / 4096 - 2.0 * 4608 * (4608 + 7168) / 4
    assert blocks_alone == pytest.approx(0.82e9, rel=0.02)


def test_dense_products_are_what_torch_counts() -> None:
    config = preset("tiny")
    model = KimiK25(config)
    layer = model.language_model.model.layers["0"]
    tokens = 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.language_model.model.embed_tokens(torch.zeros(1, dtype=torch.int64))
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        model.hidden_states(ids)
    attention = costs.attention_work(config.text, tokens)
    dense = costs.dense_mlp_work(config.text)
    experts = costs.experts_work(config.text)
    layers = config.text.num_hidden_layers
    products = tokens * (layers * attention.gemm + dense.gemm + (layers - 1) * experts.gemm)
    counted = counter.get_flop_counts()["Global"]
    assert layer is not None
    found = sum(count for op, count in counted.items() if "attention" not in str(op))
    assert found == products


def test_newton_schulz_counts_its_products() -> None:
    with FlopCounterMode(display=False) as counter:
        x = torch.randn(24, 40)
        for _ in range(5):
            square = x @ x.T
            x = x + (square + square @ square) @ x
    assert counter.get_total_flops() == costs.newton_schulz_flops(40, 24)
