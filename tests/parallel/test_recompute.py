"""Activations that are recomputed or stored in E4M3: the same gradients, and exactly as many bytes as calculated."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from k25sys import ops
from k25sys.errors import ArgumentValueError, DTypeError
from k25sys.models.decoder import DecoderLayer
from k25sys.models.documents import Documents
from k25sys.models.moe import MixtureOfExperts
from k25sys.models.presets import preset
from k25sys.models.rope import text_tables
from k25sys.parallel import GridSizes, RankGrid, weight_grads
from k25sys.parallel.activation_store import E4M3Store, ExactStore, Packed, SavedActivations
from k25sys.parallel.expert import ExpertParallel, OverlappedMixtureOfExperts, expert_layouts
from k25sys.parallel.layout import local_part
from k25sys.parallel.recompute import NAMES, RECOMPUTED, MemoryPlan, apply_memory_plan
from k25sys.parallel.saved_bytes import (
    LayerShapes,
    cut_bytes,
    measure_saved_bytes,
    moe_down_bytes,
    saved_bytes_table,
)
from tests.parallel.processes import run_ranks

TEXT = preset("tiny").text
TOKENS = 24
DTYPES = (torch.float32, torch.bfloat16)
PLANS = [names for n in range(len(NAMES) + 1) for names in combinations(NAMES, n)]


def trained(layer: nn.Module) -> list[nn.Parameter]:
    """Not the router's bias."""
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


class Case:
    """A layer of preset tiny with random weights, dense (0) or with experts (1), and documents of two lengths; the
    tokens are those of a rank."""

    def __init__(self, index: int, dtype: torch.dtype, rank: int = 0) -> None:
        generator = torch.Generator().manual_seed(index)
        self.layer = DecoderLayer(TEXT, index, attention="sdpa")
        with torch.no_grad():
            for parameter in self.layer.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
                else:
                    parameter.zero_()
        self.layer.to(dtype)
        self.documents = Documents((10, TOKENS - 10), torch.device("cpu"))
        self.tables = text_tables(TEXT, self.documents.positions_T)
        x_of_rank = [torch.randn(TOKENS, TEXT.hidden_size, generator=generator) for _ in range(rank + 1)]
        self.x = x_of_rank[rank].to(dtype)
        widths: dict[str, Any] = {"dense_width": TEXT.intermediate_size}
        if index:
            rows, width = TOKENS * TEXT.num_experts_per_tok, TEXT.moe_intermediate_size
            widths = {"shared_width": width * TEXT.n_shared_experts, "expert_rows": rows, "expert_width": width}
        self.shapes = LayerShapes(
            tokens=TOKENS, dtype=dtype, hidden=TEXT.hidden_size, heads=TEXT.num_attention_heads,
            nope=TEXT.qk_nope_head_dim, rope=TEXT.qk_rope_head_dim, value=TEXT.v_head_dim,
            kv_lora_rank=TEXT.kv_lora_rank, q_lora_rank=TEXT.q_lora_rank, **widths,
        )  # fmt: skip

    def planned(self, names: tuple[str, ...], memory: SavedActivations, grid: RankGrid | None = None) -> DecoderLayer:
        """Over `grid` the routed experts are spread."""
        layer = copy.deepcopy(self.layer)
        if grid is not None and isinstance(layer.mlp, MixtureOfExperts):
            experts = ExpertParallel(layer.mlp.experts, grid, weight_grads.WeightGradStore())
            layer.mlp = OverlappedMixtureOfExperts(layer.mlp.gate, experts, layer.mlp.shared_experts)  # pyright: ignore[reportAttributeAccessIssue]
        apply_memory_plan(layer, MemoryPlan(names=names), memory)
        return layer

    def run(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x, self.tables, self.documents)

    def step(self, names: tuple[str, ...], grid: RankGrid | None = None) -> tuple[int, list[Tensor]]:
        """Saved bytes, and the output with all gradients."""
        memory = SavedActivations()
        layer, leaf = self.planned(names, memory, grid), self.x.clone().requires_grad_()
        x = leaf * 1  # no leaf: as in the middle of a model
        y, saved = measure_saved_bytes(lambda: self.run(layer, x), layer.parameters(), memory)
        y.float().square().sum().backward()
        gradients = [leaf.grad, *(parameter.grad for parameter in trained(layer))]
        assert all(gradient is not None for gradient in gradients)
        return saved, [y, *gradients]  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [0, 1])
