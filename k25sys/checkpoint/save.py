"""`save_hf`: a model into a published folder, in the released layout or in transformers'."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k25sys.checkpoint.config_files import CONFIG, LAYOUTS, config_json
from k25sys.checkpoint.int4 import GROUP, check_scale_rule, recover_int4
from k25sys.checkpoint.safetensors import INDEX, ShardWriter
from k25sys.checkpoint.sources import FLOATS, ModelSource, Source
from k25sys.checkpoint.store import MANIFEST, publish
from k25sys.errors import ArgumentTypeError, ArgumentValueError, CheckpointError, DTypeError, listing, message
from k25sys.models.config import KimiK25Config
from k25sys.models.key_maps import (
    Piece,
    is_expert,
    is_router_bias,
    released_shapes,
    to_half_split,
    transformers_name,
    transformers_pieces,
)

EXPERTS = ("bf16", "int4")
SHARD_BYTES = 5 * 10**9


def released_tensors(config: KimiK25Config, *, experts: str = "int4") -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every tensor of the released layout: for Kimi-K2.5 its 208,550 tensors.

    Args:
        config: the model.
        experts: "int4", as released, or "bf16".

    Raises:
        ArgumentValueError: another word for `experts`, or experts whose widths are no multiple of 32 for "int4".
    """
    _check_word("released_tensors", "experts", experts, EXPERTS)
    if experts == "int4":
        _check_groups("released_tensors", config)
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, shape in released_shapes(config).items():
        if experts == "int4" and is_expert(name):
            rows, columns = shape
            stem = name.removesuffix("weight")
            tensors[stem + "weight_packed"] = ((rows, columns // 8), torch.int32)
            tensors[stem + "weight_scale"] = ((rows, columns // GROUP), torch.bfloat16)
            tensors[stem + "weight_shape"] = ((2,), torch.int32)
        else:
            tensors[name] = (shape, torch.float32 if is_router_bias(name) else torch.bfloat16)
    return tensors


def save_hf(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    experts: str = "bf16",
    layout: str = "released",
    scale_rule: str = "amax/7",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    others: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Writes shards, index, config.json and manifest.json to a temporary folder and renames it to `folder`.

    Args:
        model: a KimiK25.
        folder: a new name. `python -m k25sys verify` checks what lies there.
        experts: "bf16" whole, or "int4" packed (released layout). Experts that were loaded from INT4 and have not
            changed are written with the codes and scales they had; others are quantised.
        layout: "released", or "transformers" for the names of its Kimi_K25ForConditionalGeneration.
        scale_rule: of the experts to quantise; see `recover_int4`.
        dtype: of the tensors; None is bfloat16 beside experts in INT4, as released, and else keeps those of the model.
            The router's bias is float32 in any case.
        max_shard_bytes: largest file; a tensor above it has a file to itself.
        others: files to copy beside, under their own names, and to name in the manifest: tiktoken.model, a README, ...

    Raises:
        CheckpointError: `folder` exists, or a file of `others` does not.
        ArgumentTypeError, ArgumentValueError, ConfigError, DeviceError: a wrong argument, or a model that cannot be
            written so. Nothing is left behind.
    """
    source = ModelSource("save_hf", model)
    with torch.no_grad():
        write_hf(
            source, folder, experts=experts, layout=layout, scale_rule=scale_rule, dtype=dtype,
            max_shard_bytes=max_shard_bytes, others=[(Path(path).name, Path(path)) for path in others],
        )  # fmt: skip


def write_hf(
    source: Source,
    folder: str | os.PathLike[str],
    *,
    experts: str,
    layout: str,
    scale_rule: str,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    others: Sequence[tuple[str, Path]],
    describe: Callable[[torch.dtype], dict[str, Any]] | None = None,
) -> None:
    """`save_hf` of any source: `others` are paths in the folder with the files to copy there, `describe` makes another
    config.json of the stored dtype than that of the source's config."""
    _check_word("save_hf", "experts", experts, EXPERTS)
    _check_word("save_hf", "layout", layout, LAYOUTS)
    check_scale_rule("save_hf", scale_rule)
    if isinstance(max_shard_bytes, bool) or not isinstance(max_shard_bytes, int):
        raise ArgumentTypeError(message("save_hf", "max_shard_bytes", type(max_shard_bytes).__name__, "an int"))
    if max_shard_bytes < 1:
        raise ArgumentValueError(message("save_hf", "max_shard_bytes", max_shard_bytes, "at least 1"))
    if dtype is not None and dtype not in FLOATS:
        raise DTypeError(message("save_hf", "dtype", dtype, "a float dtype, or None"))
    int4 = experts == "int4"
    if int4 and layout == "transformers":
        hint = 'choose experts="bf16", or layout="released", which transformers reads with compressed-tensors'
        raise ArgumentValueError(message("save_hf", "experts", "'int4' with layout 'transformers'", "'bf16'", hint))
    if int4:
        _check_groups("save_hf", source.config)
    _check_others(others)
    if int4 and dtype is None:
        dtype = torch.bfloat16  # as released; the codes were made for it
    stored = dtype or source.dtype("language_model.lm_head.weight")
    config = config_json(source.config, layout, dtype=stored, int4=int4) if describe is None else describe(stored)
    with publish(folder) as temporary:
        for name, path in others:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, temporary / name)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        writer = ShardWriter(temporary, max_shard_bytes)
        if layout == "released":
            _write_released(writer, source, scale_rule if int4 else None, dtype)
        else:
            _write_transformers(writer, source, dtype)
        writer.finish()


def _write_released(writer: ShardWriter, source: Source, scale_rule: str | None, dtype: torch.dtype | None) -> None:
    for name, shape in released_shapes(source.config).items():
        if scale_rule is None or not is_expert(name):
            writer.add(name, _cast(name, source.read(name), dtype))
            continue
        codes = source.codes(name)
        if codes is None:
            weight = source.read(name)
            if not weight.isfinite().all():
                raise CheckpointError(f"save_hf: {name}: got NaN or infinity, accepted finite weights")
            codes = recover_int4(weight, scale_rule)
        stem = name.removesuffix("weight")
        writer.add(stem + "weight_packed", codes[0])
        writer.add(stem + "weight_scale", codes[1])  # belong to the codes: bfloat16 whatever dtype is asked for
        writer.add(stem + "weight_shape", torch.tensor(shape, dtype=torch.int32))


def _write_transformers(writer: ShardWriter, source: Source, dtype: torch.dtype | None) -> None:
    stored: dict[str, list[tuple[str, Piece]]] = {}
    shapes = released_shapes(source.config)
    for name in shapes:
        for piece in transformers_pieces(name, source.config):
            stored.setdefault(piece.name, []).append((name, piece))
    for name, parts in stored.items():
        first, piece = parts[0]
        if piece.expert is None:
            writer.add(transformers_name(name), _cast(first, _rows(source, first, piece), dtype))
            continue
        # The largest tensors there are: not to be made while a shard that they do not fit in is held.
        width, height = shapes[first][1], max(piece.rows[1] if piece.rows else shapes[part][0] for part, piece in parts)
        shape, stored_dtype = (source.config.text.n_routed_experts, height, width), dtype or source.dtype(first)
        writer.make_room(math.prod(shape) * stored_dtype.itemsize)
        writer.add(transformers_name(name), _stack(source, parts, torch.empty(shape, dtype=stored_dtype)))


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if is_router_bias(name):
        return tensor.float()
    return tensor if dtype is None else tensor.to(dtype)


def _rows(source: Source, name: str, piece: Piece) -> Tensor:
    rows = source.read(name)
    rows = rows if piece.released_rows is None else rows[slice(*piece.released_rows)]
    return rows if piece.rotary_heads is None else to_half_split(rows, piece.rotary_heads)


def _stack(source: Source, parts: list[tuple[str, Piece]], stack: Tensor) -> Tensor:
    """Fills a layer's stacked experts."""
    for name, piece in parts:
        assert piece.expert is not None
        matrix = stack[piece.expert]
        (matrix if piece.rows is None else matrix[slice(*piece.rows)]).copy_(source.read(name))
    return stack


def _check_others(others: Sequence[tuple[str, Path]]) -> None:
    names = [name for name, _ in others]
    for name, path in others:
        if name in (CONFIG, INDEX, MANIFEST) or name.endswith(".safetensors") or names.count(name) > 1:
            accepted = "names that differ, and that are not written anyway"
            raise ArgumentValueError(message("save_hf", "others", repr(name), accepted))
        if not path.is_file():
            raise CheckpointError(f"save_hf: others: {path}: missing, or not a file")


def _check_word(op: str, argument: str, word: str, accepted: tuple[str, ...]) -> None:
    if word not in accepted:
        raise ArgumentValueError(message(op, argument, repr(word), " or ".join(map(repr, accepted))))


def _check_groups(op: str, config: KimiK25Config) -> None:
    names = ("hidden_size", "moe_intermediate_size")
    odd = listing(f"{name} {size}" for name in names if (size := getattr(config.text, name)) % GROUP)
    if odd:
        raise ArgumentValueError(message(op, "experts", f"'int4' with {odd}", f"widths that are multiples of {GROUP}"))
