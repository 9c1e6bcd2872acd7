"""The task heads: the same answers padded and packed, and losses as transformers defines them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from neobert.breakdown.work import WorkCounter
from neobert.checkpoint import write_random_checkpoint
from neobert.model import (
    NeoBERTForQuestionAnswering,
    NeoBERTForSequenceClassification,
    NeoBERTForTokenClassification,
    NeoBERTLMHead,
)
from neobert.packing import pack
from neobert.plain import PlainNeoBERT
from tests.checkpoints import pad, random_sequences, small_config

LENGTHS = [5, 1, 64, 33]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = small_config(num_hidden_layers=3)
    return write_random_checkpoint(tmp_path_factory.mktemp("small"), config)


@pytest.fixture
def sequences():
    return random_sequences(LENGTHS)


def packed_arguments(sequences):
    batch = pack(sequences)
    return {
        "input_ids": batch.input_ids[None],
        "cu_seqlens": batch.cu_seqlens,
        "max_seqlen": batch.max_seqlen,
    }


def close(a, b, tolerance=2e-5):
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest tensor made inside it has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


# --- masked-language model ---


def masked(ids, mask):
    return torch.where((torch.rand(ids.shape) < 0.3) & (mask == 1), ids, -100)


@torch.no_grad()
def test_lm_logits_agree_with_plain(checkpoint, sequences):
    ids, mask = pad(sequences, "right")
    model = NeoBERTLMHead.from_pretrained(checkpoint)
    plain = PlainNeoBERT.load(checkpoint, torch.float64)
    logits, live = model(ids, mask).logits, mask.bool()
    truth = plain.decoder(plain(ids, mask))
    assert logits.shape == (4, 66, 1000)
    assert (logits[live] - truth[live]).abs().max() <= 1e-6 * truth[live].abs().max()
    packed = model(**packed_arguments(sequences)).logits
    assert (packed[0] - truth[live]).abs().max() <= 1e-6 * truth[live].abs().max()


@torch.no_grad()
def test_lm_loss_is_the_mean_over_labelled_tokens(checkpoint, sequences):
    ids, mask = pad(sequences, "right")
    labels = masked(ids, mask)
    model = NeoBERTLMHead.from_pretrained(checkpoint)
    expected = F.cross_entropy(model(ids, mask).logits.flatten(0, 1), labels.flatten())
    output = model(ids, mask, labels=labels)
    assert close(output.loss, expected) and output.logits is None
    packed = model(**packed_arguments(sequences), labels=labels[mask.bool()][None])
    assert close(packed.loss, expected)
    assert output.to_tuple()[0] == output.loss and len(output) == 1


@torch.no_grad()
def test_lm_loss_over_the_items_of_an_accumulated_batch(checkpoint, sequences):
    ids, mask = pad(sequences, "right")
    labels = masked(ids, mask)
    model = NeoBERTLMHead.from_pretrained(checkpoint)
    mean, count = model(ids, mask, labels=labels).loss, (labels != -100).sum()
    for items in (50, torch.tensor(50)):
        output = model(ids, mask, labels=labels, num_items_in_batch=items)
        assert close(output.loss, mean * count / 50)


def test_lm_loss_without_a_label(checkpoint, sequences):
    """NaN alone, as PyTorch's; nothing at all as a part of an accumulated batch."""
    ids, mask = pad(sequences, "right")
    model = NeoBERTLMHead.from_pretrained(checkpoint)
    none = torch.full_like(ids, -100)
    assert model(ids, mask, labels=none).loss.isnan()
    loss = model(ids, mask, labels=none, num_items_in_batch=50).loss
    loss.backward()
    assert loss == 0 and (model.decoder.weight.grad == 0).all()


