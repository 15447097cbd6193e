"""A loss as a figure: exact over real rows, whatever the batches."""

import keras
from keras import ops


class MeanLoss(keras.metrics.Mean):
    """The mean of a loss over rows, each by its weight.

    Keras's own wrapper would take the mask of the outputs, which is of tokens, for one of rows.

    Args:
        loss: its `call` gives (rows, ...).
        name: of the figure.
    """

    def __init__(self, loss: keras.losses.Loss, name: str):
        super().__init__(name)
        self.loss = loss

    def update_state(self, y_true, y_pred, sample_weight=None):
        losses = self.loss.call(y_true, y_pred)
        for _ in losses.shape[1:]:
            losses = ops.mean(losses, axis=-1)
        return super().update_state(losses, sample_weight)
