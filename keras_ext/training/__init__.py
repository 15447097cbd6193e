"""What changes how a training step is computed, without a train_step per backend."""

from keras_ext.training.bigan_qp import BiGANQP
from keras_ext.training.critic_penalty import CriticPenalty
from keras_ext.training.ema_evaluation import EvaluateWithEMA
from keras_ext.training.feature_redraw import RedrawFeatures
from keras_ext.training.fgm import FGM
from keras_ext.training.gan import SingleLossGAN
from keras_ext.training.gradient_penalty import GradientPenalty
from keras_ext.training.objective import Objective
from keras_ext.training.objective_model import ObjectiveMixin, with_objective
from keras_ext.training.r_drop import RDrop
from keras_ext.training.step import Batch, Step
from keras_ext.training.theseus import (
    ConstantReplacement,
    LinearReplacement,
    build_theseus_model,
    extract_successor,
)
from keras_ext.training.vat import VAT

__all__ = [
    "FGM",
    "VAT",
    "Batch",
    "BiGANQP",
    "ConstantReplacement",
    "CriticPenalty",
    "EvaluateWithEMA",
    "GradientPenalty",
    "LinearReplacement",
    "Objective",
    "ObjectiveMixin",
    "RDrop",
    "RedrawFeatures",
    "SingleLossGAN",
    "Step",
    "build_theseus_model",
    "extract_successor",
    "with_objective",
]
