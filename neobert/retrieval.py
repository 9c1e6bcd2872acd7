"""How well texts are found: recall, and BM25 to compare with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def recall_at(k: int, scores: Tensor, relevant: Tensor) -> float:
    """The share of queries whose one relevant text is among the `k` best.

    scores: (queries, texts). relevant: (queries,) int64, the number of each query's text. Of texts
    with equal scores the relevant one counts as the last, so that a method which says the same of
    all texts finds nothing.
    """
    if scores.dim() != 2 or relevant.shape != scores.shape[:1]:
        raise ValueError(
            f"scores must be (queries, texts) and relevant (queries,), got {tuple(scores.shape)} "
            f"and {tuple(relevant.shape)}"
        )
    own = scores.gather(1, relevant[:, None])
    # NaN is below everything, also below itself.
    rank = (~(scores < own)).sum(1)
    return (rank <= k).double().mean().item()


def bm25_scores(texts: Sequence[str], queries: Sequence[str]) -> Tensor:
    """(queries, texts) float32 scores by the package bm25s as it comes (Lucene's BM25, k1 = 1.5,
    b = 0.75, its English stop words, no stemming). Needs the `eval` extra."""
    import bm25s

    retriever = bm25s.BM25()
    tokens = bm25s.tokenize(list(texts), stopwords="en", show_progress=False)
    retriever.index(tokens, show_progress=False)
    asked = bm25s.tokenize(list(queries), stopwords="en", return_ids=False, show_progress=False)
    nothing = np.zeros(len(texts), np.float32)  # of a query that has no word
    rows = [retriever.get_scores(words) if words else nothing for words in asked]
    return torch.from_numpy(np.stack(rows).astype(np.float32))
