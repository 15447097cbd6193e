"""GPTs and T5s against transformers (golden arrays), GPT2-ML against float64 NumPy."""

import json
import math
from pathlib import Path

import keras
import numpy as np
import pytest
from bundle import write_bundle
from families import SIZES, TARGETS, TOKENS, flags, random_model, run, values_of
from keras import ops

from keras_ext.models import (
    FAMILIES,
    build_transformer_model,
    load_checkpoint,
    save_transformer_model,
)

safetensors = pytest.importorskip("safetensors.numpy")

HERE = Path(__file__).parent
ONE_BLOCK = {**SIZES, "num_hidden_layers": 1}
IN_TRANSFORMERS = ["openai-gpt", "gpt2", "t5", "mt5"]


def golden_model(family, directory, **options):
    """The golden arrays, and our model of their weights."""
    golden = np.load(HERE / "golden" / f"{family}.npz")
    (directory / "config.json").write_text(str(golden["config"]))
    weights = {
        k.removeprefix("weights/"): golden[k] for k in golden if k.startswith("weights/")
    }
    safetensors.save_file(weights, directory / "model.safetensors")
    return golden, build_transformer_model(directory, directory, **options)


@pytest.mark.parametrize("family", IN_TRANSFORMERS)
def test_equals_transformers(family, tmp_path):
    golden, model = golden_model(family, tmp_path, with_mlm=True)
    assert not model.checkpoint_report.fresh
    assert not model.checkpoint_report.ignored
    tokens, targets = golden["token_ids"], golden["decoder_token_ids"]
    hidden, logits = run(model, tokens, targets=targets)
    # Padding behind a text changes nothing in it; its own outputs are nobody's.
    real = tokens != 0 if len(model.inputs) == 1 else np.ones_like(targets, bool)
    for name, output in (("hidden", hidden), ("mlm", logits)):
        expected = golden[f"outputs/{name}"]
        np.testing.assert_allclose(output[real], expected[real], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("family", ["t5", "mt5"])
def test_the_sides_of_a_t5(family, tmp_path):
    golden, encoder = golden_model(family, tmp_path, application="encoder")
    tokens, targets = golden["token_ids"], golden["decoder_token_ids"]
    real, memory = tokens != 0, run(encoder, tokens)
    np.testing.assert_allclose(memory[real], golden["outputs/encoder"][real], atol=1e-5)
    options = {"application": "decoder", "with_mlm": True}
    decoder = build_transformer_model(tmp_path, tmp_path, **options)
    assert not decoder.checkpoint_report.fresh
    memory[~real] = 1e4  # never seen
    outputs = decoder([memory, real, targets])
    for name, output in zip(("hidden", "mlm"), outputs, strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(output), golden[f"outputs/{name}"], atol=1e-5
        )


def gelu(x):
    return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def test_gpt2_ml_equals_the_float64_reference():
    model = random_model("gpt2_ml", with_mlm=True)
    weights = {path: value.astype("float64") for path, value in values_of(model).items()}

    def dense(x, name):
        return x @ weights[f"{name}/kernel"] + weights[f"{name}/bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}/gamma"] + weights[f"{name}/beta"]

    table = weights["token_embedding/embeddings"]
    h = norm(table[TOKENS[0]] + weights["position_embedding/embeddings"][:6], "embedding_norm")
    for i in range(3):
        at = f"encoder_{i}/attention"
        q, k, v = (
            np.split(dense(h, f"{at}/{name}_dense"), 2, -1)
            for name in ("query", "key", "value")
        )
        heads = []
        for query, key, value in zip(q, k, v, strict=True):
            scores = np.exp(query @ key.T / 2) * np.tri(6)  # √4 = 2
            heads.append(scores / scores.sum(-1, keepdims=True) @ value)
        h = h + dense(np.concatenate(heads, -1), f"{at}/output_dense")
        x = norm(h, f"encoder_{i}/attention_norm")
        x = gelu(dense(x, f"encoder_{i}/feed_forward/intermediate_dense"))
        x = dense(x, f"encoder_{i}/feed_forward/output_dense")
        h = norm(h + x, f"encoder_{i}/feed_forward_norm")
    hidden, logits = run(model, TOKENS[:1])
    np.testing.assert_allclose(hidden[0], h, atol=1e-5)
    np.testing.assert_allclose(logits[0], h @ table.T, atol=1e-5)


@pytest.mark.parametrize("family", ["openai-gpt", "gpt2", "gpt2_ml", "t5", "mt5"])
def test_no_token_sees_later_ones(family):
    model = random_model(family)
    first = run(model)
    for place in range(1, 4):
        tokens, targets = TOKENS.copy(), TARGETS.copy()
        changed = targets if "decoder_token_ids" in [x.name for x in model.inputs] else tokens
        changed[:, place] = changed[:, place] % 9 + 1
        differs = np.abs(run(model, tokens, targets=targets) - first).max(-1) > 1e-4
        np.testing.assert_array_equal(differs[0], np.arange(differs.shape[1]) >= place)


def test_checkpoints_of_openai():
    """Their three projections in one kernel of shape (1, rows, columns)."""
    names = FAMILIES["gpt2"].names["tensorflow"]
    fallbacks = {
        str(names.fallback(names.source(w.path))) for w in random_model("gpt2").weights
    }
    block = {
        f"model/h{i}/{layer}/{weight}"
        for i in range(3)
        for layer, weights in {
            **dict.fromkeys(("ln_1", "ln_2"), ("g", "b")),
            **dict.fromkeys(("attn/c_proj", "mlp/c_fc", "mlp/c_proj"), ("w", "b")),
            "attn/c_attn": [f"{w}[{part}/3]" for w in "wb" for part in range(3)],
        }.items()
        for weight in weights
    }
    assert fallbacks == block | {"model/wte", "model/wpe", "model/ln_f/g", "model/ln_f/b"}


def test_a_checkpoint_of_openai_is_read(tmp_path):
    model = random_model("gpt2", with_mlm=True)
    table, parts = FAMILIES["gpt2"].names["tensorflow"], {}
    for path, value in values_of(model).items():
        name, _, part = str(table.fallback(table.source(path))).partition("[")
        parts.setdefault(name, {})[part] = value
    variables = {
        name: np.concatenate([found[part] for part in sorted(found)], -1)
        for name, found in parts.items()
    }
    variables = {k: v[None] if k.endswith("/w") else v for k, v in variables.items()}
    write_bundle(tmp_path / "model.ckpt", variables)
    again = build_transformer_model(SIZES, tmp_path, "gpt2", with_mlm=True)
    assert not again.checkpoint_report.fresh
    assert not again.checkpoint_report.ignored
    for one, other in zip(run(again), run(model), strict=True):
        np.testing.assert_array_equal(one, other)


def test_names_of_mt5_in_tensorflow_checkpoints(tmp_path):
    model, table = random_model("mt5", with_mlm=True), FAMILIES["mt5"].names["tensorflow"]
    variables = {}
    for path, value in values_of(model).items():
        source = table.source(path)
        name, transposed = source.name, source.transposed
        name = name.replace("final_layer_norm", "rms_norm").replace("layer_norm", "rms_norm")
        variables[name] = np.ascontiguousarray(value.T if transposed else value)
        variables[f"{name}_slot_vr"] = value
    assert "decoder/block_001/layer_002/DenseReluDense/wi_1/kernel" in variables
    assert variables[
        "encoder/block_000/layer_000/SelfAttention/relative_attention_bias"
    ].shape == (2, 8)
    write_bundle(tmp_path / "model.ckpt", variables)
    again = random_model("mt5", seed=1, with_mlm=True)
    report = load_checkpoint(again, tmp_path)
    assert not report.fresh
    assert set(report.ignored.values()) == {"optimizer slot"}
    for one, other in zip(run(again), run(model), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_wrong_part_is_named(tmp_path):
    random = random_model("gpt2")
    save_transformer_model(random, tmp_path)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    tensors["transformer.h.1.attn.c_attn.bias"] = np.zeros(21, "float32")
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"key_dense/bias \(8,\) <- .* \(21,\), part \[1/3\]"):
        load_checkpoint(random_model("gpt2"), tmp_path)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention must be False for GPT2"),
        (
            "gpt2",
            {"application": "unilm"},
            "application must be one of lm for GPT2, got 'unilm'",
        ),
        ("t5", {"feed_forward_proj": "squared-relu"}, "must be like gated-gelu, got 'squared-"),
        (
            "t5",
            {"application": "lm"},
            "must be one of seq2seq, encoder, decoder for T5, got 'lm'",
        ),
    ],
)
def test_configurations_of_other_models_are_refused(family, config, message):
    with pytest.raises(ValueError, match=message):
        build_transformer_model({**SIZES, **config}, model=family)


