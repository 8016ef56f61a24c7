"""Random small models and inputs, and the same model in transformers.

The conversion of names here is written from the specification, apart from the one that the package uses for files.
"""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

from k25sys.models import KimiK25, KimiK25Config

VOCABULARY = 64
MEDIA_PAD = 60


@dataclass(frozen=True, kw_only=True)
class ModelCase:
    """A model and a batch: `clips` are (t, h, w), spread in order over the rows of the batch."""

    layers: int
    dense_layers: int
    hidden: int
    heads: int
    q_rank: int | None
    kv_rank: int
    nope: int
    rope: int
    value: int
    experts: int
    top_k: int
    shared: int
    yarn: bool
    vision_heads: int
    vision_head_dim: int
    vision_layers: int
    position_grid: int
    rows: int
    length: int
    clips: tuple[tuple[int, int, int], ...]
    seed: int
    positions: int = 512

    def hf_config(self) -> Kimi_K25Config:
        """The config of the model in transformers."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 50000.0}
        if self.yarn:
            rope = {
                "rope_type": "yarn", "rope_theta": 50000.0, "factor": 8.0, "original_max_position_embeddings": 64,
                "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.8,
            }  # fmt: skip
        text = {
            "vocab_size": VOCABULARY, "hidden_size": self.hidden, "intermediate_size": 40, "moe_intermediate_size": 24,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.heads,
            "q_lora_rank": self.q_rank, "kv_lora_rank": self.kv_rank, "qk_nope_head_dim": self.nope,
            "qk_rope_head_dim": self.rope, "v_head_dim": self.value, "n_routed_experts": self.experts,
            "num_experts_per_tok": self.top_k, "n_shared_experts": self.shared, "n_group": 1, "topk_group": 1,
            "first_k_dense_replace": self.dense_layers, "routed_scaling_factor": 1.7, "rms_norm_eps": 1e-5,
            "max_position_embeddings": self.positions, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip
        vision = {
            "hidden_size": self.vision_heads * self.vision_head_dim, "intermediate_size": 36,
            "num_hidden_layers": self.vision_layers, "num_attention_heads": self.vision_heads,
            "pos_emb_height": self.position_grid, "pos_emb_width": self.position_grid,
        }  # fmt: skip
        return Kimi_K25Config(
            text_config=text, vision_config=vision, image_token_id=MEDIA_PAD, video_token_id=VOCABULARY + 1,
            vision_start_token_id=61, vision_end_token_id=62, tie_word_embeddings=False,
            projection_hidden_size=vision["hidden_size"],
        )  # fmt: skip

    def config(self) -> KimiK25Config:
        """Ours, read from that of transformers."""
        return KimiK25Config.from_hf_config(self.hf_config().to_dict())

    def model(self) -> KimiK25:
        """Ours with weights large enough that a wrong detail shows."""
        generator = torch.Generator().manual_seed(self.seed)
        model = KimiK25(self.config(), generator=generator)
        randomize(model, generator)
        return model

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """input_ids_BS, pixel_values and grid_thw."""
        generator = torch.Generator().manual_seed(self.seed)
        slots = [h * w // 4 for _, h, w in self.clips]
        length = self.length + -(-sum(slots) // self.rows)
        ids = torch.randint(0, MEDIA_PAD, (self.rows * length,), generator=generator)
        where = torch.randperm(len(ids), generator=generator)[: sum(slots)].sort().values
        ids[where] = MEDIA_PAD
        if not self.clips:
            return ids.view(self.rows, length), None, None
        patches = sum(t * h * w for t, h, w in self.clips)
        pixels = torch.randn(patches, 3, 14, 14, generator=generator)
        return ids.view(self.rows, length), pixels, torch.tensor(self.clips)


def model_cases(clips: int = 4, frames: int = 4, rows: int = 2) -> st.SearchStrategy[ModelCase]:
    """Up to `clips` clips of up to `frames` frames; a part of the cases has none."""
    clip = st.tuples(st.integers(1, frames), st.sampled_from((2, 4, 6)), st.sampled_from((2, 4, 8)))
    return st.builds(
        ModelCase,
        layers=st.integers(1, 3),
        dense_layers=st.integers(0, 1),
        hidden=st.sampled_from((16, 32, 56)),
        heads=st.integers(1, 4),
        q_rank=st.sampled_from((None, 8, 20)),
        kv_rank=st.sampled_from((8, 12, 24)),
        nope=st.sampled_from((4, 8, 12)),
        rope=st.sampled_from((2, 8, 12)),
        value=st.sampled_from((4, 8, 20)),
        experts=st.integers(4, 9),
        top_k=st.integers(1, 4),
        shared=st.integers(1, 2),
        yarn=st.booleans(),
        vision_heads=st.integers(1, 3),
        vision_head_dim=st.sampled_from((8, 12)),
        vision_layers=st.integers(1, 2),
        position_grid=st.sampled_from((4, 7)),
        rows=st.integers(1, rows),
        length=st.integers(1, 20),
        clips=st.lists(clip, max_size=clips).map(tuple),
        seed=st.integers(0, 2**31),
    )


@torch.no_grad()
def randomize(model: KimiK25, generator: torch.Generator) -> None:
    """Draws every parameter, the routers' biases, gains and biases of norms included."""
    for name, parameter in model.named_parameters():
        scale = 0.2 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
        if "experts." in name and parameter.dim() == 3:
            scale = parameter.shape[-1] ** -0.5
        if "embed" in name:
            scale = 0.7
        if name.endswith("e_score_correction_bias"):
            scale = 0.1
        parameter.normal_(0.0, scale, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1.0)


