"""Small GLUE data: a file of every task in its own format, and a task that can be learned."""

from __future__ import annotations

import json
import random
from pathlib import Path

from neobert.checkpoint import write_random_checkpoint
from neobert.config import NeoBERTConfig
from neobert.glue_recipes import FinetuneConfig, GlueConfig
from neobert.metrics import Metrics
from neobert.settings import load
from tests.checkpoints import WORDS, word_tokenizer

PARSES = "( a )\t( b )\t(ROOT a)\t(ROOT b)"
# Per task: its files as GLUE has them, and what their first file holds. A quote opens and never
# closes, as in the real ones.
TSV = {
    "CoLA": (
        {
            "train.tsv": 'gj04\t1\t\tThe "cat sat.\nbc01\t0\t*\tSat cat the.\n',
            "dev.tsv": "gj04\t0\t*\tRan dog.\nr-67\t1\t\tThe dog ran.\n",
        },
        [(('The "cat sat.',), 1), (("Sat cat the.",), 0)],
    ),
    "SST-2": (
        {
            "train.tsv": 'sentence\tlabel\na "very new mat \t1\nnot it \t0\n',
            "dev.tsv": "sentence\tlabel\nvery very old \t0\nblue \t1\n",
        },
        [(('a "very new mat ',), 1), (("not it ",), 0)],
    ),
    "MRPC": (
        {
            "train.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
            '1\t70\t71\tThe cat " ran.\tA cat ran.\r\n0\t72\t73\tIt sat.\tThe dog ran.\r\n',
            "dev.tsv": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
            "0\t1\t2\tOne.\tTwo.\n1\t3\t4\tThree.\tThree.\n",
        },
        [(('The cat " ran.', "A cat ran."), 1), (("It sat.", "The dog ran."), 0)],
    ),
    "QQP": (
        {
            "train.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
            '9\t1\t2\tWhat is "old?\tWhat was old?\t1\n8\t3\t4\tWhy?\tHow?\t0\n',
            "dev.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
            "7\t1\t2\tA?\tB?\t0\n6\t3\t4\tC?\tC?\t1\n",
        },
        [(('What is "old?', "What was old?"), 1), (("Why?", "How?"), 0)],
    ),
    "STS-B": (
        {
            "train.tsv": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\t"
            "sentence2\tscore\n"
            '0\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\tA plane.\tA "plane.\t5.000\n'
            "1\tmain-news\theadlines\t2013\t0002\tnone\tnone\tA cat.\tA dog.\t1.600\n",
            "dev.tsv": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\t"
            "sentence2\tscore\n"
            "0\tg\tf\ty\t1\tnone\tnone\tA.\tB.\t0.000\n1\tg\tf\ty\t2\tnone\tnone\tA.\tA.\t5\n",
        },
        [(("A plane.", 'A "plane.'), 5.0), (("A cat.", "A dog."), 1.6)],
    ),
    "MNLI": (
        {
            "train.tsv": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\t"
            "sentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\t"
            "label1\tgold_label\n"
            f'0\t31\t31n\tfiction\t{PARSES}\tIt "was a dog.\tIt was red.\tneutral\tneutral\n'
            f"1\t32\t32e\tfiction\t{PARSES}\tA cat sat.\tIt sat.\tentailment\tentailment\n"
            f"2\t33\t33c\tfiction\t{PARSES}\tA cat sat.\tIt ran.\tneutral\tcontradiction\n",
            **{
                f"dev_{name}.tsv": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\t"
                "sentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\t"
                "label1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label\n"
                f"0\t1\t1n\t{name}\t{PARSES}\tA.\tB.\tneutral\tn\tn\tn\tn\tcontradiction\n"
                f"1\t2\t2n\t{name}\t{PARSES}\tC.\tD.\tneutral\tn\tn\tn\tn\tneutral\n"
                for name in ("matched", "mismatched")
            },
        },
        [
            (('It "was a dog.', "It was red."), 1),
            (("A cat sat.", "It sat."), 0),
            (("A cat sat.", "It ran."), 2),
        ],
    ),
    "QNLI": (
        {
            "train.tsv": "index\tquestion\tsentence\tlabel\n"
            '0\tWhat is "it?\tIt is a cat.\tentailment\n1\tWho?\tA mat.\tnot_entailment\n',
            "dev.tsv": "index\tquestion\tsentence\tlabel\n"
            "0\tA?\tB.\tnot_entailment\n1\tC?\tD.\tentailment\n",
        },
        [(('What is "it?', "It is a cat."), 0), (("Who?", "A mat."), 1)],
    ),
    "RTE": (
        {
            "train.tsv": "index\tsentence1\tsentence2\tlabel\n"
            '0\tThe "cat sat.\tIt sat.\tentailment\n1\tA dog.\tA cat.\tnot_entailment\n',
            "dev.tsv": "index\tsentence1\tsentence2\tlabel\n"
            "0\tA.\tB.\tnot_entailment\n1\tC.\tC.\tentailment\n",
        },
        [(('The "cat sat.', "It sat."), 0), (("A dog.", "A cat."), 1)],
    ),
}


