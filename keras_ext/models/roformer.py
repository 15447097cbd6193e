"""RoFormer: a BERT with rotary positions instead of learnt ones.

    q_i -> R(i) q_i,    k_j -> R(j) k_j    in every attention, pairs of components interleaved

There is no limit to the length. Embeddings may be narrower than the blocks.

Source: Su et al. 2021, arXiv 2104.09864; kexue.fm/archives/8265; checkpoints:
github.com/ZhuiyiTechnology/roformer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from keras_ext.layers import RotaryPosition
from keras_ext.models.bert import (
    BERT,
    DENSE,
    IMPLIED,
    WITHOUT_POSITIONS,
    huggingface_names,
    tensorflow_names,
)
from keras_ext.models.names import NameTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoFormer(BERT, family="roformer"):
    """The sizes of a RoFormer; `max_position_embeddings` limits nothing.

    Example:
        >>> model = build_transformer_model("bert_config.json", model="roformer")
    """

    max_position_embeddings: int = 1536

    implied: ClassVar[Mapping[str, Any]] = {**IMPLIED, "rotary_value": False}
    names: ClassVar[Mapping[str, NameTable]] = {
        "tensorflow": tensorflow_names(
            (
                *WITHOUT_POSITIONS,
                ("embedding_projection", "bert/encoder/embedding_hidden_mapping_in", DENSE),
            )
        ),
        "huggingface": huggingface_names(
            (*WITHOUT_POSITIONS, ("embedding_projection", "bert/embeddings_project", DENSE)),
            model="roformer",
        ),
    }
    learned_positions: ClassVar[bool] = False
    narrow_embeddings: ClassVar[bool] = True

    def position(self) -> RotaryPosition:
        return RotaryPosition()
