"""The throughput table's arithmetic, workloads, search and models, on tiny shapes."""

import math
import statistics
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from neobert import encode
from neobert.plain import PlainNeoBERT
from neobert.throughput import measure, models, worker
from neobert.throughput.shapes import CONTESTANTS, Shape, pairs_within
from neobert.throughput.workloads import (
    Workload,
    made_up_texts,
    made_up_tokenizer,
    random_ids,
)
from tests.test_graphs import Rerun, equal

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
PLENTY = 1e9  # seconds
TRANSFORMERS = ("bert-base", "roberta-base", "modernbert-base", "nomicbert")


def tiny(contestant: str) -> Shape:
    """Two layers and two heads of 64; ModernBERT's second layer is local."""
    shape = CONTESTANTS[contestant].shape
    window = None if shape.window is None else 8
    small = dict(vocab=1000, dim=128, layers=2, heads=2, intermediate=192, max_length=160)
    return replace(shape, **small, window=window)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("neobert")
    models.write_checkpoint(folder, tiny("neobert"))
    return folder


@pytest.mark.parametrize("name", [*TRANSFORMERS, "neobert"])
def test_flop_are_those_that_torch_counts(name, checkpoint):
    shape = tiny(name)
    if name == "neobert":
        model = PlainNeoBERT.load(checkpoint)
    else:
        model = models._transformers_model(shape, "eager", torch.float32)
    ids = torch.randint(5, shape.vocab, (3, 40))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids)
    # What eager attention computes: a local layer's masked pairs too.
    assert counter.get_total_flops() == replace(shape, window=None).flop([40] * 3)


def test_flop_of_the_published_shapes():
    neobert = CONTESTANTS["neobert"].shape
    assert neobert.flop([512]) == 512 * (396_361_728 + 86_016 * 512)
    assert CONTESTANTS["bert-base"].shape.linear_weights == 84_934_656
    assert CONTESTANTS["modernbert-base"].shape.linear_weights == 110_297_088
    assert neobert.flop([3, 5]) == neobert.flop([3]) + neobert.flop([5])


@pytest.mark.parametrize("window", [1, 8, 64])
@pytest.mark.parametrize("length", [0, 1, 2, 8, 9, 10, 130])
def test_pairs_within_a_window(length, window):
    near = [(i, j) for i in range(length) for j in range(length) if abs(i - j) <= window]
    assert pairs_within(length, window) == len(near)


def test_local_layers_count_their_windows_only():
    shape = tiny("modernbert-base")  # of its two layers one is local
    saved = replace(shape, window=None).flop([40]) - shape.flop([40])
    assert saved == 4 * shape.dim * (40 * 40 - pairs_within(40, 8))


def test_lengths_are_distributed_as_described():
    lognormal = Workload.parse("lognormal-100000").lengths(20_000)
    assert statistics.median(lognormal) == pytest.approx(300, rel=0.03)
    assert statistics.stdev(map(math.log, lognormal)) == pytest.approx(1.1, rel=0.02)
    clipped = Workload.parse("lognormal-512").lengths(20_000)
    assert max(clipped) == 512 and min(clipped) >= 4
    # The share of a lognormal beyond 512: 1 - Phi(ln(512 / 300) / 1.1) = 0.3135
    assert clipped.count(512) / 20_000 == pytest.approx(0.3135, rel=0.05)
    normal = Workload.parse("normal-512").lengths(20_000)
    assert statistics.mean(normal) == pytest.approx(256, rel=0.01)
    assert statistics.stdev(normal) == pytest.approx(64, rel=0.02)
    assert Workload.parse("fixed-512").lengths(3) == [512] * 3
    queries = Workload.parse("short-64").lengths(64)
    assert max(queries) == 32 and min(queries) == 4 and len(set(queries)) > 15


@pytest.mark.parametrize("name", ["lognormal-512", "normal-512", "short-64", "fixed-64"])
def test_a_larger_batch_begins_like_a_smaller_one(name):
    workload = Workload.parse(name)
    assert workload.lengths(8)[1:] == workload.lengths(32)[1:8]
    assert workload.lengths(8) == workload.lengths(8)


