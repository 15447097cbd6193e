"""BERT against transformers (golden arrays) and against a float64 NumPy forward pass."""

import json
import math
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops
from small_bert import HEADS, SIZES

from keras_ext.models import BERT

GOLDEN = np.load(Path(__file__).with_name("golden") / "bert.npz")
TOKENS = np.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 0, 0, 0], [7, 0, 0, 0, 0, 0]], "int32")
SEGMENTS = np.array([[0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]], "int32")


def random_bert(seed=0, **options):
    """A model in which every weight matters: also biases and norms are random."""
    model = BERT(**SIZES).build(**options)
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        scale = 0.2 if len(weight.shape) == 1 else weight.shape[0] ** -0.5
        weight.assign(rng.normal(size=weight.shape) * scale + weight.path.endswith("gamma"))
    return model


def run(model, tokens=TOKENS, segments=SEGMENTS):
    return keras.tree.map_structure(ops.convert_to_numpy, model([tokens, segments]))


# ------------------------------------------------------------------ a float64 reference


def gelu(x):
    return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def reference(weights, tokens, segments):
    """hidden, mlm, nsp, pooled of a BERT with the given weights, by path."""
    weights = {path: np.asarray(value, "float64") for path, value in weights.items()}

    def dense(x, name):
        return x @ weights[f"{name}/kernel"] + weights[f"{name}/bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * weights[f"{name}/gamma"] + weights[f"{name}/beta"]

    def attention(x, name):
        heads, outputs = SIZES["num_attention_heads"], []
        split = [
            np.split(dense(x, f"{name}/{p}_dense"), heads, -1)
            for p in ("query", "key", "value")
        ]
        for q, k, v in zip(*split, strict=True):
            scores = q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1])
            scores = np.exp(scores) * (tokens != 0)[:, None]
            outputs.append(scores / scores.sum(-1, keepdims=True) @ v)
        return dense(np.concatenate(outputs, -1), f"{name}/output_dense")

    table = weights["token_embedding/embeddings"]
    h = table[tokens] + weights["segment_embedding/embeddings"][segments]
    h = norm(h + weights["position_embedding/embeddings"][: tokens.shape[1]], "embedding_norm")
    for i in range(SIZES["num_hidden_layers"]):
        block = f"encoder_{i}"
        h = norm(h + attention(h, f"{block}/attention"), f"{block}/attention_norm")
        inner = gelu(dense(h, f"{block}/feed_forward/intermediate_dense"))
        h = norm(
            h + dense(inner, f"{block}/feed_forward/output_dense"), f"{block}/feed_forward_norm"
        )
    mlm = norm(gelu(dense(h, "mlm_dense")), "mlm_norm") @ table.T + weights["mlm_bias/bias"]
    pooled = np.tanh(dense(h[:, 0], "pooler"))
    return h, mlm, dense(pooled, "nsp"), pooled


def weights_of(model):
    return {w.path: ops.convert_to_numpy(w) for w in model.weights}


def test_equals_the_float64_reference():
    model = random_bert(**HEADS)
    expected = reference(weights_of(model), TOKENS, SEGMENTS)
    for output, reference_output in zip(run(model), expected, strict=True):
        np.testing.assert_allclose(output, reference_output, atol=1e-5)


# ------------------------------------------------------------------ transformers


def golden_model():
    """The golden weights, assigned by the mapping table alone, without a checkpoint reader."""
    config = {
        k.removeprefix("config/"): int(GOLDEN[k]) for k in GOLDEN if k.startswith("config/")
    }
    model = BERT(**config).build(**HEADS)
    for weight in model.weights:
        source = BERT.names["huggingface"].source(weight.path)
        name, transposed = source.name, source.transposed
        value = GOLDEN[f"weights/{name}"]
        weight.assign(value.T if transposed else value)
    return model


def test_equals_transformers():
    outputs = run(golden_model(), GOLDEN["token_ids"], GOLDEN["segment_ids"])
    for name, output in zip(("hidden", "mlm", "nsp", "pooled"), outputs, strict=True):
        np.testing.assert_allclose(output, GOLDEN[f"outputs/{name}"], atol=1e-5, err_msg=name)


def test_golden_inputs_have_padding_and_segments():
    tokens, segments = GOLDEN["token_ids"], GOLDEN["segment_ids"]
    assert ((tokens == 0).sum(1) == [11, 8, 4, 0]).all()
    assert set(segments[tokens != 0]) == {0, 1}


# ------------------------------------------------------------------ the model


