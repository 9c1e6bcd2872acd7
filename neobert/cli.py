"""The `neobert` command: embed texts, train, measure throughput, and say what runs here."""

from __future__ import annotations

import platform
import sys
import warnings
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers.utils.logging import disable_progress_bar

from neobert import cli_eval, cli_search, cli_train
from neobert.cli_options import (
    BY_DEVICE,
    Device,
    Dtype,
    DtypeName,
    Input,
    InputField,
    MaxLength,
    MaxTokens,
    PoolingName,
    Progress,
    fail,
)
from neobert.encode import Encoder, TruncationWarning
from neobert.files import NpyWriter, count_lines, read_texts
from neobert.memory import keep_freed_memory
from neobert.signals import Stopped, stopped_by_signals
from neobert_kernels import __main__ as kernels
from neobert_kernels import _compiled

app = typer.Typer(
    help="NeoBERT on fused kernels: texts to embeddings, without padding.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command()(cli_train.pretrain)
app.command()(cli_train.contrastive)
app.command()(cli_train.prepare)
app.command()(cli_search.index)
app.command()(cli_search.search)
app.add_typer(cli_eval.app, name="eval")


@app.command()
def encode(
    model: Annotated[
        str,
        typer.Option(
            help="Checkpoint directory, a training run, or hub repository: chandar-lab/NeoBERT."
        ),
    ],
    input: Input,
    output: Annotated[
        Path, typer.Option(dir_okay=False, help="The .npy file to write: row i embeds line i.")
    ],
    field: InputField = None,
    pooling: Annotated[
        PoolingName | None,
        typer.Option(
            help="Mean over a text's tokens, or its first token.", show_default="the model's"
        ),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(help="Scale each embedding to length 1.", show_default="if the model does"),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Put before every text.", show_default="the model's, if it has one"),
    ] = None,
    prompt_name: Annotated[
        str | None,
        typer.Option(help="Put the model's prompt of this name before every text: query, …"),
    ] = None,
    max_length: MaxLength = None,
    max_tokens: MaxTokens = None,
    dtype: Dtype = None,
    device: Device = None,
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant", help="The same text gets the same bits in any batch and order."
        ),
    ] = False,
    progress: Progress = None,
) -> None:
    """Embed every line of a file; write (lines, dim) float32 as .npy.

    Pooling, length, normalization and prompts are the model's, as sentence-transformers reads them.
    Memory stays bounded however large the file. The output appears only when it is complete: an
    interrupted run leaves nothing behind, and a file already there as it was.
    """
    warnings.simplefilter("ignore", TruncationWarning)  # said at the end
    disable_progress_bar()  # transformers', for loading the weights
    try:
        with stopped_by_signals():
            source = sys.stdin.buffer if input == "-" else open(input, "rb")
            with source, NpyWriter(output) as writer:
                texts = read_texts(source, "stdin" if input == "-" else input, field)
                total = None if input == "-" else count_lines(Path(input))
                typer.echo(f"loading {model}", err=True)
                encoder = Encoder.from_pretrained(
                    model,
                    device,
                    dtype and dtype.value,
                    max_length,
                    batch_invariant=batch_invariant,
                )
                writer.dim = encoder.dim
                folder = encoder.folder
                if prompt_name is not None:
                    prompt = _prompt(encoder, prompt, prompt_name)
                elif prompt is None and not folder.default_prompt and any(folder.prompts.values()):
                    typer.echo(
                        f"no prompt goes before the texts; --prompt-name takes one of the model's: "
                        f"{', '.join(folder.prompts)}",
                        err=True,
                    )
                stream = encoder.encode_stream(
                    texts,
                    pooling.value if pooling else None,
                    normalize,
                    prompt,
                    max_tokens=max_tokens,
                    show_progress_bar=progress,
                    total=total,
                )
                with closing(stream):
                    for rows in stream:
                        writer.write(rows.cpu().numpy())
    except Stopped as stopped:
        typer.echo(f"{stopped}: stopped, {output} not written", err=True)
        raise typer.Exit(stopped.exit_code) from None
    except (ValueError, OSError) as error:
        raise fail(error) from error
    stats = encoder.stats
    typer.echo(
        f"{output}: {writer.rows:,} x {encoder.dim} float32 from {stats.tokens:,} tokens in "
        f"{stats.seconds:,.1f} s ({stats.tokens_per_second:,.0f} tok/s, {encoder.device}, "
        f"{str(encoder.dtype).removeprefix('torch.')})",
        err=True,
    )
    if stats.truncated:
        typer.echo(
            f"{stats.truncated:,} of {stats.texts:,} texts were longer than {encoder.max_length} "
            "tokens and were truncated",
            err=True,
        )