@pytest.mark.parametrize("name", ["fixed", "fixed-0", "fixed-512-1", "long-512", "Fixed-512", ""])
def test_other_names_are_no_workload(name):
    with pytest.raises(ValueError, match=r"a workload is named .* got "):
        Workload.parse(name)


@pytest.mark.parametrize("vocab", [1000, 30522])
def test_made_up_texts_have_just_these_tokens(vocab):
    lengths = [2, 3, 4, 5, 31, 512]
    tokenizer = made_up_tokenizer(vocab)
    texts = made_up_texts(lengths, vocab)
    ids = tokenizer(texts)["input_ids"]
    assert [len(row) for row in ids] == lengths
    assert max(map(max, ids)) < vocab
    assert tokenizer.unk_token_id not in set(ids[-1])
    pieces = tokenizer.convert_ids_to_tokens(ids[-1])
    assert 0.2 < sum(piece.startswith("##") for piece in pieces) / len(pieces) < 0.3


def search(fails=None, rate=lambda batch: 10.0 * batch, left=PLENTY, patience=1):
    tried = []

    def try_batch(batch: int) -> measure.Trial:
        tried.append(batch)
        if fails is not None:
            fails(batch)
        return measure.Trial(batch, 100 * batch, [100 * batch / rate(batch)])

    pace = measure.Pace(100, 1.0, 2, 1.0, patience, 0.02)
    batches = Workload.parse("fixed-64").batches("cpu")
    found = measure.search_batches(batches, try_batch, lambda b: float(b), lambda: left, pace)
    return found, tried


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_search_ends_where_memory_does(error):
    def fails(batch):
        if batch >= 8:
            raise error

    found, tried = search(fails)
    assert tried == [1, 2, 4, 8] and found.ended == "out of memory"
    assert found.best.batch == 4 and found.best.rate == pytest.approx(40)


def test_search_with_no_batch_that_fits():
    def fails(batch):
        raise MemoryError

    found, _ = search(fails)
    assert found.best is None and found.ended == "out of memory"


def test_search_hides_no_other_error():
    def fails(batch):
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        search(fails)


@pytest.mark.parametrize(("patience", "last"), [(1, 16), (2, 32)])
def test_search_ends_without_gain(patience, last):
    found, tried = search(rate=lambda batch: min(batch, 8) * 10.0, patience=patience)
    assert tried[-1] == last and found.ended == "no gain" and found.best.batch == 8


def test_search_ends_with_the_time():
    found, tried = search(left=20)
    assert tried == [1, 2, 4, 8, 16] and found.ended == "time"
    found, tried = search(left=0)  # the first is tried in any case
    assert tried == [1] and found.best.batch == 1


def test_search_tries_all():
    found, tried = search()
    assert tried[-1] == 512 and len(tried) == 10 and found.ended == "all tried"


def test_timing():
    taken = measure.time_steps(lambda: time.sleep(0.01), 100, 0.055, CPU)
    assert 3 <= len(taken) <= 6 and min(taken) >= 0.01
    assert len(measure.time_steps(lambda: None, 7, 10.0, CPU)) == 7
    assert len(measure.time_steps(lambda: None, 7, 0.0, CPU)) == 1
    assert [measure.percentile(list(range(1, 11)), p) for p in (0.5, 0.9, 1.0)] == [5, 9, 10]
    assert measure.percentile([3.0], 0.5) == 3.0


def test_peak_memory_is_that_since_the_reset():
    def allocate(mebibytes):
        torch.ones(mebibytes * 2**18)

    allocate(200)
    measure.reset_peak_memory(CPU)
    before = measure.peak_memory(CPU)
    allocate(100)
    grown = measure.peak_memory(CPU) - before
    assert 80 * 2**20 < grown < 150 * 2**20


