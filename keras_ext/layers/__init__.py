"""Keras layers; each file holds the function on tensors first, then the layer."""

from keras_ext.layers.attention.multi_head import MultiHeadAttention, dot_product_attention
from keras_ext.layers.bias import Bias
from keras_ext.layers.cosine import CosineDense, cosine_scores
from keras_ext.layers.embeddings import PositionEmbedding, SegmentEmbedding, TokenEmbedding
from keras_ext.layers.gradient_stop import GradientReversal, gradient_only
from keras_ext.layers.theseus import TheseusModule
from keras_ext.layers.transformer import FeedForward, TransformerBlock, gelu_tanh

__all__ = [
    "Bias",
    "CosineDense",
    "FeedForward",
    "GradientReversal",
    "MultiHeadAttention",
    "PositionEmbedding",
    "SegmentEmbedding",
    "TheseusModule",
    "TokenEmbedding",
    "TransformerBlock",
    "cosine_scores",
    "dot_product_attention",
    "gelu_tanh",
    "gradient_only",
]
