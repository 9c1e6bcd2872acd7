"""The evaluation commands: `neobert eval …`."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from neobert.cli_options import (
    ConfigFile,
    Device,
    Documents,
    DocumentsField,
    Dtype,
    HubSplit,
    HubSubset,
    MaxLength,
    MaxTokens,
    Progress,
    Show,
    Streaming,
    fail,
    need_extra,
)

app = typer.Typer(help="Measure a model: the evaluations of the paper.", no_args_is_help=True)


EXTRA = ("evaluation", "eval")


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
    max_length: MaxLength = None,
    max_tokens: MaxTokens = None,
    dtype: Dtype = None,
    device: Device = None,
    progress: Progress = None,
) -> None:
    """Score embeddings on MTEB: the paper's Table 4, as Markdown and JSON.

    Results are written as they come; a run that was stopped goes on with the next task. Tasks that
    fail are named at the end, and are not in the table. A score is known by the model's files,
    dtype, length and instructions. The paper's scores are of float16.
    """
    try:
        from neobert import mteb_table
        from neobert.mteb import EvaluationError, MTEBEncoder, evaluate, quiet, select_tasks
    except ImportError as error:
        raise need_extra(error, *EXTRA) from error
    quiet()
    results, failure = [], None
    try:
        selected = select_tasks([name for name in tasks.split(",") if name], benchmark, data)
        typer.echo(f"loading {model}", err=True)
        encoder = MTEBEncoder(
            model,
            device=device,
            dtype=dtype and dtype.value,
            max_length=max_length,
            max_tokens=max_tokens,
            instructions=instructions,
        )
        for task, result in evaluate(encoder, selected, output, progress):
            results.append((task, result))
    except EvaluationError as error:
        if not results:
            raise fail(error) from error
        failure = error
    except (ValueError, OSError) as error:
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
    if failure:
        raise fail(failure) from failure


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
    config: ConfigFile = None,
    show: Show = False,
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
        raise need_extra(error, *EXTRA) from error
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


@app.command()
def perplexity(
    model: Annotated[
        str, typer.Option(help="Checkpoint directory or hub repository, with its masked-LM head.")
    ],
    data: Documents,
    output: Annotated[
        Path, typer.Option(dir_okay=False, help="JSONL, a line for each document; is gone on with.")
    ],
    field: DocumentsField = "text",
    split: HubSplit = "train",
    subset: HubSubset = None,
    streaming: Streaming = False,
    documents: Annotated[
        int | None, typer.Option(min=1, help="Take the first so many.", show_default="all")
    ] = None,
    min_tokens: Annotated[
        int | None,
        typer.Option(help="Pass over shorter documents.", show_default="one below 2 is an error"),
    ] = None,
    positions: Annotated[
        int | None,
        typer.Option(
            help="Mask so many tokens of each document, drawn at random.", show_default="all"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of a document; the rest is cut off. May be beyond the model's.",
            show_default="the model's, times --yarn",
        ),
    ] = None,
    yarn: Annotated[
        float | None, typer.Option(help="Stretch the model's length by this factor, with YaRN.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Draw perplexity by length: .png, .svg, …")
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="Draw the results in this file too. May be repeated.", exists=True),
    ] = None,
    max_tokens: MaxTokens = None,
    dtype: Dtype = None,
    device: Device = None,
    progress: Progress = None,
) -> None:
    """Pseudo-perplexity of each document: every token masked once, alone (paper, §5.3, App. E).
    Special tokens in a text, [UNK] above all, are read and counted and never masked.

    Costs a forward pass for each token: --positions 100 estimates it, with a standard error. A
    finished document's line is never lost; the same command goes on after an interruption.
    """
    try:
        from tqdm.auto import tqdm
        from transformers.utils.logging import disable_progress_bar

        from neobert.corpus import Source, open_texts, text_batches
        from neobert.digests import model_revision
        from neobert.perplexity import Scorer, documents_digest
        from neobert.perplexity_scores import (
            check_plot,
            mean_perplexity,
            plot_by_length,
            read_scores,
            resume,
            score_line,
        )
        from neobert.signals import Stopped, stopped_by_signals
    except ImportError as error:
        raise need_extra(error, *EXTRA) from error
    disable_progress_bar()  # transformers', for loading the weights
    scores = []
    try:
        if plot:
            check_plot(plot)
        others = {str(path): read_scores(path) for path in beside or []}
        if empty := [name for name, read in others.items() if not read]:
            raise ValueError(f"{empty[0]} has no scores to draw")
        texts = open_texts(Source(data, field, streaming=streaming, split=split, subset=subset))
        rows = (text for batch, _ in text_batches(texts, field) for text in batch)
        scorer = Scorer.from_pretrained(
            model, device, dtype and dtype.value, max_length, max_tokens, yarn
        )
        chosen, passed_over = scorer.documents(
            islice(rows, documents), data, positions, seed, min_tokens
        )
        if not chosen:
            raise ValueError(f"{data} has no document of at least {min_tokens or 2} tokens")
        settings = {
            "model": model, "data": data, "field": field, "split": split, "subset": subset,
            "positions": positions, "seed": seed, "min_tokens": min_tokens,
            "max_length": scorer.max_length, "yarn": yarn,
            "dtype": str(scorer.model.dtype).removeprefix("torch."),
            "documents": len(chosen), "tokens": sum(len(each.ids) for each in chosen),
            "model_revision": model_revision(scorer.model),
            "documents_digest": documents_digest(chosen),
        }  # fmt: skip
        scores = resume(output, settings)
        todo = chosen[len(scores) :]
        work = sum(len(each.ids) * len(each.places) for each in todo)
        hidden = None if progress is None else not progress
        with (
            stopped_by_signals(),
            open(output, "a") as lines,
            tqdm(total=work, desc="perplexity", unit="tok", unit_scale=True, disable=hidden) as bar,
        ):
            for score in scorer(todo, bar.update):
                scores.append(score)
                lines.write(score_line(score))
                lines.flush()
                bar.set_postfix_str(f"document {score.document}: {score.perplexity:.4g}")
        if plot:
            plot_by_length({**others, str(output): scores}, plot)
    except Stopped as stopped:
        typer.echo(f"{stopped}: stopped, {len(scores)} documents are in {output}", err=True)
        raise typer.Exit(stopped.exit_code) from None
    except (ValueError, OSError) as error:
        raise fail(error) from error
    masked, maskable = (sum(getattr(s, name) for s in scores) for name in ("masked", "maskable"))
    mean, standard_error = mean_perplexity(scores)
    plus_minus = f" ± {standard_error:.4f}" if masked < maskable else ""
    typer.echo(
        f"{len(scores):,} documents, {masked:,} of {maskable:,} tokens masked: pseudo-perplexity "
        f"{mean:.4f}{plus_minus} over all of them; written to {output}"
    )
    for count, what in (
        (passed_over, f"shorter than {min_tokens} tokens and passed over"),
        (sum(score.truncated for score in scores), f"cut off at {scorer.max_length} tokens"),
    ):
        if count:
            typer.echo(f"{count:,} documents were {what}", err=True)
    special: Counter[str] = sum((Counter(score.special) for score in scores), Counter())
    if special:
        which = ", ".join(f"{count:,} {name}" for name, count in special.most_common())
        typer.echo(f"special tokens in the texts, read but not scored: {which}", err=True)
    if literal := sum(scorer.mask_name in score.special for score in scores):
        typer.echo(
            f"{literal:,} documents spell out {scorer.mask_name}: it is a second mask in each of "
            "their copies",
            err=True,
        )