def test_padding_changes_nothing():
    model = random_bert(**HEADS)
    hidden, mlm, *rest = run(model)
    padded = [np.pad(x, ((0, 0), (0, 1))) for x in (TOKENS, SEGMENTS)]
    hidden_padded, mlm_padded, *rest_padded = run(model, *padded)
    np.testing.assert_allclose(hidden_padded[:, :-1], hidden, atol=1e-6)
    np.testing.assert_allclose(mlm_padded[:, :-1], mlm, atol=1e-5)
    for one, other in zip(rest, rest_padded, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_row_of_padding_alone_is_finite():
    assert np.isfinite(run(random_bert(), 0 * TOKENS, SEGMENTS)).all()


def test_layer_names_and_order_of_outputs():
    model = random_bert(**HEADS)
    names = [layer.name for layer in model.layers]
    for name in (
        *("token_ids", "segment_ids", "token_embedding", "segment_embedding"),
        *(
            "position_embedding",
            "embedding_norm",
            "embedding_dropout",
            "encoder_0",
            "encoder_1",
        ),
        *("mlm_dense", "mlm_norm", "mlm_bias", "pooler", "nsp"),
    ):
        assert name in names
    assert [x.name for x in model.inputs] == ["token_ids", "segment_ids"]
    assert [x.dtype for x in model.inputs] == ["int32", "int32"]
    assert [x.shape for x in model.outputs] == [
        (None, None, 8),
        (None, None, 11),
        (None, 2),
        (None, 8),
    ]


@pytest.mark.parametrize("head", [None, "with_mlm", "with_nsp", "with_pool"])
def test_one_head_at_a_time(head):
    outputs = run(random_bert(**({head: True} if head else {})))
    if head is None:
        assert outputs.shape == (3, 6, 8)
    else:
        shapes = {"with_mlm": (3, 6, 11), "with_nsp": (3, 2), "with_pool": (3, 8)}
        assert [x.shape for x in outputs] == [(3, 6, 8), shapes[head]]


def test_hidden_states_between_the_blocks():
    model = random_bert()
    first = keras.Model(model.inputs, model.get_layer("encoder_0").output)
    second = ops.convert_to_numpy(
        model.get_layer("encoder_1")(run(first), attention_mask=(TOKENS != 0)[:, None])
    )
    np.testing.assert_allclose(second, run(model), atol=1e-6)


def test_save_and_load(tmp_path):
    model = random_bert(**HEADS)
    model.save(tmp_path / "bert.keras")
    loaded = keras.models.load_model(tmp_path / "bert.keras")
    assert [w.path for w in loaded.weights] == [w.path for w in model.weights]
    for one, other in zip(run(loaded), run(model), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch.compile takes minutes")
def test_compiled_equals_eager():
    model = random_bert(**HEADS)
    model.compile(jit_compile=True)
    compiled = model.predict([TOKENS, SEGMENTS], verbose=0)
    for one, other in zip(compiled, run(model), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_mixed_precision():
    exact = random_bert(with_mlm=True)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed = random_bert(with_mlm=True)
    finally:
        keras.config.set_dtype_policy("float32")
    assert {w.dtype for w in mixed.weights} == {"float32"}
    assert [x.dtype for x in mixed.outputs] == ["bfloat16", "bfloat16"]
    for one, other in zip(mixed([TOKENS, SEGMENTS]), run(exact), strict=True):
        one = ops.convert_to_numpy(ops.cast(one, "float32"))
        assert np.abs(one - other).mean() < 0.02 * np.abs(other).mean() + 0.01


@pytest.mark.parametrize("head", ["input", "mlm"])
def test_the_token_table_learns_from_both_its_uses(head):
    bert = BERT(**{**SIZES, "num_hidden_layers": 1}).build(with_mlm=True)
    model = keras.Model(bert.inputs, bert.outputs[head == "mlm"])
    table = bert.get_layer("token_embedding").embeddings
    before = ops.convert_to_numpy(table).copy()
    model.compile(keras.optimizers.SGD(0.1), "mse")
    targets = np.random.default_rng(0).normal(size=(3, 6, table.shape[head == "input"]))
    model.train_on_batch([TOKENS, SEGMENTS], targets)
    moved = set(np.flatnonzero((ops.convert_to_numpy(table) != before).any(axis=1)))
    # The head reaches every token, the input only its own; padding is masked from the loss.
    assert moved == (set(range(11)) if head == "mlm" else set(TOKENS.ravel()) - {0})


def test_weights_start_with_the_spread_of_the_configuration():
    sizes = SIZES | {"hidden_size": 64, "vocab_size": 200}
    model = BERT(**sizes, initializer_range=0.5).build(**HEADS)
    for weight in model.weights:
        value = ops.convert_to_numpy(weight)
        if weight.path.endswith(("kernel", "embeddings")):
            # 0.44 if the tails are cut at two standard deviations; Keras on torch keeps them.
            assert 0.3 < value.std() < 0.65  # of 128 weights at least
        else:
            assert (value == weight.path.endswith("gamma")).all()


# ------------------------------------------------------------------ the configuration


def test_defaults_are_those_of_bert():
    bert = BERT.from_config(SIZES)
    assert bert.hidden_act == "gelu"
    assert bert.hidden_dropout_prob == bert.attention_probs_dropout_prob == 0.1
    assert bert.type_vocab_size == 2
    assert bert.layer_norm_eps == 1e-12


@pytest.mark.parametrize("field", list(SIZES)[:5])
def test_a_missing_field_is_named(field):
    config = {key: value for key, value in SIZES.items() if key != field}
    with pytest.raises(ValueError, match=f"lacks '{field}'"):
        BERT.from_config(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "roberta"),
        ("embedding_size", 4),
        ("position_embedding_type", "relative_key"),
        ("use_relative_position", True),
        ("is_decoder", True),
        ("tie_word_embeddings", False),
    ],
)
def test_another_architecture_is_refused(key, value):
    with pytest.raises(ValueError, match=f"{key} must be .* for BERT, got {value!r}"):
        BERT.from_config({**SIZES, key: value})


def test_activations():
    for name, exact in {"gelu": True, "gelu_new": False, "gelu_pytorch_tanh": False}.items():
        model = BERT(**SIZES, hidden_act=name).build()
        activation = model.get_layer("encoder_0").feed_forward.activation
        value = float(activation(ops.convert_to_tensor([-1.0]))[0])
        assert value == pytest.approx(-0.15865525 if exact else -0.15880801, abs=1e-7)
    with pytest.raises(ValueError, match=r"hidden_act must be one of gelu, .*, got 'mish'"):
        BERT(**SIZES, hidden_act="mish")


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"hidden_size=8 must be a multiple of .*=3"):
        BERT(**{**SIZES, "num_attention_heads": 3})


