"""The evaluation commands: `neobert eval …`."""

from __future__ import annotations

import typer

app = typer.Typer(help="Measure a model: the evaluations of the paper.", no_args_is_help=True)


def fail(error: Exception) -> typer.Exit:
    typer.echo(f"Error: {error}", err=True)
    return typer.Exit(1)


def need_extra(error: ImportError) -> typer.Exit:
    return fail(
        ImportError(
            f"evaluation needs packages that are not installed ({error}): "
            'pip install "neobert-kernels[eval]"'
        )
    )
