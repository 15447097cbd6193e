"""What MultiHeadAttention changes of softmax attention, each against loops in float64."""

import math

import keras
import numpy as np
import pytest
from compiled import compiled
from keras import ops
from reference.global_pointer import rotation

from keras_ext import backend
from keras_ext.layers import (
    FeedForward,
    MultiHeadAttention,
    RelativePosition,
    ReRoPE,
    RotaryPosition,
    T5Bias,
    TransformerBlock,
    hwfa_layers,
)
from keras_ext.layers.attention.relative import sinusoids, t5_buckets

RNG = np.random.default_rng(0)
HEADS, SIZE, N = 2, 4, 9


def random_heads(length=N, batch=2, kv_heads=HEADS, value_size=SIZE):
    shapes = [(HEADS, SIZE), (kv_heads, SIZE), (kv_heads, value_size)]
    return [RNG.normal(size=(batch, length, *s)).astype("float32") for s in shapes]


def built(**kwargs):
    keras.utils.set_random_seed(1)
    layer = MultiHeadAttention(HEADS, SIZE, **kwargs)
    layer.build((None, None, 8), (None, None, 8))
    for weight in layer.weights:
        weight.assign(RNG.normal(size=weight.shape))
    return layer


def attend(
    layer,
    query,
    key,
    value,
    mask=None,
    bias=None,
    source_mask=None,
    training=False,
    positions=None,
):
    pattern = {"causal": layer.causal, "training": training, "positions": positions}
    run = compiled(lambda q, k, v: layer.attend(q, k, v, source_mask, mask, bias, **pattern))
    return ops.convert_to_numpy(run(*map(ops.convert_to_tensor, (query, key, value))))


def definition(query, key, value, score, visible, value_at=None):
    """softmax of `score(b, h, i, j)` over the j with `visible(b, i, j)`, row by row."""
    batch, targets, heads, _ = query.shape
    outputs = np.zeros((batch, targets, heads, value.shape[-1]))
    for b, i, h in np.ndindex(batch, targets, heads):
        seen = [j for j in range(key.shape[1]) if visible(b, i, j)]
        if seen:
            scores = np.array([score(b, h, i, j) for j in seen])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            values = [value[b, j, h] + (value_at(b, i, j) if value_at else 0) for j in seen]
            outputs[b, i, h] = weights @ np.array(values, "float64")
    return outputs


def products(query, key, scale):
    q, k = np.asarray(query, "float64"), np.asarray(key, "float64")
    return lambda b, h, i, j: scale * q[b, i, h] @ k[b, j, h]


def everything(b, i, j):
    return True


def earlier(b, i, j):
    return j <= i


def unit(x):
    return x.astype("float64") / np.linalg.norm(x.astype("float64"), axis=-1, keepdims=True)


# --- norms and scales ---


@pytest.mark.parametrize(
    ("query_norm", "key_norm", "scale"),
    [(False, True, None), (True, False, None), (True, True, 7.0)],
)
def test_normalised_keys_and_queries(query_norm, key_norm, scale):
    layer = built(query_norm=query_norm, key_norm=key_norm, scale=scale)
    query, key, value = random_heads()
    q, k = unit(query) if query_norm else query, unit(key) if key_norm else key
    expected = definition(query, key, value, products(q, k, scale or 1.0), everything)
    np.testing.assert_allclose(attend(layer, query, key, value), expected, atol=1e-5)
    if key_norm:  # the length of a key does not matter
        np.testing.assert_allclose(attend(layer, query, 9 * key, value), expected, atol=1e-5)


def test_a_key_of_zeros_has_a_finite_gradient():
    layer = built(key_norm=True)
    query, key, value = random_heads()
    gradient = gradients(layer, query, 0 * key, value)[1]
    assert np.isfinite(gradient).all()


def test_the_gradient_of_a_normalised_key_is_orthogonal_to_it():
    query, key, value = random_heads()
    gradient = gradients(built(key_norm=True), query, key, value)[1]
    assert np.abs(gradient).max() > 1e-2
    np.testing.assert_allclose((gradient * key).sum(-1), 0, atol=1e-5)


