"""RoFormerV2: a RoFormer without biases, with RMS norms that have no weights.

    h     = RMS(Dropout(E_token[ids] + E_segment[segments]))
    block = RMS(x + Attention(x)), RMS(h + FeedForward(h))
    mlm   = h E_tokenᵀ

Kernels are drawn from truncated normals of standard deviation √(1/(N width)) for N layers, so
that what all blocks together add does not grow with N.

Source: kexue.fm/archives/8998; checkpoints: github.com/ZhuiyiTechnology/roformer-v2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import keras

from keras_ext import layers
from keras_ext.models.bert import (
    BLOCKS,
    EMBEDDINGS,
    IMPLIED,
    Segmented,
    huggingface_names,
    tensorflow_names,
)
from keras_ext.models.family import Trunk
from keras_ext.models.names import NameTable

TABLES = tuple(row for row in EMBEDDINGS if row[0] in ("token_embedding", "segment_embedding"))
# The kernels are all that blocks have.
KERNELS = tuple(
    (layer, scope, weights[:1]) for layer, scope, weights in BLOCKS if weights[0][0] == "kernel"
)
# What √(1/fan) has to be multiplied by for a normal distribution cut off at two deviations.
TRUNCATION = 1.13684723


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoFormerV2(Segmented, family="roformer_v2"):
    """The sizes of a RoFormerV2. Its only head is `with_mlm`; `initializer_range` is not its.

    Example:
        >>> model = build_transformer_model("bert_config.json", model="roformer_v2")
    """

    implied: ClassVar[Mapping[str, Any]] = {
        **IMPLIED,
        "rotary_value": False,
        "initializer_range": 0.02,  # of its configurations; the spread is that of above
    }
    names: ClassVar[Mapping[str, NameTable]] = {
        "tensorflow": tensorflow_names((*TABLES, *KERNELS)),
        "huggingface": huggingface_names((*TABLES, *KERNELS), model="roformer"),
    }
    heads: ClassVar[Mapping[str, str]] = {"with_mlm": "mlm"}
    use_bias: ClassVar[bool] = False
    learned_positions: ClassVar[bool] = False

    def position(self) -> layers.RotaryPosition:
        return layers.RotaryPosition()

    def embed(self, hidden: Any, positions: list[Any]) -> Any:
        """Drop, normalise."""
        return self.norm("embedding_norm")(self.drop(hidden))

    def mlm(self, trunk: Trunk) -> Any:
        """Logits over the vocabulary, (batch, length, vocab_size)."""
        return trunk.token_embedding(trunk.hidden, reverse=True)

    def norm(self, name: str | None = None) -> keras.layers.Layer:
        return layers.RMSNorm(epsilon=self.layer_norm_eps, scale=False, name=name)

    @property
    def gain(self) -> float:
        """Share of the variance that a kernel is to keep."""
        return 1 / self.num_hidden_layers

    def initializer(self) -> keras.initializers.Initializer:
        return keras.initializers.VarianceScaling(self.gain, "fan_in", "truncated_normal")

    def table_initializer(self) -> keras.initializers.Initializer:
        deviation = TRUNCATION * (self.gain / self.hidden_size) ** 0.5
        return keras.initializers.TruncatedNormal(stddev=deviation)
