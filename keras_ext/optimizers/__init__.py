"""Optimizer wrappers. Each owns an inner optimizer: `Wrapper(keras.optimizers.Adam(), ...)`."""

from keras_ext.optimizers.accumulation import AccumOptimizer
from keras_ext.optimizers.wrapper import OptimizerWrapper

__all__ = ["AccumOptimizer", "OptimizerWrapper"]