def gradients(layer, *heads, **kwargs):
    factor = np.random.default_rng(5).normal(size=(*heads[0].shape[:3], heads[2].shape[-1]))

    def loss(x):
        outputs = layer.attend(
            *x, kwargs.get("source_mask"), None, None, layer.causal, training=False
        )
        return ops.sum(outputs * ops.convert_to_tensor(factor.astype("float32")))

    run = compiled(backend.value_and_grad(loss))
    _, gradient = run(tuple(map(ops.convert_to_tensor, heads)))
    return [ops.convert_to_numpy(g) for g in gradient]


@pytest.mark.parametrize("causal", [False, True])
def test_log_n_counts_the_tokens_attended_to(causal):
    layer = built(causal=causal, log_length=16)
    query, key, value = random_heads()
    mask = np.ones((2, N), bool)
    mask[1, 6:] = False

    def visible(b, i, j):
        return mask[b, j] and (not causal or j <= i)

    def score(b, h, i, j):
        n = sum(visible(b, i, other) for other in range(N))
        product = query[b, i, h].astype("float64") @ key[b, j, h]
        return math.log(n) / math.log(16) * product / math.sqrt(SIZE)

    expected = definition(query, key, value, score, visible)
    outputs = attend(layer, query, key, value, source_mask=ops.convert_to_tensor(mask))
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    mask[:] = True
    expected = definition(query, key, value, score, visible)
    np.testing.assert_allclose(attend(layer, query, key, value), expected, atol=1e-5)


def test_log_n_is_one_at_the_training_length():
    heads = random_heads(length=8)
    plain, scaled = built(), built(log_length=8)
    np.testing.assert_allclose(attend(scaled, *heads), attend(plain, *heads), atol=1e-6)


# --- masks, biases, grouped heads ---


@pytest.mark.parametrize("shape", [(2, N, N), (2, HEADS, N, N), (1, 1, 1, N)])
def test_an_additive_bias(shape):
    bias = RNG.normal(size=shape).astype("float32")
    full = np.broadcast_to(bias[:, None] if bias.ndim == 3 else bias, (2, HEADS, N, N))
    query, key, value = random_heads()
    product = products(query, key, SIZE**-0.5)
    mask = np.tri(N, dtype=bool)[None]
    expected = definition(
        query, key, value, lambda b, h, i, j: product(b, h, i, j) + full[b, h, i, j], earlier
    )
    outputs = attend(built(), query, key, value, mask=mask, bias=bias)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["fused", "own"])
def test_causal_cross_attention_with_padding(dropout):
    layer = built(causal=True, dropout=dropout)
    query = random_heads(length=4)[0]
    _, key, value = random_heads(length=6)
    mask = np.ones((2, 6), bool)
    mask[1, 0] = False  # the first query of the second text sees nothing
    expected = definition(
        query, key, value, products(query, key, 0.5), lambda b, i, j: j <= i and mask[b, j]
    )
    outputs = attend(layer, query, key, value, source_mask=ops.convert_to_tensor(mask))
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    assert (outputs[1, 0] == 0).all()


def test_the_fused_form_equals_ours():
    heads = random_heads()
    zeros = np.zeros((1, 1, 1, N), "float32")  # a bias leads past the fused form
    for causal in (False, True):
        layer = built(causal=causal)
        np.testing.assert_allclose(
            attend(layer, *heads), attend(layer, *heads, bias=zeros), atol=1e-6
        )


@pytest.mark.parametrize("window", [None, 3])
def test_grouped_heads_share_keys_and_values(window):
    layer = built(num_kv_heads=1, value_dim=3, window=window)
    query, key, value = random_heads(kv_heads=1, value_size=3)
    full = built(value_dim=3, window=window)
    expected = attend(full, query, np.repeat(key, 2, 2), np.repeat(value, 2, 2))
    np.testing.assert_allclose(attend(layer, query, key, value), expected, atol=1e-6)
    assert layer.key_dense.units == 4
    assert layer.value_dense.units == 3


