"""The compressed cache of MLA: per token and layer one latent and one rotated key, whatever the number of heads.

Shape suffixes: P prompts, K samples a prompt, A sequences still running, H heads, L prompt length, S sampled tokens,
E = C + R channels of an entry (C latent, R rotated key).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from k25sys.models.documents import Documents

_FIRST_CAPACITY = 32  # sampled tokens; doubled when full


class LayerCache:
    """Entries of one layer: those of each prompt once, shared by its K samples, and those of each sample.

    Sample i * K + j is the j-th of prompt i. `rows_A` of the LatentCache names the samples that still run.
    """

    def __init__(self, owner: "LatentCache") -> None:
        self._owner = owner

    def store_prompts(self, entries_TE: Tensor, documents: Documents) -> None:
        """Keeps the entries of the packed prompts."""
        owner = self._owner
        self._prompts_PLE = entries_TE.new_zeros(len(documents.lengths), documents.max_length, entries_TE.shape[-1])
        self._prompts_PLE[documents.index_T, documents.positions_T] = entries_TE
        num_samples = len(documents.lengths) * owner.samples_per_prompt
        self._sampled_NSE = entries_TE.new_zeros(num_samples, _FIRST_CAPACITY, entries_TE.shape[-1])

    def append(self, entries_AE: Tensor) -> None:
        """Adds one token's entry to each running sample."""
        owner, capacity = self._owner, self._sampled_NSE.shape[1]
        if owner.num_sampled > capacity:
            self._sampled_NSE = F.pad(self._sampled_NSE, (0, 0, 0, capacity))
        self._sampled_NSE[owner.rows_A, owner.num_sampled - 1] = entries_AE

    def attend(self, q_AHE: Tensor, *, scale: float) -> Tensor:
        """softmax(scale * q . entries) . latents for each running sample: (A, H, E) -> (A, H, E - R) = (A, H, C).

        Scores, softmax and sums are float32: entries are converted rather than the scores rounded.
        """
        owner = self._owner
        dtype = torch.promote_types(q_AHE.dtype, torch.float32)
        rows_A, latent_dim = owner.rows_A, owner.latent_dim
        prompts_PLE = self._prompts_PLE.to(dtype)
        sampled_ASE = self._sampled_NSE[rows_A, : owner.num_sampled].to(dtype)
        q_AHE = q_AHE.to(dtype) * scale
        # All samples of a prompt meet its entries in one product, which reads them once.
        to_prompt = self._by_prompt(q_AHE) @ prompts_PLE.mT
        to_prompt = to_prompt.masked_fill(owner.hidden_P1L, float("-inf"))
        to_prompt_AHL = to_prompt.view(self._sampled_NSE.shape[0], -1, prompts_PLE.shape[1])[rows_A]
        weights = torch.cat([to_prompt_AHL, q_AHE @ sampled_ASE.mT], -1).softmax(-1)
        over_prompt_AHL, over_sampled_AHS = weights.split([prompts_PLE.shape[1], owner.num_sampled], -1)
        from_prompt = self._by_prompt(over_prompt_AHL) @ prompts_PLE[..., :latent_dim]
        from_prompt_AHC = from_prompt.view(self._sampled_NSE.shape[0], -1, latent_dim)[rows_A]
        return (from_prompt_AHC + over_sampled_AHS @ sampled_ASE[..., :latent_dim]).to(self._sampled_NSE.dtype)

    def _by_prompt(self, x_AHX: Tensor) -> Tensor:
        """(A, H, X) -> (P, K * H, X), zeros for the samples that have ended."""
        num_samples = self._sampled_NSE.shape[0]
        slots = x_AHX.new_zeros(num_samples, *x_AHX.shape[1:]).index_copy(0, self._owner.rows_A, x_AHX)
        return slots.view(self._prompts_PLE.shape[0], -1, x_AHX.shape[-1])


class LatentCache:
    """The caches of all layers, and which samples still run.

    Args:
        num_layers: of the decoder.
        latent_dim: C.
        prompts: the packing of the prompts.
        samples_per_prompt: K.
    """

    def __init__(self, *, num_layers: int, latent_dim: int, prompts: Documents, samples_per_prompt: int) -> None:
        self.latent_dim, self.samples_per_prompt = latent_dim, samples_per_prompt
        self.num_sampled = 0
        lengths_P = torch.tensor(prompts.lengths, device=prompts.device)
        self._prompt_lengths_N = lengths_P.repeat_interleave(samples_per_prompt)
        self.rows_A = torch.arange(len(self._prompt_lengths_N), device=prompts.device)
        self.hidden_P1L = (torch.arange(prompts.max_length, device=prompts.device) >= lengths_P[:, None])[:, None]
        self.layers = [LayerCache(self) for _ in range(num_layers)]

    def next_positions(self) -> Tensor:
        """(A,): the position of the token that each running sample adds now; makes room for it."""
        self.num_sampled += 1
        return self._prompt_lengths_N[self.rows_A] + self.num_sampled - 1

    def keep(self, running_A: Tensor) -> None:
        """Drops the samples that are False in `running_A` (bool)."""
        self.rows_A = self.rows_A[running_A]
