"""The table of layouts and swaps: complete, what each module holds, and gradients that sum up to one process's."""

import copy
from itertools import pairwise
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from k25sys import ops
from k25sys.errors import ArgumentValueError, GridError
from k25sys.models import KimiK25
from k25sys.models.documents import Documents
from k25sys.models.presets import preset
from k25sys.parallel import GridSizes, ParameterLayout, RankGrid, WeightGradStore
from k25sys.parallel.collectives import own_rows
from k25sys.parallel.dep import splice
from k25sys.parallel.layout import local_part
from k25sys.training.microbatch import MicroBatch
from k25sys.training.sharding_plan import plan, swap_modules
from tests.models.cases import plain_case
from tests.parallel.parts import gather_parts
from tests.parallel.processes import run_ranks
from tests.parallel.tensor_cases import relative_error
from tests.training.batches import MEDIA_PAD, build_model, make_microbatches, small_config

LAYER = "language_model.model.layers.1."


@pytest.mark.parametrize("name", ["tiny", "small", "moonlight", "k25"])
def test_every_parameter_has_a_layout(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = KimiK25(config)
    layouts = plan(config, GridSizes(data=2, tensor=2, expert=2, expert_tensor=2))
    parameters = dict(model.named_parameters())
    assert list(layouts) == list(parameters)
    assert all(prod(layouts[name].shape) == p.numel() for name, p in parameters.items())
    # Muon takes what AdamW does not: no vector, no embedding, no head, no positions.
    for name, layout in layouts.items():
        vector = parameters[name].dim() < 2
        table = any(part in name for part in ("embed", "lm_head"))
        assert layout.matrix == (not vector and not table), name
        assert layout.expert == (".experts." in name), name


def test_layouts_of_k25() -> None:
    """As the released shapes have them (spec, table of tensors); splits written out by hand."""
    layouts = plan(preset("k25"), GridSizes(data=2, tensor=4, expert=4, expert_tensor=2))
    split = {
        "self_attn.q_b_proj.weight": ((12288, 1536), 0), "self_attn.kv_b_proj.weight": ((16384, 512), 0),
        "self_attn.o_proj.weight": ((7168, 8192), 1), "mlp.shared_experts.gate_proj.weight": ((2048, 7168), 0),
        "mlp.shared_experts.down_proj.weight": ((7168, 2048), 1),
    }  # fmt: skip
    for name, (shape, dim) in split.items():
        expected = ParameterLayout(shape=shape, splits=((dim, "tensor"),), matrix=True)
        assert layouts[LAYER + name] == expected
    shared = {
        "self_attn.q_a_proj.weight": (1536, 7168), "self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
        "self_attn.q_a_layernorm.weight": (1536,), "input_layernorm.weight": (7168,), "mlp.gate.weight": (384, 7168),
    }  # fmt: skip
    for name, shape in shared.items():
        expected = ParameterLayout(shape=shape, matrix=len(shape) == 2, sum_over_tensor=True)
        assert layouts[LAYER + name] == expected
    experts = ((0, "expert"), (2, "expert_tensor"))
    gate_up = ParameterLayout(shape=(384, 2, 2048, 7168), splits=experts, matrix=True, expert=True)
    assert layouts[LAYER + "mlp.experts.gate_up_proj"] == gate_up
    assert prod(gate_up.shape[:-2]) == 768
    down = ParameterLayout(shape=(384, 7168, 2048), splits=experts, matrix=True, expert=True)
    assert layouts[LAYER + "mlp.experts.down_proj"] == down
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        assert layouts[name] == ParameterLayout(shape=(163840, 7168), splits=((0, "tensor"),))
    wqkv = layouts["vision_tower.encoder.blocks.0.wqkv.weight"]
    assert wqkv == ParameterLayout(shape=(3, 1152, 1152), matrix=True, sum_over_tensor=True)


def test_where_the_encoder_lies() -> None:
    config, sizes = preset("tiny"), GridSizes(pipeline=2, tensor=2)
    encoder = [name for name in plan(config, sizes) if not name.startswith("language_model.")]
    assert encoder
    everywhere = plan(config, sizes, vision="dep")
    assert all(everywhere[name].everywhere and not everywhere[name].sum_over_tensor for name in encoder)
    assert not set(encoder) & set(plan(config, sizes, vision="none"))
    apart, in_place = plan(config, sizes, vision="dep", projector="stage0"), plan(config, sizes)
    for name in encoder:
        assert apart[name] == (in_place if name.startswith("mm_projector.") else everywhere)[name]
    with pytest.raises(ArgumentValueError, match=r"plan: vision: got 'stage1', accepted 'stage0', 'dep' or 'none'"):
        plan(config, sizes, vision="stage1")


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        (GridSizes(tensor=8), "plan: num_attention_heads: got 4 over 8 tensor ranks, accepted a multiple of 8"),
        (GridSizes(tensor=3), "num_attention_heads: got 4 over 3"),
        (GridSizes(data=16, expert=16), "experts.gate_up_proj: got 16 ranks along expert, accepted a divisor of 8"),
        (GridSizes(data=3, expert_tensor=3), "got 3 ranks along expert_tensor, accepted a divisor of 64 (dimension 2"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes: GridSizes, text: str) -> None:
    with pytest.raises(GridError) as error:
        plan(preset("tiny"), sizes)
    assert text in str(error.value)


@pytest.mark.parametrize("q_rank", [None, 20])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_swapped_modules_hold_what_the_layouts_say_under_the_same_names(ranks: int, q_rank: int | None) -> None:
    whole, sizes = plain_case(heads=4, q_rank=q_rank).model(), GridSizes(tensor=ranks)
    layouts = plan(whole.config, sizes)
    for rank in range(ranks):
        model = copy.deepcopy(whole)
        swap_modules(model, model.config.text, RankGrid(sizes, rank, "cpu", {}), WeightGradStore())
        assert list(dict(model.named_parameters())) == list(layouts)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, local_part(whole.get_parameter(name), layouts[name], sizes, rank)), name
    with torch.device("meta"):
        empty = KimiK25(whole.config)
    swap_modules(empty, whole.config.text, RankGrid(sizes, 0, "cpu", {}), WeightGradStore())
    assert {name: p.shape for name, p in empty.named_parameters()} == {
        name: local_part(p, layouts[name], sizes, 0).shape for name, p in whole.named_parameters()
    }


