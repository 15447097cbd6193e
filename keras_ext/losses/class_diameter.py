"""The margin that a data set asks for: the mean diameter of its classes.

The derivation of margin softmax (`margin_softmax.py`) needs, for a pair of another sentence z3
of the same class 1 and a sentence z2 of another class 2, the margin

    m = d(z3, c1) + d(z2, c2),

on average two mean radii. So: train with margin 0, measure m, train again with it.

d = 1 - cos is the distance whose difference the loss compares, so m comes in the units of
`AMSoftmax`. Approximate in two ways: one mean replaces all pairs, and the triangle inequality
holds for sqrt(1 - cos), for 1 - cos itself only up to a factor of 2.

Source: kexue.fm/archives/8656.
"""

import numpy as np
from keras import ops

from keras_ext.labels import class_numbers


def adaptive_margin(
    features: np.ndarray, labels: np.ndarray, centers: np.ndarray | None = None
) -> float:
    """Mean class diameter, the margin to retrain `AMSoftmax` with.

        m = 2 · mean over classes k of mean_{z in k} (1 - cos(z, c_k))

    Args:
        features: (examples, dim), of a model that was trained with margin 0.
        labels: class numbers (examples,). Classes without examples do not count.
        centers: (dim, classes), the kernel of its `CosineDense`. Default: the mean direction of
            each class.

    Raises:
        ValueError: a class has no center, features and labels differ in length, or there are
            none.

    Example:
        >>> features = np.array([[1.0, 0.0], [0.0, 1.0]])
        >>> round(adaptive_margin(features, [0, 0], centers=np.array([[1.0], [0.0]])), 3)
        1.0
    """
    features, labels = _normalize(np.asarray(features, float)), np.asarray(labels)
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"labels must be class numbers, one for each of the {len(features)} features, "
            f"got shape {labels.shape}."
        )
    if not len(features):
        raise ValueError("features must have one row or more, got none.")
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if centers is None:
        directions = np.zeros((len(counts), features.shape[1]))
        np.add.at(directions, classes, features)
        own = _normalize(directions)[classes]
    else:
        centers = np.asarray(centers, float).T
        fix = " centers has one column for each class."
        numbers, _ = class_numbers("labels", labels, len(centers), fix=fix)
        own = _normalize(centers)[ops.convert_to_numpy(numbers)]
    radii = np.bincount(classes, 1 - np.sum(features * own, axis=1)) / counts
    return float(2 * radii.mean())


def _normalize(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms != 0)
