"""Which tokens a masked-language model has to predict (paper, §3.3; Devlin et al. 2019, §3.1).

Masks are drawn by a counter-based rule, not by a generator that the run carries along: the same
(seed, step, lane) gives the same masks in any process, after any restart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from neobert.randomness import MASKS, random_generator

IGNORE_INDEX = -100

# What becomes of a chosen token: [MASK], or a random token, or (the rest) itself.
SCHEMES = {"mask": (1.0, 0.0), "80/10/10": (0.8, 0.1)}


@dataclass(frozen=True)
class Masking:
    """Masks token ids for a tokenizer's vocabulary.

    mask_id: the id of [MASK].
    special_ids: ids never chosen ([PAD], [UNK], [CLS], [SEP], [MASK]), nor ever a random token.
    vocab_size: random tokens come from [0, vocab_size).
    rate: the probability that a token is chosen, each for itself. The paper's is 0.2.
    scheme: "mask" (the paper's: each chosen token becomes [MASK]) or "80/10/10" (BERT's: 80 %
        become [MASK], 10 % a random token, 10 % stay).
    Raises ValueError for a rate outside (0, 1) and for an unknown scheme.
    """

    mask_id: int
    special_ids: tuple[int, ...]
    vocab_size: int
    rate: float = 0.2
    scheme: str = "mask"

    def __post_init__(self):
        if not 0 < self.rate < 1:
            raise ValueError(f"mask rate must lie between 0 and 1, got {self.rate}")
        if self.scheme not in SCHEMES:
            raise ValueError(
                f"mask scheme must be one of {', '.join(SCHEMES)}, got {self.scheme!r}"
            )

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, rate: float, scheme: str) -> Masking:
        if tokenizer.mask_token_id is None:
            raise ValueError(f"the tokenizer has no [MASK]: {tokenizer.special_tokens_map}")
        return cls(
            tokenizer.mask_token_id, tuple(tokenizer.all_special_ids), len(tokenizer), rate, scheme
        )

    def __call__(
        self, input_ids: Tensor, seed: int, step: int, lane: int = 0
    ) -> tuple[Tensor, Tensor]:
        """(tokens,) int64 ids → masked ids and labels, both (tokens,) int64; labels are -100 where
        nothing is to be predicted. A pure function of its arguments."""
        ids = input_ids.numpy()
        generator = random_generator(seed, MASKS, step, lane)
        chosen = generator.random(len(ids)) < self.rate
        chosen &= ~np.isin(ids, self.special_ids)
        labels = np.where(chosen, ids, IGNORE_INDEX)

        masked, replaced = SCHEMES[self.scheme]
        fate = generator.random(len(ids))
        result = np.where(chosen & (fate < masked), self.mask_id, ids)
        if replaced:
            at_random = chosen & (fate >= masked) & (fate < masked + replaced)
            ordinary = self._ordinary_ids()
            draws = generator.integers(len(ordinary), size=len(ids))
            result = np.where(at_random, ordinary[draws], result)
        return torch.from_numpy(result), torch.from_numpy(labels)

    def _ordinary_ids(self) -> np.ndarray:
        return np.setdiff1d(np.arange(self.vocab_size), self.special_ids)
