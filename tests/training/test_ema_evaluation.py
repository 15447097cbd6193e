"""EvaluateWithEMA: averages while evaluating, the trained weights before and after."""

import keras
import numpy as np
import pytest
from keras import ops
from optimizers.test_accumulation import LR, build, distance, fit, weights_of
from reference.problems import Regression

from keras_ext.optimizers import AccumOptimizer
from keras_ext.optimizers.ema import EMAOptimizer
from keras_ext.training.ema_evaluation import EvaluateWithEMA

BACKEND = keras.backend.backend()
CHAINS = {
    "alone": lambda ema: ema,
    "in Accum": lambda ema: AccumOptimizer(ema, 1),
    "in LossScale in Accum": lambda ema: AccumOptimizer(
        keras.optimizers.LossScaleOptimizer(ema), 1
    ),
}


@pytest.fixture
def problem():
    return Regression(embedding=False)


def trained(problem, chain="alone", **compile_args):
    """A model after 6 updates, and the EMAOptimizer of its chain."""
    model = build(problem)
    ema = EMAOptimizer(keras.optimizers.SGD(LR), 0.9)
    fit(model, problem, CHAINS[chain](ema), 8, **compile_args)
    return model, ema


def averages_of(ema):
    return [ops.convert_to_numpy(a).astype("float64") for a in ema.averages]


def loss_of(problem, weights):
    kernel, bias = weights
    return np.mean((problem.x.astype("float64") @ kernel + bias - problem.y) ** 2)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


class Spy(keras.callbacks.Callback):
    """The weights that a model has at some moments."""

    def __init__(self, *moments):
        super().__init__()
        self.seen = {moment: [] for moment in moments}
        for moment in moments:
            setattr(self, moment, self._look(moment))

    def _look(self, moment):
        return lambda *arguments, **named: self.seen[moment].append(self.model.get_weights())


@pytest.mark.parametrize("chain", CHAINS)
def test_evaluate(problem, chain):
    model, ema = trained(problem, chain)
    weights, averages = model.get_weights(), averages_of(ema)
    assert distance(weights, averages) > 1e-3
    for _ in range(2):
        loss = model.evaluate(problem.x, problem.y, verbose=0, callbacks=[EvaluateWithEMA()])
        np.testing.assert_allclose(loss, loss_of(problem, averages), rtol=1e-5)
        assert same(model.get_weights(), weights)
        assert same(averages_of(ema), averages)
    plain = model.evaluate(problem.x, problem.y, verbose=0)
    np.testing.assert_allclose(plain, loss_of(problem, weights_of(model)), rtol=1e-5)


def test_predict(problem):
    model, ema = trained(problem)
    weights, (kernel, bias) = model.get_weights(), averages_of(ema)
    for _ in range(2):  # Keras's callback leaves the averages in the model
        actual = model.predict(problem.x, verbose=0, callbacks=[EvaluateWithEMA()])
        np.testing.assert_allclose(actual, problem.x @ kernel + bias, atol=1e-5)
        assert same(model.get_weights(), weights)