def test_tokens_to_keep_are_those_of_the_whole_output(checkpoint, sequences):
    """Also twice the same one, in any order, or none; with all hidden states before the last. To
    rounding: a matrix product's library may sum few rows in another order than many."""
    model = NeoBERTLMHead.from_pretrained(checkpoint)
    packed = packed_arguments(sequences)
    whole = model(**packed, output_hidden_states=True)
    for keep in ([0, 102, 5, 6, 70, 5], []):
        keep = torch.tensor(keep, dtype=torch.int64)
        kept = model(**packed, tokens_to_keep=keep, output_hidden_states=True)
        assert close(kept.logits, whole.logits[:, keep])
        assert close(kept.hidden_states[-1], whole.hidden_states[-1][:, keep])
        pairs = zip(kept.hidden_states[:-1], whole.hidden_states[:-1], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_lm_loss_of_the_kept_tokens(checkpoint, sequences):
    """The loss and all gradients are those of labels that are -100 elsewhere."""
    packed = packed_arguments(sequences)
    keep = torch.tensor([0, 5, 6, 70, 102])
    labels = torch.full_like(packed["input_ids"], -100)
    labels[0, keep] = packed["input_ids"][0, keep]
    results = []
    for arguments in ({"labels": labels}, {"labels": labels[:, keep], "tokens_to_keep": keep}):
        model = NeoBERTLMHead.from_pretrained(checkpoint)
        loss = model(**packed, **arguments).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    (loss, gradients), (kept_loss, kept_gradients) = results
    assert torch.equal(loss, kept_loss)
    for name, gradient in gradients.items():
        assert (kept_gradients[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


@torch.no_grad()
def test_tokens_to_keep_save_the_work_of_the_others(checkpoint):
    model = NeoBERTLMHead.from_pretrained(checkpoint)
    packed = packed_arguments(random_sequences([400, 400]))

    def multiplied(**arguments):
        with WorkCounter() as counter:
            model.model(**packed, **arguments)
        return sum(work.flop for name, work in counter.ops.items() if "linear" in name)

    kept = multiplied(tokens_to_keep=torch.tensor([3, 500]))
    config = model.config
    width, dim = config.swiglu_width, config.hidden_size
    assert multiplied() - kept == 798 * 2 * (dim * dim + 3 * dim * width)


@torch.no_grad()
def test_tokens_to_keep_are_checked(checkpoint, sequences):
    model, packed = NeoBERTLMHead.from_pretrained(checkpoint), packed_arguments(sequences)
    ids, mask = pad(sequences, "right")
    keep = torch.tensor([0, 5])
    with pytest.raises(ValueError, match=r"tokens_to_keep .* needs cu_seqlens .*\(4, 66\)"):
        model(ids, mask, tokens_to_keep=keep)
    for wrong in (keep[None], keep.int(), torch.zeros(103, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"tokens_to_keep must be \(kept,\) int64"):
            model(**packed, tokens_to_keep=wrong)
    with pytest.raises(IndexError):
        model(**packed, tokens_to_keep=torch.tensor([103]))
    with pytest.raises(ValueError, match=r"labels must be \(1, 2\).* got \(1, 103\)"):
        model(**packed, tokens_to_keep=keep, labels=packed["input_ids"])
    for head in (NeoBERTForSequenceClassification, NeoBERTForQuestionAnswering):
        model = head.from_pretrained(checkpoint)
        with pytest.raises(ValueError, match="tokens_to_keep: this head itself chooses"):
            model(**packed, tokens_to_keep=keep)


@torch.no_grad()
def test_lm_logits_of_unlabelled_tokens_are_never_made(checkpoint):
    ids = torch.tensor(random_sequences([400, 400]))
    labels = torch.full_like(ids, -100)
    labels[0, :7] = ids[0, :7]
    model = NeoBERTLMHead.from_pretrained(checkpoint)
    with LargestTensor() as largest:
        model(ids, labels=labels)
    assert largest.numel < ids.numel() * 1000
    with LargestTensor() as largest:
        logits = model(ids, labels=labels, output_logits=True).logits
    assert largest.numel == logits.numel() == ids.numel() * 1000
    model.config.output_logits = True
    output = model(ids, labels=labels)
    assert torch.equal(output.logits, logits) and output.loss.isfinite()


def test_lm_labels_of_another_shape_are_refused(checkpoint, sequences):
    ids, mask = pad(sequences, "right")
    model = NeoBERTLMHead.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=r"labels must be \(4, 66\).* got \(4, 5\)"):
        model(ids, mask, labels=ids[:, :5])


class Doubled(nn.Module):
    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return 2 * self.base_layer(x)


@torch.no_grad()
def test_lm_loss_sees_an_adapter_a_hook_and_another_loss_function(checkpoint, sequences):
    ids, mask = pad(sequences, "right")
    labels = masked(ids, mask)
    model = NeoBERTLMHead.from_pretrained(checkpoint)
    logits = model(ids, mask).logits.flatten(0, 1)
    doubled = F.cross_entropy(2 * logits, labels.flatten())
    handle = model.decoder.register_forward_hook(lambda module, args, output: 2 * output)
    assert close(model(ids, mask, labels=labels).loss, doubled)
    handle.remove()
    model.loss_function = lambda logits, labels, **kwargs: logits.new_tensor(42.0)
    assert model(ids, mask, labels=labels).loss == 42
    del model._loss_function
    model.decoder = Doubled(model.decoder)
    assert close(model(ids, mask, labels=labels).loss, doubled)
    items = model(ids, mask, labels=labels, num_items_in_batch=50).loss
    assert close(items, doubled * (labels != -100).sum() / 50)


# --- one prediction per sequence ---


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left", "gap"])
def test_sequence_classification_reads_the_first_token(checkpoint, sequences, side):
    model = NeoBERTForSequenceClassification.from_pretrained(checkpoint, num_labels=3)
    ids, mask = pad(sequences, side)
    plain = PlainNeoBERT.load(checkpoint, torch.float32)
    hidden = plain(ids, mask)[torch.arange(4), mask.argmax(1)]
    expected = model.classifier(torch.tanh(model.dense(hidden)))
    assert close(model(ids, mask).logits, expected)
    assert close(model(ids, mask.bool()).logits, expected)
    if side != "gap":  # gaps stretch the distances between tokens
        assert close(model(**packed_arguments(sequences)).logits, expected)


@torch.no_grad()
def test_sequence_classification_packed_gives_every_sequence_its_row(checkpoint):
    model = NeoBERTForSequenceClassification.from_pretrained(checkpoint, num_labels=3)
    logits = model(**packed_arguments([[5, 6], [], [7]])).logits
    assert logits.shape == (3, 3)
    empty = model.classifier(torch.tanh(model.dense(torch.zeros(256))))
    assert close(logits[1], empty)
    assert close(logits[2], model(torch.tensor([[7]])).logits[0])


@pytest.mark.parametrize(
    ("num_labels", "labels", "expected"),
    [
        (3, torch.tensor([0, 2, 1, 1]), F.cross_entropy),
        (1, torch.tensor([0.5, 2.0, -1.0, 0.0]), lambda x, y: F.mse_loss(x[:, 0], y)),
        (
            3,
            torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]),
            F.binary_cross_entropy_with_logits,
        ),
    ],
)
def test_sequence_classification_losses(checkpoint, sequences, num_labels, labels, expected):
    model = NeoBERTForSequenceClassification.from_pretrained(checkpoint, num_labels=num_labels)
    ids, mask = pad(sequences, "left")
    output = model(ids, mask, labels=labels)
    assert close(output.loss, expected(output.logits, labels))
    assert close(model(**packed_arguments(sequences), labels=labels).loss, output.loss)
    output.loss.backward()
    assert model.model.encoder.weight.grad.abs().max() > 0


# --- one prediction per token ---


def test_token_classification(checkpoint, sequences):
    model = NeoBERTForTokenClassification.from_pretrained(checkpoint, num_labels=5)
    ids, mask = pad(sequences, "right")
    labels = torch.where(mask == 1, ids % 5, -100)
    output = model(ids, mask, labels=labels)
    assert output.logits.shape == (4, 66, 5)
    assert close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), labels.flatten()))
    packed = model(**packed_arguments(sequences), labels=labels[mask.bool()][None])
    assert close(packed.logits[0], output.logits[mask.bool()])
    assert close(packed.loss, output.loss)


