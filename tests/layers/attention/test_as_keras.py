"""MultiHeadAttention takes what Keras's takes, and gives what that gives."""

import inspect
import itertools

import keras
import numpy as np
import pytest
from compiled import compiled
from keras import ops

from keras_ext import backend
from keras_ext.layers import (
    FavorAttention,
    LinearAttention,
    MultiHeadAttention,
    PolynomialAttention,
    RelativePosition,
)
from keras_ext.layers.attention.multi_head import ELSEWHERE
from keras_ext.layers.attention.projected import ProjectedAttention

KerasAttention = keras.layers.MultiHeadAttention
HEADS, SIZE = 2, 4
TARGETS, SOURCES = 5, 6
JIT = keras.backend.backend() != "torch"  # there it means torch.compile, which needs minutes


def arrays(rng):
    """Queries, values and keys; their last tokens are zeros, which Masking hides."""
    shapes = [(2, TARGETS, 8), (2, SOURCES, 7), (2, SOURCES, 6)]
    query, value, key = (rng.normal(size=shape).astype("float32") for shape in shapes)
    query[1, 3:] = value[0, 4:] = key[1, 5:] = 0
    return query, value, key


def copy_weights(keras_layer, layer):
    for name in ("query", "key", "value", "output"):
        source, target = (getattr(x, f"{name}_dense") for x in (keras_layer, layer))
        weights = zip(source.get_weights(), target.weights, strict=True)
        target.set_weights([given.reshape(own.shape) for given, own in weights])


def both(rng, *args, **options):
    """Keras's attention and ours, with the same random weights."""
    layers = [
        cls(HEADS, SIZE, *args, **options) for cls in (KerasAttention, MultiHeadAttention)
    ]
    for layer in layers:
        layer.build((2, TARGETS, 8), (2, SOURCES, 7), (2, SOURCES, 6))
    for weight in layers[0].weights:
        weight.assign(rng.normal(size=weight.shape) * 0.5)
    copy_weights(*layers)
    return layers


def padding(rng, length):
    mask = rng.random((2, length)) < 0.6
    mask[:, 0] = True  # what causal attention sees in any case
    return mask


def pattern(rng, *heads):
    mask = rng.random((2, *heads, TARGETS, SOURCES)) < 0.6
    mask[..., 0] = True
    return mask


CALLS = {
    "all": lambda rng: {},
    "causal": lambda rng: {"use_causal_mask": True},
    "value_mask": lambda rng: {"value_mask": padding(rng, SOURCES)},
    "both masks": lambda rng: {n: padding(rng, SOURCES) for n in ("value_mask", "key_mask")},
    "pattern": lambda rng: {"attention_mask": pattern(rng)},
    "pattern of heads": lambda rng: {"attention_mask": pattern(rng, HEADS)},
    "together": lambda rng: {
        "attention_mask": pattern(rng).astype("int32"),
        "value_mask": padding(rng, SOURCES),
        "use_causal_mask": True,
    },
}
OPTIONS = {
    "plain": ((), {}),
    "value_dim": ((3,), {"use_bias": False}),
    "output_shape": ((None, 0.0, True, 9), {}),
    "axes": ((5, 0.0, True, (3,), (1,)), {}),
}


