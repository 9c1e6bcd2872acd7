"""Options that several commands have, and how a command ends with an error."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

BY_DEVICE = "float32 on a CPU, bfloat16 on a GPU"


class PoolingName(str, Enum):
    mean = "mean"
    cls = "cls"


class DtypeName(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


# --- what is computed, and where ------------------------------------------------------------------
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:1.", show_default="the GPU if there is one"),
]
Dtype = Annotated[
    DtypeName | None,
    typer.Option(help="Of the weights and activations.", show_default=BY_DEVICE),
]
MaxLength = Annotated[
    int | None,
    typer.Option(help="Most tokens of a text; the rest is cut off.", show_default="the model's"),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(help="Most tokens computed at once. [default: 2048 on a CPU, 32768 on a GPU]"),
]
Progress = Annotated[bool | None, typer.Option(help="Progress bar.", show_default="on a terminal")]

# --- texts ----------------------------------------------------------------------------------------
Input = Annotated[
    str, typer.Option(help="File with one text per line, or JSONL with --field; - is stdin.")
]
InputField = Annotated[
    str | None, typer.Option(help="Read JSONL: the field of each object that holds the text.")
]
Documents = Annotated[
    str, typer.Option(help="A file or pattern (.txt, .jsonl, .parquet), hub data set, docstrings.")
]
DocumentsField = Annotated[str, typer.Option(help="The column that holds the text.")]
HubSplit = Annotated[str, typer.Option(help="Of a hub data set.")]
HubSubset = Annotated[str | None, typer.Option(help="Of a hub data set.")]
Streaming = Annotated[bool, typer.Option("--streaming", help="Do not download the data set first.")]

# --- settings of a run ----------------------------------------------------------------------------
ConfigFile = Annotated[
    Path | None, typer.Option(dir_okay=False, exists=True, help="A YAML file of settings.")
]
Show = Annotated[bool, typer.Option("--show", help="Print the settings as YAML, and do nothing.")]


def fail(error: Exception) -> typer.Exit:
    """Says what was wrong; to be raised."""
    typer.echo(f"Error: {error}", err=True)
    return typer.Exit(1)


def need_extra(error: ImportError, what: str, extra: str) -> typer.Exit:
    """`fail`, for a command `what` whose packages come with an optional dependency."""
    return fail(
        ImportError(
            f"{what} needs packages that are not installed ({error}): "
            f'pip install "neobert-kernels[{extra}]"'
        )
    )
