"""The training commands: `neobert pretrain`, `neobert contrastive` and `neobert prepare`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from neobert.cli_options import (
    ConfigFile,
    Documents,
    DocumentsField,
    HubSplit,
    HubSubset,
    Show,
    Streaming,
    fail,
    need_extra,
)

EXTRA = ("training", "train")


def pretrain(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="key=value: steps=500, model.hidden_size=512, data.0.weight=2. The last word.",
            metavar="[KEY=VALUE]...",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="neobert-1024 and neobert-4096, the paper's two stages, or tiny."),
    ] = None,
    config: ConfigFile = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="In place of the preset's data: a file or pattern (.txt, .jsonl, .parquet), a "
            "prepared directory, a hub data set, or docstrings. May be repeated."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            help="Directory for checkpoints and metrics; a run there is continued.",
            show_default="runs/PRESET",
        ),
    ] = None,
    show: Show = False,
) -> None:
    """Pre-train a masked-language model on packed sequences.

    Settings are the preset's, changed by --config, by the other options, and by KEY=VALUE. On
    several GPUs start it with `torchrun -m neobert pretrain …` or `accelerate launch -m neobert
    pretrain …`. SIGTERM saves a checkpoint and stops; the same command goes on from there.
    """
    try:
        from neobert.pretrain import pretrain as run
        from neobert.recipes import load_config
        from neobert.settings import assign
    except ImportError as error:
        raise need_extra(error, *EXTRA) from error
    given = [assign("data", [{"path": path} for path in data])] if data else []
    given += [assign("output", output)] if output else []
    _train(
        lambda: load_config(preset, config, [*given, *(overrides or [])]),
        run,
        lambda result: f"loss {result.loss:.4f}, checkpoint {result.checkpoint}",
        show,
    )


def contrastive(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="key=value: steps=500, batch_size=256, data.0.min_score=4. The last word.",
            metavar="[KEY=VALUE]...",
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="neobert, the paper's recipe without its data, or tiny.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            exists=True,
            help="A YAML file of settings; configs/contrastive-paper.yaml has the paper's data.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="In place of the preset's data: a file or pattern (.jsonl, .parquet, .csv) or a "
            "hub data set with the columns query and positive, or docstrings. May be repeated."
        ),
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option(
            help="The pre-trained model: a checkpoint, a run of `neobert pretrain`, a hub "
            "repository.",
            show_default="the preset's",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            help="Directory for checkpoints, metrics and the model; a run there is continued.",
            show_default="runs/PRESET-contrastive",
        ),
    ] = None,
    show: Show = False,
) -> None:
    """Train a pre-trained encoder to embed, on pairs of texts that belong together.

    Settings are the preset's, changed by --config, by the other options, and by KEY=VALUE, whose
    `data` lists the data sets: files, hub data sets, their columns and instructions. On several
    GPUs start it with `torchrun -m neobert contrastive …` or `accelerate launch -m neobert
    contrastive …`. SIGTERM saves a checkpoint and stops; the same command goes on from there. The
    finished model, in OUTPUT/model, is a folder for sentence-transformers and `neobert encode`.
    """
    try:
        from neobert.contrastive import contrastive as run
        from neobert.contrastive_recipes import load_config
        from neobert.settings import assign
    except ImportError as error:
        raise need_extra(error, *EXTRA) from error
    given = [assign("data", [{"path": path} for path in data])] if data else []
    given += [assign("start_from", start_from)] if start_from else []
    given += [assign("output", output)] if output else []
    _train(
        lambda: load_config(preset, config, [*given, *(overrides or [])]),
        run,
        lambda result: (
            f"loss {result.loss:.4f}, accuracy {result.accuracy:.4f}, "
            + (f"model {result.model}" if result.model else f"checkpoint {result.checkpoint}")
        ),
        show,
    )


def _train(
    load: Callable[[], Any], run: Callable[[Any], Any], say: Callable[[Any], str], show: bool
) -> None:
    """What a training command does with settings: show them, or run them and `say` the result."""
    from accelerate import PartialState
    from omegaconf import OmegaConf
    from transformers.utils.logging import disable_progress_bar

    from neobert.saving import SaveError

    try:
        settings = load()
        if show:
            typer.echo(OmegaConf.to_yaml(OmegaConf.structured(settings)), nl=False)
            return
        disable_progress_bar()  # transformers', for writing and loading weights
        result = run(settings)
    except (ValueError, FileNotFoundError, SaveError, RuntimeError) as error:
        raise fail(error) from error
    if PartialState().is_main_process:
        typer.echo(f"step {result.step}: {say(result)}")
    if result.stopped_by:
        raise typer.Exit(128 + result.stopped_by)


def prepare(
    data: Documents,
    tokenizer: Annotated[str, typer.Option(help="Directory or hub repository of the tokenizer.")],
    output: Annotated[Path, typer.Option(file_okay=False, help="Directory to write shards to.")],
    field: DocumentsField = "text",
    split: HubSplit = "train",
    subset: HubSubset = None,
    streaming: Streaming = False,
    shard_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens in a shard, about; it is finished or lost as one.")
    ] = 100_000_000,
    check: Annotated[
        bool, typer.Option("--check", help="Then read all shards and compare their checksums.")
    ] = False,
) -> None:
    """Tokenize texts once, into memory-mapped shards that `neobert pretrain --data` takes.

    An interrupted run goes on where it stopped when it is started again.
    """
    try:
        from datasets import Dataset
        from transformers import AutoTokenizer

        from neobert.corpus import Source, open_texts, text_batches
        from neobert.shards import prepare as run
    except ImportError as error:
        raise need_extra(error, *EXTRA) from error
    source = Source(data, field, streaming=streaming, split=split, subset=subset)
    try:
        texts = open_texts(source)
        shards = run(
            output,
            lambda position: text_batches(texts, field, position),
            AutoTokenizer.from_pretrained(tokenizer),
            {name: value for name, value in vars(source).items() if value is not None},
            len(texts) if isinstance(texts, Dataset) else None,
            shard_tokens,
        )
        if check:
            shards.check()
    except (ValueError, OSError) as error:
        raise fail(error) from error
    typer.echo(
        f"{output}: {len(shards):,} documents, {shards.num_tokens:,} tokens of "
        f"{shards.dtype.name} in {len(shards.shards)} shards"
    )
