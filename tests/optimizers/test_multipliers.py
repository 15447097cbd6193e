"""MultiplierOptimizer against other learning rates, MultiOptimizer and NumPy."""

import keras
import numpy as np
import pytest
from keras import ops
from optimizers.test_accumulation import BACKEND, LR, build, distance, fit, thirds, weights_of
from reference import optimizers as numpy_optimizers
from reference import update_wrappers as reference
from reference.problems import Regression

from keras_ext.models import build_transformer_model
from keras_ext.optimizers import MultiplierOptimizer, layerwise_decay

FACTORS = [0.25, 4.0]  # kernel and bias
MULTIPLIERS = {"kernel$": 0.25, "bias$": 4.0}
RATES = {
    "constant": lambda m: LR * m,
    "schedule": lambda m: keras.optimizers.schedules.InverseTimeDecay(LR * m, 1, 1.0),
}
INNER = {
    "sgd": lambda rate: keras.optimizers.SGD(rate, 0.9, weight_decay=0.1),
    "adam": lambda rate: keras.optimizers.Adam(rate),
    "adamw": lambda rate: keras.optimizers.AdamW(rate, weight_decay=0.1),
    "rmsprop": lambda rate: keras.optimizers.RMSprop(rate),
    "nadam": lambda rate: keras.optimizers.Nadam(rate),
    "lion": lambda rate: keras.optimizers.Lion(rate),
}


@pytest.fixture
def problem():
    return Regression(embedding=False)


def small_bert(**arguments):
    config = {"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 3}
    config |= {"num_attention_heads": 2, "intermediate_size": 6}
    return build_transformer_model(config, **arguments)


# --- the update


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", INNER)
def test_equals_one_optimizer_per_learning_rate(problem, name, rate):
    """Each variable alone, under the inner optimizer with the learning rate m lr."""
    variables = [
        keras.Variable(w, dtype="float32", name=n)
        for w, n in zip(problem.weights, ("kernel", "bias"), strict=True)
    ]
    wrapped = MultiplierOptimizer(INNER[name](RATES[rate](1)), MULTIPLIERS)
    alone = [INNER[name](RATES[rate](m)) for m in FACTORS]
    copies = [keras.Variable(w, dtype="float32") for w in problem.weights]
    for rows in thirds(problem):
        grads = problem.gradients(
            [ops.convert_to_numpy(v).astype("float64") for v in copies], rows
        )
        grads = [ops.convert_to_tensor(g, "float32") for g in grads]
        wrapped.apply(grads, variables)
        for optimizer, g, v in zip(alone, grads, copies, strict=True):
            optimizer.apply([g], [v])
    for a, b, start in zip(variables, copies, problem.weights, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(a), ops.convert_to_numpy(b), atol=1e-6)
        assert np.abs(ops.convert_to_numpy(a) - start).max() > LR / 4


def test_equals_numpy_with_a_common_clip(problem):
    update = reference.multiply(numpy_optimizers.adam(LR), FACTORS)
    expected = problem.train(
        update, thirds(problem), lambda g: numpy_optimizers.clip_global(g, 0.5)
    )
    inner = keras.optimizers.Adam(LR, global_clipnorm=0.5)
    assert (
        distance(
            fit(build(problem), problem, MultiplierOptimizer(inner, MULTIPLIERS), 16), expected
        )
        < 1e-5
    )


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="older Keras")
def test_equals_the_multi_optimizer_of_keras(problem, tmp_path):
    def adam(rate, **arguments):
        return keras.optimizers.Adam(rate, **arguments)

    def multi(**arguments):
        groups = {".*kernel": adam(LR / 4, **arguments), ".*bias": adam(LR * 4, **arguments)}
        default = keras.optimizers.SGD()
        return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(default, groups))

    def ours(**arguments):
        return MultiplierOptimizer(adam(LR, **arguments), MULTIPLIERS)

    assert distance(*(fit(build(problem), problem, o, 8) for o in (multi(), ours()))) < 1e-6
    # With a global norm it is another method: each group clips its own.
    clip = {"global_clipnorm": 0.5}
    apart = [fit(build(problem), problem, o(**clip), 8) for o in (multi, ours)]
    assert distance(*apart) > 1e-3
    assert not hasattr(multi(), "learning_rate")


