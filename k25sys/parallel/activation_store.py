"""What waits for the backward in another form than it was computed in: recomputed, in E4M3, or where a store puts it.

Autograd saves what a backward needs. Inside `SavedActivations.saving()` it is asked first (saved-tensor hooks): of a
tensor that was handed to `keep` or that `recompute` gave, whoever saves it or a view of it gets a handle instead, and
the tensor itself is freed when the forward is done with it. The first backward that needs it brings it back for all.
This holds for custom autograd Functions too, which need to know nothing of it.

The value that was brought back lives until the last backward that saved a handle is through: autograd drops handles as
it drops saved tensors. A deferred weight gradient holds its input until it has run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from k25sys import ops
from k25sys.errors import DTypeError, message


@dataclass(frozen=True)
class Packed:
    """A tensor as a store keeps it."""

    tensors: tuple[Tensor, ...]
    """What it occupies on the device."""
    about: Any = None
    """What `unpack` needs to know, and what lies elsewhere."""


class ActivationStore(Protocol):
    """Where saved activations wait. Offloading to the host is one more class with these two methods: `pack` starts the
    copy, `unpack` waits for it."""

    def pack(self, tensor: Tensor) -> Packed:
        """Takes a tensor that will not change. It must not be kept in `Packed` with its graph: detach it."""
        ...

    def unpack(self, packed: Packed) -> Tensor:
        """The tensor, of the shape, strides and dtype it had, and of the same numbers but for the store's rounding."""
        ...


class ExactStore:
    """The tensor itself, as autograd saves it, with autograd's check that nobody wrote into it meanwhile."""

    def pack(self, tensor: Tensor) -> Packed:
        """Holds the tensor's memory."""
        return Packed((tensor.detach(),), tensor._version)

    def unpack(self, packed: Packed) -> Tensor:
        """Raises RuntimeError when the tensor was modified in place."""
        (tensor,) = packed.tensors
        if tensor._version != packed.about:
            raise RuntimeError(
                f"a tensor that the backward needs, {tuple(tensor.shape)} {tensor.dtype}, was modified by an in-place "
                f"operation: it is at version {tensor._version}, saved was version {packed.about}"
            )
        return tensor


class E4M3Store:
    """float8_e4m3fn with a float32 scale for each 1 x 128 tile of the last dimension, as K2.5 stores activations (Kimi
    K2, section 2.4.3): 1 + 4 / 128 bytes a number.

    Takes contiguous float32 and bfloat16 of one dimension or more; DTypeError otherwise.
    """

    def pack(self, tensor: Tensor) -> Packed:
        """Rounds."""
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            raise DTypeError(message("E4M3Store", "tensor", tensor.dtype, "torch.float32 or torch.bfloat16"))
        rows = tensor.detach().reshape(-1, tensor.shape[-1])
        return Packed(ops.quantize_fp8(rows, (1, 128)), (tensor.shape, tensor.dtype))

    def unpack(self, packed: Packed) -> Tensor:
        """The rounded numbers in the dtype they had."""
        values, scales = packed.tensors
        shape, dtype = packed.about
        return ops.dequantize_fp8(values, scales, (1, 128), dtype).view(shape)


class _Stored:
    """Source of one tensor that waits in a store: packed for the first who saves it, unpacked for the first who needs
    it."""

    def __init__(self, store: ActivationStore, tensor: Tensor, record: Callable[[Packed], None]) -> None:
        self._store, self._record = store, record
        self._geometry = tensor.shape, tensor.stride(), tensor.storage_offset()
        self._packed: Packed | None = None
        self._value: Tensor | None = None

    def prepare(self, view: Tensor) -> None:
        if self._packed is None:
            with torch.no_grad():
                self._packed = self._store.pack(view.detach().as_strided(*self._geometry))
            self._record(self._packed)

    def value(self) -> Tensor:
        assert self._packed is not None
        if self._value is None:
            self._value = self._store.unpack(self._packed)
        return self._value


class _Segment:
    """A part of the forward: its outputs and what autograd saved inside are computed again, together, for the first who
    needs one of them."""

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor], memory: "SavedActivations") -> None:
        self._function, self._memory = function, memory
        self._inputs = [memory._pack(x) for x in inputs]
        self._requires_grad = [x.requires_grad for x in inputs]
        self._autocast = _same_autocast(inputs[0].device.type)
        self._own = {x.untyped_storage()._cdata for x in inputs}
        self._num_saved = 0
        self._saved: list[Tensor] = []
        self._outputs: tuple[Tensor, ...] = ()

    def run(self, *inputs: Tensor) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            return self._function(*inputs)

    def owns(self, tensor: Tensor) -> bool:
        """Whether `tensor` is made inside: no view of an input, no parameter."""
        return tensor.untyped_storage()._cdata not in self._own and not _is_parameter(tensor)

    def _pack(self, tensor: Tensor) -> Any:
        if not self.owns(tensor):
            return self._memory._pack(tensor)
        self._num_saved += 1
        return _Recomputed(self, self._num_saved - 1)

    def saved(self, index: int) -> Tensor:
        self._recompute()
        return self._saved[index]

    def output(self, index: int) -> Tensor:
        self._recompute()
        return self._outputs[index]

    def _recompute(self) -> None:
        if self._outputs:
            return
        inputs = [saved.value().detach() for saved in self._inputs]
        self._own = {x.untyped_storage()._cdata for x in inputs}
        leaves = [x.requires_grad_(needs) for x, needs in zip(inputs, self._requires_grad, strict=True)]
        # With a graph, for autograd to save the same tensors in the same order; nobody goes back through it.
        with torch.enable_grad(), self._autocast, torch.autograd.graph.saved_tensors_hooks(self._collect, _unpack):
            outputs = self._function(*leaves)
        assert len(self._saved) == self._num_saved, "a recomputed function did not do the same again"
        self._outputs = tuple(x.detach() for x in _several(outputs))

    def _collect(self, tensor: Tensor) -> None:
        if self.owns(tensor):
            self._saved.append(tensor.detach())


