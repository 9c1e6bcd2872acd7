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
def mteb(
    model: Annotated[
        str,
        typer.Option(help="Checkpoint directory or hub repository; sentence-transformers' too."),
    ],
    benchmark: Annotated[
        str, typer.Option(help="One of mteb's benchmarks, all of its tasks.")
    ] = "MTEB(eng, v1)",
    tasks: Annotated[
        str,
        typer.Option(
            help="Only these, comma-separated: names of mteb's tasks, or paths of your own. A file "
            "(.csv, .tsv, .jsonl, .parquet) of sentence1, sentence2, score is STS; of sentence1, "
            "sentence2, labels pair classification; of sentences, labels clustering. A folder of "
            "corpus, queries and qrels files is retrieval; of train and test files of text, label "
            "classification."
        ),
    ] = "",
    data: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            exists=True,
            help="Read mteb's data sets here, not from the hub: DATA/mteb/stsbenchmark-sts, …",
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            file_okay=False,
            help="Folder of results, as mteb caches them, and of the table; finished tasks that "
            "are there are not computed again.",
        ),
    ] = Path("mteb"),
    instructions: Annotated[
        bool,
        typer.Option(
            help="Put the model's own prompt for the task, or else the paper's instruction, "
            "before each text."
        ),
    ] = True,
    max_length: Annotated[
        int | None,
        typer.Option(help="Most tokens of a text.", show_default="the model's, 4096"),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Most tokens computed at once. [default: 4096 on a CPU, 32768 on a GPU]"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16, the paper's.",
            show_default="float32 on a CPU, bfloat16 on a GPU",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda or cuda:1.", show_default="the GPU if there is one"),
    ] = None,
    progress: Annotated[
        bool | None, typer.Option(help="Progress bars.", show_default="on a terminal")
    ] = None,
) -> None:
    """Score embeddings on MTEB: the paper's Table 4, as Markdown and JSON.

    Results are written as they come; a run that was stopped goes on with the next task. A score is
    known by the model's files, dtype, length and instructions.
    """
    try:
        from neobert import mteb_table
        from neobert.mteb import EvaluationError, MTEBEncoder, evaluate, quiet, select_tasks
    except ImportError as error:
        raise need_extra(error) from error
    quiet()
    results = []
    try:
        selected = select_tasks([name for name in tasks.split(",") if name], benchmark, data)
        typer.echo(f"loading {model}", err=True)
        encoder = MTEBEncoder(
            model,
            device=device,
            dtype=dtype,
            max_length=max_length,
            max_tokens=max_tokens,
            instructions=instructions,
        )
        for task, result in evaluate(encoder, selected, output, progress):
            results.append((task, result))
    except (EvaluationError, ValueError, OSError) as error:
        raise fail(error) from error
    summary = mteb_table.summary(encoder.mteb_model_meta, results, benchmark)
    path = mteb_table.write(output, encoder.mteb_model_meta, summary)
    typer.echo(mteb_table.markdown(summary))
    totals = encoder.totals
    typer.echo(
        f"{path}: {len(results)} tasks, {totals.texts:,} texts of {totals.tokens:,} tokens encoded "
        f"in {totals.seconds:,.1f} s ({totals.tokens_per_second:,.0f} tok/s, "
        f"{encoder.encoder.device}), {totals.truncated:,} of them truncated, "
        f"{encoder.empty_texts:,} empty",
        err=True,
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
