"""CUDA graphs on the GPU: replays have the bits of eager runs on the same tensors, whatever the
lengths, threads and streams; a masked-LM training step is captured; nothing waits for the GPU."""

import contextlib
import threading

import pytest
import torch

from neobert import NeoBERT, NeoBERTConfig, NeoBERTLMHead, graphs
from neobert.encode import Encoder
from neobert.graphs import Bucket, CudaCapturer, PackedGraphs
from neobert.packing import pack
from neobert_kernels import pool
from tests.checkpoints import random_sequences
from tests.tiny import texts, write_tiny_checkpoint

pytestmark = pytest.mark.no_poison  # a fill is a launch more, in the graph as well
CONFIG = NeoBERTConfig(num_hidden_layers=3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return NeoBERT(CONFIG).eval().to("cuda", torch.bfloat16)


def embed(model):
    @torch.inference_mode()
    def function(batch, mode="mean"):
        hidden = model(**batch.inputs()).last_hidden_state[0]
        return pool(hidden, batch.cu_seqlens, mode)

    return function


def made_of(model):
    return PackedGraphs(embed(model), model, CONFIG.max_length, 0, CudaCapturer(model.device))


def padded(batch):
    bucket = Bucket.of(batch, CONFIG.max_length)
    flat = torch.empty(bucket.input_size, dtype=torch.int32)
    bucket.fill(flat, batch, 0)
    return bucket.views(flat.cuda())


def random_batch(longest=200, sequences=9):
    number = int(torch.randint(1, sequences + 1, ()))
    lengths = torch.randint(0, longest, (number,)).tolist()
    return pack(random_sequences(lengths, 30000))


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_any_filling_of_a_bucket_has_the_bits_of_the_eager_run(model, mode):
    graphed, eager = made_of(model), embed(model)
    batches = [random_batch() for _ in range(60)]
    batches += [pack(random_sequences(lengths)) for lengths in ([1], [32], [600, 0, 1], [64] * 8)]
    for batch in batches:
        actual = graphed(batch, mode)
        expected = eager(padded(batch), mode)[: batch.num_sequences]
        assert torch.equal(actual, expected)
        # PyTorch's GEMM may sum in another order for another number of rows; no more than that.
        alone = eager(batch.to("cuda"), mode)
        assert (actual - alone).norm() <= 0.02 * alone.norm()
    assert len(graphed) < len(batches) / 2


def test_threads_on_streams_of_their_own_while_others_allocate(model):
    graphed, eager = made_of(model), embed(model)
    work = [[random_batch(60, 5) for _ in range(30)] for _ in range(4)]
    results, errors, stop = {}, [], threading.Event()

    def encode(number):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for index, batch in enumerate(work[number]):
                    results[number, index] = graphed(batch).cpu()
        except BaseException as error:
            errors.append(error)

    def allocate():
        try:
            while not stop.is_set():
                torch.ones(1 << 20, device="cuda").sum().item()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=encode, args=(number,)) for number in range(len(work))]
    noise = threading.Thread(target=allocate)
    for thread in (noise, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    noise.join()
    assert not errors
    for (number, index), result in results.items():
        batch = work[number][index]
        expected = eager(padded(batch))[: batch.num_sequences]
        assert torch.equal(result, expected.cpu())


def test_graphs_dropped_and_made_anew(model, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    model = NeoBERT(CONFIG).eval().to("cuda", torch.bfloat16)
    graphed, eager = made_of(model), embed(model)
    batches = [pack(random_sequences([length])) for length in (20, 50, 80)]
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        model.to(dtype)
        for batch in (*batches, *batches):
            assert torch.equal(graphed(batch), eager(padded(batch))[: batch.num_sequences])
            assert len(graphed) <= 2


def test_memory_is_that_of_the_largest_graph(model):
    """Scratch is shared: fifteen more graphs, all smaller, take less than the first again."""
    graphed = made_of(model)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    graphed(pack(random_sequences([128] * 16)))
    torch.cuda.empty_cache()
    first = torch.cuda.memory_reserved() - before
    for tokens in graphs.TOKENS[:-1]:
        graphed(pack(random_sequences([tokens])))
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before <= 2 * first


def test_encoder(tmp_path):
    checkpoint = write_tiny_checkpoint(tmp_path)
    eager = Encoder.from_pretrained(checkpoint, device="cuda")
    graphed = Encoder.from_pretrained(checkpoint, device="cuda", cuda_graphs=True)
    given = [text[:80] for text in texts()]
    for options in ({}, {"pooling": "cls", "normalize": True}):
        expected = eager.encode(given, max_tokens=512, **options)
        actual = graphed.encode(given, max_tokens=512, **options)
        assert graphed.stats.graphed == graphed.stats.batches == eager.stats.batches
        cosine = (actual * expected).sum(1) / (
            (actual**2).sum(1) ** 0.5 * (expected**2).sum(1) ** 0.5
        )
        assert cosine.min() > 0.999
    graphed.encode(given)
    assert graphed.stats.graphed < graphed.stats.batches


@contextlib.contextmanager
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def training_step(model, inputs):
    """Loss and gradients, the residual stream in float32 and the branches in bfloat16."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def training_inputs(lengths, bucket):
    """Of one shape, `bucket`, whatever the lengths."""
    batch = pack(random_sequences(lengths, 30000))
    flat = torch.empty(bucket.input_size, dtype=torch.int32)
    bucket.fill(flat, batch, 0)
    views = bucket.views(flat.cuda())
    labels = torch.full((bucket.tokens,), -100)
    labels[: batch.num_tokens] = batch.input_ids
    labels[torch.rand(bucket.tokens) > 0.2] = -100
    labels[0] = 17
    return {
        "input_ids": views.input_ids[None].long(),
        "position_ids": views.positions[None],
        "cu_seqlens": views.cu_seqlens,
        "max_seqlen": bucket.max_seqlen,
        "labels": labels[None].cuda(),
    }


# Beyond 3,072 tokens PyTorch's embedding has another backward.
@pytest.mark.parametrize("tokens", [1024, 4096])
def test_a_masked_lm_training_step_is_captured(tokens):
    model, bucket = NeoBERTLMHead(CONFIG).train().cuda(), Bucket(tokens, 64, tokens)
    static = training_inputs([tokens], bucket)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        training_step(model, static)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        outputs = training_step(model, static)
    for lengths in ([tokens], [500, 3, 0, 129], [64] * 16, [1]):
        others = training_inputs(lengths, bucket)
        for name, value in others.items():
            if name != "max_seqlen":
                static[name].copy_(value)
        graph.replay()
        replayed = [output.clone() for output in outputs]
        for mine, eager in zip(replayed, training_step(model, others), strict=True):
            assert torch.equal(mine, eager)


def test_nothing_waits_for_the_gpu(model):
    batch = pack(random_sequences([30, 1, 129])).to("cuda")
    language_model = NeoBERTLMHead(CONFIG).train().cuda()
    inputs = training_inputs([100, 20], Bucket(128, 8, 128))
    embed(model)(batch), training_step(language_model, inputs)  # compiles
    with waiting_is_an_error():
        embed(model)(batch)
        training_step(language_model, inputs)
