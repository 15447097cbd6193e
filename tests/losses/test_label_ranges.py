"""Labels out of range: an error where they can be seen, otherwise NaN, never a number."""

import keras
import numpy as np
import pytest
from compiled import unseen
from keras import ops

from keras_ext import losses
from keras_ext.backend import value_and_grad

NAN = float("nan")
SCORES = np.random.default_rng(0).uniform(-1, 1, (3, 3)).astype("float32")
MARGINS = [
    losses.AMSoftmax(),
    losses.ASoftmax(),
    losses.ArcFace(),
    losses.ArcFace(easy_margin=True),
    losses.CombinedMargin(),
    losses.CosineSoftmax(),
    losses.SimpleASoftmax(),
]
DENSE, SPARSE = losses.MultilabelCrossentropy(), losses.MultilabelCrossentropy(sparse=True)
FIRST, LAST = [True, False, False], [False, False, True]
CASES = [
    *((loss, [-1, 1, 2], FIRST) for loss in MARGINS),
    (MARGINS[0], [-1, 3, 7], [True] * 3),
    (MARGINS[0], [0, 1, 3], LAST),
    (MARGINS[0], [0.5, 1, 2], FIRST),
    (MARGINS[0], [NAN, 1, 2], FIRST),
    (MARGINS[0], [[0], [1], [3]], LAST),
    (MARGINS[0], np.zeros((3, 3)), [True] * 3),
    (MARGINS[0], [[1, 0, 0], [0, 1, 0], [1, 1, 0]], LAST),
    (MARGINS[0], [[-1, -2, -1], [0, 1, 0], [0, 0, 1]], FIRST),
    (DENSE, [[0, 1, 0], [0, 1, 0], [0, 0, 2]], LAST),
    (DENSE, [[0, -0.1, 0], [0, 1, 0], [0, 0, 0]], FIRST),
    (SPARSE, [[0, 1], [2, -1], [0.5, -1]], LAST),
]


@pytest.mark.parametrize(("loss", "labels", "wrong"), CASES)
def test_out_of_range(loss, labels, wrong, monkeypatch):
    labels = np.array(labels, "float32")
    with pytest.raises(
        ValueError, match=r"(labels|y_true) must be (integers|one-hot|in \[0, 1])"
    ):
        loss(labels, SCORES)
    value, gradient = unseen(
        value_and_grad(lambda scores, labels: loss(labels, scores)), monkeypatch
    )(ops.convert_to_tensor(SCORES), ops.convert_to_tensor(labels))
    assert np.isnan(ops.convert_to_numpy(value))
    np.testing.assert_array_equal(np.isnan(ops.convert_to_numpy(gradient)).all(axis=-1), wrong)


def test_the_error_names_what_is_wrong():
    with pytest.raises(
        ValueError, match=r"^labels must be integers in \[0, 3\), got \[-1.0, 7.0"
    ):
        losses.AMSoftmax()([-1, 2, 7], SCORES)


@pytest.mark.parametrize("labels", [[NAN, 0, 1], [0, NAN, 1], [1, 1, NAN]])
@pytest.mark.parametrize("loss", [DENSE, SPARSE])
def test_nan_labels_give_nan(loss, labels):
    labels = np.array([labels, [0, 0, 1], [1, 1, 1]], "float32")
    each = losses.MultilabelCrossentropy(sparse=loss.sparse, reduction=None)(labels, SCORES)
    np.testing.assert_array_equal(np.isnan(ops.convert_to_numpy(each)), [True, False, False])


def test_where_scores_are_masked_a_label_may_be_anything():
    scores = SCORES.copy()
    scores[:, 2] = -16384
    labels = np.array([[0, 1, NAN], [0, 1, -100], [1, 0, 2]], "float32")
    expected = DENSE(labels[:, :2], scores[:, :2])
    assert float(DENSE(labels, scores)) == float(expected)


@pytest.mark.parametrize("loss", [DENSE, SPARSE])
def test_an_empty_batch_is_that_of_keras(loss):
    labels, scores = np.zeros((0, 3), "float32"), np.zeros((0, 3), "float32")
    expected = ops.convert_to_numpy(keras.losses.BinaryCrossentropy()(labels, scores))
    np.testing.assert_array_equal(ops.convert_to_numpy(loss(labels, scores)), expected)
    spans = losses.MultilabelCrossentropy(class_axes=2, sparse=loss.sparse, reduction="sum")
    labels = np.zeros((0, 2, 4, 2) if loss.sparse else (0, 2, 4, 4), "float32")
    assert float(spans(labels, np.zeros((0, 2, 4, 4), "float32"))) == 0


def test_shapes():
    for make in (losses.AMSoftmax, losses.ArcFace):
        for labels in (np.zeros(1), np.zeros((1, 1)), np.zeros((2, 3)), np.zeros((1, 3))):
            with pytest.raises(ValueError, match="labels must have"):
                make()(labels, SCORES)
    one, two = ops.ones((4,)), ops.ones((4, 1))
    with pytest.raises(ValueError, match=r"fake must have the shape of real \(4,\)"):
        losses.Relativistic().discriminator(one, two)
    for scores, x in (((one, two), (two, two)), ((one, one), (two, two[:1]))):
        with pytest.raises(ValueError, match="fake must have the shape of"):
            losses.GANQP().discriminator(*scores, *x)
    with pytest.raises(ValueError, match=r"x_real must have pairs, in shape \(4, 1\)"):
        losses.GANQP().discriminator(one, one, two[:1], two[:1])
