"""Optimizers, and wrappers that own an inner one: `Wrapper(keras.optimizers.Adam(), ...)`."""

from keras_ext.optimizers import schedules
from keras_ext.optimizers.accumulation import AccumOptimizer
from keras_ext.optimizers.adafactor import RelativeAdafactor
from keras_ext.optimizers.additive_low_rank import AdditiveLowRankOptimizer
from keras_ext.optimizers.clipping import ClipOptimizer
from keras_ext.optimizers.ema import EMAOptimizer
from keras_ext.optimizers.galore import GaLoreOptimizer
from keras_ext.optimizers.layer_adaptation import LayerAdaptiveOptimizer
from keras_ext.optimizers.lazy import LazyOptimizer
from keras_ext.optimizers.lookahead import LookaheadOptimizer
from keras_ext.optimizers.lora import LoRAOptimizer
from keras_ext.optimizers.momentum_accumulation import (
    MomentumAccumAdam,
    MomentumAccumAdamW,
    MomentumAccumLamb,
    MomentumAccumSGD,
)
from keras_ext.optimizers.multipliers import MultiplierOptimizer, layerwise_decay
from keras_ext.optimizers.periodic import PeriodicOptimizer
from keras_ext.optimizers.random_projection import RandomProjectionOptimizer
from keras_ext.optimizers.tiger import Tiger
from keras_ext.optimizers.update_wrapper import UpdateWrapper
from keras_ext.optimizers.wrapper import OptimizerWrapper

__all__ = [
    "AccumOptimizer",
    "AdditiveLowRankOptimizer",
    "ClipOptimizer",
    "EMAOptimizer",
    "GaLoreOptimizer",
    "LayerAdaptiveOptimizer",
    "LazyOptimizer",
    "LoRAOptimizer",
    "LookaheadOptimizer",
    "MomentumAccumAdam",
    "MomentumAccumAdamW",
    "MomentumAccumLamb",
    "MomentumAccumSGD",
    "MultiplierOptimizer",
    "OptimizerWrapper",
    "PeriodicOptimizer",
    "RandomProjectionOptimizer",
    "RelativeAdafactor",
    "Tiger",
    "UpdateWrapper",
    "layerwise_decay",
    "schedules",
]