def to_transformers(tensors: dict[str, Tensor], num_vision_heads: int) -> dict[str, Tensor]:
    """Our names and row orders to those of transformers, for weights or gradients."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = name
        for old, other in (
            ("language_model.model.", "model.language_model."),
            ("language_model.lm_head.", "lm_head."),
            ("mm_projector.proj.0.", "model.mm_projector.in_proj."),
            ("mm_projector.proj.2.", "model.mm_projector.out_proj."),
            ("mm_projector.pre_norm.", "model.mm_projector.pre_norm."),
            ("vision_tower.encoder.final_layernorm.", "model.vision_tower.final_layernorm."),
            ("vision_tower.encoder.blocks.", "model.vision_tower.layers."),
            ("vision_tower.patch_embed.pos_emb.weight", "model.vision_tower.patch_embed.pos_emb.position_embeddings"),
            ("vision_tower.patch_embed.", "model.vision_tower.patch_embed."),
        ):
            if name.startswith(old):
                new = other + name.removeprefix(old)
                break
        if "vision_tower.layers." in new:
            for old, other in ((".norm1.", ".norm2."), (".norm0.", ".norm1."), (".fc1.", ".fc2."), (".fc0.", ".fc1.")):
                if old in new:
                    new = new.replace(old, other)
                    break
            new = new.replace(".wo.", ".attn.proj.")
        if ".wqkv." in new:
            q, k, v = tensor.chunk(3)
            for letter, part in (("q", _halves(q, num_vision_heads)), ("k", _halves(k, num_vision_heads)), ("v", v)):
                renamed[new.replace(".wqkv.", f".attn.{letter}_proj.")] = part
        else:
            renamed[new] = tensor
    return renamed


def _halves(rows: Tensor, heads: int) -> Tensor:
    """Rows 0, 2, 4, ... of each head first, then 1, 3, 5, ..."""
    per_head = rows.reshape(heads, -1, *rows.shape[1:])
    return torch.cat([per_head[:, 0::2], per_head[:, 1::2]], 1).reshape(rows.shape)


def transformers_twin(case: ModelCase, model: KimiK25) -> Kimi_K25ForConditionalGeneration:
    """The model of transformers with the weights of ours; every one of its parameters is set."""
    twin = Kimi_K25ForConditionalGeneration._from_config(
        case.hf_config(), attn_implementation="eager", experts_implementation="eager"
    )
    twin.load_state_dict(to_transformers(model.state_dict(), case.vision_heads), strict=True)
    return twin


def twin_logits(twin: Any, ids_BS: Tensor, pixels: Tensor | None, grid: Tensor | None) -> Tensor:
    """Logits of transformers; clip by clip and through inputs_embeds, which it needs for clips of several frames."""
    if pixels is None or grid is None:
        return twin(input_ids=ids_BS).logits
    if (grid[:, 0] == 1).all():
        return twin(input_ids=ids_BS, pixel_values=pixels, image_grid_thw=grid).logits
    embeds = twin.get_input_embeddings()(ids_BS)
    features = []
    for patches, clip in zip(pixels.split(grid.prod(1).tolist()), grid, strict=True):
        features.append(twin.model.mm_projector(twin.model.vision_tower(patches, clip[None]).pooler_output)[:, 0])
    embeds = embeds.masked_scatter((ids_BS == MEDIA_PAD)[..., None], torch.cat(features))
    return twin(inputs_embeds=embeds).logits


def plain_case(**changes: Any) -> ModelCase:
    """A model of three layers with an image and two videos, for what does not vary over models."""
    sizes: dict[str, Any] = {
        "layers": 3, "dense_layers": 1, "hidden": 32, "heads": 2, "q_rank": 20, "kv_rank": 12, "nope": 8, "rope": 8,
        "value": 4, "experts": 6, "top_k": 2, "shared": 1, "yarn": True, "vision_heads": 2, "vision_head_dim": 12,
        "vision_layers": 2, "position_grid": 4, "rows": 2, "length": 9, "clips": ((1, 4, 6), (3, 2, 4), (4, 2, 2)),
        "seed": 1,
    }  # fmt: skip
    return ModelCase(**{**sizes, **changes})


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value wanted."""
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()
