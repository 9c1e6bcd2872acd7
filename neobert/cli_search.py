"""The search commands: `neobert index` and `neobert search`."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neobert.cli_options import Device, Input, InputField, PoolingName, Progress, fail

if TYPE_CHECKING:
    from neobert.search import Hit


def index(
    model: Annotated[
        str,
        typer.Option(
            help="Checkpoint directory, a training run, or hub repository; trained for search."
        ),
    ],
    input: Input,
    output: Annotated[
        Path, typer.Option(file_okay=False, help="The index's folder; one there is replaced.")
    ],
    field: InputField = None,
    pooling: Annotated[
        PoolingName | None,
        typer.Option(
            help="Mean over a text's tokens, or its first token.", show_default="the model's"
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Put before every text.", show_default="the model's for documents"),
    ] = None,
    query_prompt: Annotated[
        str | None,
        typer.Option(help="Put before every query.", show_default="the model's for queries"),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of a text; the rest is not read.", show_default="the model's"
        ),
    ] = None,
    device: Device = None,
    progress: Progress = None,
) -> None:
    """Embed texts into a folder that `neobert search` looks through.

    Blank texts are passed over and counted. Other fields of a JSONL record are kept, and shown.
    """
    from transformers.utils.logging import disable_progress_bar

    from neobert.encode import Encoder, TruncationWarning
    from neobert.files import count_lines, read_records
    from neobert.locate import locate
    from neobert.search import IndexSettings, build_index
    from neobert.signals import Stopped, stopped_by_signals

    disable_progress_bar()  # transformers', for loading the weights
    warnings.simplefilter("ignore", TruncationWarning)  # said at the end
    try:
        with (
            stopped_by_signals(),
            sys.stdin.buffer if input == "-" else open(input, "rb") as source,
        ):
            records = read_records(source, "stdin" if input == "-" else input, field)
            total = None if input == "-" else count_lines(Path(input))
            model = str(locate(model))
            encoder = Encoder.from_pretrained(model, device, max_length=max_length)
            folder = encoder.folder
            settings = IndexSettings(
                # Absolute: the index may be searched from another directory.
                model=str(Path(model).resolve()) if Path(model).is_dir() else model,
                field=field or "text",
                pooling=pooling.value if pooling else folder.pooling,
                prompt=folder.prompts.get("document", "") if prompt is None else prompt,
                query_prompt=(
                    folder.prompts.get("query", "") if query_prompt is None else query_prompt
                ),
                max_length=encoder.max_length,
            )
            count, blank = build_index(output, records, encoder, settings, progress, total)
    except Stopped as stopped:
        typer.echo(f"{stopped}: stopped, {output} is no index", err=True)
        raise typer.Exit(stopped.exit_code) from None
    except (ValueError, OSError) as error:
        raise fail(error) from error
    typer.echo(f"{output}: {count:,} texts" + (f", {blank:,} blank ones passed over" * (blank > 0)))
    if encoder.stats.truncated:
        typer.echo(
            f"{encoder.stats.truncated:,} texts were longer than {encoder.max_length} tokens and "
            "were truncated",
            err=True,
        )


def search(
    query: Annotated[
        str | None,
        typer.Argument(
            help="What to look for; without it, a query a line is read.", show_default=False
        ),
    ] = None,
    index: Annotated[
        Path, typer.Option(file_okay=False, help="A folder written by `neobert index`.")
    ] = ...,  # type: ignore[assignment]
    k: Annotated[int, typer.Option("-k", min=1, help="How many texts to show.")] = 10,
    model: Annotated[
        str | None, typer.Option(help="Where the index's model is now, if it has moved.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON object a line, with the whole records.")
    ] = False,
    device: Device = None,
) -> None:
    """Find the texts of an index that are nearest in meaning to a query."""
    from transformers.utils.logging import disable_progress_bar

    from neobert.search import Index

    disable_progress_bar()  # transformers', for loading the weights
    try:
        if query is not None:
            _check_query(query)
        loaded = Index.load(index, model, device)
        for asked in _queries() if query is None else [query]:
            (hits,) = loaded.search([asked], k)
            for rank, hit in enumerate(hits, 1):
                if as_json:
                    found = {"query": asked, "rank": rank, "score": round(hit.score, 6)}
                    typer.echo(json.dumps(found | hit.record | found, ensure_ascii=False))
                else:
                    typer.echo(_line(rank, hit, loaded.settings.field))
    except (ValueError, OSError) as error:
        raise fail(error) from error


def _check_query(query: str) -> None:
    if not query.strip():
        raise ValueError("the query is empty")
    try:
        query.encode()
    except UnicodeEncodeError as error:  # the shell's bytes, escaped
        raise ValueError(f"the query is not UTF-8: {query!r:.80}") from error


def _queries() -> Iterator[str]:
    """Lines from standard input, with a prompt on a terminal; blank ones are passed over."""
    from neobert.files import read_texts

    asking = sys.stdin.isatty()
    lines = read_texts(sys.stdin.buffer, "stdin", None)
    while True:
        if asking:
            typer.echo("\nsearch> ", nl=False)
        line = next(lines, None)
        if line is None:
            return
        if line.strip():
            yield line.strip()


def _line(rank: int, hit: Hit, field: str) -> str:
    """A record on one line of the terminal: score, other fields, the beginning of its text."""
    others = [str(value) for name, value in hit.record.items() if name != field]
    text = " ".join([*others, "|", hit.record[field]] if others else [hit.record[field]])
    line = f"{rank:>3}  {hit.score:.3f}  {' '.join(text.split())}"
    width = shutil.get_terminal_size().columns
    return line if len(line) <= width else f"{line[: width - 1]}…"
