"""The evaluation commands: `neobert eval …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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


@app.command()
def glue(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="key=value: lr=2e-5, precision=float32, grid.lr=[1e-5,2e-5]. The last word.",
            metavar="[KEY=VALUE]...",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint directory or hub repository, tokenizer included."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A directory with a folder per task: GLUE's TSV files, or the hub's as Parquet or "
            "JSONL; or hub, for nyu-mll/glue."
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Of the eight, with commas.", show_default="all")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(help="Directory for runs and results; an evaluation there is continued."),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="The paper's grid, in place of its best settings.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(dir_okay=False, exists=True, help="A YAML file of settings.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print the settings as YAML, and do nothing.")
    ] = False,
) -> None:
    """Fine-tune on the tasks of GLUE, and print the row of the paper's Table 3.

    RTE, STS-B, MRPC and QNLI start from the best MNLI run in the same output (transfer=false: from
    the model). SIGTERM saves a checkpoint and stops; the same command goes on from there.
    """
    try:
        from omegaconf import OmegaConf
        from transformers.utils.logging import disable_progress_bar

        from neobert.glue_recipes import GlueConfig
        from neobert.glue_search import glue as run
        from neobert.glue_search import table
        from neobert.settings import load
    except ImportError as error:
        raise need_extra(error) from error
    given = {"model": model, "data": data, "output": output}
    changes = [f"{name}={value}" for name, value in given.items() if value is not None]
    changes += [f"tasks=[{tasks}]"] if tasks else []
    changes += ["search=true"] if search else []
    try:
        settings = load(GlueConfig, {}, None, config, [*changes, *(overrides or [])])
        if show:
            typer.echo(OmegaConf.to_yaml(OmegaConf.structured(settings)), nl=False)
            return
        disable_progress_bar()  # transformers', for writing and loading weights
        result = run(settings)
    except (ValueError, OSError, RuntimeError) as error:
        raise fail(error) from error
    typer.echo(table(settings.model, result), nl=False)
    if result.signum:
        raise typer.Exit(128 + result.signum)
