"""Methods from papers and kexue.fm as Keras 3 code: optimizers, layers, models, text."""

from keras_ext import (
    analysis,
    generation,
    layers,
    losses,
    models,
    optimizers,
    text,
    training,
)

__version__ = "0.1.0"
__all__ = [
    "analysis",
    "generation",
    "layers",
    "losses",
    "models",
    "optimizers",
    "text",
    "training",
]
