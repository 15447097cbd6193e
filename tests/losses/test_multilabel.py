"""Multilabel cross-entropy: float64 values and gradients, sparse = dense, masks, invariants."""

import keras
import numpy as np
import pytest
from compiled import compiled, float64
from keras import ops
from reference import multilabel as reference

from keras_ext.backend import value_and_grad
from keras_ext.losses import (
    MultilabelCrossentropy,
    multilabel_crossentropy,
    sparse_multilabel_crossentropy,
)

RNG = np.random.default_rng(0)
SCORES = RNG.normal(0, 4, (6, 5)).astype("float32")
# No positive, one, two, all, a repeated one, the first; padded by -1 and by what is too large.
SETS = np.array(
    [
        [-1, -1, 9, -1, 5],
        [3, -1, -1, -1, -1],
        [-1, 4, 1, 7, -1],
        [4, 0, 1, 3, 2],
        [2, -1, 2, 2, -1],
        [0, -1, -1, -1, -1],
    ]
)
HARD = np.array([[i in row for i in range(5)] for row in SETS], "float32")
SOFT = RNG.uniform(size=(6, 5)).astype("float32")
MASKED = SCORES.copy()
MASKED[0] = -16384  # all
MASKED[1:3, 3:], MASKED[3, 4], MASKED[4, 0] = -np.inf, -1e12, -1e4


def numpy(x):
    return ops.convert_to_numpy(ops.cast(x, "float32"))


def losses_and_gradient(loss_fn, y_true, y_pred):
    def loss(y_pred):
        losses = loss_fn(y_true, y_pred)
        return ops.sum(losses), losses

    step = compiled(value_and_grad(loss, has_aux=True))
    (_, losses), gradient = step(ops.convert_to_tensor(y_pred))
    return losses, numpy(gradient)


@pytest.mark.parametrize("labels", [HARD, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize("scores", [SCORES, MASKED], ids=["scores", "masked"])
@pytest.mark.parametrize("threshold", [0.0, 1.5, None])
def test_values(labels, scores, threshold):
    losses = numpy(multilabel_crossentropy(labels, scores, threshold))
    expected = reference.rows(reference.loss, labels, scores, threshold=threshold)
    np.testing.assert_allclose(losses, expected, rtol=3e-6)
    assert (losses >= 0).all()
    assert np.isfinite(losses).all()


def test_float64_values():
    labels, scores = SOFT.astype("float64"), MASKED.astype("float64")
    loss = MultilabelCrossentropy(reduction=None, dtype="float64")
    sparse = MultilabelCrossentropy(sparse=True, reduction=None, dtype="float64")
    with float64():
        results = [
            ops.convert_to_numpy(loss(labels, scores)),
            ops.convert_to_numpy(sparse(SETS, scores)),
        ]
    for truth, result in zip((labels, HARD), results, strict=True):
        expected = reference.rows(reference.loss, truth, scores)
        np.testing.assert_allclose(result, expected, rtol=1e-13)


@pytest.mark.parametrize("labels", [HARD, SOFT], ids=["hard", "soft"])
def test_gradients_and_none_for_masked_scores(labels):
    _, result = losses_and_gradient(multilabel_crossentropy, labels, MASKED)
    expected = reference.rows(reference.gradient, labels, MASKED)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-7)
    assert (result[MASKED <= -1e4] == 0).all()
    assert (result[3, :4] != 0).all()


@pytest.mark.parametrize(("dtype", "threshold"), [("float32", -0.5), ("bfloat16", None)])
def test_sparse_equals_dense(dtype, threshold):
    scores = ops.cast(MASKED, dtype)

    def sparse(y_true, y_pred):
        return sparse_multilabel_crossentropy(y_true, y_pred, threshold)

    def dense(y_true, y_pred):
        return multilabel_crossentropy(y_true, y_pred, threshold)

    losses, result = losses_and_gradient(sparse, SETS, scores)
    expected_losses, expected = losses_and_gradient(dense, HARD, scores)
    assert keras.backend.standardize_dtype(losses.dtype) == "float32"
    np.testing.assert_allclose(numpy(losses), numpy(expected_losses), rtol=1e-6)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-7)