@pytest.mark.parametrize("make", [keras.optimizers.Adam, keras.optimizers.SGD])
def test_ones_change_nothing(problem, make):
    plain = fit(build(problem), problem, make(LR, global_clipnorm=0.5), 8)
    ones = MultiplierOptimizer(make(LR, global_clipnorm=0.5), {"": 1.0})
    assert distance(plain, fit(build(problem), problem, ones, 8)) == 0
    none = MultiplierOptimizer(make(LR, global_clipnorm=0.5), {})
    assert distance(plain, fit(build(problem), problem, none, 8)) == 0
    assert not any(map(ones.rewrites, range(2)))  # so nothing is copied


def test_zero_freezes_bit_for_bit_and_the_state_moves(problem):
    inner = keras.optimizers.AdamW(LR, weight_decay=0.1)
    optimizer = MultiplierOptimizer(inner, {"kernel": 0})
    kernel, bias = fit(build(problem), problem, optimizer, 8)
    np.testing.assert_array_equal(kernel, problem.weights[0])
    assert distance([bias], [problem.weights[1]]) > LR
    momenta = [v for v in inner.variables if "kernel" in v.path]
    assert len(momenta) == 2
    assert all(np.all(ops.convert_to_numpy(v) != 0) for v in momenta)


def test_frozen_weights_need_not_meet_their_constraint():
    layer = keras.layers.Dense(1, use_bias=False, kernel_constraint="unit_norm")
    layer.build((None, 2))
    layer.kernel.assign([[3.0], [4.0]])
    MultiplierOptimizer("sgd", {layer: 0}).apply([ops.ones((2, 1))], [layer.kernel])
    np.testing.assert_array_equal(ops.convert_to_numpy(layer.kernel), [[3.0], [4.0]])


def test_constraint_holds_afterwards():
    layer = keras.layers.Dense(1, use_bias=False, kernel_constraint="non_neg")
    layer.build((None, 2))
    layer.kernel.assign([[1.0], [1.0]])
    optimizer = MultiplierOptimizer(keras.optimizers.SGD(0.75), {layer: 2.0})
    optimizer.apply([ops.convert_to_tensor([[1.0], [0.5]])], [layer.kernel])
    # 1 + 2 (0.25 - 1) = -0.5, which is not allowed; 1 + 2 (0.625 - 1) = 0.25
    np.testing.assert_array_equal(ops.convert_to_numpy(layer.kernel), [[0.0], [0.25]])


def test_bfloat16_variables_are_rounded_once():
    variable = keras.Variable([1.0], dtype="bfloat16")
    optimizer = MultiplierOptimizer(keras.optimizers.SGD(1.0), {"": 0.7})
    optimizer.apply([ops.convert_to_tensor([3.0], "bfloat16")], [variable])
    expected = ops.cast(ops.convert_to_tensor([1 + 0.7 * -3.0]), "bfloat16")
    np.testing.assert_array_equal(
        ops.convert_to_numpy(ops.cast(variable, "float32")),
        ops.convert_to_numpy(ops.cast(expected, "float32")),
    )


def test_nan_and_infinity_pass_as_without():
    variables = [keras.Variable([1.0], name=n) for n in ("frozen", "slow")]
    optimizer = MultiplierOptimizer(keras.optimizers.SGD(1.0), {"frozen": 0, "slow": 0.5})
    optimizer.apply([ops.ones(1) * np.nan, ops.ones(1) * np.inf], variables)
    assert ops.convert_to_numpy(variables[0]) == [1.0]
    assert ops.convert_to_numpy(variables[1]) == [-np.inf]


# --- keys


def nested_model(names=("dense", "head")):
    inner_input = keras.Input((4,))
    inner = keras.Model(
        inner_input, keras.layers.Dense(3, name=names[0])(inner_input), name="inner"
    )
    inputs = keras.Input((4,))
    return keras.Model(inputs, keras.layers.Dense(3, name=names[1])(inner(inputs)))


def factors(optimizer, variables):
    optimizer.build(variables)
    return optimizer._factors


def test_a_layer_or_a_model_stands_for_all_its_variables():
    model = nested_model()
    inner, head = model.layers[1], model.layers[2]
    variables = model.trainable_variables
    assert factors(MultiplierOptimizer("sgd", {inner: 0.5}), variables) == [0.5, 0.5, 1, 1]
    assert factors(MultiplierOptimizer("sgd", {head: 2, "^dense/b": 3}), variables) == [
        1,
        3,
        2,
        2,
    ]
    assert factors(MultiplierOptimizer("sgd", {model: 0.1}), variables) == [0.1] * 4


