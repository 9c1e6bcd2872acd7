"""The demo's search: a small NeoBERT, trained on the spot to find docstrings by name.

Masked-LM pre-training on the docstrings of the standard library, then contrastive training on
pairs (name, docstring) and (summary line, the rest of the docstring). A tenth of the names is held
out: neither training sees them or their docstrings. For each of those the model has to find the
docstring, among all that are held out; so have BM25 and the same encoder with random weights.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neobert.contrastive import MODEL, contrastive
from neobert.contrastive_recipes import load_config as contrastive_config
from neobert.docstrings import as_query, is_held_out, standard_library_names
from neobert.encode import Encoder
from neobert.machine import commit, machine
from neobert.metrics import read_metrics
from neobert.model import NeoBERT
from neobert.pretrain import pretrain
from neobert.recipes import load_config as pretrain_config
from neobert.retrieval import bm25_scores, recall_at
from neobert.search import Index, IndexSettings, build_index, truncation_expected
from neobert.settings import assign
from neobert.stopwatch import step

K = 10
QUERIES = (
    "how do I read rows of a csv file",
    "remove a directory and everything in it",
    "run a function in another thread",
)

# Changes of the presets "tiny" of the two trainings: chosen for two and a half minutes on two AVX2
# cores. Where every chosen token is masked, as in the paper, no loss asks for the last states of
# the others, and the mean over those is a worse beginning than random weights (LOG.md). A batch is
# one chunk, so that no text is embedded twice for its gradient.
PRETRAIN = ("steps=200", "validate_every=200", "save_every=200", "log_every=50",
            "tensorboard=false", "mask_scheme=80/10/10")  # fmt: skip
CONTRASTIVE = ("steps=240", "batch_size=128", "max_tokens=16384", "lr=2e-3", "save_every=240",
               "log_every=40", "tensorboard=false")  # fmt: skip


def write_lines(path: Path, records: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def summary_pairs(texts: Iterable[str]) -> list[dict[str, str]]:
    """(first paragraph, the rest) of the docstrings that have both, of some length: what a user
    asks in words of their own is nearer to the one than a name is."""
    pairs = []
    for text in texts:
        summary, _, rest = text.partition("\n\n")
        if len(summary.split()) > 2 and len(rest.split()) > 4:
            pairs.append({"query": summary, "positive": rest})
    return pairs


def learn(folder: Path, names: dict[str, str]) -> Path:
    """Train on the names that are not held out; the model's folder, in `folder`.

    names: {qualified name: docstring}. A model that is there already is taken as it is.
    """
    model = folder / "contrastive" / MODEL
    if model.exists():
        print(f"{model} is there already; without it, it would be trained anew")
        return model
    folder.mkdir(parents=True, exist_ok=True)
    known = {name: text for name, text in names.items() if not is_held_out(name)}
    texts, pairs, summaries = (folder / f"{name}.jsonl" for name in ("texts", "names", "summaries"))
    write_lines(texts, ({"text": text} for text in known.values()))
    write_lines(pairs, ({"query": as_query(n), "positive": text} for n, text in known.items()))
    write_lines(summaries, summary_pairs(known.values()))
    print("masked-LM pre-training")
    pretrain(
        pretrain_config(
            "tiny",
            None,
            [
                assign("data", [{"path": str(texts)}]),
                assign("output", f"{folder}/pretrain"),
                *PRETRAIN,
            ],
        )
    )
    print("contrastive training: names and summaries find their docstrings")
    contrastive(
        contrastive_config(
            "tiny",
            None,
            [
                assign("data", [{"path": str(pairs)}, {"path": str(summaries)}]),
                assign("start_from", f"{folder}/pretrain"),
                assign("output", f"{folder}/contrastive"),
                *CONTRASTIVE,
            ],
        )
    )
    return model


def cosines(encoder: Encoder, queries: list[str], texts: list[str]) -> Tensor:
    """(queries, texts) float32."""
    with truncation_expected():
        rows, columns = (
            torch.from_numpy(encoder.encode(each, normalize=True, show_progress_bar=False))
            for each in (queries, texts)
        )
    return rows @ columns.T


def recalls(encoder: Encoder, names: dict[str, str]) -> dict[str, float]:
    """Recall@K of the trained encoder, of BM25 and of the encoder with random weights: the share of
    `names` whose docstring is among the best K of all of these names' docstrings."""
    queries, texts = [as_query(name) for name in names], list(names.values())
    torch.manual_seed(0)
    untrained: Any = NeoBERT(encoder.model.config)
    scores = {
        "this NeoBERT, trained just now": cosines(encoder, queries, texts),
        "BM25 (bm25s)": bm25_scores(texts, queries),
        "the same NeoBERT, random weights": cosines(
            Encoder(untrained.to(encoder.device), encoder.tokenizer), queries, texts
        ),
    }
    relevant = torch.arange(len(names))
    return {method: recall_at(K, each, relevant) for method, each in scores.items()}


def print_recalls(found: dict[str, float], names: int, max_length: int) -> None:
    header = f"{'held-out name → its docstring':<36} recall@{K}"
    print(f"\n{header}\n{'-' * len(header)}")
    for method, recall in found.items():
        print(f"{method:<36} {recall:>9.1%}")
    print(
        f"\n{names:,} names and their docstrings, none of them seen in training; the encoders read"
        f"\nthe first {max_length} tokens. BM25 matches words, and a docstring often says its name."
    )


def write_results(folder: Path, found: dict[str, float], names: int) -> None:
    """The recalls as <folder>/recall.json, with what they depend on and how long training took."""
    document = {
        "machine": machine(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "training_seconds": {
            run: read_metrics(folder / run)[-1]["seconds"] for run in ("pretrain", "contrastive")
        },
        "held_out_names": names,
        f"recall_at_{K}": {method: round(recall, 4) for method, recall in found.items()},
    }
    (folder / "recall.json").write_text(json.dumps(document, indent=1) + "\n")


def demonstrate_search(folder: Path) -> dict[str, float]:
    """Train in `folder`, measure, index all docstrings, and ask something; returns the recalls."""
    with step("reading the names and docstrings of the standard library") as done:
        names = standard_library_names()
        held_out = {name: text for name, text in names.items() if is_held_out(name)}
        done(f"{len(names):,}, of which {len(held_out):,} are held out")
    model = learn(folder, names)
    # As far as it was pre-trained: a docstring's end counts too, though pairs were cut at half.
    encoder = Encoder.from_pretrained(str(model), max_length=pretrain_config("tiny").max_length)
    found = recalls(encoder, held_out)
    write_results(folder, found, len(held_out))
    print_recalls(found, len(held_out), encoder.max_length)
    index = folder / "index"
    with step(f"\nindexing all {len(names):,} docstrings") as done:
        records = ({"name": name, "text": text} for name, text in names.items())
        with truncation_expected():
            build_index(index, records, encoder, IndexSettings(str(model.resolve())), False)
        done(str(index))
    for query, hits in zip(QUERIES, Index.load(index).search(QUERIES, 3), strict=True):
        print(f"\n{query}?")
        for hit in hits:
            summary = " ".join(hit.record["text"].split())
            print(f"  {hit.score:.2f}  {hit.record['name']}: {summary:.60}")
    print(f"\nAsk it yourself: neobert search --index {index}")
    return found
