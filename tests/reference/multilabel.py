"""Multilabel cross-entropy in float64 NumPy, and the sparse form that cancels."""

import numpy as np


def loss(y_true, y_pred, threshold=0.0):
    """Of one row: Σ over all classes, weighed by the labels; masked ones are left out."""
    labels, scores = np.asarray(y_true, float), np.asarray(y_pred, float)
    labels, scores = labels[scores > -1e4], scores[scores > -1e4]
    with np.errstate(divide="ignore"):
        neg = np.logaddexp.reduce(np.append(np.log(1 - labels) + scores, -np.inf))
        pos = np.logaddexp.reduce(np.append(np.log(labels) - scores, -np.inf))
    if threshold is None:
        return np.logaddexp(0, neg + pos)
    return np.logaddexp(0, neg - threshold) + np.logaddexp(0, pos + threshold)


def gradient(y_true, y_pred, threshold=0.0):
    """Of one row, by the scores."""
    labels, scores = np.asarray(y_true, float), np.asarray(y_pred, float)
    kept = scores > -1e4
    neg = np.where(kept, (1 - labels) * np.exp(np.where(kept, scores - threshold, 0)), 0)
    pos = np.where(kept, labels * np.exp(np.where(kept, threshold - scores, 0)), 0)
    return neg / (1 + neg.sum()) - pos / (1 + pos.sum())


def rows(fn, y_true, y_pred, **arguments):
    """`fn` of each row along the last axis."""
    results = [fn(y_true[i], y_pred[i], **arguments) for i in np.ndindex(y_pred.shape[:-1])]
    return np.reshape(results, (*y_pred.shape[:-1], *np.shape(results[0])))


def clipped(y_true, y_pred, epsilon=1e-7):
    """The sparse form of bert4keras, of one row of true classes, in float32."""
    scores = np.append(np.asarray(y_pred, "float32"), np.float32(0))
    pos, every = scores[list(y_true)], np.logaddexp.reduce(scores)
    rest = np.float32(1) - np.exp(np.logaddexp.reduce(pos) - every)
    rest = np.log(np.clip(rest, np.float32(epsilon), np.float32(1)))
    return np.logaddexp.reduce(np.append(-pos, np.float32(0))) + every + rest