@dataclass(frozen=True)
class _Recomputed:
    """What autograd saves inside a segment."""

    segment: _Segment
    index: int

    def value(self) -> Tensor:
        return self.segment.saved(self.index)


class _Output:
    """Source of one output of a segment."""

    def __init__(self, segment: _Segment, index: int) -> None:
        self._segment, self._index = segment, index

    def prepare(self, view: Tensor) -> None:
        pass

    def value(self) -> Tensor:
        return self._segment.output(self._index)


@dataclass(frozen=True)
class _Handle:
    """What a consumer saves in place of a view of a source's tensor."""

    source: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int | torch.SymInt

    def value(self) -> Tensor:
        value = self.source.value()
        if value.shape == self.shape and value.stride() == self.strides and value.storage_offset() == self.offset:
            return value
        return value.as_strided(self.shape, self.strides, self.offset)


@dataclass(frozen=True)
class _InStore:
    """What a consumer saves of any other tensor."""

    store: ActivationStore
    packed: Packed

    def value(self) -> Tensor:
        return self.store.unpack(self.packed)


class SavedActivations:
    """Decides, tensor by tensor, in which form it waits for the backward. One object serves a whole model.

    Args:
        otherwise: the store of tensors of which nothing else was said; parameters always stay where they are.
    """

    def __init__(self, otherwise: ActivationStore | None = None) -> None:
        self._exact = ExactStore()
        self._otherwise: ActivationStore = otherwise or self._exact
        self._depth = 0
        self._inside = False
        self._sources: dict[int, tuple[StorageWeakRef, int, Any]] = {}
        self.on_packed: Callable[[Packed], None] = _ignore
        """Called with everything that begins to wait; a measurer sets it."""

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around a forward. Outside, nothing is recomputed or stored in another form."""
        self._depth += 1
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._sources.clear()

    def keep(self, tensor: Tensor, store: ActivationStore) -> Tensor:
        """From now on whoever saves `tensor`, a contiguous one that fills its memory (or a part of one), saves what
        `store` packs, once for all. Returns `tensor`. One that is recomputed already stays so: that is free."""
        if self._is_active:
            self._keep(tensor, store)
        return tensor

    def recompute(self, function: Callable[..., Any], *inputs: Tensor) -> Any:
        """`function(*inputs)`, a tensor or several; neither they nor anything between is saved, only the inputs.

        The graph is the one without it, so that gradients are bitwise the same; `function` is called once more for all
        who saved an output and for its own backward. It must do the same again, and read nothing that changes but
        `inputs` and parameters.
        """
        if not self._is_active or self._inside:
            return function(*inputs)
        segment, self._inside = _Segment(function, inputs, self), True
        try:
            outputs = segment.run(*inputs)
        finally:
            self._inside = False
        for index, output in enumerate(_several(outputs)):
            if segment.owns(output):
                self._register(output, _Output(segment, index))
        return outputs

    @property
    def _is_active(self) -> bool:
        return self._depth > 0 and torch.is_grad_enabled()

    def _register(self, tensor: Tensor, source: Any) -> None:
        # The weak reference keeps the address from being used again, not the memory.
        storage = tensor.untyped_storage()
        self._sources[storage._cdata] = StorageWeakRef(storage), tensor._version, source

    def _keep(self, tensor: Tensor, store: ActivationStore) -> None:
        if tensor.untyped_storage()._cdata not in self._sources and not _is_parameter(tensor):
            whole = tensor if tensor._base is None else tensor._base
            if _fills_its_storage(whole):
                self._register(tensor, _Stored(store, whole, self.on_packed))

    def _pack(self, tensor: Tensor) -> Any:
        if self._otherwise is not self._exact:
            self._keep(tensor, self._otherwise)
        _, version, source = self._sources.get(tensor.untyped_storage()._cdata, (None, None, None))
        if source is not None and version == tensor._version:
            source.prepare(tensor)
            return _Handle(source, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        store = self._exact if _is_parameter(tensor) else self._otherwise
        packed = store.pack(tensor)
        self.on_packed(packed)
        return _InStore(store, packed)


def _unpack(saved: Any) -> Tensor:
    with torch.no_grad():
        return saved.value()


def _ignore(packed: Packed) -> None:
    pass


def _several(outputs: Any) -> Sequence[Tensor]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _same_autocast(device_type: str) -> AbstractContextManager[Any]:
    """The state of autocast now, to be entered later."""
    if not torch.is_autocast_enabled(device_type):
        known = torch.amp.is_autocast_available(device_type)
        return torch.autocast(device_type, enabled=False) if known else nullcontext()
    return torch.autocast(device_type, dtype=torch.get_autocast_dtype(device_type))


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def _fills_its_storage(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