def _loss(model: Any, batch: MicroBatch, group: Any) -> Tensor:
    """Through the decoder as it is, on this rank's tokens; the loss is that of all."""
    assert batch.pixel_values is not None
    lengths = tuple(end - begin for begin, end in pairwise(batch.cu_seqlens))
    features_QD = model.encode_media(batch.pixel_values, batch.grid_thw)
    decoder, head = model.language_model.model, model.language_model.lm_head
    x_ND, is_media_T = decoder.embed_tokens(batch.input_ids_T), batch.input_ids_T == MEDIA_PAD
    place_N, is_media_N = (own_rows("test", rows, group) for rows in (is_media_T.cumsum(0) - 1, is_media_T))
    x_ND = splice(x_ND, is_media_N.nonzero()[:, 0], features_QD[place_N[is_media_N]])
    hidden_ND = decoder(x_ND, Documents(lengths, x_ND.device))
    targets = batch.targets_T, batch.loss_mask_T
    if group is None:
        return ops.linear_cross_entropy(hidden_ND, head.weight, *targets, normalizer=batch.normalizer)
    return head.cross_entropy(hidden_ND, *targets, normalizer=batch.normalizer)


def _errors(ranks: int) -> float:
    """Gradients, summed as the layouts say, against one process; in float64, where no rounding hides a missing term."""
    sizes, worst, dtype = GridSizes(tensor=ranks), 0.0, torch.float64
    grid = RankGrid.create(sizes)
    for q_rank in (None, 20):
        whole = build_model(small_config(layers=2, q_lora_rank=q_rank), dtype=dtype)
        ((batch,),) = make_microbatches(data_ranks=1, per_rank=1, dtype=dtype)
        layouts = plan(whole.config, sizes)
        want = _loss(whole, batch, None)
        want.backward()
        model = copy.deepcopy(whole)
        model.zero_grad(set_to_none=True)
        store = WeightGradStore()
        swap_modules(model, model.config.text, grid, store)
        loss = _loss(model, batch, grid.group("tensor"))
        with store.deferring("step"):
            loss.backward()
        store.run("step")
        errors = {"loss": relative_error(loss, want)}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                expected = whole.get_parameter(name).grad
                assert expected is not None, name
                got = gather_parts(_summed(parameter, layouts[name], grid), expected.shape, layouts[name], grid)
                errors[name] = relative_error(got, expected)
        assert max(errors.values()) <= 1e-13, (q_rank, {k: v for k, v in errors.items() if v > 1e-13})
        worst = max(worst, *errors.values())
    return worst


def _summed(parameter: Tensor, layout: ParameterLayout, grid: RankGrid) -> Tensor:
    assert parameter.grad is not None
    total = parameter.grad.clone()
    for axis in (layout.replicas, *(("tensor",) if layout.sum_over_tensor else ())):
        group = grid.group(axis)
        if group is not None:
            dist.all_reduce(total, group=group)
    return total


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_summed_as_the_layouts_say_equal_one_process(ranks: int) -> None:
    """Text and vision, with the decoder's own forward on each rank's tokens."""
    print(f"{max(run_ranks(ranks, _errors, ranks)):.1e}")
