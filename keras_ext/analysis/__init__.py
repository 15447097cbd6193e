"""What a model computes and what it costs, beside training."""

from keras_ext.analysis.attention_rank import attention_rank
from keras_ext.analysis.model_flops import model_flops
from keras_ext.analysis.transformer_flops import crossover, plot_flops, transformer_flops

__all__ = [
    "attention_rank",
    "crossover",
    "model_flops",
    "plot_flops",
    "transformer_flops",
]