# --- windows ---


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "window"), [(1, 3), (9, 1), (32, 5), (70, 3), (100, 40)])
def test_a_window_equals_the_masked_square(length, window, causal):
    heads = random_heads(length)
    mask = np.ones((2, length), bool)
    mask[1, length // 2 :] = False
    distance = np.arange(length)[:, None] - np.arange(length)
    near = (distance < window) & (distance >= 0 if causal else distance > -window)
    pattern = (near & mask[:, None])[:, None]
    source_mask = ops.convert_to_tensor(mask)
    position = RotaryPosition()
    blocks = built(window=window, causal=causal, position=position)
    square = built(position=position)
    outputs = attend(blocks, *heads, source_mask=source_mask)
    np.testing.assert_allclose(outputs, attend(square, *heads, mask=pattern), atol=2e-6)
    if length == 70:
        for ours, expected in zip(
            gradients(blocks, *heads, source_mask=source_mask),
            gradients_of_the_square(square, heads, pattern),
            strict=True,
        ):
            np.testing.assert_allclose(ours, expected, atol=2e-5)


def gradients_of_the_square(layer, heads, pattern):
    """Of the masked square, which other tests compare with the definition."""
    factor = np.random.default_rng(5).normal(size=(*heads[0].shape[:3], heads[2].shape[-1]))

    def loss(x):
        outputs = layer.attend(*x, None, pattern, None, False, training=False)
        return ops.sum(outputs * ops.convert_to_tensor(factor.astype("float32")))

    _, gradient = compiled(backend.value_and_grad(loss))(
        tuple(map(ops.convert_to_tensor, heads))
    )
    return [ops.convert_to_numpy(g) for g in gradient]


def test_a_window_on_texts_of_any_length_in_one_model():
    inputs = keras.Input((None, 8))
    layer = MultiHeadAttention(HEADS, SIZE, window=3, causal=True)
    model = keras.Model(inputs, layer(inputs, inputs))
    model.compile(jit_compile=False)  # where TensorFlow has lengths of its own
    x = RNG.normal(size=(2, 40, 8)).astype("float32")
    long = model.predict(x, verbose=0)
    short = model.predict(x[:, :7], verbose=0)
    np.testing.assert_allclose(long[:, :7], short, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"attention_mask": np.ones((1, 5, 5), bool)}, "no attention_mask"),
        ({"attention_bias": np.ones((1, 5, 5))}, "no attention_mask or attention_bias"),
        ({"value": np.ones((2, 4, 8))}, "as many targets as sources, got 5 and 4"),
    ],
)
def test_what_a_window_refuses(kwargs, match):
    layer = MultiHeadAttention(HEADS, SIZE, window=3)
    x = np.ones((2, 5, 8), "float32")
    with pytest.raises(ValueError, match=match):
        layer(x, **{"value": x, **kwargs})


# --- positions ---


def turned(x, position, **kwargs):
    return rotation(SIZE, position, **kwargs) @ x.astype("float64")


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_positions(interleaved):
    layer = built(position=RotaryPosition(100.0, interleaved))
    query, key, value = random_heads()

    def score(b, h, i, j):
        q = turned(query[b, i, h], i, base=100.0, interleaved=interleaved)
        k = turned(key[b, j, h], j, base=100.0, interleaved=interleaved)
        return q @ k / 2

    expected = definition(query, key, value, score, everything)
    np.testing.assert_allclose(attend(layer, query, key, value), expected, atol=1e-5)


@pytest.mark.parametrize("leak", [None, 1.0, 3.0])
@pytest.mark.parametrize("window", [3, N])
def test_rerope_rectifies_distances_at_inference(window, leak):
    layer = built(position=ReRoPE(window, leak), causal=True)
    query, key, value = random_heads()

    def score(b, h, i, j):
        distance = i - j
        if distance >= window:
            distance = window + (0 if leak is None else (distance - window) / leak)
        return turned(query[b, i, h], distance) @ key[b, j, h] / 2

    expected = definition(query, key, value, score, earlier)
    outputs = attend(layer, query, key, value)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    rotary = built(position=RotaryPosition(), causal=True)
    in_training = attend(layer, query, key, value, training=True)
    plain = attend(rotary, query, key, value)
    np.testing.assert_allclose(in_training, plain, atol=1e-6)
    assert np.allclose(outputs, plain, atol=1e-5) == (window == N or leak == 1.0)


def test_rerope_is_for_causal_attention():
    x = np.ones((1, 3, 8), "float32")
    with pytest.raises(ValueError, match="ReRoPE needs causal=True"):
        MultiHeadAttention(HEADS, SIZE, position=ReRoPE(2))(x, x)


