"""`Encoder` as an mteb model, and the tasks of a benchmark run through it.

mteb hands a model one column of a task at a time, in a DataLoader's batches. Here the batches are
drained first, so that `Encoder` sorts and packs across the whole column; of a corpus mteb makes
columns of 50,000 documents.
"""

from __future__ import annotations

import copy
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import mteb
import numpy as np
from mteb.abstasks import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from neobert.digests import model_revision
from neobert.encode import Encoder, EncodeStats, TruncationWarning
from neobert.instructions import prompt as paper_prompt
from neobert.local_tasks import is_local, local_task
from neobert.locate import locate

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.results import TaskResult
    from torch.utils.data import DataLoader

BENCHMARK = "MTEB(eng, v1)"
PAPER = """@misc{lebreton2025neobert,
  title={NeoBERT: A Next-Generation BERT},
  author={Lola Le Breton and Quentin Fournier and Mariam El Mezouar and Sarath Chandar},
  year={2025}, eprint={2502.19587}, archivePrefix={arXiv}, primaryClass={cs.CL}}"""


class EvaluationError(RuntimeError):
    """Tasks that gave no score; the message has a line for each."""


class MTEBEncoder(AbsEncoder):
    """A NeoBERT as mteb's `EncoderProtocol`: mean pooling and cosine similarity, as in the paper.

    model_name: a checkpoint directory or hub repository, sentence-transformers' folders included,
        or a training run's output for its newest checkpoint.
    revision: of the hub repository.
    device, dtype, max_length: as of `Encoder.from_pretrained`.
    max_tokens: the most tokens computed at once; it changes the speed and not the vectors.
    instructions: put the paper's instruction for the task before each text. A prompt that the
        model's folder has for the task, its type or its side (query, document) comes first, an
        empty one too; a folder with a prompt for all queries or all documents gets no instructions:
        it was trained with its own. Nor does one with empty prompts alone, which `neobert
        contrastive` writes without instructions: it was trained without. False: no prompts at all.

    `totals` counts what was encoded; `empty_texts` those of white space alone, which mteb's data
    sets have, and which are embedded like any other. Two models share mteb's cached results only if
    their files, dtype, max_length and instructions are the same: `mteb_model_meta.revision` is the
    hub's commit or a digest of the directory's files, and what differs from float32, the model's
    length and instructions is in `experiment_kwargs`.
    """

    mteb_model_meta: ModelMeta

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        max_tokens: int | None = None,
        instructions: bool = True,
    ):
        options: dict[str, Any] = {"revision": revision} if revision else {}
        path = locate(model_name)
        self.encoder = Encoder.from_pretrained(path, device, dtype, max_length, **options)
        self.folder = self.encoder.folder
        self.max_tokens = max_tokens
        self.instructions = instructions
        self.totals = EncodeStats()
        self.empty_texts = 0
        settings = {
            "dtype": str(self.encoder.dtype).removeprefix("torch."),
            "max_length": self.encoder.max_length,
            "instructions": instructions,
        }
        usual = {
            "dtype": "float32",
            "max_length": self.folder.max_length or self.encoder.model.config.max_length,
            "instructions": True,
        }
        self.mteb_model_meta = _model_meta(
            model_name,
            self.encoder,
            instructions,
            {key: value for key, value in settings.items() if value != usual[key]},
        )

    def prompt(self, task_metadata: TaskMetadata, prompt_type: PromptType | None) -> str:
        """What goes before each text of a task: "" or an instruction with its separator."""
        if not self.instructions:
            return ""
        prompts = self.folder.prompts
        name = get_prompt_name(prompts, task_metadata, prompt_type)
        if name is not None:
            return prompts[name]
        own = any(prompts.get(kind.value) for kind in PromptType)
        without = bool(prompts) and not any(prompts.values())
        if self.folder.default_prompt or own or without:
            return self.folder.default_prompt
        return paper_prompt(task_metadata.name, task_metadata.type)

    def encode(
        self,
        inputs: DataLoader,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Embeddings of the texts of `inputs`, (texts, dim) float32, in their order.

        kwargs: show_progress_bar; batch_size, which the loader has used already.
        Raises ValueError for a task without texts, a `precision` other than float32, or an
        embedding that is not finite, with the text and its index.
        """
        if kwargs.get("precision") not in (None, "float32"):
            raise ValueError(f"precision must be float32, got {kwargs['precision']!r}")
        texts: list[str] = []
        for batch in inputs:
            if "text" not in batch:
                raise ValueError(
                    f"{task_metadata.name} has {', '.join(batch)}, and a NeoBERT reads text"
                )
            texts += batch["text"]
        embeddings = self.encoder.encode(
            texts,
            prompt=self.prompt(task_metadata, prompt_type),
            max_tokens=self.max_tokens,
            show_progress_bar=kwargs.get("show_progress_bar"),
        )
        assert isinstance(embeddings, np.ndarray)
        finite = np.isfinite(embeddings).all(1)
        if not finite.all():
            index = int(finite.argmin())
            where = "/".join((task_metadata.name, hf_subset, hf_split))
            raise ValueError(
                f"the model's embedding of text {index} of {where} is not finite, nor are those of "
                f"{(~finite).sum() - 1} others: {texts[index]!r:.80}"
            )
        stats = self.encoder.stats
        for name in ("texts", "tokens", "truncated", "seconds", "batches", "graphed"):
            setattr(self.totals, name, getattr(self.totals, name) + getattr(stats, name))
        self.empty_texts += sum(not text.strip() for text in texts)
        return embeddings


def _model_meta(name: str, encoder: Encoder, instructions: bool, experiment: dict) -> ModelMeta:
    model = encoder.model
    is_directory = Path(name).is_dir()
    return ModelMeta(
        # A directory has no place from which mteb could load it again.
        loader=None if is_directory else MTEBEncoder,
        name=f"local/{Path(name).resolve().name}" if is_directory else name,
        revision=model_revision(model),
        release_date=None,
        languages=["eng-Latn"],
        n_parameters=sum(p.numel() for p in model.parameters()),
        n_embedding_parameters=model.get_input_embeddings().weight.numel(),
        memory_usage_mb=sum(p.nbytes for p in model.parameters()) / 2**20,
        max_tokens=encoder.max_length,
        embed_dim=encoder.dim,
        license=None,
        open_weights=None if is_directory else True,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch", "safetensors"],
        reference=None if is_directory else f"https://huggingface.co/{name}",
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=instructions,
        training_datasets=None,
        modalities=["text"],
        model_type=["dense"],
        citation=PAPER,
        experiment_kwargs=experiment or None,
    )


def select_tasks(
    names: Sequence[str] = (), benchmark: str = BENCHMARK, data: Path | None = None
) -> list[AbsTask]:
    """Tasks by name, or all of a benchmark.

    names: of the benchmark's tasks; of any of mteb's, then in English where it has languages; or
        paths of local tasks (`neobert.local_tasks`).
    data: a folder that holds the tasks' data sets as the hub does, each in the folder of its hub
        name: <data>/mteb/stsbenchmark-sts. Nothing is then read from the hub.
    Raises ValueError for an unknown name (it says the nearest), a task that is not of text alone,
    and data that is not there.
    """
    try:
        of_benchmark = {task.metadata.name: task for task in mteb.get_benchmark(benchmark).tasks}
        tasks = [
            local_task(Path(name))
            if is_local(name)
            else of_benchmark.get(name) or mteb.get_task(name, languages=["eng"])
            for name in names
        ] or list(of_benchmark.values())
    except KeyError as error:
        raise ValueError(str(error.args[0]).removeprefix("KeyError: ")) from error
    for task in tasks:
        if set(task.metadata.modalities) != {"text"}:
            raise ValueError(
                f"{task.metadata.name} is a task of {', '.join(task.metadata.modalities)}, and a "
                "NeoBERT reads text"
            )
    return tasks if data is None else [_from_disk(task, data) for task in tasks]


def _from_disk(task: AbsTask, data: Path) -> AbsTask:
    """The task with its data set in a folder, a task of several tasks with all of theirs."""
    if task.data_loaded:
        return task
    task = copy.copy(task)
    if isinstance(task, AbsTaskAggregate):
        tasks = [_from_disk(part, data) for part in task.metadata.tasks]
        task.metadata = task.metadata.model_copy(update={"tasks": tasks})
        task.tasks, task.taskname_to_task = tasks, {t.metadata.name: t for t in tasks}
        return task
    folder = data / task.metadata.dataset["path"]
    if not folder.is_dir():
        raise ValueError(
            f"{task.metadata.name}: there is no folder {folder}; to have it: hf download "
            f"{task.metadata.dataset['path']} --repo-type dataset --local-dir {folder}"
        )
    dataset = {**task.metadata.dataset, "path": str(folder.resolve())}
    task.metadata = task.metadata.model_copy(update={"dataset": dataset})
    return task


def quiet() -> None:
    """Keeps mteb and datasets from telling of superseded tasks, of truncated texts, which
    `MTEBEncoder.totals` counts, and of every small step on the way."""
    warnings.simplefilter("ignore", TruncationWarning)
    warnings.filterwarnings("ignore", module="mteb")
    logging.getLogger("mteb").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    disable_progress_bar()  # transformers', for loading the weights


def evaluate(
    model: MTEBEncoder,
    tasks: Sequence[AbsTask],
    output: Path,
    show_progress_bar: bool | None = None,
) -> Iterator[tuple[AbsTask, TaskResult]]:
    """Each task with its result, computed now or taken from mteb's `ResultCache` in `output`.

    Results are written as they come, so that a run that is stopped goes on with the next task.
    show_progress_bar: of tasks and of texts; None shows them when standard error is a terminal.
    A task fails if its data cannot be read, an embedding is not finite, or its score is none. The
    others are evaluated all the same; then EvaluationError names those that failed.
    """
    failed: list[str] = []
    cache = mteb.ResultCache(output)
    if show_progress_bar is None:
        show_progress_bar = sys.stderr.isatty()
    progress = tqdm(tasks, desc="tasks", unit="task", disable=not show_progress_bar)
    for task in progress:
        name = task.metadata.name
        progress.set_postfix_str(name)
        try:
            (result,) = mteb.evaluate(
                model,
                task,
                cache=cache,
                co2_tracker=False,
                encode_kwargs={"show_progress_bar": show_progress_bar},
                show_progress_bar=False,
            ).task_results
            score = result.get_score()
            if not math.isfinite(score):
                file = cache.get_task_result_path(name, model.mteb_model_meta)
                raise ValueError(f"its {task.metadata.main_score} is {score} ({file})")
        except (OSError, ValueError) as error:
            failed.append(f"{name}: {error}")
            continue
        yield task, result
    if failed:
        raise EvaluationError("\n".join(failed))
