"""One contract for all public optimizers; a new one adds a row, its mathematics elsewhere.

The reference is float64 NumPy, so TensorFlow, JAX and PyTorch agree with each other as well.
"""

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pytest
from keras import ops
from reference import adafactor, low_rank, momentum_accumulation, update_wrappers, wrappers
from reference import optimizers as numpy_optimizers
from reference.problems import OUTPUTS, VOCABULARY, WIDTH, Regression

from keras_ext import optimizers

JIT = keras.backend.backend() != "torch"  # there it means torch.compile, which needs minutes
LR, BATCH, ROWS = 0.05, 8, 48


class Row(NamedTuple):
    """An optimizer, and what it should have done after one epoch of 6 batches of 8 rows."""

    name: str
    make: Callable[[], keras.optimizers.Optimizer]
    reference: Callable[[Regression], list[np.ndarray]] | None


def batches(size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, ROWS, size)]


def trained(update, size: int = BATCH, transform=lambda grads: grads):
    """Reference weights: a NumPy update for every batch of `size` rows."""
    return lambda problem: problem.train(update, batches(size), transform)


def looked_ahead(problem: Regression) -> list[np.ndarray]:
    optimizer = wrappers.Lookahead(wrappers.Leaf(ADAM), 3, 0.5)
    weights = problem.weights
    for rows in batches(BATCH):
        weights = optimizer.step(weights, problem.gradients(weights, rows))
    return weights


