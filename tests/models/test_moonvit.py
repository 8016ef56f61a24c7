"""MoonViT-3D: clips of different lengths in one call, positions, and the independence of clips."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers.models.kimi_k25 import modeling_kimi_k25

from k25sys.models.config import VisionConfig
from k25sys.models.moonvit import MoonViT3D, PositionEmbedding
from tests.models.cases import ModelCase, model_cases, plain_case, relative_error, transformers_twin


@settings(max_examples=40)
@given(case=model_cases(clips=5).filter(lambda case: len({t for t, _, _ in case.clips}) > 1))
def test_mixed_lengths_equal_the_merger_of_transformers(case: ModelCase) -> None:
    model = case.model()
    twin = transformers_twin(case, model).model.vision_tower
    _, pixels, grid = case.tensors()
    assert pixels is not None
    assert grid is not None
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        # transformers cannot index clips of different lengths; its method temporal_patch_merger can pool them.
        patch.setattr(
            modeling_kimi_k25, "get_vision_temporal_merge_index", lambda *_args, **_kwargs: torch.zeros(1, 1, 4).long()
        )
        hidden = twin(pixels, grid).last_hidden_state
        want = twin.temporal_patch_merger(hidden, grid)
        pooled = model.vision_tower(pixels, grid)
    assert relative_error(pooled, torch.as_tensor(want).view(pooled.shape)) <= 1e-5


@settings(max_examples=30)
@given(case=model_cases(clips=5).filter(lambda case: len(case.clips) > 1))
def test_clips_together_equal_clips_alone(case: ModelCase) -> None:
    tower = case.model().vision_tower
    _, pixels, grid = case.tensors()
    assert pixels is not None
    assert grid is not None
    with torch.no_grad():
        alone = [tower(part, clip[None]) for part, clip in zip(pixels.split(grid.prod(1).tolist()), grid, strict=True)]
        assert relative_error(tower(pixels, grid), torch.cat(alone)) <= 1e-5


@given(t=st.integers(1, 4), h=st.sampled_from((2, 4, 10)), w=st.sampled_from((2, 6, 12)))
def test_positions_follow_the_specification(t: int, h: int, w: int) -> None:
    config = VisionConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, position_height=5,
        position_width=7,
    )  # fmt: skip
    embedding = PositionEmbedding(config)
    torch.nn.init.normal_(embedding.weight)
    rows = embedding([(t, h, w)]).view(t, h, w, 16)
    grid = embedding.weight.permute(2, 0, 1)[None]
    space = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    for frame in range(t):
        time = torch.zeros(16)
        if t > 1:
            angles = frame / 10000 ** (torch.arange(0, 16, 2) / 16)
            time = torch.cat([angles.sin(), angles.cos()])
        torch.testing.assert_close(rows[frame], space + time, rtol=1e-5, atol=1e-6)


def test_a_still_clip_of_its_grids_size_gets_the_learned_rows_exactly() -> None:
    model = plain_case().model()
    positions = model.vision_tower.patch_embed.pos_emb
    assert torch.equal(positions([(1, 4, 4)]), positions.weight.flatten(0, 1))


def test_the_encoder_alone_takes_bfloat16_and_int32_grids() -> None:
    config = VisionConfig(hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    tower = MoonViT3D(config)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pixels, grid = torch.randn(16, 3, 14, 14), torch.tensor([[1, 2, 4], [2, 2, 2]], dtype=torch.int32)
    exact = tower(pixels, grid)
    assert relative_error(tower.bfloat16()(pixels, grid).float(), exact) < 0.05
