"""One contract for all public layers; a new one adds a row, and a test of its mathematics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
from keras import ops

from keras_ext import layers
from keras_ext.layers.theseus import ReplacementRate

JIT = keras.backend.backend() != "torch"  # there it means torch.compile, which needs minutes

BATCH, LENGTH, WIDTH = 2, 5, 8
HIDDEN = np.random.default_rng(0).normal(size=(BATCH, LENGTH, WIDTH)).astype("float32")
HIDDEN[1, 3:] = 0  # padding
MEMORY = np.random.default_rng(1).normal(size=(BATCH, 3, WIDTH)).astype("float32")
IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]], "int32")
# A seed with which the first draw of a compiled step is the successor.
SUCCESSOR_FIRST = 3 if keras.backend.backend() == "torch" else 8
SEGMENTS = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]], "int32")


class Row(NamedTuple):
    """A layer and the arrays it is called with."""

    name: str
    make: Callable[..., keras.layers.Layer]
    inputs: tuple[np.ndarray, ...]

    @property
    def specs(self) -> list[keras.KerasTensor]:
        return [keras.Input(x.shape[1:], dtype=str(x.dtype)) for x in self.inputs]

    def model(self, **kwargs: Any) -> keras.Model:
        inputs = self.specs
        return keras.Model(inputs, self.make(**kwargs)(*inputs))


def block(**kwargs: Any) -> layers.TransformerBlock:
    parts = {key: kwargs[key] for key in kwargs if key == "dtype"}
    attention = layers.MultiHeadAttention(2, 4, **parts)
    return layers.TransformerBlock(attention, layers.FeedForward(16, **parts), **kwargs)


def gated_block(**kwargs: Any) -> layers.GatedAttentionBlock:
    parts = {key: kwargs[key] for key in kwargs if key == "dtype"}
    unit = layers.GatedAttentionUnit(16, 4, position=layers.RotaryPosition(), **parts)
    return layers.GatedAttentionBlock(unit, norm=layers.RMSNorm(scale=False), **kwargs)


def theseus_module(**kwargs: Any) -> layers.TheseusModule:
    parts = {key: kwargs[key] for key in kwargs if key == "dtype"}
    branches = [layers.FeedForward(size, **parts) for size in (16, 8)]
    module = layers.TheseusModule(*branches, seed=SUCCESSOR_FIRST, **kwargs)
    module.recompute = True  # for XLA on TensorFlow
    return module


ROWS = [
    Row("Bias", layers.Bias, (HIDDEN,)),
    Row("CRF", layers.CRF, (HIDDEN,)),
    Row(
        "ConditionalLayerNormalization",
        layers.ConditionalLayerNormalization,
        (HIDDEN, np.float32([[1, 2, 3]] * len(HIDDEN))),
    ),
    Row("CosineDense", lambda **k: layers.CosineDense(6, **k), (HIDDEN,)),
    Row(
        "EfficientGlobalPointer",
        lambda **k: layers.EfficientGlobalPointer(3, 4, **k),
        (HIDDEN,),
    ),
    Row(
        "FavorAttention",
        lambda **k: layers.FavorAttention(2, 4, num_features=8, seed=0, **k),
        (HIDDEN, MEMORY),
    ),
    Row("FeedForward", lambda **k: layers.FeedForward(16, layers.gelu_tanh, **k), (HIDDEN,)),
    Row("GatedAttentionBlock", gated_block, (HIDDEN,)),
    Row("GatedAttentionUnit", lambda **k: layers.GatedAttentionUnit(16, 4, **k), (HIDDEN,)),
    Row("GlobalPointer", lambda **k: layers.GlobalPointer(3, 4, **k), (HIDDEN,)),
    Row("GradientReversal", layers.GradientReversal, (HIDDEN,)),
    Row("LinearAttention", lambda **k: layers.LinearAttention(2, 4, **k), (HIDDEN, MEMORY)),
    Row(
        "MultiHeadAttention", lambda **k: layers.MultiHeadAttention(2, 4, **k), (HIDDEN, MEMORY)
    ),
    Row(
        "PolynomialAttention",
        lambda **k: layers.PolynomialAttention(2, 3, 4, **k),
        (HIDDEN, MEMORY),
    ),
    Row("PositionEmbedding", lambda **k: layers.PositionEmbedding(7, **k), (HIDDEN,)),
    Row("RMSNorm", layers.RMSNorm, (HIDDEN,)),
    Row("SegmentEmbedding", lambda **k: layers.SegmentEmbedding(2, **k), (HIDDEN, SEGMENTS)),
    Row("TheseusModule", theseus_module, (HIDDEN,)),
    Row(
        "TokenEmbedding", lambda **k: layers.TokenEmbedding(10, 8, mask_zero=True, **k), (IDS,)
    ),
    Row("TransformerBlock", block, (HIDDEN,)),
    Row("WithMask", layers.WithMask, (HIDDEN,)),
]
# What models are built with besides: they give masks and rates, no hidden states.
HELPERS = [
    Row("OtherTokens", layers.OtherTokens, (HIDDEN,)),
    Row("PrefixMask", layers.PrefixMask, (SEGMENTS,)),
    Row("ReplacementRate", ReplacementRate, (HIDDEN,)),
]
# The others give one output for each pair of tokens, or a mask of their own.
OF_TOKENS = [row for row in ROWS if not row.name.endswith(("GlobalPointer", "WithMask"))]


@pytest.fixture(params=ROWS, ids=[row.name for row in ROWS])
def row(request: pytest.FixtureRequest) -> Row:
    keras.utils.set_random_seed(0)
    return request.param


@pytest.fixture(params=ROWS + HELPERS, ids=[row.name for row in ROWS + HELPERS])
def any_row(request: pytest.FixtureRequest) -> Row:
    keras.utils.set_random_seed(0)
    return request.param


def run(model: keras.Model, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
    return ops.convert_to_numpy(model(list(inputs)))


def test_every_public_layer_has_a_row():
    public = [getattr(layers, name) for name in layers.__all__]
    # Positions are parts of a MultiHeadAttention, and in its tests; models in test_networks.
    parts = (layers.RotaryPosition, layers.RelativePosition, layers.T5Bias, keras.Model)
    classes = {c.__name__ for c in public if isinstance(c, type) and not issubclass(c, parts)}
    assert classes | {"ReplacementRate"} == {row.name for row in ROWS + HELPERS}


def test_config_round_trip(any_row):
    layer = any_row.make(name="layer")
    layer(*any_row.inputs)
    config = keras.saving.serialize_keras_object(layer)
    assert config["registered_name"] == f"keras_ext>{any_row.name}"
    copy = keras.saving.deserialize_keras_object(config)
    copy(*any_row.inputs)
    assert copy.get_config() == layer.get_config()
    assert [w.path for w in copy.weights] == [w.path for w in layer.weights]
    copy.set_weights(layer.get_weights())
    expected = ops.convert_to_numpy(layer(*any_row.inputs))
    np.testing.assert_array_equal(ops.convert_to_numpy(copy(*any_row.inputs)), expected)


def test_unknown_keyword_is_refused(any_row):
    with pytest.raises(ValueError, match="no_such_option"):
        any_row.make(no_such_option=1)


def test_save_and_load_in_a_model(any_row, tmp_path):
    model = any_row.model()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(run(loaded, any_row.inputs), run(model, any_row.inputs))


def test_eager_equals_compiled(row):
    model = row.model()
    eager = run(model, row.inputs)
    model.compile(jit_compile=JIT)
    compiled = model.predict(list(row.inputs), verbose=0)
    np.testing.assert_allclose(compiled, eager, rtol=1e-5, atol=1e-6)


def test_mixed_precision(row):
    exact, mixed = row.model(), row.model(dtype="mixed_bfloat16")
    mixed.set_weights(exact.get_weights())
    assert {w.dtype for w in mixed.weights} <= {"float32"}
    assert mixed.output.dtype == "bfloat16"
    outputs = mixed.layers[-1](*row.inputs)
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    outputs = ops.convert_to_numpy(ops.cast(outputs, "float32"))
    np.testing.assert_allclose(outputs, run(exact, row.inputs), rtol=0.05, atol=0.05)


def test_inferred_shape_is_the_real_one(any_row):
    spec = any_row.model().output
    outputs = any_row.make()(*any_row.inputs)
    assert spec.shape[1:] == tuple(outputs.shape)[1:]
    assert (spec.shape[:1] == (None,)) == (tuple(outputs.shape[:1]) == (BATCH,))
    assert spec.dtype == keras.backend.standardize_dtype(outputs.dtype)


def test_a_compiled_fit_step_is_finite_and_learns(row):
    layer = row.model()
    model = keras.Model(layer.inputs, keras.layers.Dense(2)(layer.output))
    # The weights of a CRF are in its loss only.
    learning = layer if layer.trainable_weights and row.name != "CRF" else model
    before = learning.get_weights()
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=JIT)
    targets = np.ones((BATCH, *model.output.shape[1:]), "float32")
    model.fit(list(row.inputs), targets, verbose=0)
    after = learning.get_weights()
    assert all(np.isfinite(w).all() for w in after)
    assert any((new != old).any() for new, old in zip(after, before, strict=True))


class MaskProbe(keras.layers.Layer):
    """Gives the mask that reaches it."""

    supports_masking = True

    def call(self, inputs: Any, mask: Any = None) -> Any:
        return ops.cast(mask, "float32")

    def compute_output_shape(self, inputs_shape: tuple) -> tuple:
        return inputs_shape[:-1]


@pytest.mark.parametrize("row", OF_TOKENS, ids=[row.name for row in OF_TOKENS])
def test_the_mask_is_passed_on(row):
    first, *rest = inputs = row.specs
    masked = first if row.name == "TokenEmbedding" else keras.layers.Masking()(first)
    model = keras.Model(inputs, MaskProbe()(row.make()(masked, *rest)))
    np.testing.assert_array_equal(run(model, row.inputs), IDS != 0)