def close(ours, theirs):
    np.testing.assert_allclose(*map(ops.convert_to_numpy, (ours, theirs)), atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("call", CALLS)
def test_outputs_scores_and_gradients(call, options):
    rng = np.random.default_rng([len(call), len(options)])
    args, kwargs = OPTIONS[options]
    layers = both(rng, *args, **kwargs)
    inputs, given = tuple(map(ops.convert_to_tensor, arrays(rng))), CALLS[call](rng)
    given = {n: m if m is True else ops.convert_to_tensor(m) for n, m in given.items()}
    width = layers[1].output_dense.units
    factor = rng.normal(size=(2, TARGETS, width)).astype("float32")
    results = []
    for layer in layers:

        def scored(*x, layer=layer):
            return layer(*x, **given, return_attention_scores=True)

        def plain(*x, layer=layer, scored=scored):
            if isinstance(layer, KerasAttention) and layer.value_dim != SIZE:
                return scored(*x)[0]  # Keras on JAX takes these widths with scores only
            return layer(*x, **given)

        def loss(x, plain=plain):
            return ops.sum(plain(*x) * ops.convert_to_tensor(factor))

        gradients = compiled(backend.value_and_grad(loss))(inputs)[1]
        outputs = compiled(plain)(*inputs)
        results.append([outputs, *compiled(scored)(*inputs), *gradients])
    for theirs, ours in zip(*results, strict=True):
        close(ours, theirs)
    assert ops.shape(results[1][2]) == (2, HEADS, TARGETS, SOURCES)


@pytest.mark.parametrize("causal", [False, True])
def test_keras_masks(causal):
    """Of queries, values and keys; that of the queries is passed on and changes nothing."""
    rng = np.random.default_rng(2)
    layers, inputs = both(rng), arrays(rng)
    seen = inputs[0].any(-1)

    def call(layer, *inputs):
        output, scores = layer(*inputs, use_causal_mask=causal, return_attention_scores=True)
        scores = ops.transpose(scores, (0, 2, 1, 3))  # (batch, targets, heads, sources)
        return output, [ops.convert_to_numpy(x) for x in (output, scores)]

    results = [call(layer, *map(keras.layers.Masking(), inputs)) for layer in layers]
    (theirs, expected), (ours, found) = results
    for output in (ours, theirs):
        np.testing.assert_array_equal(ops.convert_to_numpy(output._keras_mask), seen)
    _, without = call(layers[1], inputs[0], *map(keras.layers.Masking(), inputs[1:]))
    for x, y, z in zip(found, expected, without, strict=True):
        np.testing.assert_allclose(x[seen], y[seen], atol=1e-5)
        np.testing.assert_array_equal(x, z)


KINDS = [
    MultiHeadAttention,
    LinearAttention,
    lambda *a, **k: FavorAttention(*a, num_features=8, seed=0, **k),
    PolynomialAttention,
    lambda *a, **k: MultiHeadAttention(*a, window=2, **k),
]


@pytest.mark.parametrize("option", [{}, {"position": RelativePosition}, {"num_kv_heads": 1}])
def test_scores_times_values_are_the_heads(option):
    option = {name: x() if callable(x) else x for name, x in option.items()}
    layer = MultiHeadAttention(HEADS, SIZE, output_shape=HEADS * SIZE, use_bias=False, **option)
    rng = np.random.default_rng(4)
    x, mask = rng.normal(size=(2, SOURCES, 8)).astype("float32"), padding(rng, SOURCES)
    mask[1] = False
    layer.build(x.shape, x.shape)
    layer.output_dense.set_weights([np.eye(HEADS * SIZE)])
    if option.get("position"):
        layer.position.value_table.assign(np.zeros(layer.position.value_table.shape))
    output, scores = layer(x, x, value_mask=mask, return_attention_scores=True)
    value = ops.convert_to_numpy(layer.value_dense(x)).reshape(2, SOURCES, -1, SIZE)
    value = np.broadcast_to(value, (2, SOURCES, HEADS, SIZE))
    heads = np.einsum("bhts,bshd->bthd", ops.convert_to_numpy(scores), value)
    close(output, heads.reshape(2, SOURCES, -1))
    total = np.broadcast_to(mask.any(1)[:, None, None], (2, HEADS, SOURCES))
    np.testing.assert_allclose(ops.convert_to_numpy(scores).sum(-1), total, atol=1e-6)


def test_scores_in_a_model():
    query, value = keras.Input((TARGETS, 8)), keras.Input((SOURCES, 7))
    layer = MultiHeadAttention(HEADS, SIZE, output_shape=(3,))
    model = keras.Model([query, value], layer(query, value=value, return_attention_scores=True))
    assert [x.shape[1:] for x in model.outputs] == [(TARGETS, 3), (HEADS, TARGETS, SOURCES)]
    inputs = arrays(np.random.default_rng(0))[:2]
    outputs, scores = model.predict(list(inputs), verbose=0)
    assert outputs.shape == (2, TARGETS, 3)
    np.testing.assert_allclose(scores.sum(-1), 1, atol=1e-6)


# --- training ---


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_step_of_training(dropout):
    """Losses of regularisers, gradients of all weights, constraints, draws of the seed."""
    rng = np.random.default_rng(5)
    layers = both(
        rng,
        dropout=dropout,
        seed=7,
        kernel_regularizer=keras.regularizers.L2(0.1),
        bias_regularizer=keras.regularizers.L1(0.2),
        activity_regularizer=keras.regularizers.L2(0.3),
        kernel_constraint=keras.constraints.NonNeg(),
        bias_constraint="non_neg",
    )
    inputs = arrays(rng)
    targets = rng.normal(size=(2, TARGETS, 8)).astype("float32")
    losses = []
    for layer in layers:
        specs = [keras.Input(x.shape[1:]) for x in inputs]
        model = keras.Model(specs, layer(*specs))
        model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=JIT)
        losses.append(float(model.train_on_batch(list(inputs), targets)))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    trained = MultiHeadAttention(HEADS, SIZE)
    trained.build(*(x.shape for x in inputs))
    copy_weights(layers[0], trained)
    for ours, theirs in zip(layers[1].get_weights(), trained.get_weights(), strict=False):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert ours.min() >= 0