# ------------------------------------------------------------------ the mapping table


@pytest.mark.real_data
def test_every_variable_of_the_chinese_bert_has_one_weight(shared):
    lines = (shared / "configs/chinese_L-12_H-768_A-12.variables.tsv").read_text().splitlines()
    shapes = {name: shape for name, shape, *_ in (line.split("\t") for line in lines)}
    assert len(shapes) == 206
    table = BERT.names["tensorflow"]
    small = BERT(**{**SIZES, "num_hidden_layers": 12}).build(**HEADS)
    large = {
        2: 2,
        7: 512,
        8: 768,
        11: 21128,
        12: 3072,
    }  # its sizes for those of the small model
    mapped = {}
    for weight in small.weights:
        source = table.source(weight.path)
        name, transposed = source.name, source.transposed
        assert name not in mapped
        shape = [large[size] for size in weight.shape]
        mapped[name] = str(shape[::-1] if transposed else shape)
    assert mapped == shapes


@pytest.mark.real_data
def test_published_configurations_are_read(shared):
    configs = shared / "configs"
    sizes = {
        "chinese_L-12_H-768_A-12.json": (12, 768, 21128),
        "rbt3.json": (3, 768, 21128),
        "roberta_tiny_clue/bert_config.json": (4, 312, 8021),
        "bert-base-chinese/config.json": (12, 768, 21128),
        **{
            f"uer_bert/{name}_config.json": (layers, width, 100)
            for name, layers, width in [
                *(("tiny", 2, 128), ("mini", 4, 256), ("small", 4, 512), ("medium", 8, 512)),
                *(("base", 12, 768), ("large", 24, 1024)),
            ]
        },
    }
    for path, expected in sizes.items():
        # UER keeps the size of the vocabulary apart.
        bert = BERT.from_config({"vocab_size": 100, **json.loads((configs / path).read_text())})
        assert (bert.num_hidden_layers, bert.hidden_size, bert.vocab_size) == expected, path


@pytest.mark.real_data
def test_a_small_published_configuration_builds(shared):
    config = json.loads((shared / "configs/uer_bert/tiny_config.json").read_text())
    model = BERT.from_config({**config, "vocab_size": 21128}).build()
    # Tables, norms and blocks of 2 layers, width 128, feed-forward 512.
    blocks = 2 * (4 * 128 * 129 + 128 * 512 + 512 + 512 * 128 + 128 + 4 * 128)
    assert model.count_params() == (21128 + 512 + 2 + 2) * 128 + blocks
