"""A corpus encoded through mteb: `MTEBEncoder` against sentence-transformers in mteb's wrapper.

The same full-size random weights, tokenizer and texts (lognormal token counts: median 300, sigma
1.1, cut at 512), handed over as mteb does, in a DataLoader. sentence-transformers sorts by length
before it cuts batches. Two models in it:

- "st_our_model": `SentenceTransformer(folder)`, which finds neobert's own class. It packs each
  padded batch at its door, so what differs from ours is around the model: batches of so many rows,
  tokenized between them, in place of a token budget and a thread.
- "st_plain": plain PyTorch with padding and SDPA, the hub's remote code in kind.

Methods take turns; vectors must agree before anything is timed. Beside the rates stands the share
of our seconds that is not in the model's forward.
"""

import statistics
import time

import numpy as np
import pytest
from datasets import Dataset
from mteb._create_dataloaders import create_dataloader
from mteb.mocks import MockRetrievalTask
from mteb.models import SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from sentence_transformers.sentence_transformer.modules import Pooling

from neobert.checkpoint import write_random_checkpoint
from neobert.mteb import MTEBEncoder
from neobert.plain import PlainNeoBERT
from neobert.throughput.workloads import Workload, made_up_texts, made_up_tokenizer

TEXTS, ROUNDS, VOCAB = 48, 2, 30522
# Rows in a batch of sentence-transformers. Its default, 32, cuts a corpus of thousands into batches
# of nearly one length and 48 texts into two; 8 is the default's case at 192 texts.
ROWS = 8


class PlainTransformer(InputModule):
    """`PlainNeoBERT` between sentence-transformers' tokenizing and pooling."""

    def __init__(self, plain: PlainNeoBERT, tokenizer, max_length: int):
        super().__init__()
        self.plain, self.tokenizer, self.max_seq_length = plain, tokenizer, max_length

    def preprocess(self, inputs, prompt=None, **kwargs):
        return self.tokenizer(
            [(prompt or "") + text for text in inputs],
            padding=True,
            truncation=True,
            max_length=self.max_seq_length,
            return_tensors="pt",
        )

    def forward(self, features, **kwargs):
        mask = features["attention_mask"]
        # SDPA without a mask is faster: a batch without padding gets its best case.
        hidden = self.plain(features["input_ids"], None if mask.all() else mask)
        return {**features, "token_embeddings": hidden}

    def save(self, *args, **kwargs):
        raise NotImplementedError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = write_random_checkpoint(tmp_path_factory.mktemp("neobert"))
    made_up_tokenizer(VOCAB).save_pretrained(folder)
    return folder


def plain_sentence_transformer(folder, max_length: int) -> SentenceTransformer:
    module = PlainTransformer(PlainNeoBERT.load(folder), made_up_tokenizer(VOCAB), max_length)
    pooling = Pooling(module.plain.model["encoder"].embedding_dim, "mean")
    return SentenceTransformer(modules=[module, pooling], device="cpu")


def corpus(texts: list[str]) -> Dataset:
    return Dataset.from_dict(
        {"id": [str(i) for i in range(len(texts))], "title": [""] * len(texts), "text": texts}
    )


def encode(model, documents: Dataset) -> tuple[np.ndarray, float]:
    """The documents' vectors, and the seconds they took, mteb's reading of the corpus included."""
    task = MockRetrievalTask().metadata
    start = time.perf_counter()
    loader = create_dataloader(
        documents, task_metadata=task, prompt_type=PromptType.document, batch_size=ROWS
    )
    vectors = model.encode(
        loader,
        task_metadata=task,
        hf_split="test",
        hf_subset="default",
        prompt_type=PromptType.document,
        batch_size=ROWS,
        show_progress_bar=False,
    )
    return np.asarray(vectors), time.perf_counter() - start


class Clock:
    """Seconds spent in a function."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, *args, **kwargs):
        start = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start


def test_corpus(benchmark, checkpoint):
    workload = Workload("strings", 512)
    lengths = workload.lengths(TEXTS)
    texts = made_up_texts(lengths, VOCAB)
    documents, few = corpus(texts), corpus(sorted(texts, key=len)[:8])

    ours = MTEBEncoder(
        str(checkpoint), device="cpu", dtype="float32", max_length=512, instructions=False
    )
    own = SentenceTransformer(str(checkpoint), device="cpu")
    own.max_seq_length = 512
    others = {
        "st_our_model": SentenceTransformerEncoderWrapper(own),
        "st_plain": SentenceTransformerEncoderWrapper(plain_sentence_transformer(checkpoint, 512)),
    }
    truth = encode(ours, few)[0]  # also the warm-up
    for name, model in others.items():
        vectors = encode(model, few)[0]
        cosines = (vectors * truth).sum(1) / np.linalg.norm(vectors, axis=1)
        worst = (cosines / np.linalg.norm(truth, axis=1)).min()
        assert worst > 0.9999, f"{name} gives other vectors: cosine {worst}"

    seconds: dict[str, list[float]] = {name: [] for name in others}

    def take_turns():
        if benchmark.enabled:
            for name, model in others.items():
                seconds[name].append(encode(model, documents)[1])

    clock = ours.encoder._embed = Clock(ours.encoder._embed)
    clock.seconds = 0.0
    benchmark.pedantic(encode, (ours, documents), setup=take_turns, rounds=ROUNDS)
    if benchmark.stats is None:  # --benchmark-disable: everything ran once, nothing was timed
        return
    assert ours.encoder.stats.tokens == sum(lengths)
    rounds = benchmark.stats.stats.data
    median = {"ours": statistics.median(rounds)}
    median |= {name: statistics.median(each) for name, each in seconds.items()}
    info = benchmark.extra_info
    info["live tokens"] = sum(lengths)
    info["live tok/s"] = {name: round(sum(lengths) / s, 1) for name, s in median.items()}
    info["times_ours"] = {name: round(median[name] / median["ours"], 3) for name in others}
    info["share_outside_model"] = round(1 - clock.seconds / sum(rounds), 4)