def write_tsv(data: Path, name: str) -> Path:
    """The task's folder."""
    folder = data / name
    folder.mkdir(parents=True)
    for file, text in TSV[name][0].items():
        (folder / file).write_bytes(text.encode())
    return folder


def write_learnable(data: Path, examples: int = 96) -> Path:
    """RTE and MNLI as the hub's JSONL: the second text is about something red, and with MNLI also
    about something blue, or it is not."""
    generator = random.Random(0)
    plain = [word for word in WORDS if word not in ("red", "blue")]

    def sentence(extra: str = "") -> str:
        words = generator.choices(plain, k=generator.randrange(1, 12))
        return " ".join(words[:3] + [extra] * bool(extra) + words[3:])

    tasks = {
        "rte": ("sentence1", "sentence2", ("red", ""), ("validation",)),
        "mnli": ("premise", "hypothesis", ("red", "blue", ""),
                 ("validation_matched", "validation_mismatched")),
    }  # fmt: skip
    for subset, (first, second, extras, dev) in tasks.items():
        folder = data / subset
        folder.mkdir(parents=True)
        for split in ("train", *dev):
            rows = []
            for number in range(examples if split == "train" else examples // 2):
                label = generator.randrange(len(extras))
                texts = {first: sentence(), second: sentence(extras[label])}
                rows.append(json.dumps(texts | {"label": label, "idx": number}))
            (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return data


def write_model(folder: Path, dropout: float = 0.1) -> Path:
    """A random checkpoint of the released layout, with a tokenizer of a few words."""
    tokenizer = word_tokenizer()
    config = NeoBERTConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=96, max_length=64,
    )  # fmt: skip
    write_random_checkpoint(folder, config, outliers=False)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"classifier_dropout": dropout}))
    tokenizer.save_pretrained(folder)
    return folder


SETTINGS = {
    "precision": "float32", "epochs": 3, "patience": 100, "log_every": 1, "save_every": 5,
}  # fmt: skip


def run_settings(model: Path, data: Path, output: Path, **changes: object) -> FinetuneConfig:
    values = SETTINGS | {"batch_size": 8, "lr": "3e-3"}
    values |= {"model": model, "data": data, "output": output, "task": "rte"} | changes
    return load(FinetuneConfig, {}, overrides=[f"{k}={v}" for k, v in values.items()])


def glue_settings(model: Path, data: Path, output: Path, **changes: object) -> GlueConfig:
    values = SETTINGS | {"model": model, "data": data, "output": output} | changes
    overrides = [f"{name.replace('__', '.')}={value}" for name, value in values.items()]
    return load(GlueConfig, {}, overrides=overrides)


def after(steps, action):
    """A Metrics.advance that does something after so many steps of this process."""
    advance, taken = Metrics.advance, 0

    def patched(self, loss):
        nonlocal taken
        advance(self, loss)
        taken += 1
        if taken == steps:
            action()

    return patched
