"""Keras losses; each file holds the function on tensors first, then the loss."""

from keras_ext.losses.class_diameter import adaptive_margin
from keras_ext.losses.gan import GANQP, Hinge, NonSaturating, Relativistic, Wasserstein
from keras_ext.losses.margin_softmax import (
    AMSoftmax,
    ArcFace,
    ASoftmax,
    CombinedMargin,
    CosineSoftmax,
    SimpleASoftmax,
    margin_softmax_loss,
)
from keras_ext.losses.multilabel import (
    MultilabelCrossentropy,
    multilabel_crossentropy,
    sparse_multilabel_crossentropy,
)

__all__ = [
    "GANQP",
    "AMSoftmax",
    "ASoftmax",
    "ArcFace",
    "CombinedMargin",
    "CosineSoftmax",
    "Hinge",
    "MultilabelCrossentropy",
    "NonSaturating",
    "Relativistic",
    "SimpleASoftmax",
    "Wasserstein",
    "adaptive_margin",
    "margin_softmax_loss",
    "multilabel_crossentropy",
    "sparse_multilabel_crossentropy",
]
