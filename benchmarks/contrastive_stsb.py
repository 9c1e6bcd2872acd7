"""What contrastive fine-tuning makes of a small model, from nothing to a score in minutes:

    python benchmarks/contrastive_stsb.py stsb-train.csv stsb-dev.csv [FOLDER]

The CSV files hold STS-B's (sentence, sentence, score) without a first line. A small NeoBERT is
pre-trained on the docstrings of the standard library and the training sentences, then trained on
the pairs with a score of at least 4 and on names and their docstrings. At every checkpoint the
Spearman correlation of cosine similarity with the dev scores is measured, beside three baselines:
random weights, the model before, and a bag of embeddings (the mean of the rows of a model's input
embedding matrix, special tokens included, with no layer above it). The learning rate (of
3e-4, 1e-3, 2e-3 and 3e-3) and the number of steps (250 or 400) were chosen by this very score.

Writes benchmarks/results/contrastive/tiny-stsb.json and .png. FOLDER, a temporary one by default,
gets the runs; a second call with the same one goes on in them.
"""

from __future__ import annotations

import csv
import datetime
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from timing import RESULTS
from transformers.utils.logging import disable_progress_bar

from neobert.contrastive import contrastive
from neobert.contrastive_recipes import ContrastiveConfig
from neobert.contrastive_recipes import tiny as tiny_contrastive
from neobert.docstrings import standard_library_docstrings
from neobert.encode import Encoder
from neobert.locate import checkpoints
from neobert.machine import commit, machine
from neobert.metrics import read_metrics
from neobert.model import NeoBERT
from neobert.packing import pack
from neobert.pairs import PairSource
from neobert.pretrain import pretrain
from neobert.recipes import PretrainConfig, Source
from neobert.recipes import tiny as tiny_pretrain
from neobert.saving import load_progress
from neobert_kernels import pool

STS = "Retrieve semantically similar text."  # Table 7
NAMES = "Given the name of a Python object, retrieve its documentation."
COLUMNS = ["query", "positive", "score"]
EVERY = 25  # steps between two measurements


def read_sts(path: Path) -> tuple[list[str], list[str], list[float]]:
    with open(path, newline="", encoding="utf-8") as file:
        first, second, scores = zip(*csv.reader(file), strict=True)
    return list(first), list(second), list(map(float, scores))


def pretraining(train: Path, folder: Path) -> PretrainConfig:
    """The tiny preset on docstrings and the training sentences; dev is never seen."""
    texts = folder / "texts.jsonl"
    if not texts.exists():
        first, second, _ = read_sts(train)
        every = dict.fromkeys([*standard_library_docstrings(), *first, *second])
        texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in every))
    config = tiny_pretrain()
    config.output, config.data = str(folder / "pretrain"), [Source(str(texts))]
    config.steps, config.log_every, config.tensorboard = 1500, 50, False
    return config


def finetuning(train: Path, folder: Path) -> ContrastiveConfig:
    config = tiny_contrastive()
    config.output, config.start_from = str(folder / "contrastive"), str(folder / "pretrain")
    sts = PairSource(
        str(train), "stsb", columns=COLUMNS, score="score", min_score=4, instruction=STS,
        symmetric=True,
    )  # fmt: skip
    config.data = [sts, PairSource("docstrings", instruction=NAMES)]
    config.steps, config.save_every, config.keep_checkpoints = 400, EVERY, 1000
    config.log_every, config.tensorboard = 5, False
    return config


def cosines(rows: np.ndarray) -> np.ndarray:
    """Of the first half of the rows with the second."""
    first, second = F.normalize(torch.as_tensor(rows), dim=-1).chunk(2)
    return (first * second).sum(-1).numpy()


def of_encoder(encoder: Encoder, dev: Path, prompt: str) -> np.ndarray:
    first, second, _ = read_sts(dev)
    return cosines(encoder.encode([*first, *second], prompt=prompt, show_progress_bar=False))


def of_embeddings(encoder: Encoder, dev: Path) -> np.ndarray:
    """The bag of embeddings; no prompt, which would only add the same rows to every text."""
    first, second, _ = read_sts(dev)
    packed = pack(encoder.tokenizer([*first, *second])["input_ids"])
    with torch.inference_mode():
        return cosines(pool(encoder.model.encoder(packed.input_ids), packed.cu_seqlens).numpy())


def spearman(found: np.ndarray, scores: np.ndarray) -> float:
    return float(spearmanr(found, scores).statistic)


