"""Pseudo-perplexity: how well a masked-language model predicts each token of a text from the rest.

    P = exp(mean of l_i),  l_i = -log p(token i | all other tokens)      (paper, §5.3 and App. E)

Each token of the text is masked once, alone, in a copy of its own, but for special tokens. They are
in every copy and never masked, as in training they are never predicted (`Masking`): the [CLS] and
[SEP] around the text, an [UNK] for characters that the vocabulary lacks, and names of special
tokens that a text spells out, which the tokenizer reads as such. Of those, a [MASK] is in every
copy beside the copy's own. Those within a text are counted, document by document.

So a text of n tokens is n sequences, and what they cost grows with n². They are live tokens all:
copies of one document and of the next are packed end to end into batches of a token budget. Of each
copy one row is asked for: for it alone the last block goes on after its attention, and logits are
made.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from neobert.config import NeoBERTConfig
from neobert.devices import MAX_TOKENS, device_and_dtype
from neobert.locate import locate
from neobert.model import NeoBERTLMHead
from neobert.packing import PackedBatch, pack
from neobert.perplexity_scores import Score
from neobert.randomness import POSITIONS, random_generator
from neobert.text import TextTokenizer

# In a batch: 512 rows of 30,522 float32 logits are 62 MB. Only texts of a few tokens have so many.
MOST_COPIES = 512


@dataclass(frozen=True)
class Document:
    """A tokenized text.

    number: its place in its source, from 1.
    ids: (tokens,) int64, special tokens included.
    places: (masked,) int64, the places in `ids` that are masked, ascending; `maskable` could be.
    special: how many of each special token are in the text itself, by name.
    truncated: whether the text was longer.
    """

    number: int
    ids: np.ndarray
    places: np.ndarray
    maskable: int
    special: dict[str, int] = field(default_factory=dict)
    truncated: bool = False


class Scorer:
    """Pseudo-perplexities of texts under a model.

    model: on its device, in its dtype; it is put in eval mode.
    tokenizer: its fast tokenizer, with a [MASK].
    max_length: the most tokens of a text, special tokens included; what is beyond is cut off. By
        default the model's.
    max_tokens: the most tokens computed at once; a longer text's copies are computed one by one.
    """

    def __init__(
        self,
        model: NeoBERTLMHead,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        max_tokens: int | None = None,
    ):
        if tokenizer.mask_token_id is None:
            raise ValueError(f"the tokenizer has no [MASK]: {tokenizer.special_tokens_map}")
        self.model = model.eval()
        self.mask_id: int = tokenizer.mask_token_id
        names = tokenizer.convert_ids_to_tokens(tokenizer.all_special_ids)
        self.special: dict[int, str] = dict(zip(tokenizer.all_special_ids, names, strict=True))
        self.mask_name = self.special[self.mask_id]
        self.tokenize = TextTokenizer(tokenizer)
        if self.tokenize.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"tokenizer has {self.tokenize.vocab_size} ids, but the model has embeddings for "
                f"{model.config.vocab_size}"
            )
        self.max_length = model.config.max_length if max_length is None else max_length
        least = self.tokenize.num_special + 2
        if not least <= self.max_length <= model.config.max_length:
            raise ValueError(
                f"max_length must be between {least} (the special tokens and two more) and "
                f"{model.config.max_length} (the model's), got {self.max_length}"
            )
        self.max_tokens = MAX_TOKENS[model.device.type] if max_tokens is None else max_tokens
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        max_length: int | None = None,
        max_tokens: int | None = None,
        yarn: float | None = None,
    ) -> Scorer:
        """Load a checkpoint with a masked-LM head, or the newest one of a training run's output.

        device, dtype: as for `Encoder.from_pretrained`.
        max_length: may be beyond the model's (Figures 2 and 6): the rotary angles go on.
        yarn: the factor by which YaRN (Peng et al. 2023) stretches the model's length; with it,
            max_length is by default so many times the model's.
        """
        path_or_hub_id = locate(path_or_hub_id)
        device, dtype = device_and_dtype(device, dtype)
        config = NeoBERTConfig.from_pretrained(path_or_hub_id)
        changes: dict[str, Any] = {}
        if yarn is not None:
            changes["rope_parameters"] = yarn_parameters(config, yarn)
            if max_length is None:
                max_length = int(config.max_length * yarn)
        if max_length is not None and max_length > config.max_length:
            changes["max_length"] = max_length
        tokenizer = AutoTokenizer.from_pretrained(path_or_hub_id)
        model = NeoBERTLMHead.from_pretrained(path_or_hub_id, dtype=dtype, **changes)
        return cls(model.to(device), tokenizer, max_length, max_tokens)

    def documents(
        self,
        texts: Iterable[str],
        name: str,
        positions: int | None = None,
        seed: int = 0,
        min_tokens: int | None = None,
    ) -> tuple[list[Document], int]:
        """Tokenize all texts of a source, and choose what is masked in each; also returns how many
        texts were passed over.

        name: what errors call the source.
        positions: how many tokens of each text to mask, drawn without replacement by
            (seed, number); None, or more than a text has, is all of them.
        min_tokens: pass over texts of fewer tokens, special tokens not counted, [UNK] among them.
        Raises ValueError that names the document if, without min_tokens, a text has no such token
        or a single one: nothing would predict it.
        """
        if positions is not None and positions < 2:
            raise ValueError(f"positions must be at least 2 (for an error bar), got {positions}")
        if min_tokens is not None and min_tokens < 2:
            raise ValueError(f"min_tokens must be at least 2, got {min_tokens}")
        found: list[Document] = []
        passed_over = 0
        for number, text in enumerate(texts, 1):
            (ids,), truncated = self.tokenize([text], self.max_length)
            inside = range(len(self.tokenize.prefix), len(ids) - len(self.tokenize.suffix))
            places = np.array([i for i in inside if ids[i] not in self.special], np.int64)
            maskable = len(places)
            if maskable < (min_tokens or 2):
                if min_tokens is not None:
                    passed_over += 1
                    continue
                raise ValueError(
                    f"{name}, document {number}: pseudo-perplexity needs a text of at least 2 "
                    f"tokens, special ones like [UNK] not counted, got {maskable} ({text!r:.40}); "
                    "min_tokens=2 passes such texts over"
                )
            if positions is not None and positions < maskable:
                generator = random_generator(seed, POSITIONS, number)
                places = np.sort(generator.choice(places, positions, replace=False))
            special = Counter(self.special[ids[i]] for i in inside if ids[i] in self.special)
            found.append(
                Document(number, np.array(ids), places, maskable, dict(special), bool(truncated))
            )
        return found, passed_over

    def __call__(
        self, documents: Sequence[Document], progress: Callable[[int], object] = lambda tokens: None
    ) -> Iterator[Score]:
        """The scores of `documents`, in their order, each as soon as it is known.

        progress: called with the number of tokens of each batch when it is computed.
        Raises ValueError that names the document and the token of a loss that is not finite.
        """
        losses = np.empty(sum(len(document.places) for document in documents), np.float32)
        known = first = done = 0
        for batch, rows, labels in masked_batches(documents, self.mask_id, self.max_tokens):
            losses[known : known + len(labels)] = self._losses(batch, rows, labels).cpu().numpy()
            known += len(labels)
            progress(batch.num_tokens)
            while done < len(documents) and first + len(documents[done].places) <= known:
                end = first + len(documents[done].places)
                _check_finite(documents[done], losses[first:end])
                yield Score.of(documents[done], losses[first:end])
                first, done = end, done + 1

    @torch.inference_mode()
    def _losses(self, batch: PackedBatch, rows: Tensor, labels: Tensor) -> Tensor:
        """(rows,) float32, the cross entropy of each masked row. Logits in float32 from there on,
        whatever the model's dtype."""
        device = self.model.device
        batch = batch.to(device, non_blocking=True)
        logits = self.model(
            **batch.inputs(), tokens_to_keep=rows.to(device, non_blocking=True)
        ).logits[0]
        return F.cross_entropy(logits.float(), labels.to(device), reduction="none")


