"""Where a model's tensors come from, one at a time by released name: a folder in any layout, or a model."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from k25sys.checkpoint.int4 import CODES_PER_WORD, GROUP, Int4Origin, dequantize_int4
from k25sys.checkpoint.safetensors import SafetensorsFolder
from k25sys.errors import ArgumentTypeError, CheckpointError, DeviceError, listing, message
from k25sys.models.config import KimiK25Config
from k25sys.models.key_maps import (
    Piece,
    from_half_split,
    is_expert,
    model_piece,
    released_shapes,
    split_pieces,
    stacked_piece,
    standard_name,
)

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INT4_PARTS = ("weight_packed", "weight_scale", "weight_shape")


class Source(Protocol):
    """Tensors by released name, experts one by one."""

    config: KimiK25Config

    def dtype(self, name: str) -> torch.dtype:
        """dtype of `read(name)`."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor; it may be a view of something larger."""
        ...

    def codes(self, name: str) -> tuple[Tensor, Tensor] | None:
        """An expert's INT4 codes and scales, if that is what it is made of."""
        ...


class FolderSource:
    """A folder of safetensors in any layout that `key_maps` knows. Making one checks every name, shape and dtype."""

    def __init__(self, files: SafetensorsFolder, config: KimiK25Config) -> None:
        """Finds each tensor of a model of `config`.

        Raises:
            CheckpointError: one error with the missing, extra, mis-shaped and mis-typed tensors.
        """
        self.config = config
        self._files = files
        self._stored: dict[str, str] = {}
        self._used: set[str] = set()
        self._pieces: dict[str, tuple[Piece, ...]] = {}
        self._packed: set[str] = set()
        self._problems: dict[str, list[str]] = {kind: [] for kind in ("missing", "extra", "mis-shaped", "mis-typed")}
        for stored in files.entries:
            name = standard_name(stored)
            if name in self._stored:
                self._problems["extra"].append(f"{stored} (is {self._stored[name]} again)")
            self._stored.setdefault(name, stored)
        num_layers = config.text.num_hidden_layers + (0 if config.vision is None else config.vision.num_hidden_layers)
        if num_layers > len(files.entries):  # a config that is no config may ask for billions
            raise CheckpointError(
                f"{files.folder}: {len(files.entries)} tensors cannot be those of {num_layers} layers"
            )
        self._shapes = released_shapes(config)
        for name, shape in self._shapes.items():
            self._find(name, shape)
        self._check_weight_shapes()
        self._problems["extra"] += [stored for name, stored in self._stored.items() if name not in self._used]
        found = [f"{len(names)} {kind}: {listing(names)}" for kind, names in self._problems.items() if names]
        if found:
            raise CheckpointError(f"{files.folder}: its tensors are not those of the model: " + "; ".join(found))

    def names_by_file(self) -> Iterator[str]:
        """Every released name, so ordered that each file is read in one go."""
        return iter(sorted(self._pieces, key=lambda name: self._files.entries[self._stored_names(name)[0]].file))

    def is_packed(self, name: str) -> bool:
        """Whether a tensor is in INT4."""
        return name in self._packed

    def dtype(self, name: str) -> torch.dtype:
        """dtype of `read(name)`: bfloat16 for INT4."""
        dtype = self._files.entries[self._stored_names(name)[0]].dtype
        assert isinstance(dtype, torch.dtype)  # checked: a word of the file was mis-typed
        return torch.bfloat16 if name in self._packed else dtype

    def read(self, name: str) -> Tensor:
        """The tensor, from INT4 in bfloat16."""
        codes = self.codes(name)
        if codes is not None:
            return dequantize_int4(*codes)
        pieces = self._pieces[name]
        parts = [self._read_piece(piece) for piece in pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def codes(self, name: str) -> tuple[Tensor, Tensor] | None:
        """(O, I / 8) int32 and (O, I / 32) bfloat16 as stored, or None for a tensor that is not in INT4."""
        if name not in self._packed:
            return None
        packed, scale, _ = self._stored_names(name)
        return self._files.read(packed), self._files.read(scale)

    def _stored_names(self, name: str) -> list[str]:
        return [self._stored[piece.name] for piece in self._pieces[name]]

    def _read_piece(self, piece: Piece) -> Tensor:
        part = self._files.read(self._stored[piece.name], piece.expert, piece.rows)
        return part if piece.rotary_heads is None else from_half_split(part, piece.rotary_heads)

    def _find(self, name: str, shape: tuple[int, ...]) -> None:
        """Notes the pieces of a tensor, or what is wrong with them."""
        stem = name.removesuffix("weight")
        stacked, split = stacked_piece(name, self.config), split_pieces(name, self.config)
        if name in self._stored:
            self._take(name, shape, FLOATS)
            self._pieces[name] = (Piece(name=name),)
        elif is_expert(name) and any(stem + part in self._stored for part in _INT4_PARTS):
            rows, columns = shape
            self._take(stem + "weight_packed", (rows, columns // CODES_PER_WORD), (torch.int32,))
            self._take(stem + "weight_scale", (rows, columns // GROUP), (torch.bfloat16,))
            self._take(stem + "weight_shape", (2,), (torch.int32, torch.int64))
            self._packed.add(name)
            self._pieces[name] = tuple(Piece(name=stem + part) for part in _INT4_PARTS)
        elif stacked is not None and stacked.name in self._stored:
            rows = shape[0] if stacked.rows is None else 2 * shape[0]
            self._take(stacked.name, (self.config.text.n_routed_experts, rows, shape[1]), FLOATS)
            self._pieces[name] = (stacked,)
        elif split is not None and any(piece.name in self._stored for piece in split):
            for piece in split:
                self._take(piece.name, (shape[0] // 3, *shape[1:]), FLOATS)
            self._pieces[name] = split
        else:
            self._problems["missing"].append(name)

    def _take(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        if name in self._used:
            return
        if name not in self._stored:
            self._problems["missing"].append(name)
            return
        self._used.add(name)
        stored = self._stored[name]
        entry = self._files.entries[stored]
        if entry.shape != shape:
            self._problems["mis-shaped"].append(f"{stored} (got {entry.shape}, accepted {shape})")
        if entry.dtype not in dtypes:
            want = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            got = str(entry.dtype).removeprefix("torch.")
            self._problems["mis-typed"].append(f"{stored} (got {got}, accepted {want})")

    def _check_weight_shapes(self) -> None:
        """weight_shape repeats what the model says; one that says something else belongs to another matrix."""
        if any(self._problems.values()):
            return
        names = sorted(self._packed, key=lambda name: self._files.entries[self._stored_names(name)[2]].file)
        for name in names:
            stored = self._stored_names(name)[2]
            told = tuple(self._files.read(stored).tolist())
            if told != self._shapes[name]:
                self._problems["mis-shaped"].append(f"{stored} (says {told}, accepted {self._shapes[name]})")


class ModelSource:
    """A KimiK25 in memory. Making one checks that its state dict is that of its configuration."""

    def __init__(self, op: str, model: nn.Module) -> None:
        """Takes the tensors of `model`, not copies.

        Raises:
            ArgumentTypeError, DeviceError, CheckpointError: no KimiK25, a model on the meta device, or one whose
                tensors are not those that its configuration describes.
        """
        config = getattr(model, "config", None)
        if not isinstance(model, nn.Module) or not isinstance(config, KimiK25Config):
            raise ArgumentTypeError(message(op, "model", type(model).__name__, "a KimiK25 with its config"))
        self.config = config
        self._state: dict[str, Tensor] = {
            standard_name(name): tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()
        }
        origin = getattr(model, "int4_origin", None)
        self._origin = origin if isinstance(origin, Int4Origin) else Int4Origin()
        on_meta = [name for name, tensor in self._state.items() if tensor.is_meta]
        if on_meta:
            hint = "allocate it first: model.to_empty(device=...)"
            raise DeviceError(message(op, "model", f"{on_meta[0]} on the meta device", "a model in memory", hint))
        wrong = [
            name for name, shape in released_shapes(config).items() if self._shape(model_piece(name, config)) != shape
        ]
        if wrong:
            raise CheckpointError(f"{op}: model: its config and these of its tensors disagree: {listing(wrong)}")

    def tensor(self, name: str) -> Tensor:
        """A view of the model's memory."""
        piece = model_piece(name, self.config)
        stored = self._state[piece.name]
        if piece.expert is not None:
            stored = stored[piece.expert]
        return stored if piece.rows is None else stored[slice(*piece.rows)]

    def dtype(self, name: str) -> torch.dtype:
        """dtype of `read(name)`."""
        return self._state[model_piece(name, self.config).name].dtype

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, without a copy where it is there."""
        return self.tensor(name).cpu()

    def codes(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The codes and scales that an expert was loaded from, if it has not changed since."""
        return self._origin.codes_of(name, self.read(name).contiguous())

    def _shape(self, piece: Piece) -> tuple[int, ...] | None:
        stored = self._state.get(piece.name)
        if stored is None or piece.expert is None:
            return None if stored is None else tuple(stored.shape)
        rows = stored.shape[1] if piece.rows is None else piece.rows[1] - piece.rows[0]
        return (rows, *stored.shape[2:])
