"""The learning rate of fine-tuning: a linear rise, then a fall to zero or none."""

import math

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_ext_clue")
class WarmupDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Rise to `peak` over the first `warmup` updates, then fall until update `total`.

        rise      peak (t + 1) / warmup
        constant  peak
        linear    peak (1 - f)                   f = (t - warmup) / (total - warmup)
        cosine    peak (1 + cos(pi f)) / 2

    Args:
        peak: the highest learning rate.
        total: updates of the whole run.
        warmup: updates of the rise, less than `total`.
        kind: "constant", "linear" or "cosine".

    Example:
        >>> keras.optimizers.Adam(WarmupDecay(2e-5, total=1000, warmup=100, kind="linear"))
    """

    def __init__(self, peak: float, total: int, warmup: int, kind: str):
        self.peak, self.total, self.warmup, self.kind = peak, total, warmup, kind

    def __call__(self, step):
        step = ops.cast(step, "float32")
        rise = ops.minimum((step + 1) / max(self.warmup, 1), 1.0)
        done = ops.clip((step - self.warmup) / max(self.total - self.warmup, 1), 0.0, 1.0)
        if self.kind == "constant":
            return self.peak * rise
        if self.kind == "linear":
            return self.peak * rise * (1 - done)
        return self.peak * rise * (1 + ops.cos(math.pi * done)) / 2

    def get_config(self):
        return {
            "peak": self.peak,
            "total": self.total,
            "warmup": self.warmup,
            "kind": self.kind,
        }
