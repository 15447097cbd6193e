"""Keras layers; each file holds the function on tensors first, then the layer."""

from keras_ext.layers.attention.multi_head import MultiHeadAttention, dot_product_attention
from keras_ext.layers.bias import Bias
from keras_ext.layers.embeddings import PositionEmbedding, SegmentEmbedding, TokenEmbedding
from keras_ext.layers.transformer import FeedForward, TransformerBlock, gelu_tanh

__all__ = [
    "Bias",
    "FeedForward",
    "MultiHeadAttention",
    "PositionEmbedding",
    "SegmentEmbedding",
    "TokenEmbedding",
    "TransformerBlock",
    "dot_product_attention",
    "gelu_tanh",
]