@pytest.mark.parametrize("on_values", [True, False])
@pytest.mark.parametrize("sinusoidal", [True, False])
def test_shaw_and_nezha_vectors_of_distances(sinusoidal, on_values):
    layer = built(position=RelativePosition(2, sinusoidal, on_values))
    assert len(layer.position.weights) == (0 if sinusoidal else 1 + on_values)
    query, key, value = random_heads()
    tables = [ops.convert_to_numpy(w) for w in layer.position.weights]
    of_keys = sinusoids(5, SIZE) if sinusoidal else tables[0]
    of_values = of_keys if sinusoidal else tables[-1]

    def row(i, j):
        return min(max(j - i, -2), 2) + 2

    def score(b, h, i, j):
        return query[b, i, h].astype("float64") @ (key[b, j, h] + of_keys[row(i, j)]) / 2

    def value_at(b, i, j):
        return of_values[row(i, j)] if on_values else 0

    expected = definition(query, key, value, score, everything, value_at)
    np.testing.assert_allclose(attend(layer, query, key, value), expected, atol=1e-5)


def test_relative_values_have_their_own_width():
    layer = built(position=RelativePosition(2), value_dim=3)
    assert layer.position.value_table.shape == (5, 3)
    assert attend(layer, *random_heads(value_size=3)).shape == (2, N, HEADS, 3)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_biases(bidirectional):
    bias = T5Bias(HEADS, num_buckets=4, max_distance=6, bidirectional=bidirectional)
    layer = built(position=bias, scale=1.0)
    query, key, value = random_heads()
    embeddings = ops.convert_to_numpy(bias.embeddings)
    product = products(query, key, 1.0)

    def score(b, h, i, j):
        bucket = int(t5_buckets(j - i, 4, 6, bidirectional))
        return product(b, h, i, j) + embeddings[bucket, h]

    expected = definition(query, key, value, score, everything)
    np.testing.assert_allclose(attend(layer, query, key, value), expected, atol=1e-5)
    shared = np.asarray(ops.convert_to_numpy(bias(np.zeros((1, N, 8)))))
    plain = attend(built(scale=1.0), query, key, value, bias=shared)
    np.testing.assert_allclose(plain, expected, atol=1e-5)


def test_the_buckets_of_t5():
    """Table made by hand from the definition: 32 buckets, distances up to 128."""
    first = {0: 0, 1: 17, 7: 23, 8: 24, 12: 25, 16: 26, 23: 27, 32: 28, 46: 29, 64: 30, 91: 31}
    later = np.arange(1000)
    expected = np.array([first[max(d for d in first if d <= n)] for n in later])
    expected[1:8] = later[1:8] + 16
    np.testing.assert_array_equal(t5_buckets(later), expected)
    np.testing.assert_array_equal(t5_buckets(-later[1:]), expected[1:] - 16)


# --- decoding ---

DECODERS = {
    "plain": dict,
    "grouped": lambda: {"num_kv_heads": 1, "value_dim": 3},
    "rotary": lambda: {"position": RotaryPosition()},
    "rerope": lambda: {"position": ReRoPE(3, 2.0)},
    "shaw": lambda: {"position": RelativePosition(2)},
    "t5": lambda: {"position": T5Bias(HEADS)},
    "window": lambda: {"position": RotaryPosition(), "window": 3},
    "cosine": lambda: {"query_norm": True, "key_norm": True, "scale": 5.0, "log_length": 4},
}


@pytest.mark.parametrize("options", DECODERS)
def test_steps_equal_the_whole(options):
    layer = built(causal=True, **DECODERS[options]())
    x = RNG.normal(size=(2, N, 8)).astype("float32")
    whole = ops.convert_to_numpy(compiled(lambda x: layer(x, x))(x))
    state = layer.initial_state(2, max_length=N)
    step = compiled(layer.step)
    for i in range(N):
        output, state = step(x[:, i : i + 1], state)
        np.testing.assert_allclose(ops.convert_to_numpy(output)[:, 0], whole[:, i], atol=2e-5)
    if options == "window":
        assert state["key"].shape[2] == 2  # those before the third, however long the text


def test_step_needs_a_causal_layer_and_a_length():
    with pytest.raises(ValueError, match="step needs causal=True"):
        built().step(np.ones((1, 1, 8)), None)
    with pytest.raises(ValueError, match="max_length must be given"):
        built(causal=True).initial_state(1)


