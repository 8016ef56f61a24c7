"""Newton-Schulz orthogonalisation, batched over matrices of one shape (Muon is Scalable, equation 2)."""

import torch
from torch import Tensor

from k25sys.errors import ArgumentValueError, ShapeError, message

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""(a, b, c) of X <- a X + b (X X^T) X + c (X X^T)^2 X: tuned for speed, singular values end in about 0.7 to 1.2."""
_EPSILON = 1e-7
_CACHED_ELEMENTS = 1 << 18  # of matrices that are iterated on together on the CPU
_BATCHED_ELEMENTS = 1 << 26  # on another device, where copies of them cost memory


@torch.no_grad()
def orthogonalize(m_BNM: Tensor, *, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: U V^T of m = U S V^T, with singular values near 1.

    Args:
        m_BNM: (B, N, M) or (N, M), floating point. Each matrix by itself; taller than wide ones are transposed inside.
        steps: of the iteration.
        dtype: of the products; None is that of `m_BNM`.

    Returns:
        The same shape, in `dtype`. Zeros stay zeros.

    Raises:
        ShapeError: fewer than two dimensions. ArgumentValueError: steps below 1.
    """
    if m_BNM.dim() not in (2, 3):
        raise ShapeError(message("orthogonalize", "m_BNM", tuple(m_BNM.shape), "(B, N, M) or (N, M)"))
    if steps < 1:
        raise ArgumentValueError(message("orthogonalize", "steps", steps, "an int >= 1"))
    x = m_BNM.to(dtype or m_BNM.dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = _by_cache(x, steps) if x.dim() == 3 and x.device.type == "cpu" else _iterate(x, steps)
    return x.mT if tall else x


def together(num_elements: int, device_type: str) -> int:
    """How many matrices of that size are to be iterated on at a time."""
    most = _CACHED_ELEMENTS if device_type == "cpu" else _BATCHED_ELEMENTS
    return max(1, most // max(1, num_elements))


def _by_cache(x_BNM: Tensor, steps: int) -> Tensor:
    """A few matrices at a time, or one: passes over all of them would each come from memory."""
    count = together(x_BNM[0].numel(), "cpu") if len(x_BNM) else 1
    if len(x_BNM) <= count:
        return _iterate(x_BNM[0], steps)[None] if len(x_BNM) == 1 else _iterate(x_BNM, steps)
    out_BNM = torch.empty_like(x_BNM)
    for out, x in zip(out_BNM.split(count), x_BNM.split(count), strict=True):
        if len(x) == 1:
            out[0] = _iterate(x[0], steps)
        else:
            out.copy_(_iterate(x, steps))
    return out_BNM


def _iterate(x: Tensor, steps: int) -> Tensor:
    """(B, N, M) or (N, M), N <= M."""
    a, b, c = COEFFICIENTS
    multiply_add = torch.addmm if x.dim() == 2 else torch.baddbmm
    norm = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(-2).norm(dim=-1)[..., None, None]
    x = x / (norm + _EPSILON).to(x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = multiply_add(x, multiply_add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
