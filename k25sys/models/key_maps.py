"""Names of a model's tensors in each of its layouts: pure functions of names and configuration.

A tensor is known here by its *released* name, one a routed expert's matrix (`...experts.3.gate_proj.weight`). It may be
stored under another name, or as a part of another tensor. Names come in these spellings:
    released      language_model.model.layers.1..., vision_tower.encoder.blocks.0.norm0..., experts one by one
    no inner model   language_model.layers.1..., as re-quantised copies have it
    transformers  model.language_model.layers.1..., model.vision_tower.layers.0.norm1..., experts stacked, q, k, v apart
    saved by transformers   its save_pretrained writes language_model.model.blocks.1..., model.mm_projector.pre_norm and
                  vision_tower.encoder.patch_embed beside released names: an inversion of its loading rules
    wrapped       module., _orig_mod., ... before or inside any of them
`standard_name` brings them to the released spelling; stacked experts are then named as this library's model names them
(`...experts.gate_up_proj`), and q, k, v apart `vision_tower.encoder.blocks.0.attn.q_proj.weight`.
"""

import re
from dataclasses import dataclass

from torch import Tensor

from k25sys.models.config import KimiK25Config, TextConfig, VisionConfig

Shapes = dict[str, tuple[int, ...]]

_DECODER = "language_model.model."
_ENCODER = "vision_tower.encoder.blocks."
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_WQKV = re.compile(rf"{re.escape(_ENCODER)}(\d+)\.wqkv\.(weight|bias)")
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_RENAMES = (
    (re.compile(r"(?:model\.)?(?:language_model\.)?lm_head\."), "language_model.lm_head."),
    (re.compile(r"(?:model\.)?language_model\.(?:model\.)?(?:layers|blocks)\."), _DECODER + "layers."),
    (re.compile(r"(?:model\.)?language_model\.(?:model\.)?(embed_tokens|norm)\."), _DECODER + r"\1."),
    (re.compile(r"(?:model\.)?vision_tower\.encoder\.(blocks|final_layernorm)\."), r"vision_tower.encoder.\1."),
    (re.compile(r"(?:model\.)?vision_tower\.(?:encoder\.)?patch_embed\.proj\."), "vision_tower.patch_embed.proj."),
    (
        re.compile(r"(?:model\.)?vision_tower\.(?:encoder\.)?patch_embed\.pos_emb\.(?:weight|position_embeddings)$"),
        "vision_tower.patch_embed.pos_emb.weight",
    ),
    (re.compile(r"(?:model\.)?vision_tower\.final_layernorm\."), "vision_tower.encoder.final_layernorm."),
    (re.compile(r"(?:model\.)?mm_projector\.(?:proj\.0|in_proj)\."), "mm_projector.proj.0."),
    (re.compile(r"(?:model\.)?mm_projector\.(?:proj\.2|out_proj)\."), "mm_projector.proj.2."),
    (re.compile(r"(?:model\.)?mm_projector\.pre_norm\."), "mm_projector.pre_norm."),
)
_TRANSFORMERS_BLOCK = re.compile(r"(?:model\.)?vision_tower\.layers\.(\d+)\.(.+)\.(weight|bias)$")
_BLOCK_PARTS = (  # of an encoder block: released, transformers
    ("norm0", "norm1"), ("norm1", "norm2"), ("mlp.fc0", "mlp.fc1"), ("mlp.fc1", "mlp.fc2"), ("wo", "attn.proj"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows of a released tensor, and where they are stored.

    The stored tensor `name`, of it the matrix `expert` unless None, of that the rows [start, stop) `rows` unless None,
    hold the released tensor's rows `released_rows`, or all of it for None. `rotary_heads`: the stored rows are in
    transformers' order for rotations, see `to_half_split`; None is the order of the released tensor.
    """

    name: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    released_rows: tuple[int, int] | None = None
    rotary_heads: int | None = None


def is_expert(name: str) -> bool:
    """Whether `name` is the released name of a routed expert's matrix."""
    return _EXPERT.fullmatch(name) is not None


def is_router_bias(name: str) -> bool:
    """Whether `name` is the bias by which experts are selected, which is float32 whatever the rest is."""
    return name.endswith(".e_score_correction_bias")


def released_shapes(config: KimiK25Config) -> Shapes:
    """The shape of every tensor of the model by its released name, experts one by one."""
    text = config.text
    shapes: Shapes = {_DECODER + "embed_tokens.weight": (text.vocab_size, text.hidden_size)}
    for layer in range(text.num_hidden_layers):
        _add(shapes, f"{_DECODER}layers.{layer}.", _decoder_layer(text, layer))
    shapes[_DECODER + "norm.weight"] = (text.hidden_size,)
    shapes["language_model.lm_head.weight"] = (text.vocab_size, text.hidden_size)
    if config.vision is not None:
        shapes.update(_encoder(config.vision, text.hidden_size))
    return shapes


def _decoder_layer(text: TextConfig, layer: int) -> Shapes:
    model, heads, latent = text.hidden_size, text.num_attention_heads, text.kv_lora_rank
    shapes: Shapes = {"input_layernorm.weight": (model,)}
    queries = heads * text.qk_head_dim
    if text.q_lora_rank is None:
        shapes["self_attn.q_proj.weight"] = (queries, model)
    else:
        shapes["self_attn.q_a_proj.weight"] = (text.q_lora_rank, model)
        shapes["self_attn.q_a_layernorm.weight"] = (text.q_lora_rank,)
        shapes["self_attn.q_b_proj.weight"] = (queries, text.q_lora_rank)
    shapes["self_attn.kv_a_proj_with_mqa.weight"] = (latent + text.qk_rope_head_dim, model)
    shapes["self_attn.kv_a_layernorm.weight"] = (latent,)
    shapes["self_attn.kv_b_proj.weight"] = (heads * (text.qk_nope_head_dim + text.v_head_dim), latent)
    shapes["self_attn.o_proj.weight"] = (model, heads * text.v_head_dim)
    shapes["post_attention_layernorm.weight"] = (model,)
    if layer < text.first_k_dense_replace:
        return _add(shapes, "mlp.", _swiglu(model, text.intermediate_size))
    shapes["mlp.gate.weight"] = (text.n_routed_experts, model)
    shapes["mlp.gate.e_score_correction_bias"] = (text.n_routed_experts,)
    width = text.moe_intermediate_size
    for expert in range(text.n_routed_experts):
        _add(shapes, f"mlp.experts.{expert}.", _swiglu(model, width))
    return _add(shapes, "mlp.shared_experts.", _swiglu(model, text.n_shared_experts * width))


def _swiglu(model: int, width: int) -> Shapes:
    return {
        "gate_proj.weight": (width, model),
        "up_proj.weight": (width, model),
        "down_proj.weight": (model, width),
    }


def _encoder(vision: VisionConfig, text_hidden: int) -> Shapes:
    width, merged, inner = vision.hidden_size, vision.merged_size, vision.intermediate_size
    patch, positions = vision.patch_size, (vision.position_height, vision.position_width)
    shapes: Shapes = {
        "vision_tower.patch_embed.proj.weight": (width, 3, patch, patch),
        "vision_tower.patch_embed.proj.bias": (width,),
        "vision_tower.patch_embed.pos_emb.weight": (*positions, width),
    }
    linears = {"wqkv": (3 * width, width), "wo": (width, width), "mlp.fc0": (inner, width), "mlp.fc1": (width, inner)}
    for block in range(vision.num_hidden_layers):
        prefix = f"{_ENCODER}{block}."
        for norm in ("norm0", "norm1"):
            _add(shapes, f"{prefix}{norm}.", _affine(width))
        for linear, shape in linears.items():
            _add(shapes, f"{prefix}{linear}.", _affine(*shape))
    _add(shapes, "vision_tower.encoder.final_layernorm.", _affine(width))
    _add(shapes, "mm_projector.pre_norm.", _affine(width))
    _add(shapes, "mm_projector.proj.0.", _affine(merged, merged))
    return _add(shapes, "mm_projector.proj.2.", _affine(text_hidden, merged))


def _affine(*shape: int) -> Shapes:
    return {"weight": shape, "bias": shape[:1]}


def _add(shapes: Shapes, prefix: str, more: Shapes) -> Shapes:
    shapes.update({prefix + name: shape for name, shape in more.items()})
    return shapes


def standard_name(name: str) -> str:
    """A stored name in the released spelling. One that belongs to no layout comes back as it is, without wrappers."""
    name = _WRAPPER.sub("", name)
    if block := _TRANSFORMERS_BLOCK.fullmatch(name):
        released = {theirs: ours for ours, theirs in _BLOCK_PARTS}
        part = released.get(block[2], block[2])
        return f"{_ENCODER}{block[1]}.{part}.{block[3]}"
    for pattern, released in _RENAMES:
        if pattern.match(name):
            return pattern.sub(released, name, count=1)
    return name


def transformers_name(name: str) -> str:
    """The state-dict name in transformers' Kimi_K25ForConditionalGeneration of a `standard_name`."""
    if name.startswith(_ENCODER):
        block, rest = name.removeprefix(_ENCODER).split(".", 1)
        part, kind = rest.rsplit(".", 1)
        return f"model.vision_tower.layers.{block}.{dict(_BLOCK_PARTS).get(part, part)}.{kind}"
    for ours, theirs in (
        (_DECODER, "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.patch_embed.pos_emb.weight", "model.vision_tower.patch_embed.pos_emb.position_embeddings"),
        ("vision_tower.encoder.final_layernorm.", "model.vision_tower.final_layernorm."),
        ("mm_projector.proj.0.", "model.mm_projector.in_proj."),
        ("mm_projector.proj.2.", "model.mm_projector.out_proj."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return "model." + name


def stacked_piece(name: str, config: KimiK25Config) -> Piece | None:
    """Where the stacked experts of a layer hold one expert's matrix: gate rows, then up rows. None for no expert."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return None
    stack, expert, matrix = match[1], int(match[2]), match[3]
    if matrix == "down":
        return Piece(name=f"{stack}.down_proj", expert=expert)
    width = config.text.moe_intermediate_size
    start = 0 if matrix == "gate" else width
    return Piece(name=f"{stack}.gate_up_proj", expert=expert, rows=(start, start + width))


def split_pieces(name: str, config: KimiK25Config) -> tuple[Piece, ...] | None:
    """Where separate q, k and v hold a block's wqkv, q and k in transformers' order. None for other tensors."""
    match = _WQKV.fullmatch(name)
    if match is None or config.vision is None:
        return None
    width, heads = config.vision.hidden_size, config.vision.num_attention_heads
    return tuple(
        Piece(
            name=f"{_ENCODER}{match[1]}.attn.{part}_proj.{match[2]}",
            released_rows=(i * width, (i + 1) * width),
            rotary_heads=heads if part != "v" else None,
        )
        for i, part in enumerate("qkv")
    )


def model_piece(name: str, config: KimiK25Config) -> Piece:
    """Where KimiK25's state dict holds a released tensor."""
    return stacked_piece(name, config) or Piece(name=name)


def transformers_pieces(name: str, config: KimiK25Config) -> tuple[Piece, ...]:
    """Where transformers' state dict holds a released tensor; the pieces' names are still standard ones."""
    return split_pieces(name, config) or (model_piece(name, config),)


def to_half_split(rows: Tensor, heads: int) -> Tensor:
    """Reorders q or k rows (heads * 2 d, ...) from neighbouring pairs, rows 2 j and 2 j + 1 of a head, to the halves
    that transformers rotates, rows j and d + j."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def from_half_split(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `to_half_split`."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
