"""Draw the random features of FAVOR+ anew while training.

One projection for all of training lets a model fit its errors. Drawn anew now and then, they
cannot be learnt.

Source: Choromanski et al. 2020, arXiv 2009.14794.
"""

from typing import Any

import keras

from keras_ext import backend
from keras_ext.layers.attention.favor import FavorAttention
from keras_ext.layers.every import every_layer


class RedrawFeatures(keras.callbacks.Callback):
    """Call `redraw` of all `FavorAttention` layers of a model every so many batches.

    Args:
        every: batches between two redraws. Default: 1000.

    Raises:
        ValueError: `every` is not positive, or the model has no such layer.

    Example:
        >>> inputs = keras.Input((5, 4))
        >>> favor = keras.Model(inputs, FavorAttention(2, 4)(inputs, inputs))
        >>> favor.compile("sgd", "mse")
        >>> x = y = np.ones((8, 5, 4))
        >>> history = favor.fit(x, y, verbose=0, callbacks=[RedrawFeatures(every=100)])
    """

    def __init__(self, every: int = 1000) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"every must be positive, got {every}.")
        self.every = every
        self.since = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self.layers = [x for x in every_layer(self.model) if isinstance(x, FavorAttention)]
        if not self.layers:
            raise ValueError(f"{self.model.name} has no FavorAttention to redraw.")

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self.last = -1

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self.since += batch - self.last  # more than 1 with steps_per_execution
        self.last = batch
        if self.since < self.every:
            return
        self.since = 0
        backend.sync_variables(self.model)
        for layer in self.layers:
            layer.redraw()