@pytest.mark.parametrize("mode", ["eager", "xla"])
def test_validation_in_fit(problem, mode):
    compiled = {"run_eagerly": True} if mode == "eager" else {"jit_compile": BACKEND != "torch"}
    with_callback, without = build(problem), build(problem)
    for model in (with_callback, without):
        model.compile(EMAOptimizer(keras.optimizers.Adam(LR), 0.9), loss="mse", **compiled)
    arguments = {"batch_size": 8, "epochs": 3, "shuffle": False, "verbose": 0}
    arguments["validation_data"] = (problem.x, problem.y)
    spy = Spy("on_test_batch_begin", "on_epoch_end")
    history = with_callback.fit(
        problem.x, problem.y, callbacks=[EvaluateWithEMA(), spy], **arguments
    ).history
    averaged = spy.seen["on_test_batch_begin"]
    np.testing.assert_allclose(
        history["val_loss"],
        [loss_of(problem, weights) for weights in averaged[:: len(averaged) // 3]],
        rtol=1e-5,
    )
    assert same(averaged[-1], averages_of(with_callback.optimizer))
    plain = without.fit(problem.x, problem.y, **arguments).history
    # Training goes on as if nothing had been evaluated.
    assert plain["loss"] == history["loss"]
    assert same(with_callback.get_weights(), without.get_weights())
    assert same(spy.seen["on_epoch_end"][-1], without.get_weights())
    assert not np.allclose(plain["val_loss"], history["val_loss"], rtol=1e-3)


def test_a_checkpoint_holds_the_averages_that_were_validated(problem, tmp_path):
    model = build(problem)
    model.compile(EMAOptimizer(keras.optimizers.SGD(LR), 0.9), loss="mse")
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    history = model.fit(
        problem.x,
        problem.y,
        batch_size=8,
        epochs=2,
        verbose=0,
        validation_data=(problem.x, problem.y),
        callbacks=[checkpoint, EvaluateWithEMA()],
    ).history
    loaded = keras.saving.load_model(tmp_path / "1.keras")
    loaded.optimizer.assign_averages()
    loss = loaded.evaluate(problem.x, problem.y, verbose=0)
    np.testing.assert_allclose(loss, history["val_loss"][0], rtol=1e-6)


def test_bfloat16_weights_come_back_bit_for_bit(problem):
    model = build(problem, dtype="bfloat16")
    assert {w.dtype for w in model.weights} == {"bfloat16"}
    ema = EMAOptimizer(keras.optimizers.SGD(LR), 0.9)
    fit(model, problem, ema, 8)
    weights, averages = weights_of(model), averages_of(ema)
    model.evaluate(problem.x, problem.y, verbose=0, callbacks=[EvaluateWithEMA()])
    assert same(weights_of(model), weights)
    assert same(averages_of(ema), averages)  # in float32: not rounded on their way


def test_before_the_first_update_the_weights_are_evaluated(problem):
    model = build(problem)
    model.compile(EMAOptimizer("sgd"), loss="mse")
    for build_optimizer in (lambda: None, lambda: model.optimizer.build(model.weights)):
        build_optimizer()
        loss = model.evaluate(problem.x, problem.y, verbose=0, callbacks=[EvaluateWithEMA()])
        np.testing.assert_allclose(loss, loss_of(problem, problem.weights), rtol=1e-5)
    assert distance(weights_of(model), problem.weights) == 0


class Interrupt(keras.callbacks.Callback):
    def on_test_batch_end(self, batch, logs=None):
        assert self.model  # on JAX this fills the variables, which a step has emptied
        raise InterruptedError


def test_an_interrupted_evaluation(problem):
    model, ema = trained(problem)
    weights = model.get_weights()
    callback = EvaluateWithEMA()
    arguments = {"verbose": 0, "batch_size": 8}
    with pytest.raises(InterruptedError):
        model.evaluate(problem.x, problem.y, callbacks=[callback, Interrupt()], **arguments)
    assert distance(model.get_weights(), averages_of(ema)) < 1e-6
    loss = model.evaluate(problem.x, problem.y, callbacks=[callback], **arguments)
    np.testing.assert_allclose(loss, loss_of(problem, averages_of(ema)), rtol=1e-5)
    assert same(model.get_weights(), weights)
    callback.restore()  # nothing is put aside: nothing happens
    assert same(model.get_weights(), weights)


def test_weights_trained_since_an_interruption_are_not_undone(problem):
    model, _ = trained(problem)
    callback = EvaluateWithEMA()
    arguments = {"verbose": 0, "batch_size": 8}
    with pytest.raises(InterruptedError):
        model.evaluate(problem.x, problem.y, callbacks=[callback, Interrupt()], **arguments)
    model.fit(problem.x, problem.y, **arguments)
    weights = model.get_weights()
    callback.restore()
    assert same(model.get_weights(), weights)


@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
def test_needs_an_ema_optimizer(problem, method):
    model = build(problem)
    model.compile(AccumOptimizer(keras.optimizers.SGD(LR, name="plain"), 2), loss="mse")
    data = [problem.x] if method == "predict" else [problem.x, problem.y]
    with pytest.raises(ValueError, match=r"EMAOptimizer, got optimizer='accum.*EMAOptimizer\("):
        getattr(model, method)(*data, verbose=0, callbacks=[EvaluateWithEMA()])


def test_needs_a_compiled_model(problem):
    with pytest.raises(ValueError, match="got optimizer=None"):
        build(problem).predict(problem.x, verbose=0, callbacks=[EvaluateWithEMA()])


# --- two devices


@pytest.mark.skipif(BACKEND != "tensorflow", reason="MirroredStrategy is TensorFlow's")
def test_mirrored_strategy(mirrored):
    problem = Regression(embedding=True)
    with mirrored.scope():
        model, ema = trained(problem, jit_compile=False)
    weights, problem.weights = model.get_weights(), averages_of(ema)
    loss = model.evaluate(
        problem.x, problem.y, batch_size=48, verbose=0, callbacks=[EvaluateWithEMA()]
    )
    single = build(problem)  # with the averages
    single.compile(loss="mse")
    np.testing.assert_allclose(
        loss, single.evaluate(problem.x, problem.y, verbose=0), rtol=1e-5
    )
    assert same(model.get_weights(), weights)
    for weight in model.trainable_weights:  # both replicas hold the same
        first, second = (v.numpy() for v in weight.value.values)
        np.testing.assert_array_equal(first, second)


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution runs on JAX")
def test_data_parallel(problem):
    devices = keras.distribution.list_devices()
    assert len(devices) == 2
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    try:
        model, ema = trained(problem)
        weights = model.get_weights()
        loss = model.evaluate(
            problem.x, problem.y, verbose=0, callbacks=[EvaluateWithEMA()], batch_size=48
        )
    finally:
        keras.distribution.set_distribution(None)
    np.testing.assert_allclose(loss, loss_of(problem, averages_of(ema)), rtol=1e-5)
    assert same(model.get_weights(), weights)
