"""Keras layers; each file holds the function on tensors first, then the layer."""

from keras_ext.layers.attention import masks
from keras_ext.layers.attention.dot_product import dot_product_attention
from keras_ext.layers.attention.favor import (
    FavorAttention,
    orthogonal_projection,
    random_features,
)
from keras_ext.layers.attention.feature_sums import linear_attention
from keras_ext.layers.attention.gated import GatedAttentionBlock, GatedAttentionUnit
from keras_ext.layers.attention.hwfa import hwfa_layers
from keras_ext.layers.attention.linear import LinearAttention
from keras_ext.layers.attention.multi_head import MultiHeadAttention
from keras_ext.layers.attention.polynomial import PolynomialAttention, polynomial_features
from keras_ext.layers.attention.positions import RotaryPosition, rotary_embedding
from keras_ext.layers.attention.relative import RelativePosition, T5Bias
from keras_ext.layers.attention.rerope import ReRoPE
from keras_ext.layers.bias import Bias
from keras_ext.layers.blocks import blocks
from keras_ext.layers.cosine import CosineDense, cosine_scores
from keras_ext.layers.crf import CRF
from keras_ext.layers.embeddings import PositionEmbedding, SegmentEmbedding, TokenEmbedding
from keras_ext.layers.global_pointer import (
    EfficientGlobalPointer,
    GlobalPointer,
    mask_spans,
    span_scores,
)
from keras_ext.layers.gradient_normalization import GradientNormalized
from keras_ext.layers.gradient_stop import GradientReversal, gradient_only
from keras_ext.layers.linear_chain import (
    crf_decode,
    crf_log_partition,
    crf_marginals,
    crf_negative_log_likelihood,
    crf_path_score,
)
from keras_ext.layers.norms import ConditionalLayerNormalization, RMSNorm
from keras_ext.layers.other_tokens import OtherTokens
from keras_ext.layers.segment_mask import PrefixMask
from keras_ext.layers.theseus import TheseusModule
from keras_ext.layers.transformer import FeedForward, TransformerBlock, gelu_erf, gelu_tanh
from keras_ext.layers.with_mask import WithMask

__all__ = [
    "CRF",
    "Bias",
    "ConditionalLayerNormalization",
    "CosineDense",
    "EfficientGlobalPointer",
    "FavorAttention",
    "FeedForward",
    "GatedAttentionBlock",
    "GatedAttentionUnit",
    "GlobalPointer",
    "GradientNormalized",
    "GradientReversal",
    "LinearAttention",
    "MultiHeadAttention",
    "OtherTokens",
    "PolynomialAttention",
    "PositionEmbedding",
    "PrefixMask",
    "RMSNorm",
    "ReRoPE",
    "RelativePosition",
    "RotaryPosition",
    "SegmentEmbedding",
    "T5Bias",
    "TheseusModule",
    "TokenEmbedding",
    "TransformerBlock",
    "WithMask",
    "blocks",
    "cosine_scores",
    "crf_decode",
    "crf_log_partition",
    "crf_marginals",
    "crf_negative_log_likelihood",
    "crf_path_score",
    "dot_product_attention",
    "gelu_erf",
    "gelu_tanh",
    "gradient_only",
    "hwfa_layers",
    "linear_attention",
    "mask_spans",
    "masks",
    "orthogonal_projection",
    "polynomial_features",
    "random_features",
    "rotary_embedding",
    "span_scores",
]
