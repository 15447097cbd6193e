"""One contract for all public losses; a new one adds a row, and a test of its mathematics."""

from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import pytest
from compiled import float64
from keras import ops

from keras_ext import losses

JIT = keras.backend.backend() != "torch"  # there it means torch.compile, which needs minutes
BATCH, WIDTH, CLASSES = 6, 4, 5
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(BATCH, WIDTH)).astype("float32")
CLASS_NUMBERS = RNG.integers(0, CLASSES, BATCH).astype("int32")
SCORES = RNG.uniform(-1, 1, (BATCH, CLASSES)).astype("float32")  # cosines, for instance
MULTI_HOT = RNG.integers(0, 2, (BATCH, CLASSES)).astype("float32")


class Row(NamedTuple):
    """A loss, and what it is called with."""

    make: Callable[..., keras.losses.Loss]
    y_true: np.ndarray
    y_pred: np.ndarray


ROWS = [
    Row(losses.AMSoftmax, CLASS_NUMBERS, SCORES),
    Row(losses.ASoftmax, CLASS_NUMBERS, SCORES),
    Row(losses.ArcFace, CLASS_NUMBERS, SCORES),
    Row(losses.CombinedMargin, CLASS_NUMBERS, SCORES),
    Row(losses.CosineSoftmax, CLASS_NUMBERS, SCORES),
    Row(losses.MultilabelCrossentropy, MULTI_HOT, SCORES),
    Row(losses.SimpleASoftmax, CLASS_NUMBERS, SCORES),
]


@pytest.fixture(params=ROWS, ids=[row.make.__name__ for row in ROWS])
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


def value(loss: keras.losses.Loss, row: Row, **arguments) -> np.ndarray:
    return ops.convert_to_numpy(loss(row.y_true, row.y_pred, **arguments))


GAN_LOSSES = [
    losses.Hinge,
    losses.NonSaturating,
    losses.Wasserstein,
    losses.Relativistic,
    lambda: losses.Relativistic(average=True),
    losses.GANQP,
    lambda: losses.GANQP(scale=3.0, norm="l1", epsilon=1e-4),
]


def gan_values(loss, real, fake, dtype):
    real, fake = (ops.cast(ops.convert_to_tensor(s), dtype) for s in (real, fake))
    images = ops.cast(ops.convert_to_tensor(FEATURES), dtype)
    values = loss.discriminator(real, fake, images, -images), loss.generator(real, fake)
    return [ops.convert_to_numpy(v) for v in values]


@pytest.mark.parametrize("make", GAN_LOSSES)
def test_losses_of_a_gan(make):
    """The configuration, and scalars in float32 from scores of any precision and shape."""
    loss = make()
    config = keras.saving.serialize_keras_object(loss)
    copy = keras.saving.deserialize_keras_object(config)
    assert type(copy) is type(loss)
    assert copy.get_config() == loss.get_config()
    with pytest.raises(TypeError, match=r"no_such_option|takes no arguments"):
        type(loss)(no_such_option=1)
    real, fake = np.float32([[1], [3], [-2], [0], [0.5], [9]]), np.float32([[-1]] * 6)
    exact = gan_values(loss, real, fake, "float32")
    for dtype in ("bfloat16", "float16"):
        rough = gan_values(copy, real, fake, dtype)
        assert [v.dtype for v in rough] == ["float32"] * 2
        np.testing.assert_allclose(rough, exact, rtol=0.02)
    flat = gan_values(loss, real[:, 0], fake[:, 0], "float32")
    np.testing.assert_array_equal(flat, exact)  # (batch,) as (batch, 1)
    for value in gan_values(loss, 1e4 * real, 1e4 * fake, "float32"):
        assert np.isfinite(value)


def test_every_public_loss_has_a_row():
    public = (getattr(losses, name) for name in losses.__all__)
    classes = {c for c in public if isinstance(c, type)}
    gan = {type(make()) for make in GAN_LOSSES}
    assert classes == {row.make for row in ROWS} | gan


def test_config_round_trip(row):
    loss = row.make(reduction="sum", name="mine")
    config = keras.saving.serialize_keras_object(loss)
    assert config["registered_name"] == f"keras_ext>{row.make.__name__}"
    copy = keras.saving.deserialize_keras_object(config)
    assert copy.get_config() == loss.get_config()
    np.testing.assert_array_equal(value(copy, row), value(loss, row))


def test_unknown_keyword_is_refused(row):
    with pytest.raises(TypeError, match="no_such_option"):
        row.make(no_such_option=1)


def test_weights_and_reductions(row):
    each = value(row.make(reduction=None), row)
    assert each.shape == (BATCH,)
    assert np.isfinite(each).all()
    np.testing.assert_allclose(value(row.make(), row), each.mean(), rtol=1e-6)
    weights = np.arange(BATCH, dtype="float32")
    expected = (weights * each).sum() / weights.sum()
    weighted = row.make(reduction="mean_with_sample_weight")
    np.testing.assert_allclose(value(weighted, row, sample_weight=weights), expected, rtol=1e-6)


def test_bfloat16_is_computed_in_float32(row):
    rounded = ops.cast(row.y_pred, "bfloat16")
    loss = row.make()(row.y_true, rounded)
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"
    same = row._replace(y_pred=ops.convert_to_numpy(ops.cast(rounded, "float32")))
    np.testing.assert_allclose(ops.convert_to_numpy(loss), value(row.make(), same), rtol=1e-6)


def test_float64_is_computed_in_float64(row):
    with float64():
        wide = row._replace(y_pred=row.y_pred.astype("float64"))
        each = value(row.make(reduction=None, dtype="float64"), wide)
    assert each.dtype == "float64"
    assert (each != each.astype("float32")).all()  # it has the digits
    np.testing.assert_allclose(each, value(row.make(reduction=None), row), rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight", "sum"])
def test_reductions_in_float64(row, reduction, masked):
    """As Keras has them in float32, with all digits."""
    weights, mask = np.arange(1.0, BATCH + 1), np.arange(BATCH) != 2
    counts = mask if masked else np.ones(BATCH)
    with float64():
        y_pred = ops.convert_to_tensor(row.y_pred.astype("float64"))
        if masked:
            y_pred._keras_mask = ops.convert_to_tensor(mask)
        each = value(row.make(reduction=None, dtype="float64"), row._replace(y_pred=y_pred))
        loss = row.make(reduction=reduction, dtype="float64")
        result = value(loss, row._replace(y_pred=y_pred), sample_weight=weights)
    total = (weights * counts * each).sum()
    number = {"sum": 1, "sum_over_batch_size": counts.sum()}
    expected = total / number.get(reduction, (weights * counts).sum())
    assert result.dtype == "float64"
    np.testing.assert_allclose(result, expected, rtol=1e-13)


def test_a_compiled_fit_step_equals_the_eager_loss(row):
    inputs = keras.Input((WIDTH,))
    model = keras.Model(inputs, keras.layers.Dense(CLASSES, activation="tanh")(inputs))
    before = model.get_weights()
    eager = value(row.make(), row._replace(y_pred=model(FEATURES)))
    model.compile(keras.optimizers.SGD(0.01), row.make(), jit_compile=JIT)
    history = model.fit(FEATURES, row.y_true, batch_size=BATCH, verbose=0)
    np.testing.assert_allclose(history.history["loss"], [eager], rtol=1e-5)
    assert all(np.isfinite(w).all() for w in model.get_weights())
    assert any((new != old).any() for new, old in zip(model.get_weights(), before, strict=True))