# --- the hybrid of windows and full attention ---


def hwfa_stack(num_layers, train_length):
    keras.utils.set_random_seed(2)
    return [
        TransformerBlock(MultiHeadAttention(HEADS, SIZE, **kind), FeedForward(16))
        for kind in hwfa_layers(num_layers, train_length)
    ]


def forward(blocks, x):
    for block in blocks:
        x = block(x)
    return x


@pytest.mark.parametrize(
    ("layers", "length", "alpha", "window"),
    [(24, 512, 0.75, 17), (24, 512, 1.0, 23), (2, 8, 0.75, 6), (9, 4, 0.75, 1)],
)
def test_the_window_is_the_largest_within_the_training_length(layers, length, alpha, window):
    *windows, last = hwfa_layers(layers, length, alpha)
    assert {kind["window"] for kind in windows} == {window}
    assert (window - 1) * (layers - 1) + 1 <= alpha * length < window * (layers - 1) + 1
    assert last == {"causal": True, "log_length": length}


def test_nothing_comes_from_outside_the_receptive_field():
    *windows, last = hwfa_stack(3, 8)  # windows of 3, two of them: 5 tokens
    x = RNG.normal(size=(1, 12, 8)).astype("float32")

    def output_of_the_last(x, blocks):
        return ops.sum(forward(blocks, x)[:, -1, :3])

    for block in (*windows, last):
        block.build((1, 12, 8))
    for blocks, reach in ((windows, 5), ([*windows, last], 12)):
        run = backend.value_and_grad(lambda x, blocks=blocks: output_of_the_last(x, blocks))
        gradient = ops.convert_to_numpy(compiled(run)(ops.convert_to_tensor(x))[1])
        seen = (gradient[0] != 0).any(-1)
        np.testing.assert_array_equal(seen, np.arange(12) >= 12 - reach)


def test_the_last_layer_does_not_know_the_order_of_the_past():
    layer = built(**hwfa_layers(1, 8)[0])
    query, key, value = random_heads()
    order = [3, 1, 0, 2, *range(4, N)]
    outputs = attend(layer, query, key, value)
    shuffled = attend(layer, query, key[:, order], value[:, order])
    np.testing.assert_allclose(shuffled[:, 3:], outputs[:, 3:], atol=1e-6)


def test_decoding_the_whole_stack_equals_the_forward_pass():
    blocks = hwfa_stack(3, 8)
    for block in blocks:
        block.build((2, 12, 8))
    x = RNG.normal(size=(2, 12, 8)).astype("float32")
    whole = ops.convert_to_numpy(compiled(lambda x: forward(blocks, x))(x))
    states = [block.attention.initial_state(2, max_length=12) for block in blocks]

    def step(x, states):
        new = []
        for block, state in zip(blocks, states, strict=True):
            x, state = block.step(x, state)
            new.append(state)
        return x, new

    step = compiled(step)
    for i in range(12):
        output, states = step(ops.convert_to_tensor(x[:, i : i + 1]), states)
        np.testing.assert_allclose(ops.convert_to_numpy(output)[:, 0], whole[:, i], atol=2e-5)


