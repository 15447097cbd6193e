"""Polynomial features: their products are the polynomial, and near the exponential."""

import itertools
import math

import keras
import numpy as np
import pytest
from compiled import compiled
from keras import ops

from keras_ext.layers import PolynomialAttention, polynomial_features

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 5)).astype("float64")


def polynomial(x, order, kind):
    if kind == "limit":
        return (1 + x / order) ** order
    return sum(x**p / math.factorial(p) for p in range(order + 1))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["taylor", "limit"])
def test_products_are_the_polynomial(kind, order):
    run = compiled(lambda x: polynomial_features(x, order, kind))
    q, k = (ops.convert_to_numpy(run(x.astype("float32"))) for x in X)
    assert q.shape == (3, math.comb(5 + order, order))
    expected = polynomial(X[0] @ X[1].T, order, kind)
    np.testing.assert_allclose(q @ k.T, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["taylor", "limit"])
def test_equal_to_the_uncompressed_construction(kind):
    """Tensor powers of [q] and of [1; q/√n], with one feature for each order of factors."""
    order, vector = 3, X[0, 0]
    ours = ops.convert_to_numpy(polynomial_features(vector.astype("float32"), order, kind))
    if kind == "limit":
        base = np.append(1, vector / np.sqrt(order))
        squares = [np.prod(base[list(i)]) ** 2 for i in itertools.product(range(6), repeat=3)]
    else:
        squares = [
            np.prod(vector[list(i)]) ** 2 / math.factorial(p)
            for p in range(order + 1)
            for i in itertools.product(range(5), repeat=p)
        ]
    np.testing.assert_allclose((ours**2).sum(), sum(squares), rtol=1e-5)


@pytest.mark.parametrize(("order", "least", "at"), [(2, 0.5, -1.0), (4, 0.270395, -1.59607)])
def test_even_orders_are_positive(order, least, at):
    x = np.linspace(-9, 9, 100_001)
    values = polynomial(x, order, "taylor")
    assert abs(values.min() - least) < 1e-6
    assert abs(x[values.argmin()] - at) < 1e-3
    assert polynomial(x, order, "limit").min() >= 0
    assert polynomial(x, order + 1, "taylor").min() < 0


def reference(layer, x, weight):
    """Attention with `weight` of q·k/√d, in float64."""
    query, key, value = (
        (x @ kernel + bias).reshape(*x.shape[:2], layer.num_heads, -1).astype("float64")
        for kernel, bias in (
            dense.get_weights()
            for dense in (layer.query_dense, layer.key_dense, layer.value_dense)
        )
    )
    weights = weight(np.einsum("bthd,bshd->bhts", query, key) / np.sqrt(layer.key_dim))
    if layer.causal:
        weights = weights * np.tri(x.shape[1])
    weights = weights / weights.sum(-1, keepdims=True)
    heads = np.einsum("bhts,bshd->bthd", weights, value)
    kernel, bias = layer.output_dense.get_weights()
    return heads.reshape(*x.shape[:2], -1) @ kernel + bias


def outputs_of(layer, x):
    layer.build(x.shape, x.shape)
    return ops.convert_to_numpy(compiled(lambda x: layer(x, x))(x))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["taylor", "limit"])
def test_the_layer_has_the_weights_of_the_polynomial(kind, causal):
    keras.utils.set_random_seed(0)
    layer = PolynomialAttention(2, 4, 3, order=4, kind=kind, causal=causal, chunk_size=4)
    x = RNG.normal(size=(2, 7, 8)).astype("float32")
    outputs = outputs_of(layer, x)
    expected = reference(layer, x, lambda s: polynomial(s, 4, kind))
    np.testing.assert_allclose(outputs, expected, atol=2e-5)
    if causal:
        state, step = layer.initial_state(2), compiled(layer.step)
        for i in range(7):
            output, state = step(x[:, i : i + 1], state)
            np.testing.assert_allclose(
                ops.convert_to_numpy(output)[:, 0], outputs[:, i], atol=2e-5
            )


@pytest.mark.parametrize(("kind", "fall"), [("taylor", 20), ("limit", 1.5)])
def test_the_error_against_softmax_falls_with_the_order(kind, fall):
    x = 0.5 * RNG.normal(size=(2, 7, 6)).astype("float32")
    errors = []
    for order in (2, 4, 6):
        keras.utils.set_random_seed(0)
        layer = PolynomialAttention(1, 3, order=order, kind=kind)
        outputs = outputs_of(layer, x)
        errors.append(np.abs(outputs - reference(layer, x, np.exp)).max())
    assert errors[0] > errors[1] > errors[2]
    assert errors[0] > fall * errors[2]


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"order": 3}, "order must be even and positive, got 3: .* negative weights"),
        ({"order": 0}, "order must be even and positive, got 0"),
        ({"kind": "chebyshev"}, "kind must be one of taylor, limit, got 'chebyshev'"),
    ],
)
def test_bad_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        PolynomialAttention(2, 4, **kwargs)