def varlen_reference(q, k, v, cu_q, cu_k, max_q, max_k, window_size=(-1, -1)):
    """torch.nn.attention.varlen.varlen_attn, whose kernels need a GPU, in plain PyTorch."""
    assert cu_q is cu_k and max_q == max_k == int(cu_q.diff().max()) and q.is_contiguous()
    outs = []
    for start, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        place = torch.arange(end - start)
        near = (place[:, None] - place).abs() <= (window_size[0] if window_size[0] >= 0 else 1e9)
        sequence = (x[start:end].transpose(0, 1) for x in (q, k, v))
        outs.append(F.scaled_dot_product_attention(*sequence, attn_mask=near).transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_packed_transformers_give_what_padded_ones_do(name, monkeypatch):
    """What a GPU runs, with the same weights: positions, boundaries and windows are right."""
    shape = tiny(name)
    sequences = random_ids([40, 3, 64, 9], shape.vocab)
    hidden = []
    for attention in ("sdpa", models.VARLEN):
        monkeypatch.setattr(models, "best_attention", lambda *_, chosen=attention: chosen)
        monkeypatch.setattr(models, "varlen_attn", varlen_reference)
        torch.manual_seed(0)
        runner = models.build(replace(CONTESTANTS[name], shape=shape), CPU, torch.float32, None)
        assert isinstance(runner, models.Padded if attention == "sdpa" else models.Packed)
        with torch.inference_mode():
            hidden.append(torch.cat(runner.hidden(sequences)))
    torch.testing.assert_close(hidden[1], hidden[0], rtol=0, atol=1e-5)


def test_the_best_attention_of_a_gpu():
    gpu = torch.device("cuda")
    for name in TRANSFORMERS:
        shape = CONTESTANTS[name].shape
        assert models.best_attention(shape, gpu, torch.bfloat16) in (
            "flash_attention_2",
            models.VARLEN,
        )
        assert models.best_attention(shape, gpu, torch.float32) == "sdpa"
        assert models.best_attention(shape, CPU, torch.bfloat16) == "sdpa"


def test_queries_of_ours_are_replayed_graphs(checkpoint, monkeypatch):
    """By the encoder, as a GPU runs them; in the place of a CUDA graph a rerun."""
    monkeypatch.setattr(encode, "CudaCapturer", lambda device: Rerun())
    contestant = replace(CONTESTANTS["neobert"], shape=tiny("neobert"))
    eager = models.build(contestant, CPU, torch.float32, checkpoint)
    runner = models.Ours(eager.model, cuda_graphs=True)
    batches = [random_ids(lengths, 1000) for lengths in ([9], [30], [4, 17])]
    with torch.inference_mode():
        for sequences in batches:
            first = torch.stack([each[0] for each in eager.hidden(sequences)])
            for _ in range(2):
                assert equal(runner.query(sequences)(), first)
    assert len(runner.encoder._graphs) == 2, "one for a query, one for up to eight"
    ids = eager.inputs(batches[0])
    assert torch.equal(eager.query(batches[0])(), eager.run(ids)), "hidden states without graphs"


WORKLOADS = ["fixed-16", "lognormal-40", "strings-40", "short-1", "short-4", "fixed-256"]


def work(name, checkpoint, workloads=WORKLOADS, seconds=PLENTY, dtype="float32"):
    """The events of a worker, in this process."""
    request = worker.Request(
        name,
        "cpu",
        dtype,
        list(workloads),
        str(checkpoint),
        time.time(),
        time.time() + seconds,
        vars(tiny(name)),
    )
    events = []
    restored = worker.Request.from_json(request.to_json())
    assert restored == request
    worker.Worker(restored, events.append).work()
    return events


@pytest.fixture
def brief(monkeypatch):
    """Few steps, a small roof."""
    monkeypatch.setitem(measure.PACES, "cpu", measure.Pace(8, 0.05, 1, 0.05, 1, 0.02))
    monkeypatch.setattr(measure, "matmul_rate", lambda device, dtype: 1e11)


@pytest.mark.parametrize("name", ["neobert", "neobert-plain", "neobert-compiled", *TRANSFORMERS])
def test_a_worker_measures_every_workload(name, checkpoint, brief, monkeypatch):
    eager = torch.compile  # dynamo without inductor: what is tested here is not its compiling
    monkeypatch.setattr(torch, "compile", lambda m, **how: eager(m, backend="eager", dynamic=True))
    events = work(name, checkpoint)
    ready, *rest = events
    assert ready["event"] == "ready" and ready["cold_start_s"] > 0
    assert [e["workload"] for e in rest if e["event"] == "begin"] == WORKLOADS
    cells = {e["workload"]: e["cell"] for e in rest if e["event"] == "cell"}
    assert cells.pop("fixed-256") == {"not_run": "beyond 160 positions"}
    shape = tiny(name)
    for workload, cell in cells.items():
        lengths = Workload.parse(workload).lengths(cell["batch"])
        assert cell["steps"] == len(cell["step_s"]) >= 1
        assert cell["mfu"] == pytest.approx(cell["flops"] / 1e11)
        assert cell["peak_bytes"] > 2**20
        if workload != "short-1":  # of which the queries differ
            tokens, flop = sum(lengths), shape.flop(lengths)
            assert cell["flops"] / cell["tokens_per_s"] == pytest.approx(flop / tokens)
            padded = name != "neobert"
            expected = max(lengths) * len(lengths) / tokens if padded else 1
            assert cell["padding"] == pytest.approx(expected)
    assert cells["lognormal-40"]["batch"] == cells["strings-40"]["batch"] == 32
    fixed = cells["fixed-16"]
    rate = 16 * fixed["batch"] / statistics.median(fixed["step_s"])
    assert fixed["tokens_per_s"] == pytest.approx(rate)
    assert cells["short-4"]["p50_ms"] <= cells["short-4"]["p90_ms"]


def test_a_worker_begins_nothing_beyond_its_deadline(checkpoint, brief):
    events = work("bert-base", checkpoint, seconds=-1)
    cells = [e["cell"] for e in events if e["event"] == "cell"]
    assert cells == [{"not_run": "time budget"}] * 5 + [{"not_run": "beyond 160 positions"}]


def test_a_worker_survives_running_out_of_memory(checkpoint, brief, monkeypatch):
    run = models.Padded.run

    def scarce(self, inputs):
        if inputs[0][0].numel() > 2000:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, inputs)

    monkeypatch.setattr(models.Padded, "run", scarce)
    events = work("bert-base", checkpoint, ["fixed-40", "lognormal-64", "short-64", "fixed-16"])
    cells = {e["workload"]: e["cell"] for e in events if e["event"] == "cell"}
    assert cells["fixed-40"]["batch"] <= 32 and cells["fixed-16"]["batch"] <= 64
    assert cells["lognormal-64"] == cells["short-64"] == {"not_run": "out of memory"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["neobert", "neobert-plain"])
def test_parity(name, checkpoint, brief, dtype):
    (ready,) = work(name, checkpoint, [], dtype=dtype)
    assert ready["parity"]["passed"] and ready["parity"]["cosine"] > 0.999


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_computes_something_else_is_withheld(checkpoint, brief, monkeypatch, dtype):
    load = models.NeoBERT.from_pretrained

    def broken(*arguments, **options):
        model = load(*arguments, **options)
        model.transformer_encoder[0].wo.weight.data.neg_()
        return model

    monkeypatch.setattr(models.NeoBERT, "from_pretrained", broken)
    (ready,) = work("neobert", checkpoint, dtype=dtype)  # and no workload is begun
    assert not ready["parity"]["passed"]


def test_nan_does_not_pass():
    assert not models.passes_parity(math.nan, 1.0, torch.bfloat16)
    assert models.passes_parity(0.999, 0.9995, torch.bfloat16)
    assert not models.passes_parity(0.99, 0.9995, torch.bfloat16)