# --- arguments ---


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"log_length": 1}, "log_length must be at least 2, got 1"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads = 4, got 3"),
        ({"value_dim": 0}, "value_dim must be positive, got 0"),
        ({"query_norm": True, "key_norm": True}, r"scale must be given .* 4 ln\(N/2\)"),
        (
            {"key_dim": 3, "position": RotaryPosition()},
            "key_dim must be a multiple of 2 .*got 3",
        ),
    ],
)
def test_bad_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        MultiHeadAttention(4, **{"key_dim": 8, **kwargs})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ReRoPE(0), "window must be at least 1, got 0"),
        (lambda: ReRoPE(3, leak=0.5), "leak must be at least 1"),
        (lambda: RotaryPosition(base=0), "base must be positive, got 0"),
        (lambda: RelativePosition(0), "max_distance must be at least 1, got 0"),
        (lambda: T5Bias(2, num_buckets=5), "num_buckets must be even and at least 4"),
        (lambda: T5Bias(2, max_distance=8), "max_distance must exceed 8"),
        (lambda: hwfa_layers(0, 8), "num_layers must be at least 1, got 0"),
        (lambda: hwfa_layers(2, 1), "train_length must be at least 2, got 1"),
        (lambda: hwfa_layers(2, 8, alpha=0), r"alpha must be in \(0, 1\], got 0"),
    ],
)
def test_bad_arguments_of_positions(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_all_options_are_saved(tmp_path):
    inputs = keras.Input((None, 8))
    nezha = {"position": RelativePosition(3, sinusoidal=True)}
    options = [*(make() for make in DECODERS.values()), nezha]
    x = inputs
    for number, kwargs in enumerate(options):
        x = MultiHeadAttention(HEADS, SIZE, causal=True, name=f"a{number}", **kwargs)(x, x)
    model = keras.Model(inputs, x)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = RNG.normal(size=(1, 5, 8)).astype("float32")
    np.testing.assert_array_equal(
        *(ops.convert_to_numpy(compiled(m)(x)) for m in (model, loaded))
    )


@pytest.mark.parametrize("name", ["attention_mask", "attention_bias"])
def test_patterns_of_another_rank_are_refused(name):
    x, pattern = np.ones((2, 3, 8), "float32"), np.ones((3, 3), "float32")
    with pytest.raises(ValueError, match=rf"{name} must have the shape .*got \(3, 3\)"):
        MultiHeadAttention(2, 4)(x, x, **{name: pattern})


@pytest.mark.parametrize("make", [lambda: RelativePosition(2), lambda: T5Bias(2)])
def test_a_position_with_weights_is_in_one_attention(make):
    position, x = make(), np.ones((2, 3, 8), "float32")
    first, second = (MultiHeadAttention(2, 4, position=position) for _ in range(2))
    first(x, x)
    first(x, x)
    with pytest.raises(
        ValueError, match=rf"another already\. Give each a {type(position).__name__}"
    ):
        second(x, x)


# --- where each text stands ---

POSITIONS = {
    "rotary": lambda: {"position": RotaryPosition(interleaved=False)},
    "rerope": lambda: {"position": ReRoPE(3, 2.0), "causal": True},
    "shaw": lambda: {"position": RelativePosition(2)},
    "nezha": lambda: {"position": RelativePosition(3, sinusoidal=True, on_values=False)},
    "t5": lambda: {"position": T5Bias(HEADS, num_buckets=8, max_distance=12)},
    "window": lambda: {"position": RotaryPosition(), "window": 3},
    "window, t5": lambda: {"position": T5Bias(HEADS), "window": 3, "causal": True},
    "window, shaw": lambda: {"position": RelativePosition(2), "window": 3},
}
of_positions = pytest.mark.parametrize("options", POSITIONS)
PLACES = np.random.default_rng(6)
ORDER = np.array([PLACES.permutation(N) for _ in range(2)])
GAPS = np.sort(PLACES.integers(0, 4 * N, (2, N)))


@of_positions
def test_the_default_positions_count_the_tokens(options):
    layer, heads = built(**POSITIONS[options]()), random_heads()
    given = attend(layer, *heads, positions=np.tile(np.arange(N), (2, 1)))
    # Windows count from the start of a block, and compilers round a table of each text anew.
    exact = "window" not in options and keras.backend.backend() == "torch"
    rounding = 0 if exact else 1e-6
    np.testing.assert_allclose(given, attend(layer, *heads), rtol=0, atol=rounding)


@of_positions
def test_only_distances_count(options):
    layer, heads = built(**POSITIONS[options]()), random_heads()
    first, second = (attend(layer, *heads, positions=GAPS + s) for s in (0, [[9], [-40]]))
    np.testing.assert_allclose(first, second, atol=1e-5)
    assert np.abs(first - attend(layer, *heads)).max() > 1e-2


@pytest.mark.parametrize("options", ["rotary", "shaw", "nezha", "t5"])
def test_tokens_in_any_order_stand_where_they_are_said_to(options):
    layer, heads = built(**POSITIONS[options]()), random_heads()
    shuffled = [np.take_along_axis(x, ORDER[..., None, None], 1) for x in heads]
    expected = np.take_along_axis(attend(layer, *heads), ORDER[..., None, None], 1)
    outputs = attend(layer, *shuffled, positions=ORDER)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


@of_positions
@pytest.mark.parametrize("at", [GAPS, ORDER], ids=["gaps", "order"])
def test_given_positions_in_the_definition(options, at):
    options = POSITIONS[options]()
    layer, position = built(**options), options["position"]
    query, key, value = random_heads()
    product = products(query, key, SIZE**-0.5)
    tables = [ops.convert_to_numpy(w) for w in getattr(position, "weights", ())]

    def visible(b, i, j):
        near = abs(i - j) < options.get("window", N)
        return near and (j <= i or not layer.causal)

    def row(b, i, j):
        m = position.max_distance
        return np.clip(at[b, j] - at[b, i], -m, m) + m

    def score(b, h, i, j):
        distance = at[b, i] - at[b, j]
        if isinstance(position, T5Bias):
            bucket = t5_buckets(-distance, position.num_buckets, position.max_distance)
            return product(b, h, i, j) + tables[0][bucket, h]
        if isinstance(position, RelativePosition):
            vectors = position.key_table if position.sinusoidal else tables[0]
            return query[b, i, h].astype("float64") @ (key[b, j, h] + vectors[row(b, i, j)]) / 2
        if isinstance(position, ReRoPE) and distance >= position.window:
            distance = position.window + (distance - position.window) / position.leak
        turn = turned(query[b, i, h], distance, interleaved=position.interleaved)
        return turn @ key[b, j, h] / 2

    def value_at(b, i, j):
        on_values = getattr(position, "on_values", False)
        return tables[1][row(b, i, j)] if on_values else 0

    expected = definition(query, key, value, score, visible, value_at)
    outputs = attend(layer, query, key, value, positions=at)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


@pytest.mark.parametrize("options", ["rotary", "rerope", "shaw", "t5"])
def test_padding_may_stand_anywhere(options):
    """On the left or within a text: its tokens have what they have without."""
    layer = built(**POSITIONS[options]())
    x = RNG.normal(size=(2, N, 8)).astype("float32")
    real = np.arange(N) < 6
    expected = ops.convert_to_numpy(layer(x, x, value_mask=np.tile(real, (2, 1))))[:, :6]
    places = np.array([[3, 4, 5, 6, 7, 8], [0, 2, 3, 5, 6, 8]])
    padded, mask, positions = np.ones_like(x), np.zeros((2, N), bool), np.zeros((2, N), int)
    for b, place in enumerate(places):
        padded[b, place], mask[b, place], positions[b, place] = x[b, :6], True, np.arange(6)
    outputs = layer(padded, padded, value_mask=mask, positions=positions)
    outputs = np.take_along_axis(ops.convert_to_numpy(outputs), places[..., None], 1)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


def test_far_positions_in_half_precision():
    layer = built(position=RotaryPosition(), dtype="mixed_bfloat16")
    x = RNG.normal(size=(2, N, 8)).astype("float32")
    near, far = (
        ops.convert_to_numpy(ops.cast(layer(x, x, positions=ORDER + s), "float32"))
        for s in (0, 4096)
    )
    assert np.abs(near - far).max() < 0.05 * np.abs(near).max()


@pytest.mark.parametrize(
    ("options", "call", "match"),
    [
        ({}, {}, "positions have no effect on an attention without a position"),
        ({"window": 2}, {}, "no effect on an attention without a position"),
        ({"position": RotaryPosition()}, {"positions": np.zeros((2, 5))}, "must be integers"),
        (
            {"position": RotaryPosition()},
            {"positions": np.arange(5)},
            r"\(batch, length\) = \(2, 5\), got \(5,\)",
        ),
        ({"position": RotaryPosition()}, {"positions": np.zeros((1, 5), int)}, r"got \(1, 5\)"),
        (
            {"position": RotaryPosition()},
            {"value": np.ones((2, 4, 8), "float32")},
            r"self-attention, .* \(2, 4\), got \(2, 5\)",
        ),
    ],
)
def test_bad_positions_of_texts(options, call, match):
    x = np.ones((2, 5, 8), "float32")
    arguments = {"value": x, "positions": np.zeros((2, 5), "int32"), **call}
    with pytest.raises(ValueError, match=match):
        MultiHeadAttention(HEADS, SIZE, **options)(x, **arguments)
