"""The whole model: sizes and names of the released one, initialisation, fusion, packing, dtypes, bad arguments."""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k25sys.errors import DTypeError
from k25sys.models import KimiK25, generate
from k25sys.models.presets import preset
from tests.models.cases import MEDIA_PAD, ModelCase, model_cases, plain_case, relative_error

RELEASED_SHAPES = {
    "language_model.lm_head.weight": (163840, 7168),
    "language_model.model.embed_tokens.weight": (163840, 7168),
    "language_model.model.norm.weight": (7168,),
    "language_model.model.layers.L.input_layernorm.weight": (7168,),
    "language_model.model.layers.L.post_attention_layernorm.weight": (7168,),
    "language_model.model.layers.L.self_attn.q_a_proj.weight": (1536, 7168),
    "language_model.model.layers.L.self_attn.q_a_layernorm.weight": (1536,),
    "language_model.model.layers.L.self_attn.q_b_proj.weight": (12288, 1536),
    "language_model.model.layers.L.self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
    "language_model.model.layers.L.self_attn.kv_a_layernorm.weight": (512,),
    "language_model.model.layers.L.self_attn.kv_b_proj.weight": (16384, 512),
    "language_model.model.layers.L.self_attn.o_proj.weight": (7168, 8192),
    "language_model.model.layers.L.mlp.gate_proj.weight": (18432, 7168),
    "language_model.model.layers.L.mlp.up_proj.weight": (18432, 7168),
    "language_model.model.layers.L.mlp.down_proj.weight": (7168, 18432),
    "language_model.model.layers.L.mlp.gate.weight": (384, 7168),
    "language_model.model.layers.L.mlp.gate.e_score_correction_bias": (384,),
    "language_model.model.layers.L.mlp.shared_experts.gate_proj.weight": (2048, 7168),
    "language_model.model.layers.L.mlp.shared_experts.up_proj.weight": (2048, 7168),
    "language_model.model.layers.L.mlp.shared_experts.down_proj.weight": (7168, 2048),
    "language_model.model.layers.L.mlp.experts.gate_up_proj": (384, 4096, 7168),
    "language_model.model.layers.L.mlp.experts.down_proj": (384, 7168, 2048),
    "vision_tower.patch_embed.proj.weight": (1152, 3, 14, 14),
    "vision_tower.patch_embed.proj.bias": (1152,),
    "vision_tower.patch_embed.pos_emb.weight": (64, 64, 1152),
    "vision_tower.encoder.blocks.L.wqkv.weight": (3456, 1152),
    "vision_tower.encoder.blocks.L.wqkv.bias": (3456,),
    "vision_tower.encoder.blocks.L.wo.weight": (1152, 1152),
    "vision_tower.encoder.blocks.L.wo.bias": (1152,),
    "vision_tower.encoder.blocks.L.norm0.weight": (1152,),
    "vision_tower.encoder.blocks.L.norm0.bias": (1152,),
    "vision_tower.encoder.blocks.L.norm1.weight": (1152,),
    "vision_tower.encoder.blocks.L.norm1.bias": (1152,),
    "vision_tower.encoder.blocks.L.mlp.fc0.weight": (4304, 1152),
    "vision_tower.encoder.blocks.L.mlp.fc0.bias": (4304,),
    "vision_tower.encoder.blocks.L.mlp.fc1.weight": (1152, 4304),
    "vision_tower.encoder.blocks.L.mlp.fc1.bias": (1152,),
    "vision_tower.encoder.final_layernorm.weight": (1152,),
    "vision_tower.encoder.final_layernorm.bias": (1152,),
    "mm_projector.pre_norm.weight": (1152,),
    "mm_projector.pre_norm.bias": (1152,),
    "mm_projector.proj.0.weight": (4608, 4608),
    "mm_projector.proj.0.bias": (4608,),
    "mm_projector.proj.2.weight": (7168, 4608),
    "mm_projector.proj.2.bias": (7168,),
}


