"""The compressed cache of MLA: per token and layer one latent and one rotated key, whatever the number of heads.

Shape suffixes: P prompts with samples that still run, A those samples, K the most of one prompt, H heads, L longest
prompt, S sampled tokens, E = C + R channels of an entry (C latent, R rotated key).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from k25sys.models.documents import Documents

_FIRST_CAPACITY = 32  # sampled tokens; doubled when full


class LayerCache:
    """Entries of one layer: those of each prompt once, shared by its samples, and those of each running sample.

    Prompts are padded to the longest of those that still have a running sample.
    """

    def __init__(self, owner: "LatentCache") -> None:
        self._owner = owner

    def store_prompts(self, entries_TE: Tensor, documents: Documents) -> None:
        """Keeps the entries of the packed prompts."""
        owner = self._owner
        self._prompts_PLE = entries_TE.new_zeros(len(documents.lengths), documents.max_length, entries_TE.shape[-1])
        self._prompts_PLE[documents.index_T, documents.positions_T] = entries_TE
        self._sampled_ASE = entries_TE.new_zeros(len(owner.rows_A), _FIRST_CAPACITY, entries_TE.shape[-1])

    def keep(self, running_A: Tensor, prompts_P: Tensor, longest: int) -> None:
        """Drops the samples that are False in `running_A`, the prompts not in `prompts_P`, and padding."""
        self._sampled_ASE = self._sampled_ASE[running_A]
        if len(prompts_P) < self._prompts_PLE.shape[0]:
            self._prompts_PLE = self._prompts_PLE[prompts_P, :longest]

    def append(self, entries_AE: Tensor) -> None:
        """Adds one token's entry to each running sample."""
        owner, capacity = self._owner, self._sampled_ASE.shape[1]
        if owner.num_sampled > capacity:
            self._sampled_ASE = F.pad(self._sampled_ASE, (0, 0, 0, capacity))
        self._sampled_ASE[:, owner.num_sampled - 1] = entries_AE

    def attend(self, q_AHE: Tensor, *, scale: float) -> Tensor:
        """softmax(scale * q . entries) . latents for each running sample: (A, H, E) -> (A, H, E - R) = (A, H, C).

        Scores, softmax and sums are float32: entries are converted rather than the scores rounded.
        """
        owner = self._owner
        dtype = torch.promote_types(q_AHE.dtype, torch.float32)
        prompts_PLE = self._prompts_PLE.to(dtype)
        sampled_ASE = self._sampled_ASE[:, : owner.num_sampled].to(dtype)
        q_AHE = q_AHE.to(dtype) * scale
        # All samples of a prompt meet its entries in one product, which reads them once.
        to_prompt = (owner.by_prompt(q_AHE) @ prompts_PLE.mT).masked_fill(owner.hidden_P1L, float("-inf"))
        to_prompt_AHL = owner.by_sample(to_prompt, q_AHE.shape[1])
        weights = torch.cat([to_prompt_AHL, q_AHE @ sampled_ASE.mT], -1).softmax(-1)
        over_prompt_AHL, over_sampled_AHS = weights.split([prompts_PLE.shape[1], owner.num_sampled], -1)
        from_prompt = owner.by_prompt(over_prompt_AHL) @ prompts_PLE[..., : owner.latent_dim]
        from_prompt_AHC = owner.by_sample(from_prompt, q_AHE.shape[1])
        return (from_prompt_AHC + over_sampled_AHS @ sampled_ASE[..., : owner.latent_dim]).to(self._sampled_ASE.dtype)


class LatentCache:
    """The caches of all layers, and which samples still run: `rows_A`, where i * K + j is sample j of prompt i.

    Args:
        num_layers: of the decoder.
        latent_dim: C.
        prompts: the packing of the prompts.
        samples_per_prompt: K.
    """

    def __init__(self, *, num_layers: int, latent_dim: int, prompts: Documents, samples_per_prompt: int) -> None:
        self.latent_dim = latent_dim
        self.num_sampled = 0
        lengths_P = torch.tensor(prompts.lengths, device=prompts.device)
        self._lengths_P = lengths_P
        self.rows_A = torch.arange(len(lengths_P) * samples_per_prompt, device=prompts.device)
        self.layers = [LayerCache(self) for _ in range(num_layers)]
        self._arrange(self.rows_A // samples_per_prompt, prompts.max_length)

    def next_positions(self) -> Tensor:
        """(A,): the position of the token that each running sample adds now; makes room for it."""
        self.num_sampled += 1
        return self._lengths_P[self._prompt_of_A] + self.num_sampled - 1

    def keep(self, running_A: Tensor) -> None:
        """Drops the samples that are False in `running_A` (bool), and with its last sample a prompt."""
        if running_A.all():
            return
        self.rows_A = self.rows_A[running_A]
        prompts_P, prompt_of_A = self._prompt_of_A[running_A].unique(return_inverse=True)
        self._lengths_P = self._lengths_P[prompts_P]
        longest = int(self._lengths_P.max()) if len(prompts_P) < len(self.hidden_P1L) else self.hidden_P1L.shape[2]
        for layer in self.layers:
            layer.keep(running_A, prompts_P, longest)
        self._arrange(prompt_of_A, longest)

    def by_prompt(self, x_AHX: Tensor) -> Tensor:
        """(A, H, X) -> (P, K * H, X), zeros where a prompt has fewer than K running samples."""
        slots = x_AHX.new_zeros(len(self._lengths_P) * self._num_slots, *x_AHX.shape[1:])
        slots = slots.index_copy(0, self._slot_of_A, x_AHX)
        return slots.view(len(self._lengths_P), -1, x_AHX.shape[-1])

    def by_sample(self, x: Tensor, num_heads: int) -> Tensor:
        """The inverse of `by_prompt`: (P, K * H, X) -> (A, H, X)."""
        return x.view(-1, num_heads, x.shape[-1])[self._slot_of_A]

    def _arrange(self, prompt_of_A: Tensor, longest: int) -> None:
        """Numbers the running samples of each prompt, which follow each other, from prompt * K on."""
        self._prompt_of_A = prompt_of_A
        samples_P = prompt_of_A.bincount()
        self._num_slots = int(samples_P.max())
        first_P = samples_P.cumsum(0) - samples_P
        number_A = torch.arange(len(prompt_of_A), device=prompt_of_A.device) - first_P[prompt_of_A]
        self._slot_of_A = prompt_of_A * self._num_slots + number_A
        positions_L = torch.arange(longest, device=prompt_of_A.device)
        self.hidden_P1L = (positions_L >= self._lengths_P[:, None])[:, None]