def _prompt(encoder: Encoder, prompt: str | None, name: str) -> str:
    """The model's prompt of a name."""
    if prompt is not None:
        raise ValueError(f"--prompt {prompt!r} and --prompt-name {name!r}: one of the two")
    prompts = encoder.folder.prompts
    if name not in prompts:
        raise ValueError(
            f"the model has no prompt named {name!r}; it has {', '.join(prompts) or 'none'}"
        )
    return prompts[name]


@app.command()
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Four models, four workloads, under three minutes.")
    ] = False,
    plot: Annotated[
        bool, typer.Option("--plot", help="Also draw the table, beside the results file.")
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Instead: where NeoBERT's time goes, op by op against the roofline; "
            "--quick takes 4 of its layers.",
        ),
    ] = False,
    models: Annotated[
        str, typer.Option(help="Names, comma-separated: neobert,neobert-plain,bert-base, …")
    ] = "",
    workloads: Annotated[
        str, typer.Option(help="Names, comma-separated: fixed-512,lognormal-1024,short-1, …")
    ] = "",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda.", show_default="the GPU if there is one")
    ] = None,
    dtype: Annotated[
        DtypeName | None, typer.Option(help="Of all models.", show_default=BY_DEVICE)
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="Time budget.", show_default="570 on a CPU, 560 on a GPU, 160 if quick"),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(file_okay=False, help="Folder of the results file; new figures join old."),
    ] = Path("benchmarks/results"),
    progress: Progress = None,
) -> None:
    """Measure the throughput table: NeoBERT and other encoders, as fast as this machine runs them.

    Each model runs in a process of its own within its share of the time budget, and each finished
    model is written to the results file at once. On a GPU the whole table takes three runs:
    --models neobert,neobert-plain,neobert-compiled, then the four base models, then the large.
    """
    # Here, for the other commands need none of transformers' encoders.
    from neobert.breakdown.run import run as take_apart
    from neobert.throughput import results
    from neobert.throughput import run as throughput
    from neobert.throughput.plot import draw, find_plotting
    from neobert.throughput.table import markdown

    try:
        plan = throughput.default_plan(
            quick,
            [name for name in models.split(",") if name],
            [name for name in workloads.split(",") if name],
            device,
            dtype and dtype.value,
            seconds,
        )
        if plot:
            find_plotting()
    except (ValueError, ImportError) as error:
        raise fail(error) from error
    if profile:
        path = take_apart(plan.device, plan.dtype, output, plot, quick, typer.echo)
        return typer.echo(f"written to {path}", err=True)
    typer.echo(
        f"{len(plan.contestants)} models, {len(plan.workloads)} workloads, {plan.dtype} on "
        f"{plan.device}, at most {plan.seconds:.0f} s",
        err=True,
    )
    path, document = output, {}

    def write(part: dict) -> None:
        nonlocal path, document
        path = results.results_path(output, part["machine"])
        document = results.write(path, part)
        if plot:
            draw(document, path.with_suffix(".png"))

    throughput.run(plan, write, sys.stderr.isatty() if progress is None else progress)
    typer.echo(markdown(document))
    typer.echo(f"written to {path}", err=True)


@app.command()
def info() -> None:
    """Versions, devices, and which kernel serves which operation here."""
    typer.echo(f"python          {platform.python_version()} on {platform.platform()}")
    for package in ("neobert-kernels", "torch", "transformers", "tokenizers", "triton"):
        try:
            typer.echo(f"{package:<16}{version(package)}")
        except PackageNotFoundError:
            typer.echo(f"{package:<16}not installed")
    typer.echo(
        f"cpu             {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads, kernels: {_compiled.status()}"
    )
    if not torch.cuda.is_available():
        typer.echo("gpu             none")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        typer.echo(
            f"cuda:{index}          {gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
            f"{gpu.total_memory / 2**30:.0f} GiB"
        )
    typer.echo(f"\n{kernels.table()}")


def main() -> None:
    keep_freed_memory()
    app(prog_name="neobert")