# --- where the answer is ---


def test_question_answering_padded_packed_and_alone_agree(checkpoint, sequences):
    model = NeoBERTForQuestionAnswering.from_pretrained(checkpoint)
    start, end = torch.tensor([1, 0, 60, 3]), torch.tensor([4, 0, 63, 3])
    ids, mask = pad(sequences, "right")
    padded = model(ids, mask, start_positions=start, end_positions=end)
    alone = [
        model(torch.tensor([s]), start_positions=start[i : i + 1], end_positions=end[i : i + 1])
        for i, s in enumerate(sequences)
    ]
    assert close(padded.loss, torch.stack([output.loss for output in alone]).mean())
    packed = model(**packed_arguments(sequences), start_positions=start, end_positions=end)
    assert packed.start_logits.shape == packed.end_logits.shape == (4, 64)
    assert close(packed.loss, padded.loss)
    for i, length in enumerate(LENGTHS):
        for name in ("start_logits", "end_logits"):
            expected = getattr(alone[i], name)[0]
            assert close(getattr(packed, name)[i, :length], expected)
            assert close(getattr(padded, name)[i, :length], expected)
            assert (getattr(packed, name)[i, length:] == torch.finfo(torch.float32).min).all()
    padded.loss.backward()
    assert model.qa_outputs.weight.grad.isfinite().all()


def test_question_answering_outside_the_row_has_no_loss(checkpoint, sequences):
    model = NeoBERTForQuestionAnswering.from_pretrained(checkpoint)
    ids = torch.tensor(sequences[2:3] * 2)
    here, outside = torch.tensor([3, 3]), torch.tensor([3, 999])
    both = model(ids, start_positions=here, end_positions=here).loss
    assert close(model(ids, start_positions=outside, end_positions=outside).loss, both)


@torch.no_grad()
@pytest.mark.parametrize(
    "cls",
    [
        NeoBERTLMHead,
        NeoBERTForSequenceClassification,
        NeoBERTForTokenClassification,
        NeoBERTForQuestionAnswering,
    ],
)
def test_heads_pass_on_states_attentions_embeddings_and_tuples(checkpoint, sequences, cls):
    model = cls.from_pretrained(checkpoint)
    ids, mask = pad(sequences, "right")
    output = model(ids, mask, output_hidden_states=True, output_attentions=True)
    assert (len(output.hidden_states), len(output.attentions)) == (4, 3)
    embedded = model(attention_mask=mask, inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(embedded[0], output[0])
    as_tuple = model(ids, mask, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output[0])
    model.config.return_dict = False
    assert isinstance(model(ids, mask), tuple)
