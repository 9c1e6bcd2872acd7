"""What a sentence-transformers model has beside a transformers checkpoint, read and written.

modules.json                         a Transformer and a Pooling
sentence_bert_config.json            the most tokens of a text, if not tokenizer_config.json
1_Pooling/config.json                how hidden states become an embedding
config_sentence_transformers.json    prompts by name, the similarity
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers.utils import cached_file

from neobert.config import NeoBERTConfig

Pooling = Literal["mean", "cls"]


@dataclass(frozen=True)
class SentenceFolder:
    """How a model turns hidden states into embeddings; the defaults where it does not say.

    max_length: tokens of a text, None for the model's own.
    prompts: name → what to put before a text, "" for nothing. sentence-transformers writes an empty
        "query" and "document" into every model; where there are only these, they say nothing and
        are left out.
    default_prompt: of texts that no prompt names, "" for none.
    normalize: whether embeddings are scaled to length 1.
    """

    pooling: Pooling = "mean"
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
    if set(prompts) <= {"query", "document"} and not any(prompts.values()):
        prompts = {}
    pooling = read(f"{modules[1]['path']}/config.json")
    if any(prompts.values()) and not pooling.get("include_prompt", True):
        raise ValueError(
            f"{path_or_hub_id}: has prompts and pools without them (include_prompt), where an "
            "encoder pools the prompt with the text"
        )
    max_length = (read("sentence_bert_config.json") or {}).get("max_seq_length")
    if max_length is None:  # from its version 6 on, sentence-transformers has the tokenizer's
        of_model = read("config.json").get("max_length", NeoBERTConfig.max_length)
        of_tokenizer = (read("tokenizer_config.json") or {}).get("model_max_length")
        max_length = of_model if of_tokenizer is None else min(of_tokenizer, of_model)
    default = settings.get("default_prompt_name")
    return SentenceFolder(
        _pooling(pooling, path_or_hub_id),
        max_length,
        prompts,
        prompts.get(default, "") if default else "",
        "Normalize" in kinds,
    )


def _pooling(config: dict, where: str | Path) -> Pooling:
    """From pooling_mode, or from sentence-transformers' older pooling_mode_<name>: true."""
    known: dict[str, Pooling] = {
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


def write_sentence_folder(folder: Path, dim: int, max_length: int, prompts: dict[str, str]) -> None:
    """Make a checkpoint a sentence-transformers model, which loads it after `import neobert`.

    Mean pooling, prompt included, and cosine similarity. dim: of the embeddings.
    """
    modules = "sentence_transformers.models"  # these names load in every version
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": f"{modules}.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{modules}.Pooling"},
        ],
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": dim,
            "pooling_mode_mean_tokens": True,
            "include_prompt": True,
        },
        "config_sentence_transformers.json": {
            "prompts": prompts,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
