"""Newton-Schulz orthogonalisation, batched over matrices of one shape (Muon is Scalable, equation 2)."""

import torch
from torch import Tensor

from k25sys.errors import ArgumentValueError, ShapeError, message

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""(a, b, c) of X <- a X + b (X X^T) X + c (X X^T)^2 X: tuned for speed, singular values end in about 0.7 to 1.2."""
_EPSILON = 1e-7


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
    a, b, c = COEFFICIENTS
    x = m_BNM.to(dtype or m_BNM.dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    norm = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(-2).norm(dim=-1)[..., None, None]
    x = x / (norm + _EPSILON).to(x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
