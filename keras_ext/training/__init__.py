"""What changes how a training step is computed, without a train_step per backend."""

from keras_ext.training.batch_weight import BatchWeightModel
from keras_ext.training.ema_evaluation import EvaluateWithEMA

__all__ = ["BatchWeightModel", "EvaluateWithEMA"]