def test_every_plan_cuts_the_calculated_bytes(index: int, dtype: torch.dtype) -> None:
    case = Case(index, dtype)
    saved, exact = case.step(())
    for names in PLANS:
        cut, results = case.step(names)
        assert saved - cut == sum(cut_bytes(case.shapes, MemoryPlan(names=names)).values()), names
        if set(names) <= set(RECOMPUTED):
            assert all(torch.equal(a, b) for a, b in zip(results, exact, strict=True)), names
        else:
            assert torch.equal(results[0], exact[0]), names  # the forward does not know of the store
            for a, b in zip(results[1:], exact[1:], strict=True):
                assert (a - b).float().norm() < 0.05 * b.float().norm(), names


@pytest.mark.parametrize("index", [0, 1])
def test_each_name_has_the_bytes_that_shapes_say(index: int) -> None:
    """Counted by hand for bfloat16: 24 tokens, D 128, 4 heads of 32 + 16 and 32 channels, latents 64 and 32."""
    shapes = Case(index, torch.bfloat16).shapes
    cuts = cut_bytes(shapes, MemoryPlan(names=NAMES))
    widths = {0: 256, 1: 64}[index]
    norms = sum(2 * w + 4 * w + 4 * w + 4 - 2 * kept for w, kept in ((128, 128), (128, 128), (64, 64), (32, 48)))
    swiglu_inputs = 24 * 2 * (widths - 4 * -(-widths // 128)) + (48 * (128 - 4) if index else 0)
    assert cuts == {
        "norms": 24 * norms, "swiglu": 24 * 2 * widths * 2, "mla_up": 24 * (4 * 3 * 48 - 16) * 2, "moe_down": 0,
        "expert_inputs": 0, "swiglu_inputs": swiglu_inputs,
    }  # fmt: skip
    alone = cut_bytes(shapes, MemoryPlan(names=("expert_inputs",)))
    assert alone == {"expert_inputs": 24 * (128 - 4) if index else 0}
    assert moe_down_bytes(shapes) == (48 * 128 * 2 if index else 0)


def _arrived_rows(grid: RankGrid, dtype: torch.dtype) -> int:
    """Rows that this rank's experts get from all ranks' tokens, counted with the whole layer in one process."""
    per_rank, place, chosen = TEXT.n_routed_experts // grid.size("expert"), grid.index("expert"), []
    for rank in range(grid.sizes.world_size):
        case = Case(1, dtype, rank)
        assert isinstance(case.layer.mlp, MixtureOfExperts)
        handle = case.layer.mlp.gate.register_forward_hook(lambda _, __, routed: chosen.append(routed[1]))
        case.run(case.layer, case.x)
        handle.remove()
    return int((torch.cat(chosen) // per_rank == place).sum())


def _check_over_ranks(sizes: GridSizes) -> dict[tuple[str, ...], int]:
    torch.set_num_threads(1)
    grid, found = RankGrid.create(sizes), {}
    for dtype in DTYPES:
        case = Case(1, dtype, grid.rank)
        rows, width = _arrived_rows(grid, dtype), TEXT.moe_intermediate_size // sizes.expert_tensor
        shapes = replace(case.shapes, expert_rows=rows, expert_width=width, experts_elsewhere=True)
        saved, _ = case.step((), grid)
        for names in ((), ("expert_inputs",), ("norms", "expert_inputs"), ("expert_inputs", "swiglu_inputs"), NAMES):
            cut, results = case.step(names, grid)
            calculated = cut_bytes(shapes, MemoryPlan(names=names))
            assert saved - cut == sum(calculated.values()), (dtype, names)
            found[names] = calculated.get("expert_inputs", 0)
            # SwiGLU's inputs differ by roundings, or by the width of a tile, and E4M3 makes steps of them.
            if dtype == torch.float32 and "swiglu_inputs" not in names:
                _check_one_process(case, names, results, grid)
    return found


def _check_one_process(case: Case, names: tuple[str, ...], results: list[Tensor], grid: RankGrid) -> None:
    """The same plan with all experts here, on each rank's tokens: outputs and gradients.

    There a recomputed norm gives the experts exact tokens; rows from other ranks are in E4M3 with it as without.
    """
    alone = Case(1, torch.float32, grid.rank).step(names)[1]
    stored = tuple(name for name in names if name != "norms")
    of_all = [Case(1, torch.float32, rank).step(stored)[1] for rank in range(grid.sizes.world_size)]
    of_experts = expert_layouts(TEXT.n_routed_experts, TEXT.hidden_size, TEXT.moe_intermediate_size)
    labels = ["y", "x", *(name for name, parameter in case.layer.named_parameters() if parameter.requires_grad)]
    for place, (label, got) in enumerate(zip(labels, results, strict=True)):
        want, kind = alone[place], label.split(".")[-1]
        if kind in of_experts:
            whole = torch.stack([each[place] for each in of_all]).sum(0)
            want = local_part(whole, of_experts[kind], grid.sizes, grid.rank)
        error = float(((got - want).norm() / want.norm()).detach())
        assert error <= 1e-6, (names, label, error)


@pytest.mark.parametrize("sizes", [GridSizes(data=2, expert=2), GridSizes(data=2, expert_tensor=2)], ids=str)
def test_rows_at_experts_of_other_ranks_wait_in_e4m3(sizes: GridSizes) -> None:
    """As many bytes less as calculated; the gradients are those of one process with the same plan."""
    for found in run_ranks(2, _check_over_ranks, sizes):
        print(found)
        assert found["norms", "expert_inputs"] > 0  # the rows that arrived come out of no norm


class _Alive(TorchDispatchMode):
    """Every storage that an operation made, by a weak reference: nothing else is needed to see what is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes_without(self, *tensors: Tensor) -> int:
        own = {tensor.untyped_storage()._cdata for tensor in tensors}
        return sum(size for address, (memory, size) in self.seen.items() if address not in own and not memory.expired())


@pytest.mark.parametrize("names", [(), ("norms",), ("swiglu", "mla_up"), RECOMPUTED, NAMES])
@pytest.mark.parametrize("index", [0, 1])
def test_what_is_measured_is_what_is_alive(index: int, names: tuple[str, ...]) -> None:
    case, memory = Case(index, torch.bfloat16), SavedActivations()
    layer = case.planned(names, memory)
    x = case.x.clone().requires_grad_()
    with _Alive() as alive:
        y, saved = measure_saved_bytes(lambda: case.run(layer, x), layer.parameters(), memory)
    outside = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (x, *case.tables)}
    own = [*layer.parameters(), *case.tables, x, y]
    made = alive.bytes_without(*own)
    # What is saved but was there before the forward: the rotary tables, and x where a norm saves it as it is.
    assert saved - made in {0} | {sum(c) for n in (1, 2, 3) for c in combinations(outside.values(), n)}


def test_the_router_saves_its_tokens_not_their_float32_copy() -> None:
    case = Case(1, torch.bfloat16)
    assert isinstance(case.layer.mlp, MixtureOfExperts)
    router, x = case.layer.mlp.gate, case.x.clone().requires_grad_()
    (weights, _), saved = measure_saved_bytes(lambda: router(x), router.parameters())
    logits, choices = TOKENS * TEXT.n_routed_experts * 4, TOKENS * TEXT.num_experts_per_tok * 4
    assert saved == x.nbytes + logits + choices
    weights.square().sum().backward()
    found = [x.grad, router.weight.grad]
    wide, wide_x = copy.deepcopy(router).float(), case.x.float().requires_grad_()
    wide.e_score_correction_bias.copy_(router.e_score_correction_bias)
    wide(wide_x)[0].square().sum().backward()
    for gradient, expected in zip(found, (wide_x.grad, wide.weight.grad), strict=True):
        assert gradient is not None
        assert expected is not None
        assert gradient.dtype == torch.bfloat16
        assert (gradient - expected).norm() < 0.01 * expected.norm()


class _Products(TorchDispatchMode):
    """Counts products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        self.count += name in ("aten::mm", "aten::addmm", "aten::bmm", "k25::expert_mlp", "k25::expert_mlp_backward")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("names", "extra"), [(n, 0) for n in NAMES if n != "mla_up"] + [("mla_up", 2)])
@pytest.mark.parametrize("index", [0, 1])
def test_only_mla_up_computes_products_again(index: int, names: str, extra: int) -> None:
    case = Case(index, torch.float32)

    def products(names: tuple[str, ...]) -> int:
        with _Products() as counter:
            case.step(names)
        return counter.count

    assert products((names,)) == products(()) + extra
    assert products(NAMES) == products(()) + 2


def _with_deferred_weight_gradients(
    case: Case, names: tuple[str, ...] | None, *, defer: bool
) -> tuple[list[Tensor], weight_grads.WeightGradStore]:
    """Two micro-batches, both forwards first; all linears through the store, with main_grad buffers. None: no hooks."""
    memory, store = SavedActivations(), weight_grads.WeightGradStore()
    layer = copy.deepcopy(case.layer)
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, weight_grads.Linear(child, store))
                child.weight.main_grad = torch.zeros(child.weight.shape)  # pyright: ignore[reportAttributeAccessIssue]
    apply_memory_plan(layer, MemoryPlan(names=names or ()), memory)
    leaves = [(case.x * scale).requires_grad_() for scale in (1.0, 0.5)]
    outputs = []
    for leaf in leaves:
        with nullcontext() if names is None else memory.saving():
            outputs.append(case.run(layer, leaf))
    for key, output in enumerate(outputs):
        if defer:
            with store.deferring(key):
                output.square().sum().backward()
        else:
            output.square().sum().backward()
    for key in range(2):
        store.run(key)
    gradients = [leaf.grad for leaf in leaves]
    for parameter in trained(layer):
        gradients.append(getattr(parameter, "main_grad", parameter.grad))
    return [g for g in gradients if g is not None], store


@pytest.mark.parametrize("index", [0, 1])
def test_deferred_weight_gradients_are_bitwise_the_same(index: int) -> None:
    case = Case(index, torch.float32)
    exact, _ = _with_deferred_weight_gradients(case, None, defer=False)
    assert all(gradient.count_nonzero() for gradient in exact)
    count = 2 + len(trained(case.layer))
    for names in ((), ("norms",), ("swiglu",), ("mla_up",), RECOMPUTED):
        for defer in (False, True):
            found, store = _with_deferred_weight_gradients(case, names, defer=defer)
            assert len(found) == len(exact) == count
            assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True)), (names, defer)
            assert store.num_kept == 0


