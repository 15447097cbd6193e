"""Multilabel cross-entropy (ZLPR): softmax cross-entropy for any number of true classes.

Each true class shall score above a threshold s_0, each other one below, and as in the softmax
the worst decide, so thousands of negatives need no weight against one positive:

    loss = log(1 + Σ_neg exp(s_i - s_0)) + log(1 + Σ_pos exp(s_0 - s_j))

Decode by s > s_0, usually 0. Without a threshold only the order counts, and the loss

    log(1 + Σ_neg Σ_pos exp(s_i - s_j))

is softmax cross-entropy for one positive. Soft labels t weigh the sums by 1 - t and t; then
the minimum is where sigmoid(2 (s - s_0)) = t, and above zero unless t is 0 or 1.

Exact to rounding however small: both parts are softplus(logsumexp). The sparse form of the
articles takes the positives off a log-sum-exp over all classes, which cancels: in float32 it
gives -0.07 for one positive at 12, and a wrong constant beyond. Here the labels are struck out
of the scores instead.

Scores of -10,000 and below are masked: they contribute nothing, neither as negatives nor as
labels, and get no gradient, be they -16384 (`GlobalPointer`), -1e12 (bert4keras) or -inf.

Cost: a few passes over the scores. Sparse labels save the dense tensor of labels, which for
spans is as large as the scores.

Source: kexue.fm/archives/7359, 9064, 8888; Su et al. 2022, arXiv 2208.02955.
"""

import math
from typing import Any

import keras
from keras import ops

from keras_ext.labels import check_shape, in_range, nan_unless
from keras_ext.losses.base import Loss
from keras_ext.numerics import LOG_ZERO, at_least_float32, cast_up

LOWEST = -1e4  # scores up to here are masked


def multilabel_crossentropy(
    y_true: Any, y_pred: Any, threshold: Any = 0.0, class_axes: int = 1
) -> Any:
    """Multilabel cross-entropy of labels in [0, 1].

    Args:
        y_true: like `y_pred`: 1 for true classes, 0 for others, soft labels between.
        y_pred: scores (..., classes), or with more `class_axes` e.g. (..., length, length).
        threshold: s_0, a number or a tensor (...), such as the score of a class of its own,
            to learn it; None for none. Default: 0.
        class_axes: how many axes, from the last, number the classes. Default: 1.

    Returns: losses (...), in float32 (float64 for float64 scores).

    Raises:
        ValueError: the shapes do not fit, or labels can be seen to be outside of [0, 1]
            (`keras_ext.labels`; otherwise the loss is NaN, as it is for labels of NaN).

    Example:
        >>> loss = multilabel_crossentropy(np.array([0, 1, 1]), np.array([-9.0, 9.0, 0.0]))
        >>> round(float(loss), 4)  # log(1 + e⁻⁹) + log(1 + e⁻⁹ + e⁰)
        0.6933
    """
    y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
    scores = _flat_scores(y_pred, class_axes)
    check_shape("y_true", y_true, y_pred.shape, "the shape of y_pred")
    masked = scores <= LOWEST
    # Where nothing counts a label may be anything.
    labels = ops.reshape(ops.cast(y_true, scores.dtype), ops.shape(scores))
    labels = ops.where(masked, 0, labels)
    inside = ops.logical_and(labels >= 0, labels <= 1)
    in_range("y_true", labels, "in [0, 1]", ops.logical_or(inside, ops.isnan(labels)))
    is_pos, is_neg = labels > 0, labels < 1
    pos = ops.log(ops.where(is_pos, labels, 1)) - scores
    neg = ops.log1p(-ops.where(is_neg, labels, 0)) + scores
    pos = ops.where(ops.logical_or(masked, ops.logical_not(is_pos)), LOG_ZERO, pos)
    neg = ops.where(ops.logical_or(masked, ops.logical_not(is_neg)), LOG_ZERO, neg)
    return nan_unless(ops.all(inside, axis=-1), _join(neg, pos, threshold))