def test_a_layer_that_is_built_later(problem):
    model = keras.Sequential([keras.layers.Dense(3, name="a"), keras.layers.Dense(3, name="b")])
    optimizer = MultiplierOptimizer(keras.optimizers.SGD(LR), {model.layers[0]: 0.0})
    with pytest.raises(ValueError, match="layer 'a' has no weights yet"):
        optimizer.get_config()
    model.compile(optimizer, loss="mse")
    model.build((None, 4))
    before = model.get_weights()
    model.fit(problem.x, problem.y, verbose=0)
    moved = [np.any(a != b) for a, b in zip(before, model.get_weights(), strict=True)]
    assert moved == [False, False, True, True]


def test_a_saved_layer_key_acts_on_the_same_variables(tmp_path, problem):
    model = nested_model()
    model.compile(MultiplierOptimizer(keras.optimizers.Adam(LR), {model.layers[1]: 0.0}), "mse")
    model.fit(problem.x, problem.y, verbose=0)
    model.save(tmp_path / "m.keras")
    before = model.get_weights()
    resumed = keras.saving.load_model(tmp_path / "m.keras")
    for m in (model, resumed):
        m.fit(problem.x, problem.y, shuffle=False, verbose=0)
    assert resumed.optimizer.multipliers == [[[r"^(dense/kernel|dense/bias)$"], 0.0]]
    moved = [np.any(a != b) for a, b in zip(before, resumed.get_weights(), strict=True)]
    assert moved == [False, False, True, True]
    for a, b in zip(model.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_optimizer_does_not_take_the_layer_into_the_file(tmp_path):
    h5py = pytest.importorskip("h5py")

    class Late(keras.Model):  # Keras goes through attributes by name: `optimizer` before `top`
        def __init__(self):
            super().__init__()
            self.top = keras.layers.Dense(3)

        def call(self, inputs):
            return self.top(inputs)

    model = Late()
    model(np.zeros((1, 4)))
    model.compile(MultiplierOptimizer("sgd", {model.top: 0.5}), "mse")
    model.save_weights(tmp_path / "m.weights.h5")
    sizes = {}
    with h5py.File(tmp_path / "m.weights.h5") as f:
        f.visititems(lambda path, d: sizes.update({path: getattr(d, "size", 0)}))
    kernels = [path for path, size in sizes.items() if size == 12]
    assert len(kernels) == 1
    assert not kernels[0].startswith("optimizer"), kernels


def test_two_variables_of_one_path_cannot_be_told_apart():
    model = nested_model(("same", "same"))
    variables = model.trainable_variables
    assert variables[0].path == variables[2].path
    with pytest.raises(
        ValueError, match=r"two variables have the path same/kernel.*different names"
    ):
        MultiplierOptimizer("sgd", {model.layers[1]: 0.5}).build(variables)
    assert factors(MultiplierOptimizer("sgd", {model: 0.5}), variables) == [0.5] * 4


@pytest.mark.parametrize(
    ("multipliers", "message"),
    [
        ("kernel", "multipliers must be a dictionary"),
        (["kernel"], "or a list of such pairs, got"),
        ({"kernel": -1.0}, "multiplier of 'kernel' must be a number >= 0, got -1.0"),
        ({"kernel": np.inf}, "must be a number >= 0, got inf"),
        ({"kernel": float("nan")}, "must be a number >= 0, got nan"),
        ({"kernel": True}, "must be a number >= 0, got True"),
        ({"kernel": "0.5"}, "must be a number >= 0, got '0.5'"),
        ({3: 0.5}, "must be regular expressions, layers or variables, got 3"),
        ({"(": 0.5}, r"must be regular expressions, layers or variables, got '\('"),
    ],
)
def test_bad_arguments(multipliers, message):
    with pytest.raises(ValueError, match=message):
        MultiplierOptimizer("sgd", multipliers)


def test_a_key_must_match_one_variable_and_a_variable_one_key():
    model = nested_model()
    for key in ("kernle", keras.layers.Dense(1)):
        with pytest.raises(ValueError, match=r"no variable.*dense/kernel|no weights yet"):
            MultiplierOptimizer("sgd", {key: 0.5}).build(model.trainable_variables)
    for keys in (
        {"kernel": 2.0, "dense": 0.5},
        {"kernel": 2.0, model: 1.0},
        {model: 1, model.layers[1]: 2},
    ):
        with pytest.raises(ValueError, match=r"both match .*disjoint"):
            MultiplierOptimizer("sgd", keys).build(model.trainable_variables)


def test_twice_multiplies(problem):
    optimizer = MultiplierOptimizer(keras.optimizers.SGD(LR), {"kernel": 0.5})
    twice = fit(build(problem), problem, MultiplierOptimizer(optimizer, {"": 0.5}), 8)
    once = MultiplierOptimizer(keras.optimizers.SGD(LR), {"kernel": 0.25, "bias": 0.5})
    assert distance(twice, fit(build(problem), problem, once, 8)) < 1e-6


# --- layer-wise decay


def heads(encoder):
    return keras.Model(encoder.inputs, keras.layers.Dense(2, name="head")(encoder.outputs[1]))


def nested(encoder):
    inputs = [keras.Input((None,), dtype="int32") for _ in range(2)]
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(encoder(inputs)[1]))