def test_with_mask_zero_the_first_class_counts_nowhere():
    def sparse(y_pred):
        return sparse_multilabel_crossentropy(SETS, y_pred, mask_zero=True)

    without = MASKED.copy()
    without[:, 0] = -16384
    expected = numpy(multilabel_crossentropy(HARD, without))
    np.testing.assert_allclose(numpy(compiled(sparse)(MASKED)), expected, rtol=1e-6)


def test_large_scores_where_the_usual_sparse_form_fails():
    scores = np.full((6, 5), -6, "float32")
    scores[:, 0] = [12, 20, 40, 9e3, -9e3, 0]
    scores[2:4, 1:] = [[-40] * 4, [-9e3] * 4]
    labels = np.zeros((6, 1), "int32")
    expected = reference.rows(reference.loss, np.eye(5)[labels[:, 0]], scores)
    for row, error in [(0, -0.07), (1, 3.9)]:  # it is that wrong
        assert abs(reference.clipped([0], scores[row]) - expected[row] - error) < 0.1
    assert expected[2] < 1e-15
    assert expected[4] > 8999
    for losses in (
        multilabel_crossentropy(np.eye(5, dtype="float32")[labels[:, 0]], scores),
        sparse_multilabel_crossentropy(labels, scores),
    ):
        np.testing.assert_allclose(numpy(losses), expected, rtol=5e-6)


def test_one_positive_without_threshold_is_the_softmax():
    labels = np.array([3, 0, 4, 2, 2, 1])
    losses = sparse_multilabel_crossentropy(labels[:, None], SCORES, threshold=None)
    expected = keras.losses.sparse_categorical_crossentropy(labels, SCORES, from_logits=True)
    np.testing.assert_allclose(numpy(losses), numpy(expected), rtol=1e-5, atol=1e-6)


def test_a_threshold_of_its_own_class_is_learned():
    thresholds = SCORES[:, 0]
    losses = multilabel_crossentropy(
        HARD[:, 1:], SCORES[:, 1:], ops.convert_to_tensor(thresholds)
    )
    expected = [
        reference.loss(*row) for row in zip(HARD[:, 1:], SCORES[:, 1:], thresholds, strict=True)
    ]
    np.testing.assert_allclose(numpy(losses), expected, rtol=1e-5)


def test_at_the_minimum_of_soft_labels_sigmoid_of_twice_the_score_is_the_label():
    best = 0.7 + np.log(SOFT / (1 - SOFT)) / 2
    _, result = losses_and_gradient(lambda t, s: multilabel_crossentropy(t, s, 0.7), SOFT, best)
    np.testing.assert_allclose(result, 0, atol=1e-6)
    moved = best + np.random.default_rng(1).normal(0, 0.1, best.shape)
    least, more = (numpy(multilabel_crossentropy(SOFT, s, 0.7)) for s in (best, moved))
    assert (least < more).all()
    assert least.min() > 0.1  # unlike that of hard labels


def test_classes_may_be_permuted():
    order = np.array([3, 1, 4, 0, 2])
    losses = multilabel_crossentropy(SOFT[:, order], MASKED[:, order])
    np.testing.assert_allclose(
        numpy(losses), numpy(multilabel_crossentropy(SOFT, MASKED)), rtol=1e-6
    )


def test_nan_scores_are_not_taken_for_masked_ones():
    scores = SCORES.copy()
    scores[:, 1] = np.nan  # a label in rows 2 and 3
    assert np.isnan(numpy(multilabel_crossentropy(HARD, scores))).all()
    assert np.isnan(numpy(sparse_multilabel_crossentropy(SETS, scores))).all()


def span_problem():
    """Scores (3, 3, 4, 4), spans (3, 3, 3, 2), and the same dense."""
    random = np.random.default_rng(2)
    scores = random.normal(0, 3, (3, 3, 4, 4)).astype("float32")
    scores[..., np.tri(4, k=-1, dtype=bool)] = -16384
    spans = np.sort(random.integers(0, 4, (3, 3, 3, 2)))
    spans[0, 1], spans[2, 2, 1:] = -1, [[0, 4], [4, 5]]  # too long is padding, not (1, 0)
    labels = np.zeros((3, 3, 4, 4), "float32")
    for text, head in np.ndindex(3, 3):
        for start, end in spans[text, head]:
            if 0 <= start <= end < 4:
                labels[text, head, start, end] = 1
    return scores, spans, labels