def sparse_multilabel_crossentropy(
    y_true: Any,
    y_pred: Any,
    threshold: Any = 0.0,
    class_axes: int = 1,
    mask_zero: bool = False,
) -> Any:
    """Multilabel cross-entropy of a list of true classes.

    Args:
        y_true: class numbers (..., max_labels), or with several class axes the coordinates
            of the classes (..., max_labels, class_axes), such as (start, end). What lies
            outside of the scores is padding, -1 for instance. Repeated labels count once.
        y_pred, threshold, class_axes: as for `multilabel_crossentropy`.
        mask_zero: labels 0 or (0, 0) are padding too, and this class counts nowhere, as in
            bert4keras. Default: False.

    Returns: losses (...), in float32 (float64 for float64 scores).

    Raises:
        ValueError: the shapes do not fit, or labels can be seen to be fractions
            (`keras_ext.labels`; otherwise the loss is NaN, as it is for labels of NaN).

    Example:
        >>> loss = sparse_multilabel_crossentropy(np.array([2, -1]), np.array([0.0, -9, 9]))
        >>> round(float(loss), 4)  # log(1 + e⁰ + e⁻⁹) + log(1 + e⁻⁹)
        0.6933
    """
    y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
    scores = _flat_scores(y_pred, class_axes)
    labels, y_true = y_true, ops.cast(y_true, "int32")
    numbers = _class_numbers(y_true, y_pred, class_axes)
    whole = ops.equal(ops.cast(y_true, labels.dtype), labels)  # no fraction, no NaN
    nan = ops.isnan(ops.cast(labels, scores.dtype))
    in_range("y_true", labels, "integers", ops.logical_or(whole, nan))
    whole = ops.all(whole, axis=-1 if class_axes == 1 else (-2, -1))
    scores = ops.where(scores <= LOWEST, LOG_ZERO, scores)
    # A first column of nothing, to which padding points; with mask_zero in place of class 0.
    if mask_zero:
        scores = scores[..., 1:]
    else:
        numbers = numbers + 1
    scores = ops.pad(
        scores, [(0, 0)] * (len(scores.shape) - 1) + [(1, 0)], "constant", LOG_ZERO
    )
    numbers = ops.maximum(numbers, 0)
    pos = ops.take_along_axis(scores, numbers, axis=-1)
    absent = ops.logical_or(pos <= LOWEST, _repeated(numbers))
    pos = ops.where(absent, LOG_ZERO, -pos)  # (..., max_labels)
    losses = _join(_strike_out(scores, numbers), pos, threshold)
    return nan_unless(whole, losses)


@keras.saving.register_keras_serializable(package="keras_ext")
class MultilabelCrossentropy(Loss):
    """Softmax cross-entropy for any number of true classes (ZLPR).

        log(1 + Σ_neg exp(s_i - s_0)) + log(1 + Σ_pos exp(s_0 - s_j))

    For spans, scores (batch, heads, length, length) of `GlobalPointer`, `class_axes=2` makes
    each head of each text one classification over all spans. The default reduction is the
    mean over these; for the mean over the texts of the sum over the heads (GPLinker) compile
    with `loss_weights=heads`. Sample weights (batch,) weigh all heads of a text.

    Args:
        class_axes: how many axes of the scores, from the last, number the classes: 1 for
            (batch, classes), 2 for spans. Default: 1.
        sparse: labels are lists of classes instead of one number in [0, 1] for each class.
            Default: False.
        mask_zero: with `sparse`, label 0 or (0, 0) is padding, and this class counts nowhere.
            Default: False.
        threshold: s_0; classes are decoded by s > s_0. None compares positives and negatives
            with each other only. Default: 0.
        reduction, name, dtype: as for `keras.losses.Loss`; the computation is in float32 at
            least.

    Call arguments:
        y_true: like `y_pred`, soft labels allowed; with `sparse` class numbers
            (batch, max_labels), or spans (batch, heads, max_labels, 2) as (start, end), both
            inclusive. What lies outside of the scores is padding, -1 for instance.
        y_pred: scores (batch, ..., classes), not probabilities.

    Raises:
        ValueError: `class_axes` is not a positive integer, `mask_zero` comes without
            `sparse`, or `threshold` is not a finite number; in calls, the shapes do not fit,
            or labels are outside of [0, 1] (compiled: the loss is NaN).

    Example:
        >>> loss = MultilabelCrossentropy(class_axes=2, sparse=True)
        >>> spans = np.array([[[[0, 1], [-1, -1]]]])  # one text, one head, one span
        >>> round(float(loss(spans, np.array([[[[-9.0, 9.0], [-16384, -9]]]]))), 6)
        0.00037

    Reference: kexue.fm/archives/7359, 9064; Su et al. 2022, arXiv 2208.02955.
    """

    def __init__(
        self,
        class_axes: int = 1,
        sparse: bool = False,
        mask_zero: bool = False,
        threshold: float | None = 0.0,
        reduction: str | None = "sum_over_batch_size",
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        _check_class_axes(class_axes)
        if mask_zero and not sparse:
            raise ValueError(
                "mask_zero must be False without sparse=True, got True: dense labels have no "
                "padding. Leave class 0 out of the scores, or set sparse=True."
            )
        if threshold is not None and not math.isfinite(threshold):
            raise ValueError(f"threshold must be a finite number or None, got {threshold}.")
        dtype = keras.dtype_policies.get(dtype or keras.config.floatx()).compute_dtype
        # Keras casts the labels to this dtype too: bfloat16 has no class number 257.
        super().__init__(name, reduction, at_least_float32(dtype))
        self.class_axes = class_axes
        self.sparse = sparse
        self.mask_zero = mask_zero
        self.threshold = threshold

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        if sample_weight is not None:  # Keras would align (batch,) with the heads
            sample_weight = ops.convert_to_tensor(sample_weight, self.dtype)
            shape = ops.shape(y_pred)[: -self.class_axes]
            if len(sample_weight.shape) > len(shape) and sample_weight.shape[-1] == 1:
                sample_weight = ops.squeeze(sample_weight, axis=-1)  # as the losses of Keras do
            for _ in range(len(shape) - len(sample_weight.shape)):
                sample_weight = ops.expand_dims(sample_weight, -1)
            sample_weight = ops.broadcast_to(sample_weight, shape)
        return super().__call__(y_true, y_pred, sample_weight)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        if self.sparse:
            return sparse_multilabel_crossentropy(
                y_true, y_pred, self.threshold, self.class_axes, self.mask_zero
            )
        return multilabel_crossentropy(y_true, y_pred, self.threshold, self.class_axes)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "dtype": self.dtype,
            "class_axes": self.class_axes,
            "sparse": self.sparse,
            "mask_zero": self.mask_zero,
            "threshold": self.threshold,
        }