def margin(ours: np.ndarray, theirs: np.ndarray, scores: np.ndarray) -> list[float]:
    """By how much `ours` is better: the 95 % interval over 1,000 resamplings of the dev pairs."""
    random = np.random.default_rng(0)
    samples = random.integers(len(scores), size=(1000, len(scores)))
    gains = [spearman(ours[s], scores[s]) - spearman(theirs[s], scores[s]) for s in samples]
    return [round(float(edge), 3) for edge in np.percentile(gains, [2.5, 97.5])]


def baselines(before: Path, dev: Path) -> dict[str, np.ndarray]:
    trained = Encoder.from_pretrained(before)
    torch.manual_seed(0)
    untrained = Encoder(NeoBERT(trained.model.config), trained.tokenizer)
    return {
        "random weights": of_encoder(untrained, dev, ""),
        "random weights, bag of embeddings": of_embeddings(untrained, dev),
        "pre-trained": of_encoder(trained, dev, ""),
        "pre-trained, with the instruction": of_encoder(trained, dev, f"{STS} "),
        "pre-trained, bag of embeddings": of_embeddings(trained, dev),
    }


def plot(curve: list[dict], found: dict[str, float], losses: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5.5), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    steps = [point["step"] for point in curve]
    above.plot(steps, [point["spearman"] for point in curve], marker=".", label="contrastive")
    names = ("pre-trained", "pre-trained, bag of embeddings", "random weights")
    for name, style in zip(names, ("--", ":", "-."), strict=True):
        above.axhline(found[name], color="grey", linestyle=style, label=name)
    above.set(ylabel="Spearman, STS-B dev")
    above.legend(loc="lower right")
    for name in ("loss/stsb", "loss/docstrings"):
        points = [(r["step"], r[name]) for r in losses if name in r]
        below.plot(*zip(*points, strict=True), label=name.removeprefix("loss/"), linewidth=1)
    below.set(xlabel="step", ylabel="InfoNCE (nats per query)")
    below.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(train: Path, dev: Path, folder: Path) -> None:
    disable_progress_bar()  # transformers', for loading weights
    before = pretrain(pretraining(train, folder)).checkpoint
    config = finetuning(train, folder)
    result = contrastive(config)
    scores = np.array(read_sts(dev)[2])
    pairs = baselines(before, dev)
    curve = [{"step": 0, "spearman": spearman(pairs["pre-trained, with the instruction"], scores)}]
    for checkpoint in checkpoints(Path(config.output)):
        encoder = Encoder.from_pretrained(checkpoint)
        step = load_progress(checkpoint)["step"]
        value = spearman(of_encoder(encoder, dev, f"{STS} "), scores)
        curve.append({"step": step, "spearman": value})
    last = Encoder.from_pretrained(result.model)
    ours = of_encoder(last, dev, f"{STS} ")
    margins = {f"over {name}": margin(ours, each, scores) for name, each in pairs.items()}
    pairs["contrastive"] = ours
    pairs["contrastive, without the instruction"] = of_encoder(last, dev, "")
    pairs["contrastive, bag of embeddings"] = of_embeddings(last, dev)
    found = {name: spearman(each, scores) for name, each in pairs.items()}
    output = RESULTS / "contrastive"
    output.mkdir(parents=True, exist_ok=True)
    losses = read_metrics(Path(config.output))
    plot(curve, found, losses, output / "tiny-stsb.png")
    settings = asdict(config)
    settings |= {"output": "contrastive", "start_from": "pretrain"}
    settings["data"][0]["path"] = train.name
    document = {
        "what": __doc__.split("\n\n")[0],
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "spearman": {name: round(value, 4) for name, value in found.items()},
        "contrastive, 95 % interval of the gain": margins,
        "curve": [{**point, "spearman": round(point["spearman"], 4)} for point in curve],
        "seconds": {
            name: round(read_metrics(folder / name)[-1]["seconds"], 1)
            for name in ("pretrain", "contrastive")
        },
        "left_out": [line.replace(f"{train}", train.name) for line in result.left_out],
        "pretraining": {
            name: value
            for name, value in asdict(pretraining(train, folder)).items()
            if name not in ("output", "data")
        },
        "settings": settings,
        "records": [
            {key: float(f"{value:.5g}") if key != "step" else value for key, value in r.items()}
            for r in losses
        ],
    }
    (output / "tiny-stsb.json").write_text(json.dumps(document, indent=1) + "\n")
    for name, value in found.items():
        gain = margins.get(f"over {name}")
        print(f"{value:.4f}  {name}" + (f", contrastive better by {gain}" if gain else ""))
    print(f"{output / 'tiny-stsb.json'}; the runs are in {folder}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    work = Path(sys.argv[3] if len(sys.argv) == 4 else tempfile.mkdtemp(prefix="neobert-stsb-"))
    work.mkdir(parents=True, exist_ok=True)
    main(Path(sys.argv[1]), Path(sys.argv[2]), work)
