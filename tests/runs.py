"""Small training runs, in this process or in fresh ones that may be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neobert.contrastive_recipes import ContrastiveConfig
from neobert.metrics import METRICS, read_metrics
from neobert.recipes import PretrainConfig, load_config

Config = PretrainConfig | ContrastiveConfig

# A server with everything imported, from which processes are forked: seconds less for each.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["neobert.pretrain", "neobert.contrastive"])

SETTINGS = {
    "model.vocab_size": 600,
    "model.hidden_size": 64,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.intermediate_size": 96,
    "max_length": 48,
    "bin_tokens": 96,
    "batch_bins": 8,
    "steps": 8,
    "warmup_steps": 2,
    "lr": "2e-3",
    "log_every": 1,
    "save_every": 3,
    "validation_documents": 10,
    "validate_every": 4,
    "tensorboard": "false",
}


def write_texts(path: Path, documents: int = 300) -> Path:
    """Sentences of which one word follows from another."""
    generator = random.Random(0)
    animals = ["cat", "dog", "cow", "pig", "hen", "fox", "owl", "bee"]
    verbs = ["eats", "sees", "likes", "hides", "paints", "sells", "fears", "finds"]

    def sentence() -> str:
        i, j = generator.randrange(8), generator.randrange(8)
        words = ["the", animals[i], verbs[i], "the", animals[j], "and", verbs[j]]
        return " ".join(words * generator.randrange(1, 4))

    lines = (json.dumps({"text": sentence()}) for _ in range(documents))
    path.write_text("\n".join(lines))
    return path


def settings(texts: Path, output: Path, **changes: object) -> PretrainConfig:
    """Of a small run on `texts`; `changes` have __ for a dot."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    values = SETTINGS | {"output": output, "data": f"[{{path: {texts}}}]"} | changes
    return load_config("tiny", None, [f"{key}={value}" for key, value in values.items()])


def _run(config: Config, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    import torch

    from neobert.contrastive import contrastive
    from neobert.pretrain import pretrain

    torch.set_num_threads(1)
    loop: Any = contrastive if isinstance(config, ContrastiveConfig) else pretrain
    result = loop(config)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os._exit(128 + result.stopped_by if result.stopped_by else 0)


@contextmanager
def started(config: Config, processes: int = 1, **environment: str):
    """The processes of a run, which are killed at the end of the block if they still run."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(processes):
        variables = dict(environment)
        if processes > 1:
            variables |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(port),
            }
        running.append(CONTEXT.Process(target=_run, args=(config, variables)))
    try:
        for process in running:
            process.start()
        yield running
    finally:
        for process in running:
            process.kill()
            process.join()


def run(config: Config, processes: int = 1, **environment: str) -> None:
    """A run in processes of its own, to its end."""
    with started(config, processes, **environment) as running:
        for process in running:
            process.join(120)
        assert [process.exitcode for process in running] == [0] * processes


def wait_for_step(config: Config, step: int, running: list) -> None:
    """Until a running job has written the loss of `step`."""
    deadline = time.monotonic() + 120
    while not any(record["step"] >= step for record in read_metrics(Path(config.output))):
        assert all(process.is_alive() for process in running), "it died"
        assert time.monotonic() < deadline, f"no step {step} in {config.output}/{METRICS}"
        time.sleep(0.001)


def curve(config: Config) -> list[tuple]:
    """Everything in metrics.jsonl that does not depend on the clock."""
    clock = ("tokens_per_second", "mfu", "seconds")
    return [
        tuple((name, value) for name, value in record.items() if name not in clock)
        for record in read_metrics(Path(config.output))
    ]
