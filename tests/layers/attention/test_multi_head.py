"""Softmax attention against a float64 loop, at its edges, and with every kind of mask."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ext.layers import MultiHeadAttention, dot_product_attention


def naive_attention(query, key, value, mask=None):
    """The definition, row by row, in float64."""
    query, key, value = (np.asarray(x, "float64") for x in (query, key, value))
    batch, targets, heads, dim = query.shape
    mask = np.broadcast_to(
        True if mask is None else mask, (batch, heads, targets, key.shape[1])
    )
    outputs = np.zeros((batch, targets, heads, value.shape[-1]))
    for b, t, h in np.ndindex(batch, targets, heads):
        attended = mask[b, h, t]
        if attended.any():
            scores = key[b, attended, h] @ query[b, t, h] / np.sqrt(dim)
            weights = np.exp(scores - scores.max())
            outputs[b, t, h] = weights / weights.sum() @ value[b, attended, h]
    return outputs


def random_heads(targets=4, sources=5, dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = [(2, targets, 3, 4), (2, sources, 3, 4), (2, sources, 3, 6)]
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def random_mask(*shape):
    mask = np.random.default_rng(1).random(shape) < 0.6
    mask[0, 0, 0] = False  # a row that may attend to nothing
    return mask


MASKS = {
    "none": None,
    "padding": np.array([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)[:, None, None, :],
    "pattern": random_mask(2, 1, 4, 5),
    "heads": random_mask(2, 3, 4, 5),
    "causal": np.tri(4, 5, dtype=bool)[None, None],
}


def attend(*args, **kwargs):
    return ops.convert_to_numpy(
        dot_product_attention(*map(ops.convert_to_tensor, args), **kwargs)
    )


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_equals_the_definition(mask):
    heads = random_heads()
    outputs = attend(*heads, mask=None if mask is None else ops.convert_to_tensor(mask))
    np.testing.assert_allclose(outputs, naive_attention(*heads, mask), atol=1e-6)


def test_a_fully_masked_row_gives_zeros():
    outputs = attend(*random_heads(), mask=ops.convert_to_tensor(MASKS["padding"]))
    assert (outputs[1] == 0).all()
    assert (outputs[0] != 0).all()


@pytest.mark.filterwarnings("ignore:You are using a softmax over axis -1")
def test_length_one_gives_the_value():
    query, key, value = random_heads(targets=1, sources=1)
    np.testing.assert_allclose(attend(query, key, value), value, rtol=1e-6)


@pytest.mark.parametrize("mask", [None, MASKS["causal"]], ids=["none", "causal"])
def test_extreme_logits(mask):
    query, key, value = random_heads()
    query, key = 100 * query, 100 * key  # scores of the order of 1e4
    outputs = attend(query, key, value, mask=mask)
    np.testing.assert_allclose(outputs, naive_attention(query, key, value, mask), atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_half_precision(dtype, tolerance):
    heads = random_heads()
    tensors = [ops.cast(x, dtype) for x in heads]
    outputs = dot_product_attention(*tensors, mask=ops.convert_to_tensor(MASKS["pattern"]))
    assert keras.backend.standardize_dtype(outputs.dtype) == dtype
    outputs = ops.convert_to_numpy(ops.cast(outputs, "float32"))
    expected = naive_attention(*heads, MASKS["pattern"])
    np.testing.assert_allclose(outputs, expected, atol=tolerance)


def test_the_softmax_of_half_precision_runs_in_float32():
    # 4,096 equal scores: in bfloat16 neither the sum nor the mean of the weights would survive.
    ones = ops.ones((1, 4096, 1, 1), "bfloat16")
    seen = []
    dot_product_attention(ones[:, :1], ones, ones, dropout=lambda w: seen.append(w) or w)
    weights = ops.convert_to_numpy(ops.cast(seen[0], "float32"))
    np.testing.assert_array_equal(weights, 1 / 4096)


class Heads(keras.layers.Layer):
    """Queries, keys and values as weights, so that one SGD step shows their gradients."""

    def build(self, mask_shape):
        self.heads = [
            self.add_weight(shape=x.shape, name=f"w{x.shape[-1]}") for x in random_heads()
        ]

    def call(self, mask):
        return dot_product_attention(*self.heads, mask=ops.cast(mask, "bool"))

    def compute_output_shape(self, mask_shape):
        return (2, 4, 3, 6)


@pytest.mark.parametrize("mask", [MASKS["padding"], MASKS["heads"]], ids=["padding", "heads"])
def test_gradients_equal_those_of_the_definition(mask):
    heads = random_heads()
    factor = np.random.default_rng(2).normal(size=naive_attention(*heads).shape)
    layer = Heads()
    model = keras.Sequential([keras.Input(mask.shape[1:]), layer])
    layer.set_weights(heads)
    # Compiled: in a graph of TensorFlow, Keras's optimizers may move a weight before the
    # gradients of others have read it (Keras 3.15 on TensorFlow 2.21).
    jit = keras.backend.backend() != "torch"
    model.compile(keras.optimizers.SGD(1.0), lambda y, p: ops.sum(y * p), jit_compile=jit)
    model.train_on_batch(mask.astype("float32"), factor.astype("float32"))
    for i, (before, after) in enumerate(zip(heads, layer.get_weights(), strict=True)):
        expected = numeric_gradient(heads, i, mask, factor)
        np.testing.assert_allclose(before - after, expected, atol=1e-4)


def numeric_gradient(heads, i, mask, factor, step=1e-5):
    """Central differences of sum(factor * attention) in the i-th input, in float64."""
    heads = [x.astype("float64") for x in heads]
    gradient = np.zeros_like(heads[i])
    for index in np.ndindex(gradient.shape):
        ends = []
        for sign in (1, -1):
            shifted = heads[i].copy()
            shifted[index] += sign * step
            moved = [*heads[:i], shifted, *heads[i + 1 :]]
            ends.append((factor * naive_attention(*moved, mask)).sum())
        gradient[index] = (ends[0] - ends[1]) / (2 * step)
    return gradient


def reference_layer(layer, query, value, key, mask):
    def project(x, dense):
        kernel, bias = dense.get_weights()
        return x @ kernel.astype("float64") + bias

    def split(x):
        return x.reshape(*x.shape[:2], layer.num_heads, layer.key_dim)

    heads = naive_attention(
        split(project(query, layer.query_dense)),
        split(project(key, layer.key_dense)),
        split(project(value, layer.value_dense)),
        mask,
    )
    return project(heads.reshape(*query.shape[:2], -1), layer.output_dense)


def random_layer(**kwargs):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(3)
    shapes = [(2, 4, 8), (2, 5, 6), (2, 5, 7)]
    query, value, key = (rng.normal(size=shape).astype("float32") for shape in shapes)
    layer = MultiHeadAttention(num_heads=3, key_dim=4, **kwargs)
    layer(query, value, key)
    layer.set_weights([rng.normal(size=w.shape) * 0.5 for w in layer.weights])
    return layer, query, value, key


def test_layer_with_its_own_keys_and_both_masks():
    layer, query, value, key = random_layer()
    padding, pattern = MASKS["padding"], MASKS["pattern"]
    outputs = layer(
        query, value, key, value_mask=padding[:, 0, 0], attention_mask=pattern[:, 0]
    )
    expected = reference_layer(layer, query, value, key, padding & pattern)
    np.testing.assert_allclose(ops.convert_to_numpy(outputs), expected, atol=1e-5)


@pytest.mark.parametrize(
    "mask", [MASKS["pattern"][:, 0], MASKS["heads"]], ids=["rank 3", "rank 4"]
)
def test_attention_mask_alone(mask):
    layer, query, value, key = random_layer()
    outputs = layer(query, value, key, attention_mask=mask)
    full = mask[:, None] if mask.ndim == 3 else mask
    expected = reference_layer(layer, query, value, key, full)
    np.testing.assert_allclose(ops.convert_to_numpy(outputs), expected, atol=1e-5)


def test_the_keras_mask_of_the_value_is_used():
    layer, query, value, _ = random_layer()
    value[:, 3:] = 0
    layer = MultiHeadAttention(num_heads=3, key_dim=4)
    outputs = layer(query, keras.layers.Masking()(value))
    alone = layer(query, value[:, :3])
    np.testing.assert_allclose(*map(ops.convert_to_numpy, (outputs, alone)), atol=1e-6)


def test_dropout_acts_in_training_only():
    layer, query, value, key = random_layer(dropout=0.5)
    quiet = ops.convert_to_numpy(layer(query, value, key))
    np.testing.assert_allclose(
        quiet, reference_layer(layer, query, value, key, None), atol=1e-5
    )
    first, second = (
        ops.convert_to_numpy(layer(query, value, key, training=True)) for _ in "12"
    )
    assert (first != quiet).any()
    assert (first != second).any()


def test_projections_start_differently():
    layer = MultiHeadAttention(2, 4, kernel_initializer=keras.initializers.RandomNormal())
    layer.build((None, None, 8), (None, None, 8))
    query, key = (ops.convert_to_numpy(d.kernel) for d in (layer.query_dense, layer.key_dense))
    assert (query != key).all()


def test_lora_on_a_projection():
    layer, query, value, key = random_layer()
    before = ops.convert_to_numpy(layer(query, value, key))
    layer.query_dense.enable_lora(2)
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer(query, value, key)), before, atol=1e-6
    )
    assert len(layer.query_dense.trainable_weights) == 3  # a, b and the bias


@pytest.mark.parametrize("name", ["num_heads", "key_dim"])
def test_sizes_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        MultiHeadAttention(**{"num_heads": 2, "key_dim": 4, name: 0})
