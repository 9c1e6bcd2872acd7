"""neobert.graphs on any machine: buckets, what is copied into them and out of them, threads, and
when graphs are made anew. In the place of a CUDA graph stands a rerun of the function on the
graph's own input; tests/gpu/test_cuda_graphs.py has the real ones."""

import contextlib
import logging
import threading
from unittest.mock import MagicMock, call

import pytest
import torch
from torch import nn

from neobert import NeoBERT, graphs
from neobert.encode import Encoder
from neobert.graphs import SEQUENCES, TOKENS, Bucket, CudaCapturer, PackedGraphs
from neobert.packing import pack
from neobert_kernels import _compiled, pool
from tests.checkpoints import random_sequences, small_config
from tests.tiny import texts, write_tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_LENGTH = 600


class Rerun:
    """Runs the function again where a graph would be replayed, and into one output tensor; spoils
    those of all other graphs, for they share their memory."""

    device = torch.device("cpu")

    def __init__(self):
        self.inputs, self.outputs, self.resets = [], [], 0
        self._busy = threading.Lock()

    def host_buffer(self, size):
        return torch.full((size,), -1, dtype=torch.int32)

    def capture(self, function):
        output = function().clone()
        self.outputs.append(output)

        def replay():
            for other in self.outputs:
                other.fill_(float("nan"))
            return output.copy_(function())

        return replay

    @contextlib.contextmanager
    def turn(self):
        assert self._busy.acquire(blocking=False), "two threads at once"
        yield
        self._busy.release()

    def reset(self):
        self.resets += 1
        self.outputs.clear()


@pytest.fixture(scope="module")
def models():
    model = NeoBERT(small_config(num_hidden_layers=2, max_length=MAX_LENGTH)).eval()
    return {torch.float32: model, torch.bfloat16: NeoBERT(model.config).eval().bfloat16()}


@pytest.fixture
def model(models):
    return models[torch.float32]


def embed(model):
    """What Encoder computes of a batch."""

    @torch.inference_mode()
    def function(batch, mode="mean"):
        hidden = model(**batch.inputs()).last_hidden_state[0]
        return pool(hidden, batch.cu_seqlens, mode)

    return function


def made_of(model, pad_id=0):
    capturer = Rerun()
    return PackedGraphs(embed(model), model, MAX_LENGTH, pad_id, capturer), capturer


