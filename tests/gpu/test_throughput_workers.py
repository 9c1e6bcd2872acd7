"""The throughput table's workers on a GPU: every model, tiny, in its best way to run there."""

import time

import pytest
import torch

from neobert.throughput import measure, models, worker
from neobert.throughput.shapes import CONTESTANTS
from neobert.throughput.workloads import random_ids
from tests.test_throughput import tiny

WORKLOADS = ["fixed-16", "lognormal-40", "strings-40", "short-1", "short-4"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("neobert")
    models.write_checkpoint(folder, tiny("neobert"))
    return folder


@pytest.mark.no_poison
@pytest.mark.parametrize("name", CONTESTANTS)
def test_a_worker_measures_every_workload(name, checkpoint, monkeypatch):
    monkeypatch.setitem(measure.PACES, "cuda", measure.Pace(8, 0.1, 2, 0.1, 1, 0.02))
    request = worker.Request(
        name,
        "cuda",
        "bfloat16",
        WORKLOADS,
        str(checkpoint),
        time.time(),
        time.time() + 600,
        vars(tiny(name)),
    )
    events = []
    worker.Worker(request, events.append).work()
    cells = {e["workload"]: e["cell"] for e in events if e["event"] == "cell"}
    assert list(cells) == WORKLOADS
    for cell in cells.values():
        assert cell["tokens_per_s"] > 0 and cell["peak_bytes"] > 0 and min(cell["step_s"]) > 0


@pytest.mark.no_poison
@pytest.mark.parametrize("name", ["bert-base", "roberta-base", "modernbert-base", "nomicbert"])
def test_packed_transformers_give_what_padded_ones_do(name, monkeypatch):
    """By torch's own varlen kernels, in bfloat16: to its rounding."""
    shape, gpu = tiny(name), torch.device("cuda")
    if models.best_attention(shape, gpu, torch.bfloat16) == "sdpa":
        pytest.skip("this torch has no packed attention for it")
    sequences = random_ids([40, 3, 64, 9], shape.vocab)
    hidden = []
    for attention in ("sdpa", models.best_attention(shape, gpu, torch.bfloat16)):
        monkeypatch.setattr(models, "best_attention", lambda *_, chosen=attention: chosen)
        torch.manual_seed(0)
        runner = models.build_transformers(shape, gpu, torch.bfloat16)
        with torch.inference_mode():
            hidden.append(torch.cat(runner.hidden(sequences)).double())
    assert torch.cosine_similarity(*hidden, dim=1).amin() > 0.999


def test_search_goes_on_after_running_out_of_memory():
    """An allocation that cannot be had, then one that can."""

    def try_batch(batch):
        torch.empty(batch * 2**38, dtype=torch.uint8, device="cuda")
        return measure.Trial(batch, 1, [1.0])

    search = measure.search_batches(
        [1, 2], try_batch, lambda b: 0.0, lambda: 1.0, measure.PACES["cuda"]
    )
    assert search.best is None and search.ended == "out of memory"
    torch.empty(2**20, device="cuda").fill_(1).sum().item()
