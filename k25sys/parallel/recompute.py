"""Which activations a model recomputes and which it stores in E4M3, by name: Kimi K2's memory plan (section 2.4.3).

    memory = SavedActivations()
    apply_memory_plan(model, MemoryPlan(names=("norms", "swiglu", "mla_up")), memory)
    with memory.saving():
        loss = model(...)
    loss.backward()

The modules say where: a plan replaces RMSNorms, and these attributes of the modules that have them:
    activate(gate, up)          silu(gate) * up of a SwiGLU
    expand(function, *inputs)   of latent attention: calls what makes queries, keys and values out of latents
    store_input(x)              of a mixture of experts: sees its tokens; of experts over ranks: what arrived at them
    activation_store            of routed experts: the word that ops.expert_mlp takes
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from k25sys.errors import ArgumentValueError, message
from k25sys.parallel.activation_store import ActivationStore, E4M3Store, SavedActivations

RECOMPUTED = ("norms", "swiglu", "mla_up", "moe_down")
"""norms: the outputs of RMSNorms and what lies between; swiglu: silu(gate) * up of dense layers and shared experts (the
routed experts' op never saves it); mla_up: queries, keys and values of all heads, from their latents: the only one
that computes products of matrices again, those of q_b_proj and kv_b_proj; moe_down: what the routed experts' down
projection gives. ops.expert_mlp never keeps the latter for its backward, which forms the gradient of the routing
weights before the down projection: the name is accepted, and changes nothing. (Of experts on other ranks ops.combine
keeps what came home: to compute that again would be another exchange.)"""
STORED = ("expert_inputs", "swiglu_inputs")
"""expert_inputs: the tokens that enter a mixture of experts, for routed and shared experts and the router; with experts
on several ranks, the tokens and the rows that arrived at this rank's experts, each in the tiles it would have on one;
swiglu_inputs: gate and up, of dense layers, shared and routed experts."""
NAMES = (*RECOMPUTED, *STORED)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What is recomputed or stored in E4M3: names out of NAMES.

    Raises:
        ArgumentValueError: an unknown name, or one twice.
    """

    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in NAMES or self.names.count(name) > 1:
                raise ArgumentValueError(message("MemoryPlan", "names", repr(name), f"each once of {', '.join(NAMES)}"))


class RecomputedRMSNorm(nn.RMSNorm):
    """Takes over the parameters of `norm`; saves its input and nothing else."""

    def __init__(self, norm: nn.RMSNorm, memory: SavedActivations) -> None:
        nn.Module.__init__(self)
        self.normalized_shape, self.eps, self.elementwise_affine = norm.normalized_shape, norm.eps, True
        self.weight, self.memory = norm.weight, memory

    def forward(self, x: Tensor) -> Tensor:
        """As nn.RMSNorm."""
        return self.memory.recompute(partial(_rms_norm, shape=self.normalized_shape, eps=self.eps), x, self.weight)


def _rms_norm(x: Tensor, weight: Tensor, *, shape: tuple[int, ...], eps: float | None) -> Tensor:
    return F.rms_norm(x, shape, weight, eps)


def apply_memory_plan(
    module: nn.Module, plan: MemoryPlan, memory: SavedActivations, *, store: ActivationStore | None = None
) -> None:
    """Makes every layer below `module` follow `plan`. It must come after other modules were swapped in.

    Args:
        module: a model, or a part of one. Names of parameters stay.
        plan: the names.
        memory: its `saving()` is entered around each forward.
        store: of what the plan stores; E4M3 by default. Routed experts store their SwiGLU inputs in E4M3 whatever it
            is.
    """
    names, store = plan.names, store or E4M3Store()
    for parent in list(module.modules()):
        seams = vars(parent)
        if "norms" in names:
            for name, child in list(parent.named_children()):
                if type(child) is nn.RMSNorm and child.elementwise_affine:
                    setattr(parent, name, RecomputedRMSNorm(child, memory))
        if "activate" in seams:
            inputs = store if "swiglu_inputs" in names else None
            seams["activate"] = partial(_activate, seams["activate"], memory, "swiglu" in names, inputs)
        if "expand" in seams and "mla_up" in names:
            seams["expand"] = memory.recompute
        if "store_input" in seams and "expert_inputs" in names:
            seams["store_input"] = partial(_store_input, memory, store)
        if "activation_store" in seams and "swiglu_inputs" in names:
            seams["activation_store"] = "fp8_gate_up"


def _activate(
    function: Callable[[Tensor, Tensor], Tensor], memory: SavedActivations, recompute: bool,
    store: ActivationStore | None, gate: Tensor, up: Tensor,
) -> Tensor:  # fmt: skip
    if store is not None:
        memory.keep(gate, store)
        memory.keep(up, store)
    return memory.recompute(function, gate, up) if recompute else function(gate, up)


def _store_input(memory: SavedActivations, store: ActivationStore, x: Tensor) -> Tensor:
    return memory.keep(x, store)
