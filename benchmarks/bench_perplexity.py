"""Pseudo-perplexity of a document of 128 tokens: 126 copies of it, each with one token masked.

Full-size NeoBERT, and the `tiny` preset of pre-training; random weights. Against the definition as
it is written down, a copy at a time with whole logits, in plain PyTorch and with our own model; and
in plain PyTorch with all copies in batches of 32, which are of one length and need no padding. All
copies cost the same, so of the full size the naive ways compute some of them and are scaled up. In
each round every method runs once, one after the other; figures are medians over rounds.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neobert import recipes
from neobert.checkpoint import write_random_checkpoint
from neobert.config import NeoBERTConfig
from neobert.docstrings import standard_library_docstrings
from neobert.model import NeoBERTLMHead
from neobert.perplexity import Document, Scorer
from neobert.plain import PlainNeoBERT
from neobert.wordpiece import train_tokenizer

TOKENS, BATCH = 128, 32
# The model's shape, how many copies the slowest way computes, and rounds.
MODELS = {"full": (NeoBERTConfig(), 12, 3), "tiny": (recipes.tiny().model_config(), 126, 15)}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("neobert")
    config, copies, rounds = MODELS[request.param]
    train_tokenizer(standard_library_docstrings(), config.vocab_size).save_pretrained(folder)
    return write_random_checkpoint(folder, config, outliers=False), copies, rounds


def masked_copies(document: Document, mask_id: int) -> tuple[Tensor, Tensor]:
    """(copies, tokens) ids, and (copies,) the places of the masks."""
    places = torch.from_numpy(document.places)
    copies = torch.from_numpy(document.ids).repeat(len(places), 1)
    copies[torch.arange(len(places)), places] = mask_id
    return copies, places


def whole_logits(logits: Tensor, places: Tensor, document: Document) -> Tensor:
    """(copies,) losses from (copies, tokens, vocab) logits."""
    log_probs = logits.float().log_softmax(-1)[torch.arange(len(places)), places]
    labels = torch.from_numpy(document.ids)[places]
    return -log_probs[torch.arange(len(places)), labels]


def in_batches(
    forward: Callable[[Tensor], Tensor], document: Document, mask_id: int, batch: int
) -> Tensor:
    copies, places = masked_copies(document, mask_id)
    return torch.cat(
        [
            whole_logits(forward(ids), at, document)
            for ids, at in zip(copies.split(batch), places.split(batch), strict=True)
        ]
    )


def cut(document: Document, copies: int) -> Document:
    """The same document with only so many of its tokens masked."""
    chosen = np.linspace(0, len(document.places) - 1, copies).round().astype(int)
    return replace(document, places=document.places[chosen])


def plain_logits(plain: PlainNeoBERT) -> Callable[[Tensor], Tensor]:
    decoder: nn.Module = plain.decoder
    return lambda ids: decoder(plain(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.inference_mode()
def test_document(benchmark, checkpoint, dtype):
    checkpoint, copies, rounds = checkpoint
    scorer = Scorer.from_pretrained(checkpoint, "cpu", dtype, max_length=TOKENS)
    model: NeoBERTLMHead = scorer.model
    plain, mask_id = plain_logits(PlainNeoBERT.load(checkpoint, dtype)), scorer.mask_id
    (document,), _ = scorer.documents([" ".join(standard_library_docstrings()[:99])], "docstrings")
    assert len(document.ids) == TOKENS and len(document.places) == TOKENS - 2
    few, some = cut(document, copies), cut(document, max(copies, BATCH))

    methods: dict[str, tuple[Document, Callable[[], Tensor]]] = {
        "plain, a copy at a time": (few, lambda: in_batches(plain, few, mask_id, 1)),
        f"plain, {BATCH} copies at a time": (some, lambda: in_batches(plain, some, mask_id, BATCH)),
        "ours, a copy at a time, whole logits": (
            few,
            lambda: in_batches(lambda ids: model(ids).logits, few, mask_id, 1),
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    # Also the warm-up: the same losses by every method.
    for name, (part, method) in methods.items():
        (expected,) = scorer([part])
        error = 1e-5 if dtype == torch.float32 else 2e-2
        assert method().mean().item() == pytest.approx(expected.loss, rel=error), name

    def others():
        for name, (part, method) in methods.items():
            start = time.perf_counter()
            method()
            scale = len(document.places) / len(part.places)
            seconds[name].append(scale * (time.perf_counter() - start))

    benchmark.pedantic(lambda: list(scorer([document])), setup=others, rounds=rounds)
    if benchmark.stats is None:  # --benchmark-disable
        return
    ours = benchmark.stats.stats.median
    info = benchmark.extra_info
    info["tokens"], info["copies"] = TOKENS, len(document.places)
    info["live tok/s"] = round(TOKENS * len(document.places) / ours, 1)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    info["seconds"] = {name: round(value, 2) for name, value in medians.items()}
    info["times_as_fast_as"] = {name: round(value / ours, 2) for name, value in medians.items()}