def periodically_trained(problem: Regression) -> list[np.ndarray]:
    """The kernel at every second step, with Adam's bias correction for its own steps."""
    (table, kernel, bias), states = problem.weights, ([{}, {}], [{}])
    for t, rows in enumerate(batches(BATCH), start=1):
        grads = problem.gradients([table, kernel, bias], rows)
        table, bias = ADAM([table, bias], grads[::2], states[0], t)
        if t % 2 == 0:
            (kernel,) = ADAM([kernel], grads[1:2], states[1], t // 2)
    return [table, kernel, bias]


def low_rank_trained(problem: Regression) -> list[np.ndarray]:
    *matrices, bias = problem.weights
    forms = [low_rank.Additive(w, 1) for w in matrices] + [low_rank.Whole(bias)]
    return low_rank.train(problem, forms, ADAM, batches(BATCH))[0]


def lora_trained(problem: Regression) -> list[np.ndarray]:
    *matrices, bias = problem.weights
    firsts = [keras.initializers.HeUniform(seed=i)((len(w), 1)) for i, w in enumerate(matrices)]
    factors = [ops.convert_to_numpy(a).astype("float64") for a in firsts]
    forms = [low_rank.Lora(w, a) for w, a in zip(matrices, factors, strict=True)]
    return low_rank.train(problem, [*forms, low_rank.Whole(bias)], ADAM, batches(BATCH))[0]


def galore_trained(problem: Regression) -> list[np.ndarray]:
    return low_rank.train_galore(problem, ADAM, batches(BATCH), rank=1, gap=4)


ADAM = numpy_optimizers.adam(LR)
CYCLE = 3

ROWS_OF_TABLE = [
    Row(
        "AccumOptimizer",
        lambda: optimizers.AccumOptimizer(keras.optimizers.Adam(LR), CYCLE),
        trained(ADAM, CYCLE * BATCH),
    ),
    Row(
        "ClipOptimizer",
        lambda: optimizers.ClipOptimizer(keras.optimizers.Adam(LR), 0.5),
        trained(ADAM, transform=lambda grads: numpy_optimizers.clip_global(grads, 0.5)),
    ),
    Row(
        "EMAOptimizer",
        lambda: optimizers.EMAOptimizer(keras.optimizers.Adam(LR)),
        trained(ADAM),
    ),
    Row(
        "LayerAdaptiveOptimizer",
        lambda: optimizers.LayerAdaptiveOptimizer(keras.optimizers.Adam(LR)),
        trained(update_wrappers.layer_adaptive(ADAM, lambda t: LR)),
    ),
    Row(
        "GaLoreOptimizer",
        lambda: optimizers.GaLoreOptimizer(keras.optimizers.Adam(LR), 1, update_gap=4),
        galore_trained,
    ),
    Row(
        "LoRAOptimizer",
        lambda: optimizers.LoRAOptimizer(keras.optimizers.Adam(LR), 1, seed=0),
        lora_trained,
    ),
    Row(
        "RandomProjectionOptimizer",  # its draws are compared in its own test
        lambda: optimizers.RandomProjectionOptimizer(keras.optimizers.SGD(LR), 1, seed=0),
        None,
    ),
    Row(
        "LazyOptimizer",
        lambda: optimizers.LazyOptimizer(keras.optimizers.Adam(LR)),
        trained(update_wrappers.lazy(ADAM)),
    ),
    Row(
        "LookaheadOptimizer",
        lambda: optimizers.LookaheadOptimizer(keras.optimizers.Adam(LR), 3, 0.5),
        looked_ahead,
    ),
    Row(
        "AdditiveLowRankOptimizer",
        lambda: optimizers.AdditiveLowRankOptimizer(keras.optimizers.Adam(LR), 1),
        low_rank_trained,
    ),
    Row(
        "MomentumAccumAdam",
        lambda: optimizers.MomentumAccumAdam(LR, CYCLE),
        trained(momentum_accumulation.hidden_adam(LR, CYCLE)),
    ),
    Row(
        "MomentumAccumAdamW",
        lambda: optimizers.MomentumAccumAdamW(LR, CYCLE, weight_decay=0.1),
        trained(momentum_accumulation.hidden_adam(LR, CYCLE, weight_decay=0.1)),
    ),
    Row(
        "MomentumAccumLamb",
        lambda: optimizers.MomentumAccumLamb(LR, CYCLE),
        trained(momentum_accumulation.hidden_lamb(LR, CYCLE)),
    ),
    Row(
        "MomentumAccumSGD",
        lambda: optimizers.MomentumAccumSGD(LR, 0.9, CYCLE),
        trained(numpy_optimizers.sgd(LR, 0.9), CYCLE * BATCH),
    ),
    Row(
        "MultiplierOptimizer",
        lambda: optimizers.MultiplierOptimizer(keras.optimizers.Adam(LR), {"kernel": 0.5}),
        trained(update_wrappers.multiply(ADAM, [1.0, 0.5, 1.0])),
    ),
    Row(
        "PeriodicOptimizer",
        lambda: optimizers.PeriodicOptimizer(
            keras.optimizers.Adam(LR), keras.optimizers.Adam(LR), slow="kernel", period=2
        ),
        periodically_trained,
    ),
    Row(
        "RelativeAdafactor",
        lambda: optimizers.RelativeAdafactor(LR, beta_1=0.9, min_dim_size_to_factor=4),
        trained(adafactor.relative_adafactor(LR, beta_1=0.9, min_dim=4)),
    ),
    Row(
        "Tiger",
        lambda: optimizers.Tiger(LR, CYCLE),
        trained(momentum_accumulation.tiger(LR, ["rows", "matrix", "vector"]), CYCLE * BATCH),
    ),
]
ABSTRACT = {"OptimizerWrapper", "UpdateWrapper"}


def wrapper_of_the_docstring() -> type:
    """The wrapper that the base shows a newcomer, registered to be saved."""
    source = doctest.DocTestParser().get_examples(optimizers.OptimizerWrapper.__doc__)[0].source
    names = {"OptimizerWrapper": optimizers.OptimizerWrapper, "keras": keras}
    exec(source, names)
    return keras.saving.register_keras_serializable(package="keras_ext")(
        names["CentralizeOptimizer"]
    )


Centralize = wrapper_of_the_docstring()
FROM_THE_DOCSTRING = Row(
    "CentralizeOptimizer",
    lambda: Centralize(keras.optimizers.Adam(LR)),
    trained(ADAM, transform=lambda grads: [g if g.ndim < 2 else g - g.mean(0) for g in grads]),
)
ROWS_OF_TABLE.append(FROM_THE_DOCSTRING)


@pytest.fixture(params=ROWS_OF_TABLE, ids=[row.name for row in ROWS_OF_TABLE])
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


@pytest.fixture
def problem() -> Regression:
    return Regression(embedding=True, rows=ROWS)


def model_of(problem: Regression, dtype: str | None = None) -> keras.Model:
    inputs = keras.Input((problem.x.shape[1],), dtype="int32")
    hidden = keras.layers.Embedding(VOCABULARY, WIDTH, dtype=dtype)(inputs)
    hidden = keras.layers.GlobalAveragePooling1D(dtype=dtype)(hidden)
    model = keras.Model(inputs, keras.layers.Dense(OUTPUTS, dtype=dtype)(hidden))
    model.set_weights(problem.weights)
    return model


def fit(model: keras.Model, problem: Regression, rows: slice = slice(None), **compile_args):
    if compile_args:
        model.compile(loss="mse", **compile_args)
    model.fit(problem.x[rows], problem.y[rows], batch_size=BATCH, shuffle=False, verbose=0)
    return model.get_weights()


class SaveFirstStep(keras.callbacks.Callback):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if batch == 0:
            self.model.save(self.path)  # by `self.model`, which on JAX is up to date


def distance(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    return max(np.abs(x.astype("float64") - y).max() for x, y in zip(a, b, strict=True))


def assert_near(actual: list[np.ndarray], row: Row, problem: Regression, limit: float) -> None:
    if row.reference is None:
        assert all(np.isfinite(w).all() for w in actual)
    else:
        assert distance(actual, row.reference(problem)) < limit


def test_every_public_optimizer_has_a_row():
    public = {n for n in optimizers.__all__ if isinstance(getattr(optimizers, n), type)}
    rows = {row.name for row in ROWS_OF_TABLE} - {FROM_THE_DOCSTRING.name}
    assert public - ABSTRACT == rows


@pytest.mark.parametrize("jit", [False, JIT], ids=["eager", "compiled"])
def test_equals_the_reference(row, problem, jit):
    mode = {"jit_compile": True} if jit else {"run_eagerly": True}
    actual = fit(model_of(problem), problem, optimizer=row.make(), **mode)
    assert_near(actual, row, problem, 5e-6)


def test_config_round_trip(row):
    optimizer = row.make()
    config = keras.saving.serialize_keras_object(optimizer)
    assert config["registered_name"] == f"keras_ext>{row.name}"
    copy = keras.saving.deserialize_keras_object(config)
    assert copy.get_config() == optimizer.get_config()


def test_unknown_keyword_is_refused(row):
    config = row.make().get_config() | {"no_such_option": 1}
    with pytest.raises((TypeError, ValueError), match="no_such_option"):
        type(row.make()).from_config(config)


def test_saved_state_resumes(row, problem, tmp_path):
    whole = model_of(problem)
    fit(whole, problem, optimizer=row.make())
    model = model_of(problem)
    # Saved within `fit`, after one step: inside of every cycle.
    save = SaveFirstStep(tmp_path / "model.keras")
    model.compile(row.make(), loss="mse")
    model.fit(
        problem.x, problem.y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[save]
    )
    resumed = keras.saving.load_model(tmp_path / "model.keras")
    fit(resumed, problem, slice(BATCH, ROWS))
    for a, b in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_mixed_precision(row, problem):
    model = model_of(problem, dtype="mixed_bfloat16")
    actual = fit(model, problem, optimizer=row.make(), jit_compile=JIT)
    assert {w.dtype for w in model.weights} == {"float32"}
    assert_near(actual, row, problem, 0.03)
    assert distance(actual, problem.weights) > LR  # it learned


def test_every_variable_is_exposed(row, problem):
    # The JAX trainer threads `variables`; one that is missing there is lost without a word.
    optimizer = row.make()
    fit(model_of(problem), problem, optimizer=optimizer)
    found = {id(v) for v in optimizer.variables}
    parts, owned = [optimizer], set()
    while parts:
        part = parts.pop()
        for value in vars(part).values():
            items = value if isinstance(value, (list, tuple)) else [value]
            owned |= {id(v) for v in items if isinstance(v, keras.Variable)}
            parts += [v for v in items if isinstance(v, keras.optimizers.Optimizer)]
    weights = {id(v) for v in optimizer._trainable_variables}
    assert owned - weights <= found
    assert all(np.isfinite(ops.convert_to_numpy(v)).all() for v in optimizer.variables)
