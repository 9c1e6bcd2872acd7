"""The contrastive recipes: the defaults and the shipped data are the paper's."""

from pathlib import Path

from neobert.contrastive_recipes import load_config
from neobert.locate import HUB_ID
from neobert.pairs import prompts_of

PAPER = Path(__file__).parent.parent / "configs" / "contrastive-paper.yaml"

# Table 7's rows, as the shipped file spells them.
TABLE_7 = (
    "agnews allnli amazonqa concurrentqa fever githubissue gooaq medmcqa medmcqa-clust msmarco npr "
    "paq pubmedqa qqp sentencecomp stackexchange stackoverflow sts12 stsbenchmark triviaqa wikihow "
    "yahoo-clust"
).split()


def test_the_papers_recipe():
    for c in (load_config("neobert", overrides=["output=x"]), load_config(None, PAPER)):
        assert (c.temperature, c.alpha, c.steps) == (0.07, 0.5, 2000)
        assert c.start_from == "chandar-lab/NeoBERT"


def test_the_papers_data_and_instructions():
    c = load_config(None, PAPER)
    assert [source.title for source in c.data] == TABLE_7
    instructions = {source.title: source.instruction for source in c.data}
    # Two rows say the same of NPR and AG News, two of the STS sets.
    assert len(set(instructions.values())) == len(TABLE_7) - 2
    assert all(text[0].isupper() and text.endswith(".") for text in instructions.values())
    assert instructions["msmarco"] == (
        "Given a web search query, retrieve relevant passages that answer the query."
    )
    assert instructions["sts12"] == instructions["stsbenchmark"]
    assert instructions["wikihow"] == (
        "Given a Wikihow post, retrieve titles that best summarize the post."
    )
    to_be_made = [s.title for s in c.data if s.path == f"data/{s.title}.jsonl"]
    assert to_be_made == ["concurrentqa", "medmcqa-clust", "yahoo-clust"]
    assert all(HUB_ID.fullmatch(s.path) for s in c.data if s.title not in to_be_made)
    prompts = prompts_of(c.data)
    assert prompts["gooaq"] == f"{instructions['gooaq']} " and "query" not in prompts


def test_tiny_goes_on_from_the_tiny_pretraining():
    from neobert.recipes import load_config as load_pretraining

    c, before = load_config("tiny"), load_pretraining("tiny")
    assert c.start_from == before.output and c.max_length <= before.max_length
    assert [source.path for source in c.data] == ["docstrings"]
