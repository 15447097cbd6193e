"""Costs: by formula, counted in a model, and as XLA counts them."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ext import layers
from keras_ext.analysis import crossover, model_flops, plot_flops, transformer_flops
from keras_ext.models import build_transformer_model, replace_attention

BASE = {"hidden_size": 768, "num_heads": 12, "num_layers": 1}
ON_JAX = pytest.mark.skipif(keras.backend.backend() != "jax", reason="XLA's count, by JAX")


def bert(hidden=768, layers=1, positions=512, activation="gelu"):
    return build_transformer_model(
        {
            "vocab_size": 100,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 64,
            "intermediate_size": 4 * hidden,
            "max_position_embeddings": positions,
            "hidden_act": activation,
        }
    )


@pytest.mark.parametrize(("size", "first", "second"), [(512, 1024, 3072), (768, 1536, 4608)])
def test_crossovers_of_the_article(size, first, second):
    lengths = crossover(size, num_heads=size // 64)
    assert lengths["attention_over_feed_forward"] == first
    assert lengths["square_over_rest"] == second
    assert (lengths["linear_wins"], lengths["favor_wins"]) == (64, 128)


@pytest.mark.parametrize("ratio", [2, 3, 4, 6])
def test_crossovers_solve_the_equations(ratio):
    sizes = {**BASE, "intermediate_size": ratio * 768}
    lengths = crossover(768, 12, ratio * 768, num_features=100)
    at = {n: transformer_flops(n, **sizes) for n in lengths.values() if n}
    if ratio > 2:
        flops = at[lengths["attention_over_feed_forward"]]
        assert flops["projections"] + flops["attention"] == flops["feed_forward"]
    flops = at[lengths["square_over_rest"]]
    assert flops["attention"] == flops["projections"] + flops["feed_forward"]
    for kind in ("linear", "favor"):
        n = lengths[f"{kind}_wins"]
        other = transformer_flops(n, **sizes, attention=kind, num_features=100)
        assert other["total"] == at[n]["total"]


def test_what_the_formula_is_linear_in():
    one = transformer_flops(100, **BASE)
    assert transformer_flops(100, **{**BASE, "num_layers": 7})["total"] == 7 * one["total"]
    assert transformer_flops(100, **BASE, training=True)["total"] == 3 * one["total"]
    assert transformer_flops(100, **BASE, causal=True)["attention"] == one["attention"] / 2
    assert transformer_flops(100, **BASE, num_kv_heads=12) == one
    grouped = transformer_flops(100, **BASE, num_kv_heads=3)
    assert grouped["projections"] == one["projections"] * 5 / 8
    assert (
        transformer_flops(100, **BASE, gated=True)["feed_forward"] == 1.5 * one["feed_forward"]
    )
    assert transformer_flops(100, **BASE, vocab_size=50)["head"] == 2 * 100 * 768 * 50
    # 2 FLOPs for each of the 12 D² weights and token, where the text is short.
    assert one["projections"] + one["feed_forward"] == 2 * 100 * 12 * 768**2


def test_a_model_costs_what_the_formula_says():
    expected = transformer_flops(128, **BASE)["total"]
    segments = 2 * 128 * 2 * 768  # two rows of segment embeddings, by a product
    assert model_flops(bert(), batch_size=3, length=128) == 3 * (expected + segments)


@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_costs_what_the_formula_says(causal):
    model = bert(hidden=128)
    linear = replace_attention(
        model, lambda old: layers.LinearAttention(2, 64, causal=causal, chunk_size=16)
    )
    sizes = {"hidden_size": 128, "num_heads": 2, "num_layers": 1}
    expected = transformer_flops(64, **sizes, attention="linear", causal=causal, chunk_size=16)[
        "total"
    ]
    # Beside it the normaliser, n m multiplications a head, and the rows of segments.
    assert model_flops(linear, 1, 64) == expected + 2 * 64 * 128 + 2 * 64 * 2 * 128


def test_convolutions():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(5, 3, padding="same")(inputs)
    x = keras.layers.DepthwiseConv2D(3, padding="valid")(x)
    expected = 2 * (8 * 8 * 5 * 9 * 3 + 6 * 6 * 5 * 9)
    assert model_flops(keras.Model(inputs, x), batch_size=2) == 2 * expected


def xla_flops(model, batch, length):
    import jax

    state = [v.value for v in model.variables]

    def run(state, *inputs):
        with keras.StatelessScope(list(zip(model.variables, state, strict=True))):
            return model(list(inputs), training=False)

    inputs = [jax.ShapeDtypeStruct((batch, length), "int32") for _ in model.inputs]
    return jax.jit(run).lower(state, *inputs).compile().cost_analysis()["flops"]


@ON_JAX
@pytest.mark.parametrize(
    ("hidden", "length", "activation", "within"),
    [
        (768, 128, "gelu", 0.02),
        (768, 512, "gelu", 0.02),
        (256, 64, "gelu", 0.06),
        (128, 64, "gelu_new", 0.03),  # erf is a polynomial there, of many products
    ],
)
def test_as_xla_counts(hidden, length, activation, within):
    model = bert(hidden, activation=activation)
    ratio = xla_flops(model, 2, length) / model_flops(model, 2, length)
    assert abs(ratio - 1) < within


@ON_JAX
def test_a_graph_of_products_as_xla_counts():
    inputs = [keras.Input((32, 48)), keras.Input((48, 64))]
    model = keras.Model(inputs, ops.matmul(*inputs))
    import jax

    shapes = [jax.ShapeDtypeStruct((4, *x.shape[1:]), "float32") for x in inputs]
    xla = jax.jit(lambda *x: model(list(x))).lower(*shapes).compile().cost_analysis()["flops"]
    assert abs(xla / model_flops(model, 4) - 1) < 0.02


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="TensorFlow refuses loops")
def test_a_loop_counts_as_often_as_it_turns():
    inputs = keras.Input((6, 8))

    @keras.saving.register_keras_serializable(package="test_flops")
    class Loop(keras.layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(8, 8))

        def call(self, x):
            step = lambda carry, _: (ops.matmul(carry, self.kernel), None)  # noqa: E731
            return ops.scan(step, x, length=5)[0]

        def compute_output_shape(self, shape):
            return shape

    assert model_flops(keras.Model(inputs, Loop()(inputs)), 1) == 5 * 2 * 6 * 8 * 8


def test_a_figure(tmp_path):
    figure = plot_flops([128, 1024, 8192], **BASE)
    figure.savefig(tmp_path / "flops.png")
    assert (tmp_path / "flops.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: transformer_flops(1, **BASE, attention="cosine"), "attention must be one of"),
        (lambda: transformer_flops(1, 10, 3, 1), "num_heads must divide hidden_size=10, got 3"),
        (lambda: model_flops(bert(128), 1), "length must be given"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_nothing_is_computed():
    assert np.isclose(
        model_flops(bert(128, positions=10**5), 512, 10**5),
        512 * transformer_flops(10**5, hidden_size=128, num_heads=2, num_layers=1)["total"],
        rtol=1e-3,
    )
