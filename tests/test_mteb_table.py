"""MTEB's scores as Table 4 of the paper has them."""

import mteb
import pytest

from neobert import mteb_table
from neobert.mteb import BENCHMARK, MTEBEncoder, select_tasks
from tests import tiny

pytestmark = [
    pytest.mark.usefixtures("one_thread", "hub_offline"),
    pytest.mark.no_poison,  # mteb's classifiers and k-means are not ours to make deterministic
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
    checkpoint = tiny.write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    return MTEBEncoder(str(checkpoint), device="cpu").mteb_model_meta


class Result:
    def __init__(self, score):
        self.score = score

    def get_score(self):
        return self.score


def test_the_average_is_the_papers(meta):
    """Of Table 4's row of NeoBERT, each task as good as its type: the average over tasks."""
    row = dict(zip(mteb_table.COLUMNS, (61.6, 40.8, 76.2, 51.2, 31.6, 74.8, 30.7), strict=True))
    results = [(t, Result(row[t.metadata.type] / 100)) for t in mteb.get_benchmark(BENCHMARK).tasks]
    summary = mteb_table.summary(meta, results, BENCHMARK)
    assert [f["tasks"] for f in summary["types"].values()] == [12, 11, 3, 4, 15, 10, 1]
    assert round(summary["average"]["score"], 1) == 51.3
    assert summary["missing"] == summary["others"] == []
    header, _, cells = mteb_table.markdown(summary).splitlines()
    assert header.endswith(
        "| Class., 12 tasks | Clust., 11 tasks | PairClass., 3 tasks | Rerank., 4 tasks "
        "| Retriev., 15 tasks | STS, 10 tasks | Summ., 1 tasks | Avg. |"
    )
    assert cells.endswith("| 61.6 | 40.8 | 76.2 | 51.2 | 31.6 | 74.8 | 30.7 | 51.3 |")


def test_a_table_of_some_tasks_says_so(meta):
    results = [(task, Result(0.5)) for task in select_tasks(["STS12", "SICK-R", "STS22.v2"])]
    summary = mteb_table.summary(meta, results, BENCHMARK)
    lines = mteb_table.markdown(summary).splitlines()
    assert lines[2].endswith("| - | - | - | - | - | 50.0 | - | 50.0 |")
    assert lines[-1] == f"2 of the 56 tasks of {BENCHMARK}, and 1 others."
