"""Figures 2 and 6 in small: pseudo-perplexity beyond the length of training, YaRN on and off.

    python benchmarks/perplexity_by_length.py wikitext-2-valid.txt RUN

Trains `neobert pretrain --preset tiny` in the directory RUN, at most 128 tokens a sequence, on four
fifths of the articles in a WikiText file, whose articles begin with a line " = Title = ". The
others, cut at growing lengths, are scored by a sample of their positions. Writes
benchmarks/results/perplexity/by-length.json and .png.
"""

import datetime
import json
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path

import yaml
from timing import RESULTS
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from neobert.machine import commit, machine
from neobert.metrics import read_metrics
from neobert.perplexity import Scorer
from neobert.perplexity_scores import Score, mean_perplexity, plot_by_length
from neobert.pretrain import pretrain
from neobert.recipes import load_config

TITLE = re.compile(r"^ = [^=].*[^=] = \n", re.MULTILINE)
LENGTHS = (32, 64, 128, 192, 256, 384, 512, 768, 1024)
POSITIONS = 48
YARN = (None, 2.0, 8.0)


def articles(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    starts = [match.start() for match in TITLE.finditer(text)]
    return [text[i:j] for i, j in zip(starts, [*starts[1:], None], strict=True)]


def train(run: Path, texts: list[str], steps: int) -> tuple[Path, dict]:
    """The checkpoint, and the settings."""
    run.mkdir(parents=True, exist_ok=True)
    data = run / "articles.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = [f"data=[{{path: {data}}}]", f"output={run}", f"steps={steps}", f"save_every={steps}",
             f"validate_every={steps}", "validation_documents=5", "log_every=100",
             "tensorboard=false"]  # fmt: skip
    result = pretrain(load_config("tiny", None, given))
    assert result.checkpoint
    return result.checkpoint, yaml.safe_load((run / "config.yaml").read_text())


def score(model: Path, texts: list[str], trained_length: int, yarn: float | None) -> list[Score]:
    """Of each text its first so many tokens, for each of the lengths that YaRN stretches to."""
    scores = []
    most = max(LENGTHS) if yarn is None else int(trained_length * yarn)
    for length in LENGTHS:
        if length > most:
            break
        scorer = Scorer.from_pretrained(model, max_length=length, yarn=yarn)
        documents, _ = scorer.documents(texts, "articles", POSITIONS)
        whole = [each for each in documents if len(each.ids) == length]
        with tqdm(desc=f"yarn {yarn}, {length} tokens", unit="tok", unit_scale=True) as bar:
            scores += scorer(whole, bar.update)
    return scores


def main(path: Path, run: Path, steps: int = 1500) -> None:
    disable_progress_bar()
    texts = articles(path)
    held_out = texts[::5]
    checkpoint, settings = train(run, [t for i, t in enumerate(texts) if i % 5], steps)
    began = time.perf_counter()
    length = settings["max_length"]
    curves = {
        "rotary angles as they are" if yarn is None else f"YaRN, factor {yarn:g}": score(
            checkpoint, held_out, length, yarn
        )
        for yarn in YARN
    }
    folder = RESULTS / "perplexity"
    folder.mkdir(parents=True, exist_ok=True)
    plot_by_length(curves, folder / "by-length.png", length)
    document = {
        "what": f"{len(texts) - len(held_out)} articles of {path.name} trained on, "
        f"{len(held_out)} held out and cut at each length, {POSITIONS} positions of each",
        "machine": machine(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "settings": settings,
        "validation": read_metrics(run)[-1],
        "seconds": {
            "training": read_metrics(run)[-1]["seconds"],
            "scoring": time.perf_counter() - began,
        },
        "perplexity": {
            name: {
                str(n): round(mean_perplexity([each for each in scores if each.tokens == n])[0], 2)
                for n in sorted({each.tokens for each in scores})
            }
            for name, scores in curves.items()
        },
        "scores": {name: [asdict(each) for each in scores] for name, scores in curves.items()},
    }
    (folder / "by-length.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document["perplexity"], indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