@pytest.mark.parametrize("name", ["kernel", "bias", "activity"])
@pytest.mark.parametrize("make", KINDS)
def test_each_regulariser_is_of_all_projections(make, name):
    regularizer = keras.regularizers.L2(0.1)
    options = {f"{name}_regularizer": regularizer, "bias_initializer": "ones"}
    layer, x = make(HEADS, SIZE, **options), np.ones((3, SOURCES, 8), "float32")
    layer(x, x)
    losses = [float(ops.convert_to_numpy(loss)) for loss in layer.losses]
    assert len(losses) == 4
    if name == "activity":  # a mean over texts (Keras 3.10: a sum), not over tokens
        own = keras.layers.Dense(HEADS * SIZE, activity_regularizer=regularizer)
        own.build(x.shape)
        own.set_weights(layer.query_dense.get_weights())
        own(x)
        found, expected = (
            float(ops.convert_to_numpy(dense.losses[0])) for dense in (layer.query_dense, own)
        )
        assert found == pytest.approx(expected, rel=1e-5)
    else:
        weights = [w for w in layer.trainable_weights if w.name == name]
        total = sum(0.1 * np.square(ops.convert_to_numpy(w)).sum() for w in weights)
        assert sum(losses) == pytest.approx(total, rel=1e-5)


def test_initialisers():
    normal = keras.initializers.RandomNormal()
    layer = MultiHeadAttention(HEADS, SIZE, bias_initializer=normal, query_initializer="zeros")
    layer.build((None, None, 8), (None, None, 8))
    assert not ops.convert_to_numpy(layer.query_dense.kernel).any()
    biases = [
        ops.convert_to_numpy(d.bias)
        for d in (layer.query_dense, layer.key_dense, layer.value_dense, layer.output_dense)
    ]
    assert all((b != other).all() for b, other in itertools.pairwise(biases))


# --- arguments ---


def parameters(fn):
    signature = inspect.signature(fn).parameters.values()
    return [p.name for p in signature if p.kind != p.VAR_KEYWORD and p.name != "self"]


def test_every_argument_of_keras_is_taken_or_refused_with_a_sentence():
    theirs = parameters(KerasAttention.__init__)
    positional = parameters(MultiHeadAttention.__init__)[:7]
    assert positional == theirs[:7]  # after these the versions of Keras differ
    taken = {*parameters(MultiHeadAttention.__init__), *parameters(ProjectedAttention.__init__)}
    for name in set(theirs) - taken:
        with pytest.raises(ValueError, match=f"{name}=2 is not taken here: {ELSEWHERE[name]}"):
            MultiHeadAttention(2, 4, **{name: 2})
    config = {"num_heads": 2, "key_dim": 4, "dropout": 0.5, "seed": 3, "output_shape": (7,)}
    ported = MultiHeadAttention(**KerasAttention(**config).get_config()).get_config()
    assert {name: ported[name] for name in config} == {**config, "output_shape": 7}
    call = parameters(KerasAttention.call)
    for cls in (MultiHeadAttention, LinearAttention):
        assert parameters(cls.call)[: len(call)] == call


