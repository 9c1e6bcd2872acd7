"""Texts and data sets for mteb's tasks, made on the spot, and a call as mteb makes it."""

import json

import numpy as np
from mteb._create_dataloaders import _create_dataloader_from_texts
from mteb.mocks import MockRetrievalTask, MockSTSTask

from tests import tiny

STS = MockSTSTask().metadata
RETRIEVAL = MockRetrievalTask().metadata


def encode(model, texts, task=STS, prompt_type=None, batch_size=2, **options):
    return model.encode(
        _create_dataloader_from_texts(texts, batch_size=batch_size),
        task_metadata=task,
        hf_split="test",
        hf_subset="default",
        prompt_type=prompt_type,
        **options,
    )


def cosines(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def write_sts(path, pairs=24):
    """Pairs of docstrings with a score; also returns them by column."""
    texts = tiny.texts()[: 2 * pairs]
    scores = np.random.default_rng(0).uniform(0, 5, pairs).round(2).tolist()
    columns = texts[:pairs], texts[pairs:], scores
    rows = [
        json.dumps({"sentence1": a, "sentence2": b, "score": score})
        for a, b, score in zip(*columns, strict=True)
    ]
    path.write_text("\n".join(rows))
    return columns


def hub_folder(folder):
    """STSBenchmark's data set and NFCorpus's as they lie on the hub, and a folder of each."""
    sts = folder / "mteb" / "stsbenchmark-sts"
    sts.mkdir(parents=True)
    columns = write_sts(sts / "test.jsonl")
    retrieval = folder / "mteb" / "nfcorpus"
    retrieval.mkdir()
    configs = {"corpus": "corpus", "queries": "queries", "default": "test"}
    lines = ["---", "configs:"]
    for config, split in configs.items():
        lines += [f"- config_name: {config}", "  data_files:", f"  - split: {split}",
                  f"    path: {config}.jsonl"]  # fmt: skip
    (retrieval / "README.md").write_text("\n".join([*lines, "---", ""]))
    corpus = [{"_id": f"d{i}", "title": "", "text": t} for i, t in enumerate(columns[0])]
    queries = [{"_id": f"q{i}", "text": t} for i, t in enumerate(columns[1][:3])]
    qrels = [{"query-id": f"q{i}", "corpus-id": f"d{5 * i}", "score": 1} for i in range(3)]
    for name, rows in (("corpus", corpus), ("queries", queries), ("default", qrels)):
        (retrieval / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return columns
