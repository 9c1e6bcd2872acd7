"""`python -m neobert.demo`: what this package does, on this machine, in under five minutes.

It needs no network. Two parts: real text through a full-size NeoBERT, against plain PyTorch; and a
small NeoBERT that is trained on the spot and then finds things. The second leaves a folder with
the trained model and an index to search.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers.utils.logging import disable_progress_bar

from neobert.demo_speed import demonstrate, print_table, write_checkpoint
from neobert.docstrings import standard_library_docstrings
from neobert.stopwatch import step
from neobert.wordpiece import train_tokenizer as train_tokenizer  # where it was to be found
from neobert_kernels import _compiled


def speed(model: str | None, seconds: float) -> None:
    """The same texts through plain PyTorch and through `Encoder`.

    model: checkpoint directory or hub repository; None is a full-size one with random weights.
    """
    with step("reading the docstrings of the standard library") as done:
        texts = standard_library_docstrings()
        done(f"{len(texts):,}, {sum(map(len, texts)) / 1e6:.1f} million characters")
    bfloat16 = torch.cuda.is_available() or _compiled.LOADED == "avx512_bf16"
    dtypes = ["float32", "bfloat16"] if bfloat16 else ["float32"]
    with tempfile.TemporaryDirectory(prefix="neobert-demo-") as temporary:
        if model is None:
            folder = Path(temporary)
            write_checkpoint(folder, texts)
        elif Path(model).is_dir():
            folder = Path(model)
        else:
            folder = Path(snapshot_download(model))
        print_table(demonstrate(folder, texts, dtypes, seconds))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="neobert.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="only the first part, on this checkpoint")
    parser.add_argument("--seconds", type=float, default=2.0, help="of texts to embed, default 2")
    parser.add_argument(
        "--output", type=Path, default=Path("demo-model"), help="folder to train in"
    )
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    disable_progress_bar()  # transformers', for loading the weights
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {_compiled.status()}")
    speed(options.model, options.seconds)
    if options.model is None:
        try:
            import bm25s  # noqa: F401  # needed at the end, and missed before training

            from neobert.demo_search import demonstrate_search
        except ImportError as error:
            parser.exit(
                1,
                f"\nThe second part needs packages that are not installed ({error}): "
                'pip install "neobert-kernels[train,eval]"\n',
            )
        print()
        demonstrate_search(options.output)
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