def test_all_arguments_are_saved():
    options = {
        "output_shape": 5,
        "flash_attention": False,
        "seed": 3,
        "bias_initializer": keras.initializers.Constant(0.5),
        "kernel_regularizer": keras.regularizers.L1(0.1),
        "bias_regularizer": keras.regularizers.L2(0.2),
        "activity_regularizer": keras.regularizers.L2(0.3),
        "kernel_constraint": keras.constraints.MaxNorm(2.0),
        "bias_constraint": keras.constraints.NonNeg(),
    }
    config = MultiHeadAttention(HEADS, SIZE, name="a", **options).get_config()
    copy = MultiHeadAttention.from_config(config)
    assert copy.get_config() == config
    for name, option in options.items():
        saved = config[name]
        if isinstance(saved, dict):
            saved = keras.saving.deserialize_keras_object(saved).get_config()
            option = option.get_config()
        assert saved == option
    assert copy.query_dense.kernel_constraint.max_value == 2.0
    assert copy.dropout_layer.seed == 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"output_shape": (3, 4)}, r"output_shape must be one width, got \(3, 4\)"),
        ({"output_shape": 0}, "output_shape must be an integer >= 1, got 0"),
        ({"attention_axes": 2}, "attention_axes must be None or 1, got 2"),
        ({"attention_axes": (1, 2)}, r"attention_axes must be None or 1, got \(1, 2\)"),
        ({"bias_regularizer": "l2"}, "bias_regularizer=.* no effect with use_bias=False"),
        ({"bias_constraint": "non_neg"}, "bias_constraint=.* no effect with use_bias=False"),
        ({"bias_initializer": "ones"}, "bias_initializer=.* no effect with use_bias=False"),
        ({"flash_attention": True, "dropout": 0.1}, "impossible with dropout=0.1"),
        ({"flash_attention": True, "window": 2}, "impossible with window=2"),
        ({"flash_attention": True, "value_dim": 2}, "impossible with value_dim=2"),
        (
            {"flash_attention": True, "position": RelativePosition()},
            "impossible with position=RelativePosition",
        ),
    ],
)
def test_bad_arguments(options, match):
    if match.startswith("bias"):
        options = {**options, "use_bias": False}
    with pytest.raises(ValueError, match=match):
        MultiHeadAttention(HEADS, SIZE, **options)


@pytest.mark.parametrize("axes", [1, -2, [1], (-2,)])
def test_the_axis_of_the_tokens_may_be_named(axes):
    assert MultiHeadAttention(HEADS, SIZE, attention_axes=axes).built is False


@pytest.mark.parametrize(
    ("make", "call", "match"),
    [
        (
            lambda: MultiHeadAttention(2, 4, flash_attention=True),
            {"return_attention_scores": True},
            "impossible with return_attention_scores=True",
        ),
        (
            lambda: MultiHeadAttention(2, 4, flash_attention=True),
            {"attention_bias": np.zeros((1, 3, 3), "float32")},
            "impossible with attention_bias",
        ),
        (
            lambda: MultiHeadAttention(2, 4, window=2),
            {"return_attention_scores": True},
            "With window=2 the scores of most pairs are not computed",
        ),
        (
            lambda: LinearAttention(2, 4),
            {"return_attention_scores": True},
            "LinearAttention has no scores that return_attention_scores=True",
        ),
        (
            lambda: LinearAttention(2, 4),
            {"positions": np.zeros((2, 3), int)},
            r"LinearAttention does not know .* positions of shape \(2, 3\)",
        ),
    ],
)
def test_bad_calls(make, call, match):
    x = np.ones((2, 3, 8), "float32")
    with pytest.raises(ValueError, match=match):
        make()(x, x, **call)


@pytest.mark.parametrize("flash", [None, False, True])
def test_flash_attention_reaches_keras(flash, monkeypatch):
    seen = []

    def fused(query, key, value, flash_attention, **kwargs):
        seen.append(flash_attention)
        return value

    monkeypatch.setattr(ops, "dot_product_attention", fused)
    x = np.ones((2, 3, 8), "float32")
    MultiHeadAttention(2, 4, flash_attention=flash)(x, x)
    assert seen == [flash]