def _counted(calls: list[int]) -> Callable[[Tensor, Tensor], Tensor]:
    def function(x: Tensor, y: Tensor) -> Tensor:
        calls[0] += 1
        return F.silu(x) * y

    return function


def test_one_recomputation_serves_all_consumers_and_is_freed() -> None:
    memory, calls = SavedActivations(), [0]
    x, y = (torch.randn(6, 5, requires_grad=True) for _ in range(2))
    with memory.saving():
        z = memory.recompute(_counted(calls), x * 1, y * 1)
        freed = StorageWeakRef(z.untyped_storage())
        out = (z.square() + z[1:3].sum() * z.T.exp().sum()).sum()
        del z
        assert freed.expired()
    assert calls == [1]
    out.backward(retain_graph=True)
    first = [x.grad, y.grad]
    assert calls == [2]
    x.grad = y.grad = None
    out.backward()
    assert calls == [2]  # a graph that is retained retains what was computed again
    plain_x, plain_y = (t.detach().clone().requires_grad_() for t in (x, y))
    z = _counted(calls)(plain_x * 1, plain_y * 1)
    (z.square() + z[1:3].sum() * z.T.exp().sum()).sum().backward()
    for a, b, c in zip(first, (x.grad, y.grad), (plain_x.grad, plain_y.grad), strict=True):
        assert a is not None
        assert b is not None
        assert c is not None
        assert torch.equal(a, c)
        assert torch.equal(b, c)
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


