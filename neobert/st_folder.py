"""A model folder that sentence-transformers loads: what it has beside a transformers checkpoint.

modules.json                         a Transformer and a Pooling
sentence_bert_config.json            the most tokens of a text
1_Pooling/config.json                the mean over a text's tokens, prompt included
config_sentence_transformers.json    prompts by name, cosine similarity

import neobert  # registers the model with transformers
SentenceTransformer(folder).encode(texts, prompt_name="…")
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for reading prompts the packages of training are not needed
    from neobert.pairs import PairSource

MODULES, PROMPTS = "modules.json", "config_sentence_transformers.json"


def prompts_of(sources: Iterable[PairSource]) -> dict[str, str]:
    """{name: prompt} of a model trained on `sources`: each one's by its name; "query" if all have
    the same; "document", nothing, unless a source is trained with it there too."""
    sources = list(sources)
    prompts = {source.title: source.prompt for source in sources}
    if len(set(prompts.values())) == 1:
        prompts.setdefault("query", sources[0].prompt)
        if not any(source.symmetric for source in sources):
            prompts.setdefault("document", "")
    return prompts


def write_folder(folder: Path, dim: int, max_length: int, prompts: dict[str, str]) -> None:
    """Add sentence-transformers' files to a checkpoint. dim: of the embeddings."""
    modules = "sentence_transformers.models"  # these names load in every version
    files: dict[str, Any] = {
        MODULES: [
            {"idx": 0, "name": "0", "path": "", "type": f"{modules}.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{modules}.Pooling"},
        ],
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": dim,
            "pooling_mode_mean_tokens": True,
            "include_prompt": True,
        },
        PROMPTS: {
            "prompts": prompts,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_prompts(folder: str | Path) -> dict[str, str]:
    """{name: prompt} of a folder; none of one that is not sentence-transformers'."""
    path = Path(folder) / PROMPTS
    return json.loads(path.read_text()).get("prompts", {}) if path.exists() else {}
