"""Texts → token ids: a fast tokenizer's own ids, without tokenizing what truncation throws away.

A text of a million characters truncated to 512 tokens needs only its first few thousand
characters tokenized. How many is not a fixed number: a run of spaces is no token at all, and a word
of more than 100 characters is one [UNK]. So a long text is tokenized piece by piece, cut only
where a BERT tokenizer separates words anyway, until there are more tokens than are kept. The ids
are those of the whole text, whatever the text.
"""

from __future__ import annotations

import re

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import PreTrainedTokenizerBase

# Characters that no BERT word contains: white space, and the CJK stops and commas for texts
# written without spaces. Each begins a piece, so that it also ends the word before it there.
BOUNDARIES = " \n\t\u3002\uff0c\u3001"
BOUNDARY = re.compile(f"[{BOUNDARIES}]")
CHARACTERS_PER_TOKEN = 8  # English WordPiece averages 4.3: one piece nearly always suffices
SHORTEST_PIECE = 1024  # characters; keeps the number of calls low on texts of few tokens


class TextTokenizer:
    """Truncating tokenizer for texts; keeps its own copy, so the one it was given never changes.

    tokenizer: a transformers tokenizer backed by the tokenizers library ("fast").
    Raises TypeError for a tokenizer of another kind and ValueError for one whose special tokens do
    not stand before and after the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise TypeError(
                f"tokenizer must be a fast tokenizer (tokenizer.json), got {type(tokenizer)}"
            )
        self.backend = Tokenizer.from_str(backend.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()
        self.prefix, self.suffix = _special_tokens(self.backend)
        self.can_cut = _separates_words(self.backend)

    @property
    def num_special(self) -> int:
        """Tokens added to every text, [CLS] and [SEP]."""
        return len(self.prefix) + len(self.suffix)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id the tokenizer can give."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def __call__(self, texts: list[str], max_length: int) -> tuple[list[list[int]], int]:
        """Token ids of each text, special tokens included, and how many texts were truncated.

        max_length: the most tokens of a text, special tokens included.
        Raises ValueError if `max_length` leaves no room for a token of the text.
        """
        kept = max_length - self.num_special
        if kept < 1:
            raise ValueError(
                f"max_length must exceed the {self.num_special} special tokens, got {max_length}"
            )
        ends = [self._piece_end(text, 0, kept) for text in texts]
        pieces = [
            text if end == len(text) else text[:end] for text, end in zip(texts, ends, strict=True)
        ]
        encodings = self.backend.encode_batch_fast(pieces, add_special_tokens=False)
        sequences, truncated = [], 0
        for text, end, encoding in zip(texts, ends, encodings, strict=True):
            ids = encoding.ids
            while len(ids) <= kept and end < len(text):
                start, end = end, self._piece_end(text, end, kept - len(ids))
                ids += self.backend.encode(text[start:end], add_special_tokens=False).ids
            truncated += len(ids) > kept
            sequences.append([*self.prefix, *ids[:kept], *self.suffix])
        return sequences, truncated

    def _piece_end(self, text: str, start: int, tokens: int) -> int:
        """Where to end a piece that begins at `start` and should hold more than `tokens` tokens."""
        end = start + max(CHARACTERS_PER_TOKEN * tokens, SHORTEST_PIECE)
        if not self.can_cut or end >= len(text):
            return len(text)
        cut = max(text.rfind(boundary, start + 1, end + 1) for boundary in BOUNDARIES)
        if cut > start:
            return cut
        found = BOUNDARY.search(text, end)
        return found.start() if found else len(text)


def _special_tokens(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after one text."""
    probe = "a"
    ids = backend.encode(probe, add_special_tokens=False).ids
    whole = backend.encode(probe, add_special_tokens=True).ids
    for start in range(len(whole) - len(ids) + 1):
        if ids and whole[start : start + len(ids)] == ids:
            return whole[:start], whole[start + len(ids) :]
    raise ValueError(
        f"the tokenizer must keep a text's tokens together between its special tokens: {probe!r} "
        f"gives {ids} without special tokens and {whole} with them"
    )


def _separates_words(backend: Tokenizer) -> bool:
    """Whether the ids of a text cut before a boundary are the ids of its pieces in a row.

    True for BERT's pipeline: its words never contain a boundary, WordPiece looks at one word at a
    time, and normalisation (NFD, case, accents, control characters) never looks across a boundary.
    Byte-level BPE and unigram models do, and so may an added token that contains white space.
    """
    added = backend.get_added_tokens_decoder().values()
    return (
        isinstance(backend.model, WordPiece)
        and isinstance(backend.pre_tokenizer, BertPreTokenizer)
        and (backend.normalizer is None or isinstance(backend.normalizer, BertNormalizer))
        and not any(c.isspace() or c in BOUNDARIES for token in added for c in token.content)
    )