def test_the_recomputed_is_freed_during_the_backward() -> None:
    memory, alive = SavedActivations(), []
    x = torch.randn(4, 4, requires_grad=True)

    def remembered(x: Tensor) -> Tensor:
        y = x.exp()
        alive.append(StorageWeakRef(y.untyped_storage()))
        return y

    with memory.saving():
        before = x * 1
        before.register_hook(lambda grad: seen.append([ref.expired() for ref in alive]))
        out = memory.recompute(remembered, before).square().sum()
    seen: list[list[bool]] = []
    out.backward()
    assert len(alive) == 2
    assert seen == [[True, True]]


def test_outside_saving_nothing_changes() -> None:
    memory, calls = SavedActivations(), [0]
    x, y = (torch.randn(6, 5, requires_grad=True) for _ in range(2))
    memory.keep(x, E4M3Store()).square().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * x.detach())
    memory.recompute(_counted(calls), x, y).square().sum().backward()
    assert calls == [1]
    with memory.saving(), torch.no_grad():
        memory.recompute(_counted(calls), x, y)
    assert calls == [2]


def test_what_was_modified_meanwhile_is_refused() -> None:
    memory = SavedActivations()
    weight, x = nn.Parameter(torch.randn(3, 3)), torch.randn(2, 3, requires_grad=True)
    with memory.saving():
        y = F.linear(x * 1, weight).sum()
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match=r"\(3, 3\).*modified by an in-place .*version 1, saved was version 0"):
        y.backward()
    with memory.saving():  # an output that is written into is saved as it is, not recomputed as it was
        z = memory.recompute(torch.exp, x * 1)
        with torch.no_grad():
            z.zero_()
        out = (z * x).sum()
    x.grad = None
    out.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (x * x.exp()).detach())  # through z alone, which counts as zero itself