def _join(neg: Any, pos: Any, threshold: Any) -> Any:
    """The loss from the exponents of negatives and positives."""
    neg, pos = ops.logsumexp(neg, axis=-1), ops.logsumexp(pos, axis=-1)
    if threshold is None:
        return ops.softplus(neg + pos)
    return ops.softplus(neg - threshold) + ops.softplus(pos + threshold)


def _flat_scores(y_pred: Any, class_axes: int) -> Any:
    """The scores (..., classes) in float32 at least."""
    _check_class_axes(class_axes)
    if len(y_pred.shape) < class_axes:
        raise ValueError(
            f"y_pred must have class_axes={class_axes} axes or more, got shape "
            f"{tuple(y_pred.shape)}."
        )
    y_pred = cast_up(y_pred)
    shape = ops.shape(y_pred)
    # Counted, for -1 says nothing about an empty batch.
    return ops.reshape(y_pred, (*shape[:-class_axes], math.prod(shape[-class_axes:])))


def _class_numbers(y_true: Any, y_pred: Any, class_axes: int) -> Any:
    """Numbers (..., max_labels) of the classes in the flattened scores, -1 for padding."""
    expected = (*y_pred.shape[:-class_axes], None)
    if class_axes == 1:
        check_shape("y_true", y_true, expected, "class numbers of shape")
        coordinates = [y_true]
    else:
        check_shape("y_true", y_true, (*expected, class_axes), "coordinates of shape")
        coordinates = ops.unstack(y_true, class_axes, axis=-1)
    number, inside = 0, True
    for coordinate, size in zip(coordinates, ops.shape(y_pred)[-class_axes:], strict=True):
        number = number * size + coordinate
        inside = ops.logical_and(inside, coordinate >= 0)
        inside = ops.logical_and(inside, coordinate < size)
    return ops.where(inside, number, -1)


def _repeated(numbers: Any) -> Any:
    """True where the same number stands earlier in the list."""
    place = ops.arange(ops.shape(numbers)[-1])
    same = ops.equal(ops.expand_dims(numbers, -1), ops.expand_dims(numbers, -2))
    return ops.any(ops.logical_and(same, place[:, None] > place), axis=-1)


def _strike_out(scores: Any, numbers: Any) -> Any:
    """The scores without those of the given columns, of each row."""
    shape = ops.shape(scores)
    rows = math.prod(shape[:-1])
    scores = ops.reshape(scores, (rows, shape[-1]))
    numbers = ops.reshape(numbers, (rows, ops.shape(numbers)[-1]))
    rows = ops.zeros_like(numbers) + ops.arange(rows)[:, None]
    places = ops.reshape(ops.stack([rows, numbers], axis=-1), (-1, 2))
    nothing = ops.full_like(places[:, 0], LOG_ZERO, dtype=scores.dtype)
    return ops.reshape(ops.scatter_update(scores, places, nothing), shape)


def _check_class_axes(class_axes: int) -> None:
    if class_axes != int(class_axes) or class_axes < 1:
        raise ValueError(f"class_axes must be a positive integer, got {class_axes}.")
