"""What changes how a training step is computed, without a train_step per backend."""

from keras_ext.training.batch_weight import BatchWeightModel

__all__ = ["BatchWeightModel"]
