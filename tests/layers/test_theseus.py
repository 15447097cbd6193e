"""TheseusModule: one draw for a batch, one branch computed, the successor in inference."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ext.layers import FeedForward, MultiHeadAttention, TransformerBlock
from keras_ext.layers.theseus import ReplacementRate, TheseusModule

BACKEND = keras.backend.backend()
XLA = BACKEND != "torch"  # there it means torch.compile, which needs minutes
MODES = [{"run_eagerly": True}] + [{"jit_compile": True}] * XLA
MODES += [{"jit_compile": False}] * (BACKEND == "tensorflow")

rng = np.random.default_rng(0)
X = rng.normal(size=(16, 3)).astype("float32")
Y = rng.normal(size=(16, 3)).astype("float32")


@keras.saving.register_keras_serializable(package="test")
class Scale(keras.layers.Layer):
    """x times a weight, after dropout; counts the training batches that it really computes."""

    def __init__(self, value=1.0, rate=0.0, **kwargs):
        super().__init__(**kwargs)
        self.value, self.rate = value, rate
        self.dropout = keras.layers.Dropout(rate, seed=1)

    def build(self, inputs_shape):
        constant = keras.initializers.Constant(self.value)
        self.factor = self.add_weight(shape=(), initializer=constant, name="factor")
        self.batches = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="batches"
        )

    def call(self, inputs, training=None):
        self.batches.assign(self.batches + 1)
        return self.dropout(inputs, training=training) * self.factor

    def compute_output_shape(self, inputs_shape):
        return inputs_shape

    def get_config(self):
        return {**super().get_config(), "value": self.value, "rate": self.rate}


def chain(n=1, rate=0.5, **kwargs):
    """n modules, predecessors times 2 and successors times 3."""
    x = inputs = keras.Input((3,))
    p = ReplacementRate(rate, name="rate")(x)
    for i in range(n):
        x = TheseusModule(Scale(2.0), Scale(3.0), name=f"module_{i}", **kwargs)(x, p)
    return keras.Model(inputs, x)


def modules(model):
    return [layer for layer in model.layers if isinstance(layer, TheseusModule)]


def compile(model, optimizer, loss, mode):
    for module in modules(model):
        module.recompute = mode.get("jit_compile", False)
    model.compile(optimizer, loss, **mode)


def counts(model):
    """Batches that (predecessor, successor) of each module computed."""
    return [
        (int(m.predecessor[0].batches), int(m.successor[0].batches)) for m in modules(model)
    ]


@pytest.mark.parametrize("rate", [0.0, 1.0])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_certain_rates_are_one_of_the_branches(rate, mode):
    model = chain(2, rate)
    compile(model, keras.optimizers.SGD(1.0), "mse", mode)
    loss = model.train_on_batch(X, Y)
    factor = 9 if rate else 4
    np.testing.assert_allclose(loss, np.mean((factor * X - Y) ** 2), rtol=1e-5)
    new = model.trainable_variables
    assert [v.path.split("/")[0] for v in new] == ["module_0", "module_1"]
    step = rate * 3 * np.mean(2 * (9 * X - Y) * X)
    np.testing.assert_allclose([3 - float(v) for v in new], step, rtol=1e-4)
    # Inference knows neither the rate nor the draws.
    expected = float(new[0]) * float(new[1]) * X
    np.testing.assert_allclose(model.predict(X, verbose=0), expected, rtol=1e-5)


def loss_of(model, x, y):
    """That of a training step; before Keras 3.12 it comes out as the mean of all steps."""
    model.reset_metrics()
    return float(model.train_on_batch(x, y))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_only_the_branch_drawn_is_computed_and_trained(mode):
    """The counts are state: what a branch assigns arrives, and nothing of the other."""
    steps, model = 12, chain(3)
    compile(model, keras.optimizers.SGD(1e-5), "mse", mode)
    model.train_on_batch(X, Y)
    before, built = [float(v) for v in model.trainable_variables], counts(model)
    drawn = set()
    for _ in range(steps):
        model.train_on_batch(X, Y)
        after, now = [float(v) for v in model.trainable_variables], counts(model)
        grown = [(a - c, b - d) for (a, b), (c, d) in zip(now, built, strict=True)]
        assert set(grown) <= {(1, 0), (0, 1)}
        replaced = tuple(new for _, new in grown)
        assert replaced == tuple(a != b for a, b in zip(after, before, strict=True))
        drawn.add(replaced)
        before, built = after, now
    assert any(len(set(r)) > 1 for r in drawn)  # modules draw each for itself


def test_mean_of_the_draws():
    module = TheseusModule(Scale(0.0), Scale(1.0), seed=0)
    one = np.ones((1, 1), "float32")
    draws = [float(module(one, replacement_rate=0.3, training=True)[0, 0]) for _ in range(200)]
    assert set(draws) == {0, 1}
    assert abs(np.mean(draws) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 200)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kept", [False, True])
def test_dropout_in_the_branches(mode, kept):
    inputs = keras.Input((3,))
    module = TheseusModule(Scale(rate=0.5), Scale(rate=0.5), predecessor_dropout=kept)
    rate = ReplacementRate(0.0)
    model = keras.Model(inputs, module(inputs, rate(inputs)))
    compile(model, "sgd", "mse", mode)
    seen = {}
    for p, dropped in ((0.0, kept), (1.0, True)):
        rate.rate.assign(p)
        losses = [loss_of(model, X, 0 * X) for _ in range(3)]
        losses = losses[: 1 if p else 3]  # from the first step on the successor changes
        plain = np.mean(X**2)
        assert all(np.isclose(loss, plain, rtol=1e-5) != dropped for loss in losses)
        seen[p] = losses
    assert len(set(seen[0.0])) == (3 if kept else 1)  # the dropout seed moves on


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_gradient_is_that_of_the_draws_of_the_output(mode):
    """The loss is linear in each weight, so its gradient, times the weight, is the loss."""
    x = inputs = keras.Input((3,))
    rate = ReplacementRate(0.0)
    p = rate(x)
    before, branches = Scale(1.5), (Scale(2.0, rate=0.5), Scale(3.0, rate=0.5))
    module = TheseusModule(*branches, predecessor_dropout=True)
    model = keras.Model(inputs, module(before(x), p))
    compile(model, keras.optimizers.SGD(0.01), lambda _, y: ops.mean(y), mode)
    for replaced in (0, 0, 1, 1):
        rate.rate.assign(replaced)
        weights, built = [float(before.factor), float(branches[1].factor)], counts(model)
        loss = loss_of(model, X, Y)
        steps = [weights[0] - float(before.factor), weights[1] - float(branches[1].factor)]
        expected = [0.01 * loss / weights[0], replaced * 0.01 * loss / weights[1]]
        np.testing.assert_allclose(steps, expected, rtol=1e-3, atol=1e-6)
        ((old, new),) = counts(model)  # the state moved once, as in the mode without recompute
        assert (old - built[0][0], new - built[0][1]) == (1 - replaced, replaced)
    seeds = [layer.dropout.seed_generator.state for layer in branches]
    assert [int(ops.convert_to_numpy(seed)[1]) for seed in seeds] == [2, 2]


def test_layers_called_after_are_in_training_mode():
    class Outer(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.module, self.dropout = TheseusModule(Scale(), Scale()), Scale(rate=0.9)

        def call(self, x):
            return self.dropout(self.module(x, replacement_rate=0.0))

    outer = Outer()
    assert np.any(ops.convert_to_numpy(outer(X, training=True)) == 0)


def block(name=None):
    return TransformerBlock(MultiHeadAttention(2, 4), FeedForward(4), dropout=0.2, name=name)


@pytest.mark.parametrize("training", [False, True])
def test_masks_pass_into_and_through_the_branches(training):
    x = rng.normal(size=(2, 5, 8)).astype("float32")
    x[1, 3:] = 0
    inputs = keras.Input((5, 8))
    masked = keras.layers.Masking()(inputs)
    module = TheseusModule([block(), block()], block())
    hidden = module(masked, ReplacementRate(0.0)(masked))
    model = keras.Model(inputs, [hidden, keras.layers.GlobalAveragePooling1D()(hidden)])
    hidden, mean = map(ops.convert_to_numpy, model(x, training=training))
    np.testing.assert_allclose(mean[1], hidden[1, :3].mean(0), atol=1e-5)
    alone = x[1:, :3]  # padding changes nothing
    for layer in module.predecessor if training else module.successor:
        alone = layer(alone)
    np.testing.assert_allclose(hidden[1, :3], ops.convert_to_numpy(alone)[0], atol=1e-5)


def test_mixed_precision_keeps_the_rate():
    x = inputs = keras.Input((5, 8))
    dtype = "mixed_bfloat16"
    rate = ReplacementRate(0.3001, dtype=dtype)
    module = TheseusModule(
        FeedForward(4, dtype=dtype), FeedForward(4, dtype=dtype), dtype=dtype
    )
    model = keras.Model(inputs, [module(x, rate(x)), rate(x)])
    y, p = model(np.ones((1, 5, 8)), training=True)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert float(p) == np.float32(0.3001)


def test_a_loaded_model_draws_as_it_would_have(tmp_path):
    model = chain(3)
    model.compile(keras.optimizers.SGD(1e-4), "mse")
    model.get_layer("rate").rate.assign(0.4)
    for _ in range(3):
        model.train_on_batch(X, Y)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert len(loaded.trainable_variables) == 3
    assert float(loaded.get_layer("rate").rate) == np.float32(0.4)
    for _ in range(8):
        assert loss_of(model, X, Y) == loss_of(loaded, X, Y)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="MirroredStrategy is TensorFlow's")
def test_replicas_draw_alike(mirrored):
    with mirrored.scope():
        model = chain(2)
        model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    losses = {round(loss_of(model, X[:2], 0 * X[:2]), 3) for _ in range(10)}
    square = np.mean(X[:2] ** 2)
    possible = {round(float(square * a * a), 3) for a in (4, 6, 9)}  # no 2 x 2 and 3 x 3 mixed
    assert losses <= possible
    assert len(losses) > 1


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"replacement_rate must be in \[0, 1\], got 1.5"):
        TheseusModule(Scale(), Scale())(X, replacement_rate=1.5)
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\], got -1"):
        ReplacementRate(-1)
    with pytest.raises(ValueError, match="predecessor must be a layer or a list of layers"):
        TheseusModule([], Scale())
    with pytest.raises(ValueError, match=r"shape of the predecessor, \(16, 3\), got \(16, 4\)"):
        TheseusModule(Scale(), keras.layers.Dense(4))(X)
