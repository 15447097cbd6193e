"""Linear attention: all its forms against each other and against loops in float64."""

import keras
import numpy as np
import pytest
from compiled import compiled
from keras import ops

from keras_ext import backend
from keras_ext.layers import LinearAttention, linear_attention

RNG = np.random.default_rng(0)
HEADS, SIZE, N = 2, 4, 11


@keras.saving.register_keras_serializable(package="test_linear")
def squared(x):
    return ops.square(x)


def random_features(length=N, features=5, values=3, sources=None):
    shapes = [(length, features), (sources or length, features), (sources or length, values)]
    query, key, value = (RNG.normal(size=(2, n, HEADS, d)).astype("float32") for n, d in shapes)
    return np.exp(query), np.exp(key), value


def definition(query, key, value, mask=None, causal=False):
    """Token by token, with the state of a recurrent network, in float64."""
    query, key, value = (np.asarray(x, "float64") for x in (query, key, value))
    mask = np.ones(key.shape[:2], bool) if mask is None else mask
    outputs = np.zeros((*query.shape[:3], value.shape[-1]))
    for b, h in np.ndindex(len(query), HEADS):
        for i in range(query.shape[1]):
            last = i + 1 if causal else key.shape[1]
            weights = key[b, :last, h] @ query[b, i, h] * mask[b, :last]
            if weights.any():
                outputs[b, i, h] = weights @ value[b, :last, h] / weights.sum()
    return outputs


def attend(query, key, value, mask=None, **kwargs):
    run = compiled(lambda q, k, v: linear_attention(q, k, v, mask, **kwargs))
    return ops.convert_to_numpy(run(*map(ops.convert_to_tensor, (query, key, value))))


MASK = np.ones((2, N), bool)
MASK[0, :2] = False  # padding on the left: the first two see nothing in causal attention
MASK[1, 6:] = False


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padding"])
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 11, 64])
def test_equals_the_definition(chunk_size, mask):
    heads = random_features()
    causal = {} if chunk_size is None else {"causal": True, "chunk_size": chunk_size}
    expected = definition(*heads, mask, causal=bool(causal))
    np.testing.assert_allclose(attend(*heads, mask, **causal), expected, atol=1e-5)


def test_cross_attention():
    heads = random_features(length=3, sources=7)
    np.testing.assert_allclose(attend(*heads), definition(*heads), atol=1e-5)
    with pytest.raises(ValueError, match="as many targets as sources, got 3 and 7"):
        linear_attention(*map(ops.convert_to_tensor, heads), causal=True)


def test_means_of_features_before_that_of_tokens():
    query, key, value = random_features(length=3, sources=7)
    means = np.einsum("bshm,bshv->bhmv", key / key.sum(1, keepdims=True), value)
    expected = np.einsum("bthm,bhmv->bthv", query / query.sum(-1, keepdims=True), means)
    heads = [*map(ops.convert_to_tensor, (query, key, value))]
    outputs = ops.convert_to_numpy(linear_attention(*heads, feature_means=True))
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    with pytest.raises(ValueError, match="feature_means=True takes means over all tokens"):
        linear_attention(heads[0], heads[0], heads[0], causal=True, feature_means=True)


def gradients(heads, factor, forms):
    """Of sum(factor * attention) in queries, keys and values, by each of the forms."""
    for form in forms:
        run = backend.value_and_grad(
            lambda x, form=form: ops.sum(ops.multiply(factor, form(*x)))
        )
        _, found = compiled(run)(tuple(map(ops.convert_to_tensor, heads)))
        yield [ops.convert_to_numpy(g) for g in found]


def quadratic(query, key, value):
    """All weights at once, as a matrix."""
    seen = ops.convert_to_tensor(np.tri(N, dtype="float32"))
    weights = ops.einsum("bthm,bshm->bhts", query, key) * seen
    weights = weights / ops.sum(weights, -1, keepdims=True)
    return ops.einsum("bhts,bshv->bthv", weights, value)


