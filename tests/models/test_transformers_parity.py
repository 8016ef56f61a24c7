"""The model against transformers' kimi_k25: logits, gradients, routing and tables."""

import dataclasses
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding
from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25VisionRotaryEmbedding
from transformers.vision_utils import get_vision_position_ids

from k25sys.models import YarnConfig, rope
from k25sys.models.presets import preset
from tests.models.cases import (
    ModelCase,
    model_cases,
    plain_case,
    relative_error,
    to_transformers,
    transformers_twin,
    twin_logits,
)


def routing_of(model: torch.nn.Module, which: int) -> list[Tensor]:
    """Collects what each router chooses, as sorted ids."""
    chosen: list[Tensor] = []

    def record(_module: torch.nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> None:
        chosen.append(output[which].long().sort(-1).values)

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(record)
    return chosen


@settings(max_examples=120)
@given(case=model_cases())
def test_logits_gradients_and_routing_equal_transformers(case: ModelCase) -> None:
    model = case.model()
    twin = transformers_twin(case, model)
    ours_chosen, theirs_chosen = routing_of(model, 1), routing_of(twin, 2)
    ids, pixels, grid = case.tensors()
    ours, theirs = model(ids, pixels, grid), twin_logits(twin, ids, pixels, grid)
    assert relative_error(ours, theirs) <= 1e-5
    assert len(ours_chosen) == len(theirs_chosen) == max(case.layers - case.dense_layers, 0)
    for ours_TK, theirs_TK in zip(ours_chosen, theirs_chosen, strict=True):
        assert torch.equal(ours_TK, theirs_TK)

    direction = torch.randn(ours.shape)
    for logits in (ours, theirs):
        (logits * direction).sum().backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained}
    wanted = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in twin.named_parameters()}
    grads = to_transformers(grads, case.vision_heads)
    assert grads.keys() == wanted.keys()
    largest = max(grad.abs().max().item() for grad in wanted.values())
    for name, want in wanted.items():
        # Gradients that are zero but for rounding (queries of a token that sees only itself) are measured against 1% of
        # the largest gradient.
        error = (grads[name] - want).abs().max().item() / max(want.abs().max().item(), 1e-2 * largest)
        assert error <= 1e-4, f"{name}: {error}"


def test_rotary_tables_of_the_language_model_are_exact() -> None:
    text = preset("k25").text
    assert text.yarn is not None
    rope_parameters = {"rope_type": "yarn", "rope_theta": text.rope_theta, **vars(text.yarn)}
    for parameters, config in (
        (rope_parameters, text),
        ({"rope_type": "default", "rope_theta": 50000.0}, preset("moonlight").text),
    ):
        reference = DeepseekV3RotaryEmbedding(
            DeepseekV3Config(rope_parameters=parameters, qk_rope_head_dim=64, max_position_embeddings=262144)
        )
        assert torch.equal(rope.inverse_frequencies(config), reference.inv_freq)
        positions = torch.tensor([[0, 1, 2, 4095, 4096, 131071, 262143]])
        cos, sin = reference(torch.zeros(1), positions)
        ours_cos, ours_sin = rope.text_tables(config, positions[0])
        assert torch.equal(ours_cos, cos[0, :, :32])
        assert torch.equal(ours_sin, sin[0, :, :32])


@given(
    dim=st.sampled_from((2, 8, 64)), theta=st.sampled_from((10.0, 1e4, 5e4)), factor=st.sampled_from((1.0, 4.0, 64.0)),
    original=st.sampled_from((8, 4096, 10**7)), fast=st.sampled_from((2.0, 32.0)), slow=st.sampled_from((0.5, 1.9)),
    mscale=st.sampled_from((0.7, 1.0)),
)  # fmt: skip
def test_any_yarn_is_exact(
    dim: int, theta: float, factor: float, original: int, fast: float, slow: float, mscale: float
) -> None:
    fields = {
        "factor": factor, "original_max_position_embeddings": original, "beta_fast": fast, "beta_slow": slow,
        "mscale": mscale, "mscale_all_dim": 0.9,
    }  # fmt: skip
    config = dataclasses.replace(
        preset("tiny").text, qk_rope_head_dim=dim, rope_theta=theta, yarn=YarnConfig(**fields)
    )  # fmt: skip
    parameters = {"rope_type": "yarn", "rope_theta": theta, **fields}
    reference = DeepseekV3RotaryEmbedding(
        DeepseekV3Config(rope_parameters=parameters, qk_rope_head_dim=dim, max_position_embeddings=original)
    )
    assert torch.equal(rope.inverse_frequencies(config), reference.inv_freq)
    assert rope.table_multiplier(config) == reference.attention_scaling


def test_yarn_of_k25_has_the_figures_of_the_specification() -> None:
    text = preset("k25").text
    plain = 50000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    kept = rope.inverse_frequencies(text).double() / plain
    torch.testing.assert_close(kept[:9], torch.ones(9, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(kept[20:], torch.full((12,), 1 / 64, dtype=torch.float64), rtol=1e-6, atol=0)
    assert ((kept[9:20] < 1) & (kept[9:20] > 1 / 64)).all()
    assert rope.table_multiplier(text) == 1.0
    assert abs(rope.softmax_scale(text) - 0.1446796) < 1e-7
    assert rope.softmax_scale(preset("moonlight").text) == 192**-0.5


def test_rotary_tables_of_the_vision_encoder_are_exact() -> None:
    case = plain_case(vision_head_dim=72, clips=((1, 6, 8), (3, 4, 10), (4, 2, 2)))
    vision = case.config().vision
    assert vision is not None
    theirs: Any = case.hf_config().vision_config
    reference = Kimi_K25VisionRotaryEmbedding(theirs)
    positions = get_vision_position_ids(torch.tensor(case.clips), spatial_merge_size=1)
    cos, sin = reference(torch.zeros(1), positions)
    ours_cos, ours_sin = rope.vision_tables(vision, case.clips, torch.device("cpu"))
    assert torch.equal(ours_cos, cos[:, :36])
    assert torch.equal(ours_sin, sin[:, :36])
