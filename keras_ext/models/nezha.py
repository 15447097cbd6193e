"""NEZHA: a BERT with fixed relative positions, on keys and values, instead of learnt ones.

    s_ij = q_iᵀ (k_j + a_(j-i)) / √d,    o_i = Σ_j p_ij (v_j + a_(j-i))

a are sinusoids of the distance, clipped to ±`max_relative_position`, the same in all layers.

Source: Wei et al. 2019, arXiv 1909.00204; checkpoints: github.com/huawei-noah.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from keras_ext.layers import RelativePosition
from keras_ext.models.bert import (
    BERT,
    IMPLIED,
    WITHOUT_POSITIONS,
    huggingface_names,
    tensorflow_names,
)
from keras_ext.models.names import NameTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class NEZHA(BERT, family="nezha"):
    """The sizes of a NEZHA; `max_position_embeddings` limits nothing.

    Example:
        >>> model = build_transformer_model("bert_config.json", model="nezha")
    """

    max_relative_position: int = 64

    implied: ClassVar[Mapping[str, Any]] = {**IMPLIED, "use_relative_position": True}
    names: ClassVar[Mapping[str, NameTable]] = {
        "tensorflow": tensorflow_names(WITHOUT_POSITIONS),
        "huggingface": huggingface_names(WITHOUT_POSITIONS, model="nezha"),
    }
    learned_positions: ClassVar[bool] = False
    takes_positions: ClassVar[bool] = False

    def position(self) -> RelativePosition:
        return RelativePosition(self.max_relative_position, sinusoidal=True)