def test_gradients_of_chunks_equal_those_of_the_matrix():
    heads = random_features()
    factor = RNG.normal(size=heads[2].shape).astype("float32")
    expected, *others = gradients(
        heads,
        factor,
        [quadratic]
        + [lambda *x, c=c: linear_attention(*x, causal=True, chunk_size=c) for c in (4, 16)],
    )
    for found in others:
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_nothing_comes_from_later_tokens():
    heads = random_features()
    factor = np.zeros((1, N, 1, 1), "float32")
    factor[:, 5] = 1
    ((of_query, of_key, of_value),) = gradients(
        heads, factor, [lambda *x: linear_attention(*x, causal=True, chunk_size=4)]
    )
    for gradient in (of_key, of_value):
        assert (gradient[:, 6:] == 0).all()
        assert (gradient[:, :6] != 0).all()
    assert (np.delete(of_query, 5, axis=1) == 0).all()


def test_the_order_of_other_tokens_does_not_matter():
    query, key, value = random_features()
    order = RNG.permutation(N)
    shuffled = attend(query, key[:, order], value[:, order])
    np.testing.assert_allclose(shuffled, attend(query, key, value), atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_weights_sum_to_one(causal):
    query, key, value = random_features()
    value[:] = 7
    np.testing.assert_allclose(attend(query, key, value, causal=causal), 7, rtol=1e-6)
    alone = random_features(length=1)
    np.testing.assert_allclose(attend(*alone, causal=causal), alone[2], rtol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_what_padding_holds_does_not_matter(causal):
    query, key, value = random_features()
    expected = attend(query, key, value, MASK, causal=causal)
    key, value = (np.where(MASK[..., None, None], x, np.nan) for x in (key, value))
    outputs = attend(query, key, value, MASK, causal=causal)
    np.testing.assert_array_equal(outputs, expected)
    nothing = attend(query, key, value, np.zeros_like(MASK), causal=causal)
    assert (nothing == 0).all()


def test_sums_of_half_precision_run_in_float32():
    # The sum of 4,096 ones stops at 256 in bfloat16.
    ones = ops.ones((1, 4096, 1, 1), "bfloat16")
    value = np.arange(4096)[None, :, None, None] % 2 * 1.0
    outputs = linear_attention(ones, ones, ops.cast(value, "bfloat16"))
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(outputs, "float32")), 0.5)


# --- the layer and its feature maps ---


def features(x, name):
    x = x.astype("float64")
    if name == "elu":
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    if name == "taylor":
        unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
        return np.concatenate([np.ones_like(x[..., :1]), unit], -1)
    return {"exp": np.exp, "squared": np.square}[name](x)


def heads_of(layer, x):
    """Queries, keys and values of the layer, (batch, length, heads, size), in float64."""
    for dense in (layer.query_dense, layer.key_dense, layer.value_dense):
        kernel, bias = dense.get_weights()
        yield (x @ kernel.astype("float64") + bias).reshape(*x.shape[:2], HEADS, -1)


def reference(layer, x, name, mask=None):
    query, key, value = heads_of(layer, x)
    if name == "softmax":
        query, key = np.exp(query), np.exp(key)
        key = key * mask[..., None, None]
        query = query / query.sum(-1, keepdims=True)
        key = key / key.sum(1, keepdims=True)
    else:
        query, key = features(query, name), features(key, name)
    heads = definition(query, key, value, mask, layer.causal)
    kernel, bias = layer.output_dense.get_weights()
    return heads.reshape(*x.shape[:2], -1) @ kernel + bias


def random_layer(name, **kwargs):
    keras.utils.set_random_seed(1)
    feature_map = squared if name == "squared" else name
    layer = LinearAttention(HEADS, SIZE, value_dim=3, feature_map=feature_map, **kwargs)
    x = RNG.normal(size=(2, N, 8)).astype("float32")
    layer.build(x.shape, x.shape)
    return layer, x


CASES = [(name, False) for name in ("elu", "exp", "softmax", "taylor", "squared")]
CASES += [(name, True) for name in ("elu", "exp", "taylor", "squared")]


@pytest.mark.parametrize(("name", "causal"), CASES)
def test_feature_maps(name, causal):
    layer, x = random_layer(name, causal=causal, chunk_size=4)
    outputs = compiled(lambda x: layer(x, x, value_mask=MASK))(x)
    expected = reference(layer, x, name, MASK)
    np.testing.assert_allclose(ops.convert_to_numpy(outputs), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["elu", "exp", "taylor", "squared"])