def test_autocast_is_as_it_was() -> None:
    memory = SavedActivations()
    weight, x = nn.Parameter(torch.randn(8, 8)), torch.randn(4, 8, requires_grad=True)

    def run(recompute: Callable[..., Any]) -> list[Tensor]:
        weight.grad = x.grad = None
        with torch.autocast("cpu", torch.bfloat16), memory.saving():
            z = recompute(F.linear, x * 1, weight)
            assert z.dtype == torch.bfloat16
            out = (z * z).sum()
        out.backward()
        assert x.grad is not None
        assert weight.grad is not None
        return [x.grad, weight.grad]

    exact = run(lambda function, *inputs: function(*inputs))
    assert all(torch.equal(a, b) for a, b in zip(run(memory.recompute), exact, strict=True))


class _Elsewhere:
    """A store as offloading would be: numbers lie elsewhere, nothing waits on the device."""

    def __init__(self) -> None:
        self.packed = self.unpacked = 0

    def pack(self, tensor: Tensor) -> Packed:
        self.packed += 1
        return Packed((), tensor.detach().clone())

    def unpack(self, packed: Packed) -> Tensor:
        self.unpacked += 1
        return packed.about


@pytest.mark.parametrize("names", [(), ("norms", "swiglu", "mla_up")])
def test_everything_else_may_wait_in_another_store(names: tuple[str, ...]) -> None:
    case, elsewhere = Case(1, torch.float32), _Elsewhere()
    _, exact = case.step(())
    memory = SavedActivations(otherwise=elsewhere)
    layer, leaf = case.planned(names, memory), case.x.clone().requires_grad_()
    y, saved = measure_saved_bytes(lambda: case.run(layer, leaf * 1), layer.parameters(), memory)
    assert saved == 0
    y.square().sum().backward()
    assert leaf.grad is not None
    found = [y, leaf.grad, *(parameter.grad for parameter in trained(layer))]
    assert all(b is not None and torch.equal(a, b) for a, b in zip(exact, found, strict=True))
    assert elsewhere.packed == elsewhere.unpacked  # each memory once, however many save it


def test_e4m3_store_takes_what_it_can_hold() -> None:
    x = torch.randn(2, 3, 200).bfloat16()
    store = E4M3Store()
    packed = store.pack(x)
    assert sum(t.numel() * t.element_size() for t in packed.tensors) == 6 * (200 + 2 * 4)
    expected = ops.dequantize_fp8(*ops.quantize_fp8(x.view(6, 200), (1, 128)), (1, 128), torch.bfloat16)
    assert torch.equal(store.unpack(packed), expected.view(x.shape))
    with pytest.raises(DTypeError, match=r"E4M3Store: tensor: got torch.float64, accepted torch.float32 or"):
        store.pack(x.double())
    assert ExactStore().pack(x).tensors[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("names", [("norm",), ("norms", "norms")])
def test_unknown_and_repeated_names_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ArgumentValueError, match=f"MemoryPlan: names: got '{names[0]}', accepted each once of norms,"):
        MemoryPlan(names=names)


def test_the_table_prints_bytes_by_name() -> None:
    assert saved_bytes_table({"norms": 67968, "swiglu": 49152}, {"norms": 67968, "swiglu": 49152}).splitlines() == [
        "bytes cut             calculated        measured",
        "norms                     67,968          67,968",
        "swiglu                    49,152          49,152",
        "sum                      117,120         117,120",
    ]
