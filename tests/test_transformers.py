"""What transformers v5 and sentence-transformers demand of a model, and where they trip it up."""

import json
import logging
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
    pipeline,
)

import neobert
from neobert.checkpoint import write_random_checkpoint
from neobert.model import (
    NeoBERT,
    NeoBERTConfig,
    NeoBERTForMaskedLM,
    NeoBERTForQuestionAnswering,
    NeoBERTForSequenceClassification,
    NeoBERTForTokenClassification,
    NeoBERTLMHead,
    NeoBERTModel,
)
from neobert.packing import pack
from neobert.plain import PlainNeoBERT
from neobert_kernels import pool
from tests.checkpoints import WORDS, pad, random_sequences, small_config, word_tokenizer

TEXTS = ["the cat sat on the mat", "a dog", "the red tree was not very big and it ran under a cat"]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """As on the hub: auto_map names a model.py that lies beside the weights, and must not run."""
    directory = tmp_path_factory.mktemp("hub")
    write_random_checkpoint(directory, small_config(num_hidden_layers=3, vocab_size=64))
    tokenizer.save_pretrained(directory)
    (directory / "model.py").write_text("raise RuntimeError('remote code ran')\n")
    return directory


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the checkpoint, and a function that rewrites its tensors."""
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)

    def rewrite(change):
        state = load_file(tmp_path / "model.safetensors")
        change(state)
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return rewrite


def assert_is_the_checkpoint(model, checkpoint):
    ids = torch.tensor(random_sequences([30], vocab=64))
    with torch.no_grad():
        truth = PlainNeoBERT.load(checkpoint, torch.float64)(ids)
        hidden = model.base_model(ids).last_hidden_state
    assert (hidden - truth).abs().max() <= 1e-6 * truth.abs().max()


# --- Auto classes and the checkpoint's own opinions ---


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}])
@pytest.mark.parametrize(
    ("auto_class", "expected"),
    [
        (AutoModel, NeoBERT),
        (AutoModelForMaskedLM, NeoBERTLMHead),
        (AutoModelForSequenceClassification, NeoBERTForSequenceClassification),
        (AutoModelForTokenClassification, NeoBERTForTokenClassification),
        (AutoModelForQuestionAnswering, NeoBERTForQuestionAnswering),
    ],
)
def test_auto_classes_give_local_code_whatever_the_checkpoint_says(
    checkpoint, auto_class, expected, trust
):
    assert type(AutoConfig.from_pretrained(checkpoint, **trust)) is NeoBERTConfig
    model = auto_class.from_pretrained(checkpoint, **trust)
    assert type(model) is expected and not model.training
    assert_is_the_checkpoint(model, checkpoint)


def test_aliases():
    assert NeoBERTModel is NeoBERT and NeoBERTForMaskedLM is NeoBERTLMHead
    assert neobert.NeoBERT is NeoBERT


def test_config_comes_from_the_file_and_the_junk_does_not(tmp_path):
    write_random_checkpoint(tmp_path, small_config(norm_eps=3e-4, num_hidden_layers=1))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["trust_remote_code"] is True and "auto_map" in written and "kwargs" in written
    config = NeoBERTConfig.from_pretrained(tmp_path)
    assert (config.norm_eps, config.max_length) == (3e-4, 600)
    assert config.max_position_embeddings == 600
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    for key in ("auto_map", "kwargs", "trust_remote_code", "pretrained_model_name_or_path"):
        assert not hasattr(config, key)
    assert NeoBERT.from_pretrained(tmp_path).layer_norm.eps == 3e-4


def test_released_defaults():
    config = NeoBERTConfig()
    assert config.swiglu_width == 2048
    assert (config.max_length, config.norm_eps, config.vocab_size) == (4096, 1e-5, 30522)
    assert NeoBERTConfig(intermediate_size=100).swiglu_width == 72
    with pytest.raises(ValueError, match="multiple of num_attention_heads, got 100 and 12"):
        NeoBERTConfig(hidden_size=100)


# --- loading and saving ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_low_precision_keeps_the_rotary_table(checkpoint, dtype):
    exact = NeoBERT.from_pretrained(checkpoint).rotary
    for model in (
        NeoBERT.from_pretrained(checkpoint, dtype=dtype),
        NeoBERT.from_pretrained(checkpoint).to(dtype),
    ):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert torch.equal(model.rotary.cos, exact.cos)
        assert torch.equal(model.rotary.sin, exact.sin)


def test_save_and_load_round_trip(checkpoint, tmp_path):
    model = NeoBERTLMHead.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path)
    before, after = (load_file(d / "model.safetensors") for d in (checkpoint, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["NeoBERTLMHead"] and saved["model_type"] == "neobert"
    assert not {"auto_map", "kwargs", "trust_remote_code", "dim_head"} & saved.keys()
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    ids = torch.tensor(random_sequences([30], vocab=64))
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.config.max_length == 600 and again.config.norm_eps == model.config.norm_eps


def test_base_model_saves_and_loads_without_the_prefix(checkpoint, tmp_path):
    model = NeoBERT.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path)
    assert "encoder.weight" in load_file(tmp_path / "model.safetensors")
    assert_is_the_checkpoint(AutoModel.from_pretrained(tmp_path), checkpoint)
    assert_is_the_checkpoint(NeoBERTForSequenceClassification.from_pretrained(tmp_path), checkpoint)


def test_base_model_from_a_released_checkpoint_is_silent(checkpoint, caplog):
    logger = logging.getLogger("transformers")
    propagate, logger.propagate = logger.propagate, True
    with caplog.at_level(logging.WARNING, logger="transformers"):
        AutoModel.from_pretrained(checkpoint)
    logger.propagate = propagate
    assert not caplog.records, caplog.text


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (NeoBERT, "model.transformer_encoder.1.ffn.w3.weight"),
        (NeoBERT, "model.layer_norm.weight"),
        (NeoBERTLMHead, "decoder.bias"),
        (AutoModelForMaskedLM, "model.transformer_encoder.2.qkv.weight"),
        (NeoBERTForSequenceClassification, "model.encoder.weight"),
    ],
)
def test_a_missing_tensor_is_an_error_that_names_it(broken, cls, name):
    directory = broken(lambda state: state.pop(name))
    with pytest.raises(ValueError, match=rf"lacks 1 of the tensors .*{name.split('.', 1)[1]}"):
        cls.from_pretrained(directory)


def test_a_tensor_of_another_shape_is_an_error_that_shows_both(broken):
    name = "model.transformer_encoder.1.ffn.w3.weight"

    def cut(state):
        state[name] = state[name][:, :100].clone()

    directory = broken(cut)
    for cls in (NeoBERT, NeoBERTLMHead, NeoBERTForTokenClassification):
        with pytest.raises(
            ValueError,
            match=r"1\.ffn\.w3\.weight is \(256, 100\) in the checkpoint and \(256, 512\) in the",
        ):
            cls.from_pretrained(directory)


def test_heads_start_new_and_may_change_their_number_of_labels(checkpoint, tmp_path):
    torch.manual_seed(0)
    model, info = NeoBERTForSequenceClassification.from_pretrained(
        checkpoint, num_labels=3, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {
        f"{layer}.{kind}" for layer in ("dense", "classifier") for kind in ("weight", "bias")
    }
    assert 0.01 < model.dense.weight.std() < 0.03 and (model.dense.bias == 0).all()
    model.save_pretrained(tmp_path)
    again = NeoBERTForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.num_labels == 3
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    with pytest.raises(ValueError, match=r"classifier.bias is \(3,\) .* and \(2,\) in the model"):
        NeoBERTForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    changed = NeoBERTForSequenceClassification.from_pretrained(
        tmp_path, num_labels=2, ignore_mismatched_sizes=True
    )
    assert changed.classifier.weight.shape == (2, 256)
    assert torch.equal(changed.dense.weight, model.dense.weight)


def test_new_weights_are_uniform():
    model = NeoBERTLMHead(small_config(num_hidden_layers=1, embedding_init_range=0.1))
    for weight, bound in (
        (model.model.encoder.weight, 0.1),
        (model.model.transformer_encoder[0].ffn.w12.weight, 0.02),
        (model.decoder.weight, 0.02),
    ):
        assert weight.abs().max() <= bound
        assert abs(weight.std() / (bound / 3**0.5) - 1) < 0.02
    assert (model.model.layer_norm.weight == 1).all() and (model.decoder.bias == 0).all()


def test_resize_token_embeddings(checkpoint):
    model = NeoBERTLMHead.from_pretrained(checkpoint)
    ids = torch.tensor(random_sequences([9], vocab=64))
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(70)
        after = model(ids).logits
    assert after.shape == (1, 9, 70) and model.config.vocab_size == 70
    assert torch.allclose(after[..., :64], before, atol=1e-4)
    new = torch.tensor([[69, 68]])
    model(new, labels=new).loss.backward()
    assert model.get_input_embeddings().weight.grad[69].abs().max() > 0


def test_tied_embeddings(checkpoint, tmp_path):
    model = NeoBERTLMHead(small_config(num_hidden_layers=1, tie_word_embeddings=True))
    assert model.decoder.weight is model.model.encoder.weight
    model.save_pretrained(tmp_path)
    again = NeoBERTLMHead.from_pretrained(tmp_path)
    assert again.decoder.weight is again.model.encoder.weight
    untied = NeoBERTLMHead.from_pretrained(checkpoint)
    assert not torch.equal(untied.decoder.weight, untied.model.encoder.weight)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementations_by_name_change_nothing(checkpoint, implementation):
    ids, mask = pad(random_sequences([5, 9], vocab=64), "left")
    expected = NeoBERT.from_pretrained(checkpoint)(ids, mask).last_hidden_state
    model = NeoBERT.from_pretrained(checkpoint, attn_implementation=implementation)
    assert torch.equal(model(ids, mask).last_hidden_state, expected)
    model.set_attn_implementation(implementation)
    assert torch.equal(model(ids, mask).last_hidden_state, expected)


# --- tokenizers, collators, pipelines, Trainer ---


@torch.no_grad()
def test_token_type_ids_are_ignored(checkpoint, tokenizer):
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=True)
    assert "token_type_ids" in inputs
    model = AutoModel.from_pretrained(checkpoint)
    without = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    expected = model(**without).last_hidden_state
    assert torch.equal(model(**inputs).last_hidden_state, expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    assert classifier(**inputs, labels=torch.tensor([0, 1, 0])).loss.isfinite()


@torch.no_grad()
def test_flattening_collator_keeps_texts_apart(checkpoint, tokenizer):
    features = [{"input_ids": ids} for ids in tokenizer(TEXTS)["input_ids"]]
    model = AutoModel.from_pretrained(checkpoint)
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features)
    batch.pop("labels")
    alone = [model(torch.tensor([f["input_ids"]])).last_hidden_state[0] for f in features]
    hidden = model(**batch).last_hidden_state[0]
    assert torch.allclose(hidden, torch.cat(alone), atol=1e-4)
    undeclared = DataCollatorWithFlattening()(features)
    undeclared.pop("labels")
    with pytest.raises(ValueError, match="position_ids do not rise"):
        model(**undeclared)


def test_pipelines(checkpoint, tokenizer):
    fill = pipeline("fill-mask", model=str(checkpoint), tokenizer=tokenizer)
    answers = fill(["the [MASK] sat on a mat", "a [MASK]"])
    assert [len(answer) for answer in answers] == [5, 5]
    inputs = tokenizer("a [MASK]", return_tensors="pt")
    plain = PlainNeoBERT.load(checkpoint, torch.float64)
    scores = plain.decoder(plain(inputs["input_ids"]))[0, 2].softmax(-1)
    assert answers[1][0]["token"] == int(scores.argmax())
    assert abs(answers[1][0]["score"] - float(scores.detach().max())) < 1e-5

    extract = pipeline("feature-extraction", model=str(checkpoint), tokenizer=tokenizer)
    features = torch.tensor(extract("a dog"))
    ids = tokenizer("a dog", return_tensors="pt")["input_ids"]
    assert torch.allclose(features.double(), plain(ids), atol=1e-3)

    classify = pipeline("text-classification", model=str(checkpoint), tokenizer=tokenizer)
    assert {answer["label"] for answer in classify(TEXTS)} <= {"LABEL_0", "LABEL_1"}


def training_arguments(directory, **changes):
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **changes,
    )


def random_texts(n):
    return [
        " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,)).tolist())
        for length in torch.randint(2, 12, (n,)).tolist()
    ]


@pytest.mark.no_poison
def test_trainer_masked_language_model(checkpoint, tokenizer, tmp_path):
    model = NeoBERTLMHead.from_pretrained(checkpoint)
    start = model.model.transformer_encoder[0].qkv.weight.clone()
    data = [dict(tokenizer(text)) for text in random_texts(24)]
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"tokens": int((prediction.label_ids != -100).sum())}

    trainer = Trainer(
        model,
        training_arguments(tmp_path, gradient_accumulation_steps=2),
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.state.global_step == 3
    assert not torch.equal(model.model.transformer_encoder[0].qkv.weight, start)
    assert torch.tensor([before, trainer.evaluate()["eval_loss"]]).isfinite().all()
    trainer.save_model(tmp_path / "saved")
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "saved").config.vocab_size == 64

    trainer.compute_metrics = compute_metrics
    model.config.output_logits = True
    assert trainer.evaluate()["eval_tokens"] > 0
    assert seen[0][0] == 24 and seen[0][2] == 64


@pytest.mark.no_poison
def test_trainer_sequence_classification(checkpoint, tokenizer, tmp_path):
    model = NeoBERTForSequenceClassification.from_pretrained(checkpoint, num_labels=3)
    data = [dict(tokenizer(text)) | {"label": i % 3} for i, text in enumerate(random_texts(12))]
    trainer = Trainer(
        model,
        training_arguments(tmp_path, gradient_checkpointing=True),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        compute_metrics=lambda p: {"shape": p.predictions.shape[1]},
    )
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()["eval_shape"] == 3


@torch.no_grad()
def test_sentence_transformers_gives_the_same_vectors(checkpoint, tokenizer):
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(checkpoint), max_seq_length=32)
    for mode in ("mean", "cls"):
        pooling = Pooling(256, pooling_mode=mode)
        encoder = st.SentenceTransformer(modules=[transformer, pooling], device="cpu")
        vectors = encoder.encode(TEXTS, convert_to_tensor=True, normalize_embeddings=True)
        assert type(transformer.auto_model) is NeoBERT
        batch = pack(tokenizer(TEXTS)["input_ids"])
        hidden = AutoModel.from_pretrained(checkpoint)(
            batch.input_ids[None], cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen
        ).last_hidden_state[0]
        ours = F.normalize(pool(hidden, batch.cu_seqlens, mode), dim=-1)
        assert torch.allclose(vectors, ours, atol=1e-6)