def test_steps_equal_the_whole(name):
    layer, x = random_layer(name, causal=True, num_kv_heads=1)
    whole = ops.convert_to_numpy(compiled(lambda x: layer(x, x))(x))
    state = layer.initial_state(2)
    step, shapes = compiled(layer.step), {key: value.shape for key, value in state.items()}
    for i in range(N):
        output, state = step(x[:, i : i + 1], state)
        np.testing.assert_allclose(ops.convert_to_numpy(output)[:, 0], whole[:, i], atol=1e-5)
    assert {key: value.shape for key, value in state.items()} == shapes


@pytest.mark.parametrize("name", ["elu", "exp", "softmax", "taylor"])
def test_extreme_inputs_stay_finite(name):
    layer, x = random_layer(name)
    run = compiled(backend.value_and_grad(lambda x: ops.sum(layer(x, x))))
    for seed in range(30):  # sums of weights near the smallest numbers are rare
        x = np.random.default_rng(seed).normal(size=x.shape).astype("float32")
        for scale in (0, 1e4, -1e4):
            value, gradient = run(ops.convert_to_tensor(scale * x))
            assert np.isfinite(ops.convert_to_numpy(value))
            assert np.isfinite(ops.convert_to_numpy(gradient)).all()


def test_elu_keeps_small_features():
    layer, _ = random_layer("elu")
    small = ops.full((1, 1, HEADS, SIZE), -40.0)
    query, _, _ = layer.features(small, small, None)
    np.testing.assert_allclose(ops.convert_to_numpy(query), np.exp(-40.0), rtol=1e-5)


def test_a_model_on_texts_of_any_length():
    inputs = keras.Input((None, 8))
    model = keras.Model(
        inputs, LinearAttention(2, 4, causal=True, chunk_size=4)(inputs, inputs)
    )
    model.compile(jit_compile=False)  # where TensorFlow has lengths of its own
    x = RNG.normal(size=(2, 9, 8)).astype("float32")
    long, short = (model.predict(x[:, :n], verbose=0) for n in (9, 6))
    np.testing.assert_allclose(long[:, :6], short, atol=1e-6)


def test_a_function_is_saved_by_name(tmp_path):
    inputs = keras.Input((N, 8))
    model = keras.Model(inputs, LinearAttention(2, 4, feature_map=squared)(inputs, inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = RNG.normal(size=(1, N, 8)).astype("float32")
    np.testing.assert_array_equal(*(ops.convert_to_numpy(m(x)) for m in (model, loaded)))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"feature_map": "relu"}, "feature_map must be one of elu, exp, .* got 'relu'"),
        ({"chunk_size": 0}, "chunk_size must be positive, got 0"),
        ({"num_heads": 0}, "num_heads must be positive, got 0"),
    ],
)
def test_bad_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        LinearAttention(**{"num_heads": 2, "key_dim": 4, **kwargs})


@pytest.mark.parametrize(
    ("make", "kwargs", "match"),
    [
        ({}, {"attention_mask": np.ones((1, N, N), bool)}, "no scores that an attention_mask"),
        ({}, {"attention_bias": np.ones((1, N, N))}, "no scores that an attention_bias"),
        ({"feature_map": "softmax"}, {"use_causal_mask": True}, 'use feature_map="exp"'),
    ],
)
def test_what_a_call_refuses(make, kwargs, match):
    x = np.ones((1, N, 8), "float32")
    with pytest.raises(ValueError, match=match):
        LinearAttention(2, 4, **make)(x, x, **kwargs)


@pytest.mark.parametrize("feature_map", ["exp", "softmax"])
def test_large_keys_of_padding_do_not_drown_the_others(feature_map):
    keras.utils.set_random_seed(0)
    layer = LinearAttention(2, 4, feature_map=feature_map)
    x = np.random.default_rng(0).normal(size=(1, 5, 8)).astype("float32")
    alone = ops.convert_to_numpy(layer(x[:, :3], x[:, :3]))
    x[:, 3:] *= 1e4  # e^-10000 of the others beside them is 0
    mask = np.array([[True, True, True, False, False]])
    padded = ops.convert_to_numpy(layer(x, x, value_mask=mask))
    np.testing.assert_allclose(padded[:, :3], alone, atol=1e-6)
