"""Exact gradient accumulation in `fit` when micro-batches differ in size.

The mean of the gradients of two means is not the gradient of the mean over both, unless
they have the same number of examples (or tokens). `AccumOptimizer` weighs each micro-batch
by w_i, but an optimizer in `fit` sees gradients and nothing else of a batch. So w_i travels
as one: the model owns a trainable scalar c, and its loss is

    L + w (c - stop_gradient(c)),        d/dc = w,  value = L

`AccumOptimizer` takes the gradient of c as the weight and never updates c, clips it, or
keeps state for it.
"""

import keras
from keras import ops

from keras_ext.optimizers import nesting
from keras_ext.optimizers.accumulation import AccumOptimizer


@keras.saving.register_keras_serializable(package="keras_ext")
class BatchWeightModel(keras.Model):
    """A functional model whose batches tell `AccumOptimizer` how much they weigh.

    The weight is the sum of the sample weights if there are any (use a loss with
    `reduction="mean_with_sample_weight"`, which divides by that sum), otherwise the number
    of examples. For a mean over something else, tokens for instance, override
    `batch_weight` in a subclass: it returns the number that the loss divides by.

    Args:
        inputs, outputs, name: as for `keras.Model`.

    Raises:
        ValueError: at the first training step, if the model was compiled without an
            `AccumOptimizer` (another optimizer would train the scalar, and clip with it).

    Example:
        >>> model = BatchWeightModel(model.inputs, model.outputs)
        >>> model.compile(AccumOptimizer("adam", 4), loss="mse")
        >>> history = model.fit(x, y, batch_size=12, verbose=0)  # the last batch is smaller
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.carrier = self.add_weight(
            shape=(), initializer="zeros", dtype="float32", name="accum_batch_weight"
        )
        self.carrier.carries_batch_weight = True  # so optimizers know it

    def batch_weight(self, x, y, y_pred, sample_weight):
        """What the loss of this batch was divided by; a scalar."""
        if sample_weight is not None:
            return ops.sum(ops.cast(sample_weight, "float32"))
        return ops.cast(ops.shape(keras.tree.flatten(x)[0])[0], "float32")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        if not training:
            return loss
        self._check_optimizer()
        weight = ops.stop_gradient(self.batch_weight(x, y, y_pred, sample_weight))
        carrier = self.carrier
        return loss + ops.cast(weight * (carrier - ops.stop_gradient(carrier)), loss.dtype)

    def _check_optimizer(self):
        if nesting.find(self.optimizer, AccumOptimizer) is None:
            raise ValueError(
                "BatchWeightModel needs an AccumOptimizer, got "
                f"optimizer={self.optimizer.name!r}. Compile it with "
                "AccumOptimizer(optimizer, accum_steps), or use a keras.Model."
            )
