"""The gated attention unit against its formula in float64, and its scaling by length."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_ext.layers import (
    GatedAttentionBlock,
    GatedAttentionUnit,
    RelativePosition,
    RMSNorm,
    RotaryPosition,
)

RNG = np.random.default_rng(0)


def silu(x):
    return x / (1 + np.exp(-x))


def unit_of(length, **options):
    unit = GatedAttentionUnit(6, 4, **options)
    inputs = RNG.normal(size=(2, length, 8)).astype("float32")
    unit(inputs)
    for weight in unit.weights:
        weight.assign(RNG.normal(size=weight.shape))
    return unit, inputs


def reference(unit, inputs, keep):
    """keep (batch, length, length) says which tokens see which."""
    inner, outer, query, key = (
        ops.convert_to_numpy(w).astype("float64")
        for w in (
            unit.input_dense.kernel,
            unit.output_dense.kernel,
            unit.query_gamma,
            unit.key_gamma,
        )
    )
    u, v, z = np.split(silu(inputs.astype("float64") @ inner), [6, 12], axis=-1)
    number = np.maximum(keep.sum(-1, keepdims=True), 16)
    scores = (z * query) @ (z * key).swapaxes(1, 2) / 2 * np.log(number) / math.log(512)
    scores = np.exp(scores - scores.max(-1, keepdims=True)) * keep
    totals = scores.sum(-1, keepdims=True)
    weights = np.divide(scores, totals, where=totals > 0, out=np.zeros_like(scores))
    return u * (weights @ v) @ outer


@pytest.mark.parametrize("length", [1, 5, 40])
def test_formula(length):
    """Of 40 tokens the logarithm counts, of fewer than 16 its least value."""
    unit, inputs = unit_of(length)
    expected = reference(unit, inputs, np.ones((2, length, length)))
    np.testing.assert_allclose(ops.convert_to_numpy(unit(inputs)), expected, atol=2e-4)


@pytest.mark.parametrize("by_argument", [True, False])
def test_masks_hide_and_count(by_argument):
    unit, inputs = unit_of(40, causal=not by_argument)
    causal = np.tri(40, dtype=bool)[None]
    padding = np.arange(40) >= np.array([[0], [3]])  # on the left, where it would be seen
    inputs = np.where(padding[..., None], inputs, 0)
    pattern = {"attention_mask": causal} if by_argument else {}
    outputs = unit(keras.layers.Masking()(inputs), **pattern)
    expected = reference(unit, inputs, causal & padding[:, None])
    np.testing.assert_allclose(ops.convert_to_numpy(outputs), expected, atol=2e-4)


def test_tokens_that_see_nothing_get_zeros():
    unit, inputs = unit_of(5)
    outputs = unit(inputs, attention_mask=np.zeros((2, 5, 5), bool))
    np.testing.assert_array_equal(ops.convert_to_numpy(outputs), 0)


@pytest.mark.parametrize("position", [RotaryPosition, RelativePosition])
def test_positions_tell_orders_apart(position):
    """Without them tokens in another order have the same outputs in that order."""
    order = np.array([3, 0, 4, 1, 2])
    for option, same in ((None, True), (position(), False)):
        unit, inputs = unit_of(5, position=option)
        one, other = (ops.convert_to_numpy(unit(x)) for x in (inputs, inputs[:, order]))
        assert np.allclose(one[:, order], other, atol=1e-5) == same


@pytest.mark.parametrize("position", [RotaryPosition, RelativePosition])
def test_tokens_stand_where_they_are_said_to(position):
    unit, inputs = unit_of(5, position=position())
    order = np.array([[3, 0, 4, 1, 2], [0, 1, 2, 4, 3]])
    for layer in (unit, GatedAttentionBlock(unit)):
        expected = ops.convert_to_numpy(layer(inputs))
        counted = layer(inputs, positions=np.tile(np.arange(5), (2, 1)))
        np.testing.assert_allclose(ops.convert_to_numpy(counted), expected, atol=1e-5)
        x, y = (np.take_along_axis(x, order[..., None], 1) for x in (inputs, expected))
        outputs = ops.convert_to_numpy(layer(x, positions=order + 7))
        np.testing.assert_allclose(outputs, y, atol=1e-4)


@pytest.mark.parametrize("kind", [GatedAttentionUnit, GatedAttentionBlock])
def test_positions_beside_a_mask(kind):
    """Keras names the mask otherwise where there are two tensors."""
    unit, inputs = unit_of(5, position=RotaryPosition())
    layer = unit if kind is GatedAttentionUnit else GatedAttentionBlock(unit)
    right, left = np.zeros((2, 7, 8), "float32"), np.zeros((2, 7, 8), "float32")
    right[:, :5], left[:, 2:] = inputs, inputs
    positions = np.maximum(np.tile(np.arange(7), (2, 1)) - 2, 0)
    masked = keras.layers.Masking()
    outputs = layer(masked(left), positions=positions)
    np.testing.assert_array_equal(ops.convert_to_numpy(outputs._keras_mask), left.any(-1))
    np.testing.assert_allclose(
        ops.convert_to_numpy(outputs)[:, 2:],
        ops.convert_to_numpy(layer(masked(right)))[:, :5],
        atol=2e-5,
    )


def test_positions_need_a_position():
    unit, inputs = unit_of(5)
    with pytest.raises(ValueError, match="no effect on an attention without a position"):
        unit(inputs, positions=np.zeros((2, 5), int))


def test_block():
    block = GatedAttentionBlock(GatedAttentionUnit(6, 4), norm=RMSNorm(1e-12, scale=False))
    inputs = RNG.normal(size=(2, 5, 8)).astype("float32")
    sums = inputs + ops.convert_to_numpy(block.attention(inputs))
    expected = sums / np.sqrt((sums**2).mean(-1, keepdims=True))
    np.testing.assert_allclose(ops.convert_to_numpy(block(inputs)), expected, atol=1e-5)


def test_bad_arguments():
    with pytest.raises(ValueError, match="units must be positive, got 0"):
        GatedAttentionUnit(0)
    with pytest.raises(ValueError, match="multiple of 2 for RotaryPosition, got 3"):
        GatedAttentionUnit(4, 3, position=RotaryPosition())