@pytest.mark.parametrize("mask_zero", [False, True])
def test_spans_are_one_classification_for_each_head(mask_zero):
    scores, spans, labels = span_problem()
    loss = MultilabelCrossentropy(2, sparse=True, mask_zero=mask_zero, reduction=None)
    losses = compiled(loss)(spans, scores)
    flat = [x.reshape(3, 3, 16)[..., int(mask_zero) :] for x in (labels, scores)]
    expected = reference.rows(reference.loss, *flat)
    np.testing.assert_allclose(numpy(losses), expected, rtol=3e-6)
    if not mask_zero:
        losses = compiled(MultilabelCrossentropy(class_axes=2, reduction=None))(labels, scores)
        np.testing.assert_allclose(numpy(losses), expected, rtol=3e-6)


def test_sample_weights_weigh_the_heads_of_a_text_together():
    scores, _, labels = span_problem()  # as many texts as heads
    losses = reference.rows(reference.loss, *(x.reshape(3, 3, 16) for x in (labels, scores)))
    weights = np.array([1.0, 2.0, 0.0])
    of_heads = np.random.default_rng(3).uniform(size=(3, 3))
    for reduction, sample_weight, expected in [
        ("sum", weights, weights @ losses.sum(1)),
        ("mean_with_sample_weight", weights, weights @ losses.mean(1) / 3),
        ("sum", of_heads, (of_heads * losses).sum()),
        ("sum", weights[:, None], weights @ losses.sum(1)),
    ]:
        loss = MultilabelCrossentropy(class_axes=2, reduction=reduction)
        result = compiled(loss)(labels, scores, sample_weight)
        np.testing.assert_allclose(numpy(result), expected, rtol=3e-6)


@pytest.mark.parametrize("sparse", [False, True])
def test_sample_weights_may_be_a_column_as_for_the_losses_of_keras(sparse):
    loss = MultilabelCrossentropy(sparse=sparse, reduction="sum")
    labels, weights = SETS if sparse else HARD, np.arange(6.0)
    result = loss(labels, SCORES, weights[:, None])
    assert float(result) == float(loss(labels, SCORES, weights))
    with pytest.raises(Exception, match=r"."):
        loss(labels, SCORES, np.ones((6, 2)))


def test_config_round_trip():
    loss = MultilabelCrossentropy(2, True, True, None, "sum", "spans", "bfloat16")
    config = loss.get_config()
    assert config["dtype"] == "float32"  # in bfloat16 class 257 would be 256
    copy = MultilabelCrossentropy.from_config(config)
    assert copy.get_config() == config
    for name in ("class_axes", "sparse", "mask_zero", "threshold", "reduction", "name"):
        assert getattr(copy, name) == getattr(loss, name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultilabelCrossentropy(0), "class_axes must be a positive integer, got 0"),
        (lambda: MultilabelCrossentropy(1.5), "class_axes must be a positive integer, got 1.5"),
        (lambda: MultilabelCrossentropy(mask_zero=True), "mask_zero must be False without"),
        (lambda: MultilabelCrossentropy(threshold=np.inf), "must be a finite number or None"),
        (
            lambda: MultilabelCrossentropy()(np.zeros((2, 1)), np.zeros((2, 4))),
            r"y_true must have the shape of y_pred \(2, 4\), got shape \(2, 1\)",
        ),
        (
            lambda: MultilabelCrossentropy(sparse=True)(np.zeros(2), np.zeros((2, 4))),
            r"y_true must have class numbers of shape \(2, None\), got shape \(2,\)",
        ),
        (
            lambda: MultilabelCrossentropy(2, True)(
                np.zeros((2, 3, 5)), np.zeros((2, 3, 4, 4))
            ),
            r"coordinates of shape \(2, 3, None, 2\), got shape \(2, 3, 5\)",
        ),
        (
            lambda: multilabel_crossentropy(np.zeros(4), np.zeros(4), class_axes=2),
            r"y_pred must have class_axes=2 axes or more, got shape \(4,\)",
        ),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
