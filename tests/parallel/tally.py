"""How near what several ranks compute is to what one process does, over many cases."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.models.cases import relative_error


@dataclass
class Tally:
    """The largest error found, relative to the largest entry of its tensor.

    In float32 one process's own gradient is here and there no nearer to the exact one than 1e-6, where the softmax
    cancels or a sum runs over all tokens. A tensor that is farther than the limit from one process's must then be as
    near to float64's as the limit, or as twice the rounding that one process shows in this case; those are counted.
    """

    error: float = 0.0
    num_tensors: int = 0
    num_rounded: int = 0

    def add(self, got: dict[str, Tensor], want: dict[str, Tensor], exact: dict[str, Tensor], most: float) -> None:
        """Compares tensors by name; `exact` are float64's, and of float64 itself the error never passes `most`."""
        assert got.keys() == want.keys()
        rounding = max(relative_error(tensor.double(), exact[name]) for name, tensor in want.items())
        for name, tensor in want.items():
            error = relative_error(got[name], tensor)
            self.num_tensors += 1
            if error <= most:
                self.error = max(self.error, error)
                continue
            own = relative_error(got[name].double(), exact[name])
            assert tensor.dtype != torch.float64, (name, error)
            assert own <= max(most, 2 * rounding), (name, error, own, rounding)
            self.num_rounded += 1