def test_k25_has_the_released_names_shapes_and_numbers_of_parameters() -> None:
    with torch.device("meta"):
        model = KimiK25(preset("k25"))
    counts = {"language_model": 0, "vision_tower": 0, "mm_projector": 0}
    layers: dict[str, set[int]] = {name: set() for name in RELEASED_SHAPES}
    for name, tensor in model.state_dict().items():
        counts[name.split(".")[0]] += tensor.numel()
        pattern = re.sub(r"\.(layers|blocks)\.\d+\.", r".\1.L.", name)
        assert tuple(tensor.shape) == RELEASED_SHAPES[pattern], name
        layers[pattern].update(int(number) for number in re.findall(r"\.(?:layers|blocks)\.(\d+)\.", name))
    # The routers' biases, 60 x 384, count: they are tensors of the checkpoint.
    assert counts == {"language_model": 1026408232448, "vision_tower": 416866032, "mm_projector": 54277888}
    for pattern, found in layers.items():
        dense = re.search(r"mlp\.(gate|up|down)_proj", pattern)
        language = {0} if dense else set(range("mlp" in pattern, 61))
        want = set(range(27)) if "blocks" in pattern else language if "layers" in pattern else set()
        assert found == want, pattern
    parts = (model.language_model, model.vision_tower, model.mm_projector)
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == list(counts.values())
    biases = [p for name, p in model.named_parameters() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 60
    assert {bias.dtype for bias in biases} == {torch.float32}


def test_moonlight_has_sixteen_billion_parameters() -> None:
    with torch.device("meta"):
        model = KimiK25(preset("moonlight"))
    total = sum(tensor.numel() for tensor in model.language_model.state_dict().values())
    attention = 2048 * 16 * 192 + 2048 * 576 + 512 + 512 * 16 * 256 + 16 * 128 * 2048
    experts = 3 * 2048 * 1408 * (64 + 2) + 64 * 2048 + 64
    dense = 3 * 2048 * 11264
    assert total == 27 * (attention + 2 * 2048) + 26 * experts + dense + 2 * 163840 * 2048 + 2048 == 15_960_110_208
    assert model.get_parameter("language_model.model.layers.5.self_attn.q_proj.weight").shape == (16 * 192, 2048)


def test_initialisation_follows_the_generator_also_from_the_meta_device() -> None:
    config = preset("tiny")
    model = KimiK25(config, generator=torch.Generator().manual_seed(3))
    with torch.device("meta"):
        late = KimiK25(config)
    late.to_empty(device="cpu")
    for tensor in late.state_dict().values():
        tensor.fill_(float("nan"))
    late.reset_parameters(torch.Generator().manual_seed(3))
    for name, tensor in late.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
        if tensor.dim() > 1:
            assert abs(tensor.std().item() / 0.02 - 1) < 0.1, name
    other = KimiK25(config, generator=torch.Generator().manual_seed(4))
    assert not torch.equal(other.language_model.lm_head.weight, model.language_model.lm_head.weight)


def router_biases(model: KimiK25) -> dict[str, torch.nn.Parameter]:
    """By name in the state dict."""
    return {name: p for name, p in model.named_parameters() if name.endswith("e_score_correction_bias")}


def test_the_routers_bias_stays_float32_and_unrounded() -> None:
    model = plain_case().model()
    before = {name: bias.clone() for name, bias in router_biases(model).items()}
    assert len(before) == 2
    for change in (lambda: model.to(torch.bfloat16), model.half, model.double, lambda: model.to("cpu")):
        change()
        for name, bias in router_biases(model).items():
            assert bias.dtype == torch.float32
            assert torch.equal(bias, before[name])
            assert isinstance(bias, torch.nn.Parameter)
            assert not bias.requires_grad
    assert model.language_model.lm_head.weight.dtype == torch.float64
    assert before.keys() <= model.state_dict().keys()


@pytest.mark.parametrize("all_require", [False, True])
def test_optimisers_pass_over_the_routers_bias(all_require: bool) -> None:
    """Also after the model was frozen and unfrozen as a whole."""
    case = plain_case()
    model = case.model()
    if all_require:
        model.requires_grad_(True)
    before = {name: bias.clone() for name, bias in router_biases(model).items()}
    head = model.language_model.lm_head.weight.detach().clone()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(*case.tensors()).square().mean().backward()
    optimiser.step()
    assert not torch.equal(model.language_model.lm_head.weight, head)
    for name, bias in router_biases(model).items():
        assert bias.grad is None
        assert torch.equal(bias, before[name])


def test_float16_is_refused_at_the_front() -> None:
    case = plain_case()
    model = case.model().half()
    ids, pixels, grid = case.tensors()
    error = "KimiK25: weights: got torch.float16, accepted bfloat16, float32 or float64; convert the model"
    with pytest.raises(DTypeError, match=error):
        model(ids, pixels, grid)
    with pytest.raises(DTypeError, match=error):
        generate(model, [[1, 2]], max_new_tokens=2)


@settings(max_examples=15)
@given(case=model_cases())
def test_bfloat16_is_float32_rounded(case: ModelCase) -> None:
    model = case.model().to(torch.bfloat16)
    ids, pixels, grid = case.tensors()
    logits = model(ids, pixels, grid)
    assert logits.dtype == torch.bfloat16
    (logits.float().square().mean()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    exact = model.float()(ids, pixels, grid)
    # A rounding that changes the choice of an expert changes that token: the median, not the largest error.
    errors = (logits.float() - exact).abs().amax(-1) / exact.abs().amax()
    assert errors.median() < 0.05


@settings(max_examples=40)
@given(case=model_cases(), data=st.data())
def test_packed_documents_equal_documents_alone(case: ModelCase, data: st.DataObject) -> None:
    model = case.model()
    ids, pixels, grid = case.tensors()
    packed = ids.view(1, -1)
    cuts = sorted(data.draw(st.lists(st.integers(0, packed.shape[1]), max_size=4), label="cuts"))
    bounds = [0, *cuts, packed.shape[1]]
    with torch.no_grad():
        features = model.encode_media(pixels, grid)
        together = model(packed, media_features=features, cu_seqlens=torch.tensor(bounds))
        row = 0
        for begin, end in pairwise(bounds):
            document = packed[:, begin:end]
            rows = int((document == MEDIA_PAD).sum())
            part = None if features is None else features[row : row + rows]
            row += rows
            if end > begin:
                alone = model(document, media_features=part)
                assert relative_error(together[:, begin:end], alone) <= 1e-5


def test_a_batch_equals_its_rows_packed() -> None:
    case = plain_case()
    model, (ids, pixels, grid) = case.model(), case.tensors()
    length = ids.shape[1]
    packed = model(ids.view(1, -1), pixels, grid, cu_seqlens=[0, length, 2 * length])
    assert torch.equal(model(ids, pixels, grid), packed.view(2, length, -1))


def test_a_document_does_not_see_its_neighbours() -> None:
    model = plain_case().model()
    ids = torch.arange(1, 25)[None]
    bounds = [0, 7, 15, 24]
    before = model(ids, cu_seqlens=bounds)
    other = ids.clone()
    other[0, 7:15] = 3
    after = model(other, cu_seqlens=bounds)
    same = torch.tensor([*range(7), *range(15, 24)])
    assert torch.equal(before[:, same], after[:, same])
    assert not torch.equal(before[:, 7:15], after[:, 7:15])
    later = ids.clone()
    later[0, 5] = 9
    assert torch.equal(model(later, cu_seqlens=bounds)[:, :5], before[:, :5]), "a token saw a later one"


def test_no_argument_is_changed_and_a_second_call_is_the_same() -> None:
    case = plain_case()
    model, tensors = case.model(), case.tensors()
    copies = [tensor.clone() if tensor is not None else None for tensor in tensors]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = model(*tensors)
    assert torch.equal(first, model(*tensors))
    for tensor, copy in zip(tensors, copies, strict=True):
        assert tensor is not None
        assert copy is not None
        assert torch.equal(tensor, copy)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_the_router_is_float32_under_autocast() -> None:
    model = plain_case().model()
    router: Any = model.get_submodule("language_model.model.layers.1.mlp.gate")
    x_TD = torch.randn(50, 32)
    weights, experts = router(x_TD)
    with torch.autocast("cpu", torch.bfloat16):
        cast_weights, cast_experts = router(x_TD)
        logits = model(torch.arange(40)[None])
    assert torch.equal(weights, cast_weights)
    assert torch.equal(experts, cast_experts)
    assert torch.isfinite(logits).all()


def test_an_empty_batch_and_a_text_model_work() -> None:
    model = plain_case().model()
    assert model(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 64)
    none = model.encode_media(torch.zeros(0, 3, 14, 14), torch.zeros(0, 3, dtype=torch.int64))
    assert none is not None
    assert none.shape == (0, 32)


BAD_CALLS: list[tuple[str, Callable[[KimiK25, Any, Any, Any], Any], type[Exception], str]] = [
    ("ids_float", lambda m, i, p, g: m(i.float()), TypeError, "input_ids_BS: got torch.float32, accepted int32 or"),
    ("ids_flat", lambda m, i, p, g: m(i[0]), ValueError, r"input_ids_BS: got \(14,\), accepted \(B, S\)"),
    ("ids_list", lambda m, i, p, g: m([[1]]), TypeError, "input_ids_BS: got list, accepted a torch.Tensor"),
    ("id_low", lambda m, i, p, g: m(i - 61, p, g), ValueError, "input_ids_BS: got token -61, accepted 0 to 63"),
    ("id_high", lambda m, i, p, g: m(i + 4, p, g), ValueError, "input_ids_BS: got token 64, accepted 0 to 63"),
    ("no_media", lambda m, i, p, g: m(i), ValueError, r"9 positions of media_pad \(id 60\), accepted 0, the rows"),
    ("few_media", lambda m, i, p, g: m(i, p[:24], g[:1]), ValueError, r"9 positions of .*, accepted 6, the rows"),
    ("no_grid", lambda m, i, p, g: m(i, p), TypeError, "grid_thw: got None, accepted both"),
    ("no_pixels", lambda m, i, p, g: m(i, None, g), TypeError, "pixel_values: got None, accepted both"),
    ("few_pixels", lambda m, i, p, g: m(i, p[1:], g), ValueError, "got 63 patches, accepted 64 patches"),
    ("pixel_ints", lambda m, i, p, g: m(i, p.int(), g), TypeError, "pixel_values: got torch.int32, accepted a float"),
    ("pixel_shape", lambda m, i, p, g: m(i, p[:, :1], g), ValueError, r"accepted \(P, 3, 14, 14\)"),
    ("grid_float", lambda m, i, p, g: m(i, p, g.float()), TypeError, "grid_thw: got torch.float32, accepted an int"),
    ("grid_shape", lambda m, i, p, g: m(i, p, g[0]), ValueError, r"grid_thw: got \(3,\), accepted \(N, 3\)"),
    ("grid_frames", lambda m, i, p, g: m(i, p, g + torch.tensor([3, 0, 0])), ValueError, r"grid_thw\[1\]: .*1 to 4"),
    ("grid_odd", lambda m, i, p, g: m(i, p, g + torch.tensor([0, 1, 0])), ValueError, r"h a multiple of 2"),
    ("grid_zero", lambda m, i, p, g: m(i, p, g * 0), ValueError, r"grid_thw\[0\]: got \(0, 0, 0\)"),
    ("both", lambda m, i, p, g: m(i, p, g, media_features=p), ValueError, "media_features: got pixels beside it"),
    ("features", lambda m, i, p, g: m(i, media_features=torch.zeros(9, 5)), ValueError, r"\(9, 5\), accepted \(Q"),
    ("cu_float", lambda m, i, p, g: m(i, p, g, cu_seqlens=torch.tensor([0.0, 28])), TypeError, "1-D tensor of int"),
    ("cu_none", lambda m, i, p, g: m(i, p, g, cu_seqlens=[]), ValueError, r"cu_seqlens: got \[\], accepted 0, ..."),
    ("cu_short", lambda m, i, p, g: m(i, p, g, cu_seqlens=[0, 33]), ValueError, "accepted 0, ..., 28"),
    ("cu_falls", lambda m, i, p, g: m(i, p, g, cu_seqlens=[0, 9, 5, 28]), ValueError, "never falling"),
    ("long", lambda m, i, p, g: m(torch.ones(1, 513, dtype=torch.int64)), ValueError, "a document of 513 tokens"),
    ("max_logits", lambda m, i, p, g: m(i, p, g, max_logits_LH=torch.zeros(2)), ValueError, r"shape \(3, 2\)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "kind", "error"), [call[1:] for call in BAD_CALLS], ids=[call[0] for call in BAD_CALLS]
)
def test_bad_arguments_are_refused(call: Callable[..., Any], kind: type[Exception], error: str) -> None:
    case = plain_case()
    with pytest.raises(kind, match=error):
        call(case.model(), *case.tensors())
