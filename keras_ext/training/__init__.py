"""What changes how a training step is computed, without a train_step per backend."""

from keras_ext.training.batch_weight import BatchWeightModel
from keras_ext.training.bigan_qp import BiGANQP
from keras_ext.training.ema_evaluation import EvaluateWithEMA
from keras_ext.training.feature_redraw import RedrawFeatures
from keras_ext.training.gan import SingleLossGAN
from keras_ext.training.gradient_normalization import GradientNormalized
from keras_ext.training.gradient_penalty import GradientPenalty
from keras_ext.training.theseus import (
    ConstantReplacement,
    LinearReplacement,
    build_theseus_model,
    extract_successor,
)

__all__ = [
    "BatchWeightModel",
    "BiGANQP",
    "ConstantReplacement",
    "EvaluateWithEMA",
    "GradientNormalized",
    "GradientPenalty",
    "LinearReplacement",
    "RedrawFeatures",
    "SingleLossGAN",
    "build_theseus_model",
    "extract_successor",
]
