"""What a sentence-transformers model says beside its weights: pooling, length and prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers.utils import cached_file


@dataclass(frozen=True)
class SentenceFolder:
    """How a model turns hidden states into embeddings; the defaults where it does not say.

    max_length: tokens of a text, None for the model's own.
    prompts: name → what to put before a text. sentence-transformers writes an empty "query" and
        "document" into every model; they are left out where no other prompt makes them meant.
    default_prompt: of texts that no prompt names, "" for none.
    normalize: whether embeddings are scaled to length 1.
    """

    pooling: Literal["mean", "cls"] = "mean"
    max_length: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    normalize: bool = False


def read_sentence_folder(path_or_hub_id: str | Path, **hub_options: Any) -> SentenceFolder:
    """What modules.json and its companions say; the defaults of `SentenceFolder` without them.

    hub_options: passed on to transformers (revision, token, cache_dir, local_files_only, …).
    Raises ValueError for a module, a pooling or a prompt that `Encoder` does not compute.
    """

    def read(name: str) -> Any:
        missing_is_fine = {
            "_raise_exceptions_for_missing_entries": False,
            "_raise_exceptions_for_gated_repo": False,
        }
        file = cached_file(str(path_or_hub_id), name, **missing_is_fine, **hub_options)
        return json.loads(Path(file).read_text(encoding="utf-8")) if file else None

    modules = read("modules.json")
    if modules is None:
        return SentenceFolder()
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise ValueError(
            f"{path_or_hub_id}: a model of the modules {', '.join(kinds)} in modules.json; an "
            "encoder is Transformer, Pooling and perhaps Normalize"
        )
    if modules[0]["path"]:
        raise ValueError(
            f"{path_or_hub_id}: its transformer is in the folder {modules[0]['path']!r}, where "
            "NeoBERT is read from the top one"
        )
    settings = read("config_sentence_transformers.json") or {}
    prompts = {name: text or "" for name, text in (settings.get("prompts") or {}).items()}
    prompts = prompts if any(prompts.values()) else {}
    pooling = read(f"{modules[1]['path']}/config.json")
    if prompts and not pooling.get("include_prompt", True):
        raise ValueError(
            f"{path_or_hub_id}: has prompts and pools without them (include_prompt), where an "
            "encoder pools the prompt with the text"
        )
    default = settings.get("default_prompt_name")
    return SentenceFolder(
        _pooling(pooling, path_or_hub_id),
        (read("sentence_bert_config.json") or {}).get("max_seq_length"),
        prompts,
        prompts.get(default, "") if default else "",
        "Normalize" in kinds,
    )


def _pooling(config: dict, where: str | Path) -> Literal["mean", "cls"]:
    """From pooling_mode, or from sentence-transformers' older pooling_mode_<name>: true."""
    known: dict[str, Literal["mean", "cls"]] = {
        "mean": "mean",
        "mean_tokens": "mean",
        "cls": "cls",
        "cls_token": "cls",
    }
    mode = config.get("pooling_mode")
    names = [mode] if isinstance(mode, str) else list(mode or [])
    names = names or [
        key.removeprefix("pooling_mode_")
        for key, value in config.items()
        if key.startswith("pooling_mode_") and value is True
    ]
    if len(names) != 1 or names[0] not in known:
        raise ValueError(f"{where}: pools by {', '.join(names)}, where an encoder can: mean, cls")
    return known[names[0]]