def test_the_encoder_of_a_t5_has_no_head():
    with pytest.raises(ValueError, match="T5 has no head for with_mlm as 'encoder'"):
        build_transformer_model(SIZES, model="t5", application="encoder", with_mlm=True)


def test_a_t5_without_gate_is_saved_as_transformers_reads_it(tmp_path):
    save_transformer_model(random_model("t5", **flags("t5")), tmp_path)
    names = set(safetensors.load_file(tmp_path / "model.safetensors"))
    assert "encoder.block.2.layer.1.DenseReluDense.wi.weight" in names
    assert not [name for name in names if "wi_0" in name]
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["feed_forward_proj"] == "relu"
    assert saved["d_kv"] == 3


def test_configurations_are_written_in_the_fields_of_hugging_face():
    for family, activation in (("openai-gpt", "gelu"), ("gpt2", "gelu_new")):
        kind = FAMILIES[family]
        given = {"vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 5}
        sizes = kind.from_config(given)
        assert sizes.intermediate_size == 32
        assert sizes.hidden_act == "gelu_new"
        written = sizes.to_config()
        assert {k: written[k] for k in given} == given
        assert written[kind.fields["hidden_act"]] == activation
        assert kind.from_config(written) == sizes


@pytest.mark.parametrize("family", ["t5", "gau_alpha"])
def test_recomputed_training_is_the_same(family):
    """The same draws of dropout, gradients through masks, memory and shared biases."""
    trained = []
    for recompute in (False, True):
        keras.utils.set_random_seed(0)
        model = random_model(
            family, sizes=ONE_BLOCK, dropout=0.3, attention_dropout=0.3, recompute=recompute
        )
        model.compile("sgd", "mse", jit_compile=keras.backend.backend() == "jax")
        known = {"token_ids": TOKENS, "segment_ids": 0 * TOKENS, "decoder_token_ids": TARGETS}
        inputs = [known[x.name] for x in model.inputs]
        targets = np.ones((*inputs[-1].shape, 8), "float32")
        for _ in range(2):
            model.train_on_batch(inputs, targets)
        trained.append(values_of(model))
    for path, value in trained[0].items():
        np.testing.assert_allclose(trained[1][path], value, atol=1e-5, err_msg=path)


def test_dropout_is_on_in_training_only():
    model = random_model("t5", sizes=ONE_BLOCK, dropout=0.5)
    one, two = (ops.convert_to_numpy(model([TOKENS, TARGETS], training=True)) for _ in range(2))
    assert np.abs(one - two).max() > 0.1
    np.testing.assert_array_equal(run(model), run(model))
