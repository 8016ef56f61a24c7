"""MuonClip's update rules on plain tensors: Muon for matrices, AdamW for the rest (Kimi K2, algorithm 1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from k25sys.errors import ArgumentValueError, message


@dataclass(frozen=True, kw_only=True)
class MuonClipConfig:
    """Constants of the optimiser; defaults are those of K2 (section 2.5) and of Muon is Scalable.

    Raises:
        ArgumentValueError: a number out of its range.
    """

    momentum: float = 0.95
    nesterov: bool = False
    """Muon is Scalable uses it (footnote 1); algorithm 1 of K2 does not."""
    weight_decay: float = 0.1
    newton_schulz_steps: int = 5
    newton_schulz_dtype: torch.dtype | None = None
    """In which whole matrices travel and are orthogonalised: bfloat16 at scale; None is the master's."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_epsilon: float = 1e-8
    max_gradient_norm: float | None = 1.0
    """Of the whole model; None does not clip."""
    max_logit: float | None = 100.0
    """QK-Clip's threshold tau; None does not clip."""

    def __post_init__(self) -> None:
        shares = {"momentum": self.momentum, "adam_betas[0]": self.adam_betas[0], "adam_betas[1]": self.adam_betas[1]}
        for name, value in shares.items():
            if not 0 <= value < 1:
                raise ArgumentValueError(message("MuonClipConfig", name, value, "a number of [0, 1)"))
        positive = {"max_gradient_norm": self.max_gradient_norm, "max_logit": self.max_logit}
        positive["adam_epsilon"] = self.adam_epsilon
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise ArgumentValueError(message("MuonClipConfig", name, value, "a number > 0"))
        if not self.weight_decay >= 0:
            raise ArgumentValueError(message("MuonClipConfig", "weight_decay", self.weight_decay, "a number >= 0"))
        if self.newton_schulz_steps < 1:
            accepted = "an int >= 1"
            raise ArgumentValueError(
                message("MuonClipConfig", "newton_schulz_steps", self.newton_schulz_steps, accepted)
            )


def update_scale(rows: int, columns: int) -> float:
    """0.2 sqrt(max(n, m)): an orthogonal matrix times it has the root mean square of an AdamW update (ibid., 2.2)."""
    return 0.2 * max(rows, columns) ** 0.5


def advance_momentum(momentum: Tensor, gradient: Tensor, config: MuonClipConfig) -> Tensor:
    """M <- mu M + G in place; what is to be orthogonalised: M, or mu M + G with Nesterov. Any shape."""
    momentum.mul_(config.momentum).add_(gradient)
    return gradient.add(momentum, alpha=config.momentum) if config.nesterov else momentum


def decay_and_step(
    master: Tensor, update: Tensor, learning_rate: float, config: MuonClipConfig, *, scale: float = 1.0
) -> None:
    """W <- W - eta (scale update + lambda W), in place."""
    master.mul_(1 - learning_rate * config.weight_decay).sub_(update, alpha=learning_rate * scale)


def adamw_update(exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, step: int, config: MuonClipConfig) -> Tensor:
    """AdamW's update, without learning rate and decay; moments are advanced in place.

    Args:
        step: from 1.
    """
    first, second = config.adam_betas
    exp_avg.lerp_(gradient, 1 - first)
    exp_avg_sq.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    denominator = (exp_avg_sq / (1 - second**step)).sqrt_().add_(config.adam_epsilon)
    return exp_avg / (1 - first**step) / denominator