def random_batch(longest=200, sequences=9):
    """Of any number of sequences, some of them empty; as often as not of one length."""
    number = int(torch.randint(1, sequences + 1, ()))
    lengths = torch.randint(0, longest, (number,)) if torch.rand(()) < 0.5 else [longest // 9] * 3
    return pack(random_sequences([int(length) for length in lengths]))


def equal(actual, expected):
    if _compiled.LOADED is not None:  # whose rows' bits do not depend on the number of rows
        return torch.equal(actual, expected)
    return torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_any_filling_of_a_bucket_has_the_bits_of_the_eager_run(models, dtype, mode):
    graphed, capturer = made_of(models[dtype])
    eager = embed(models[dtype])
    batches = [random_batch() for _ in range(30)]
    batches += [pack(random_sequences(lengths)) for lengths in ([1], [32], [600, 0, 1], [64] * 8)]
    for batch in batches:
        actual = graphed(batch, mode)
        assert actual.shape[0] == batch.num_sequences and actual.dtype == torch.float32
        assert equal(actual, eager(batch, mode))
        bucket = Bucket.of(batch, MAX_LENGTH)
        flat = torch.empty(bucket.input_size, dtype=torch.int32)
        bucket.fill(flat, batch, 0)
        assert torch.equal(actual, eager(bucket.views(flat), mode)[: batch.num_sequences])
    assert len(graphed) == len(capturer.outputs) < len(batches) / 2


@pytest.mark.parametrize(
    "mistake",
    [
        lambda padded, n: padded.cu_seqlens[-1].fill_(padded.num_tokens),
        lambda padded, n: padded.positions.add_(torch.arange(padded.num_tokens) == 1),
        lambda padded, n: padded.input_ids[: n - 1].copy_(padded.input_ids[1:n].clone()),
    ],
    ids=["padding in the last sequence", "positions", "ids"],
)
def test_a_wrong_filling_is_noticed(model, monkeypatch, mistake):
    fill = Bucket.fill

    def wrong(self, flat, batch, pad_id):
        fill(self, flat, batch, pad_id)
        mistake(self.views(flat), batch.num_tokens)

    monkeypatch.setattr(Bucket, "fill", wrong)
    batch = pack(random_sequences([7, 5, 9, 8, 3, 6, 4, 5]))
    assert not torch.allclose(made_of(model)[0](batch), embed(model)(batch))


def test_filling():
    batch = pack([[5, 6, 7], [], [8]])
    bucket = Bucket(6, 5, 6)
    flat = torch.full((bucket.input_size,), -1, dtype=torch.int32)
    bucket.fill(flat, batch, 9)
    assert flat.tolist() == [5, 6, 7, 8, 9, 9, *[0, 1, 2, 0, 0, 0], *[0, 3, 3, 4, 4, 4]]
    assert bucket.views(flat).max_seqlen == 6 and bucket.views(flat).num_sequences == 5


@pytest.mark.parametrize(
    ("lengths", "bucket"),
    [
        ([], (32, 1, 32)),
        ([1], (32, 1, 32)),
        ([32], (32, 1, 32)),
        ([33], (64, 1, 64)),
        ([20, 13], (64, 8, 64)),
        ([65, 60], (128, 8, 128)),
        ([128, 1], (192, 8, 128)),
        ([129, 1], (192, 8, 192)),
        ([128] * 16, (2048, 64, 128)),
        ([600, 600], (1280, 8, 600)),
        ([100, 0, *[1] * 400], (512, 512, 128)),
        ([601], None),
        ([600] * 3 + [249], None),
        ([1] * 513, None),
        ([0] * 513, None),
    ],
)
def test_bucket(lengths, bucket):
    assert Bucket.of(pack([[1] * length for length in lengths]), 600) == bucket


def test_buckets_rise():
    assert list(TOKENS) == sorted(set(TOKENS)) and list(SEQUENCES) == sorted(set(SEQUENCES))


def test_what_the_padding_holds_does_not_matter(model):
    batch = pack(random_sequences([40, 3]))
    assert torch.equal(made_of(model, pad_id=0)[0](batch), made_of(model, pad_id=7)[0](batch))


def test_a_result_outlives_the_next_replay(model):
    graphed, _ = made_of(model)
    batches = [pack(random_sequences([length, 4])) for length in (9, 10, 40, 11)]
    results = [graphed(batch) for batch in batches]
    for batch, result in zip(batches, results, strict=True):
        assert equal(result, embed(model)(batch))


def test_a_batch_too_large_is_left_and_said_once(model, caplog):
    graphed, capturer = made_of(model)
    with caplog.at_level(logging.WARNING):
        for lengths in ([300] * 7, [1] * 513, [400] * 6):
            assert graphed(pack(random_sequences(lengths))) is None
    assert not capturer.outputs
    (record,) = caplog.records
    assert "2100 tokens in 7 sequences is larger" in record.getMessage()


def test_the_least_recently_used_graph_is_dropped(model, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    graphed, capturer = made_of(model)
    a, b, c = (pack(random_sequences([length])) for length in (20, 50, 80))
    for batch, captured in ((a, 1), (b, 2), (a, 2), (c, 3), (a, 3), (b, 4), (c, 5), (b, 5)):
        assert equal(graphed(batch), embed(model)(batch))
        assert len(capturer.outputs) == captured and len(graphed) <= 2


def test_many_threads(model):
    graphed, _ = made_of(model)
    work = [[random_batch(60, 5) for _ in range(20)] for _ in range(4)]
    results, errors = {}, []

    def encode(number):
        try:
            for index, batch in enumerate(work[number]):
                results[number, index] = graphed(batch)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=encode, args=(number,)) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for (number, index), result in results.items():
        assert equal(result, embed(model)(work[number][index]))


@torch.no_grad()
def test_weights_changed_in_place_need_no_new_graph(model):
    model = NeoBERT(model.config).eval()
    graphed, capturer = made_of(model)
    batch = pack(random_sequences([20]))
    before = graphed(batch)
    model.transformer_encoder[1].wo.weight.mul_(2)
    assert equal(graphed(batch), embed(model)(batch)) and not torch.equal(graphed(batch), before)
    assert capturer.resets == 0


@torch.no_grad()
@pytest.mark.parametrize("how", ["moved", "parameter", "assigned", "buffer"])
def test_weights_replaced_make_graphs_anew(model, how):
    model = NeoBERT(model.config).eval()
    graphed, capturer = made_of(model)
    batches = [pack(random_sequences([length])) for length in (20, 50)]
    before = [graphed(batch) for batch in batches]
    wo = model.transformer_encoder[1].wo
    if how == "moved":
        model.bfloat16()
    elif how == "parameter":
        wo.weight = nn.Parameter(2 * wo.weight)
    elif how == "assigned":
        state = {name: 2 * tensor for name, tensor in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
    else:
        model.rotary.cos = model.rotary.cos.flip(0).contiguous()
    for batch, old in zip(batches, before, strict=True):
        actual = graphed(batch)
        assert equal(actual, embed(model)(batch)) and not torch.equal(actual, old)
    assert capturer.resets == 1 and len(graphed) == 2


def test_a_model_moved_to_another_device_is_refused(model):
    model = NeoBERT(model.config).eval()
    graphed, _ = made_of(model)
    graphed(pack([[5]]))
    graphed._function = lambda batch: torch.zeros(1, 1)
    model.to("meta")
    with pytest.raises(RuntimeError, match="made for cpu, but the model has been moved to meta"):
        graphed(pack([[5]]))


def test_autocast_has_graphs_of_its_own(model):
    graphed, _ = made_of(model)
    batch = pack(random_sequences([20]))
    plain = graphed(batch)
    with torch.autocast("cpu", torch.bfloat16):
        cast = graphed(batch)
        assert torch.equal(cast, embed(model)(batch))
    assert not torch.equal(cast, plain) and torch.equal(graphed(batch), plain)


# ---- in the encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    checkpoint = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    return Encoder.from_pretrained(checkpoint, device="cpu")


@pytest.mark.filterwarnings("ignore::neobert.encode.TruncationWarning")
@pytest.mark.parametrize("options", [{}, {"pooling": "cls", "normalize": True}], ids=str)
def test_encoder_gives_the_same_vectors_and_counts(encoder, options, monkeypatch):
    given = texts()[:60]
    batches = dict(max_tokens=256)
    expected = encoder.encode(given, **options, **batches)
    assert encoder.stats.graphed == 0 < encoder.stats.batches
    longest = encoder.model.config.max_length
    graphed = PackedGraphs(encoder._embed, encoder.model, longest, 0, Rerun())
    monkeypatch.setattr(encoder, "_graphs", graphed)
    actual = encoder.encode(given, **options, **batches)
    assert equal(torch.from_numpy(actual), torch.from_numpy(expected))
    assert encoder.stats.graphed == encoder.stats.batches > len(graphed)
    encoder.encode(given, max_tokens=4096)
    assert encoder.stats.tokens > TOKENS[-1] and encoder.stats.graphed < encoder.stats.batches


def test_graphs_on_a_cpu_are_refused(encoder, tmp_path):
    with pytest.raises(ValueError, match="need a model on a CUDA device, it is on cpu"):
        Encoder(encoder.model, encoder.tokenizer, cuda_graphs=True)
    with pytest.raises(ValueError, match="need a model on a CUDA device, it is on cpu"):
        Encoder.from_pretrained(encoder.tokenizer.name_or_path, device="cpu", cuda_graphs=True)


def test_capture_warms_up_on_its_stream_and_keeps_to_one_pool(monkeypatch):
    """The order of calls, with torch.cuda replaced: no proof that they work, see tests/gpu."""
    cuda = MagicMock()
    cuda.graph = MagicMock(side_effect=lambda graph, **options: contextlib.nullcontext())
    names = ("device stream Stream Event current_stream graph_pool_handle CUDAGraph graph").split()
    for name in [*names, "synchronize"]:
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    capturer = CudaCapturer(torch.device("cuda", 0))
    function = cuda.function
    with capturer.turn():
        output = capturer.capture(function)()
    assert output is function.return_value
    stream, pool = cuda.Stream.return_value, cuda.graph_pool_handle.return_value
    assert cuda.mock_calls.index(call.Stream().wait_stream(cuda.current_stream())) < (
        cuda.mock_calls.index(call.function())
    )
    cuda.graph.assert_called_once_with(
        cuda.CUDAGraph(), pool=pool, stream=stream, capture_error_mode="thread_local"
    )
    cuda.CUDAGraph().replay.assert_called_once_with()
    order = [call.current_stream().wait_event(cuda.Event()), call.CUDAGraph().replay()]
    order.append(call.Event().record(cuda.current_stream()))
    places = [cuda.mock_calls.index(each) for each in order]
    assert places == sorted(places) and function.call_count == 2