def _check_finite(document: Document, losses: np.ndarray) -> None:
    wrong = np.flatnonzero(~np.isfinite(losses))
    if len(wrong):
        raise ValueError(
            f"document {document.number}: the loss of token {document.places[wrong[0]] + 1} of "
            f"{len(document.ids)} is {losses[wrong[0]]}, and {len(wrong)} of the {len(losses)} "
            "losses are not finite: the model's weights or its dtype cannot be right"
        )


def yarn_parameters(config: NeoBERTConfig, factor: float) -> dict[str, Any]:
    """`rope_parameters` that stretch the model's length by `factor`."""
    if factor <= 1:
        raise ValueError(f"yarn must be a factor greater than 1, got {factor}")
    if config.rope_parameters["rope_type"] != "default":
        raise ValueError(f"the model's rotary angles are scaled already: {config.rope_parameters}")
    return {
        "rope_type": "yarn",
        "rope_theta": config.rope_parameters["rope_theta"],
        "factor": float(factor),
        "original_max_position_embeddings": config.max_length,
    }


def documents_digest(documents: Sequence[Document]) -> str:
    """40 digits that tell these tokens, masked at these places, from any others."""
    digest = hashlib.sha256()
    for document in documents:
        for array in (document.ids, document.places):
            digest.update(len(array).to_bytes(8, "little"))
            digest.update(array.astype("<i8").tobytes())
    return digest.hexdigest()[:40]


def masked_batches(
    documents: Sequence[Document], mask_id: int, max_tokens: int
) -> Iterator[tuple[PackedBatch, Tensor, Tensor]]:
    """The masked copies of all documents, in order: batches of at most `max_tokens` tokens, with
    the row of each copy's mask, (copies,) int64, and the token that was there, (copies,) int64.

    A batch may end one document and hold the next. A copy longer than `max_tokens` is alone.
    """
    copies: list[np.ndarray] = []
    places: list[np.ndarray] = []
    labels: list[np.ndarray] = []

    def batch() -> tuple[PackedBatch, Tensor, Tensor]:
        packed = pack(copies)
        rows = packed.cu_seqlens[:-1] + torch.from_numpy(np.concatenate(places))
        return packed, rows, torch.from_numpy(np.concatenate(labels))

    room = max_tokens
    for document in documents:
        left = document.places
        while len(left):
            fitting = min(room // len(document.ids), MOST_COPIES - len(copies))
            if fitting < 1 and copies:
                yield batch()
                copies, places, labels, room = [], [], [], max_tokens
                continue
            now, left = np.split(left, [max(1, fitting)])
            masked = np.tile(document.ids, (len(now), 1))
            masked[np.arange(len(now)), now] = mask_id
            copies.extend(masked)
            places.append(now)
            labels.append(document.ids[now])
            room -= masked.size
    if copies:
        yield batch()