class Subclass(keras.Model):
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.head = encoder, keras.layers.Dense(2, name="head")

    def call(self, inputs):
        return self.head(self.encoder(inputs)[1])


@pytest.mark.parametrize("around", [heads, nested, Subclass])
def test_layerwise_decay(around):
    model = around(small_bert(with_pool=True))
    ids = np.array([[1, 2, 3]])
    model([ids, 0 * ids])
    optimizer = MultiplierOptimizer("adam", layerwise_decay(model, 0.5) | {"^.*head/": 10.0})
    found = dict(
        zip(
            [v.path for v in model.trainable_variables],
            factors(optimizer, model.trainable_variables),
            strict=True,
        )
    )
    for path, factor in found.items():
        expected = {
            "token_embedding": 0.5**4,
            "segment_embedding": 0.5**4,
            "position_embedding": 0.5**4,
            "embedding_norm": 0.5**4,
            "encoder_0": 0.5**3,
            "encoder_1": 0.5**2,
            "encoder_2": 0.5,
            "pooler": 1.0,
            "head": 10.0,
        }[next(part for part in path.split("/") if "subclass" not in part)]
        assert factor == expected, path
    assert set(found.values()) == {10.0, 1.0, 0.5, 0.25, 0.125, 0.0625}


def test_layerwise_decay_of_a_partly_frozen_model():
    model = small_bert()
    for layer in model.layers:
        layer.trainable = layer.name in ("encoder_1", "encoder_2")
    assert sorted(layerwise_decay(model, 0.5).values()) == [0.25, 0.5]
    MultiplierOptimizer("adam", layerwise_decay(model, 0.5)).build(model.trainable_variables)


def test_layerwise_decay_counts_in_tens():
    config = {"vocab_size": 9, "hidden_size": 2, "num_hidden_layers": 12}
    model = build_transformer_model(config | {"num_attention_heads": 1, "intermediate_size": 2})
    optimizer = MultiplierOptimizer("adam", layerwise_decay(model, 0.9))
    found = factors(optimizer, model.trainable_variables)
    assert found[0] == pytest.approx(0.9**13)
    assert found[-1] == 0.9


def test_layerwise_decay_needs_blocks(problem):
    with pytest.raises(ValueError, match="has no layers encoder_0, encoder_1, "):
        layerwise_decay(build(problem), 0.9)
    for decay in (0.0, 1.1, -1.0):
        with pytest.raises(ValueError, match=r"decay must be a number in \(0, 1\], got"):
            layerwise_decay(small_bert(), decay)


def test_layerwise_decay_trains():
    model = heads(small_bert(with_pool=True, dropout=0.0, attention_dropout=0.0))
    optimizer = MultiplierOptimizer(
        keras.optimizers.Adam(1e-3, epsilon=1e-12), layerwise_decay(model, 0.5)
    )
    # One step of Adam moves every element that has a gradient by the learning rate.
    # To trace all the variables takes TensorFlow longer than one step.
    model.compile(optimizer, "mse", run_eagerly=BACKEND != "jax")
    before = weights_of(model)
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    model.fit([ids, 0 * ids], np.array([[1.0, 0.0], [0.0, 1.0]]), verbose=0)
    largest = {}
    for variable, a, b in zip(model.weights, before, weights_of(model), strict=True):
        largest[variable.path] = np.abs(a - b).max()
    assert largest["head/kernel"] == pytest.approx(1e-3, rel=0.01)
    assert largest["encoder_2/feed_forward/output_dense/kernel"] == pytest.approx(
        5e-4, rel=0.01
    )
    assert largest["encoder_0/feed_forward/output_dense/kernel"] == pytest.approx(
        1.25e-4, rel=0.01
    )
    assert largest["token_embedding/embeddings"] == pytest.approx(6.25e-5, rel=0.01)
