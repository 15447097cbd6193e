"""The Kullback-Leibler divergence between two predictions of a model.

    KL(p || q) = Σ_i p_i (log p_i - log q_i)

over the last axis, then the mean as Keras takes it: with sample weights, and without masked
positions.
"""

from typing import Any

import keras
from keras import ops

from keras_ext import backend
from keras_ext.labels import in_range, nan_unless
from keras_ext.losses.base import Loss
from keras_ext.numerics import at_least_float32

TINY = 1e-7  # as in Keras's losses of probabilities


class Divergence(Loss):
    """KL(p || q). Called with p, q and sample weights."""

    def __init__(self, from_logits: bool, dtype: str) -> None:
        super().__init__(dtype=dtype)
        self.from_logits = from_logits

    def call(self, y_true: Any, y_pred: Any) -> Any:
        p, log_p, valid_p = self._distribution(y_true)
        _, log_q, valid_q = self._distribution(y_pred)
        rows = ops.sum(p * (log_p - log_q), axis=-1)
        return nan_unless(ops.logical_and(valid_p, valid_q), rows)

    def _distribution(self, y: Any) -> tuple[Any, Any, Any]:
        """Probabilities, their logarithms, and which rows are distributions."""
        if self.from_logits:
            return ops.softmax(y), ops.log_softmax(y), ops.ones_like(y[..., 0], dtype="bool")
        total = ops.sum(y, axis=-1)
        valid = ops.logical_and(ops.all(y >= 0, axis=-1), ops.abs(total - 1) < 0.02)
        # NaN, as where float16 overflows, stays NaN.
        seen = ops.logical_or(valid, ops.isnan(total))
        fix = " If the model returns logits, set from_logits=True."
        in_range("y_pred", total, "probabilities >= 0 that sum to 1", seen, fix)
        return y, ops.log(ops.maximum(y, TINY)), valid


def mean_divergence(p: Any, q: Any, sample_weight: Any, from_logits: bool) -> Any:
    """The mean of KL(p || q) over the rows of this replica, a scalar."""
    loss = Divergence(from_logits, at_least_float32(q.dtype))(p, q, sample_weight)
    return loss * backend.num_replicas()  # Keras has divided by them


def check_predictions(who: str, model: keras.Model, from_logits: bool) -> None:
    """Refuse predictions that are no distributions over the last axis, and another loss."""
    outputs = keras.tree.flatten(getattr(model, "outputs", None) or [])
    if len(outputs) > 1:
        raise ValueError(f"{who} needs a model of one output, got {[o.name for o in outputs]}.")
    if outputs and outputs[0].shape[-1] == 1:
        raise ValueError(
            f"{who} needs probabilities of all classes on the last axis, got outputs of the "
            f"shape {tuple(outputs[0].shape)}. Use two classes in place of a sigmoid."
        )
    told = getattr(getattr(model, "loss", None), "from_logits", from_logits)
    if told != from_logits:
        raise ValueError(
            f"{who} has from_logits={from_logits}, but the loss of compile has "
            f"from_logits={told}. Set both to what the model returns."
        )
