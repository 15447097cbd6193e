"""ALBERT: a BERT whose blocks share their weights, with narrow embeddings.

    h = block_g(h),    g = ⌊i G / N⌋    for i = 0 ... N - 1 and G groups

With one group all blocks are the same one, `encoder_0`. A model of more groups than its
checkpoint has, such as as many as layers, starts from the weights of group 0 in all of them:

    build_transformer_model({**config, "num_hidden_groups": 12}, checkpoint, model="albert")

is the unshared ALBERT, whose blocks go separate ways in training. `nsp` tells the order of
sentences.

Source: Lan et al. 2019, arXiv 1909.11942; github.com/google-research/albert. The checkpoints of
albert_zh that are named "google" have these names, its others have not.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from keras_ext.models.bert import (
    BERT,
    DENSE,
    EMBEDDINGS,
    HEADS,
    IMPLIED,
    NORM,
    huggingface_names,
    tensorflow_names,
)
from keras_ext.models.family import Sizes
from keras_ext.models.names import NameTable

PROJECTION = ("embedding_projection", "bert/encoder/embedding_hidden_mapping_in", DENSE)
# Layer, its scope in a group of TensorFlow's, of Hugging Face's.
IN_GROUP = (
    ("attention/query_dense", "attention_1/self/query", "attention/query", DENSE),
    ("attention/key_dense", "attention_1/self/key", "attention/key", DENSE),
    ("attention/value_dense", "attention_1/self/value", "attention/value", DENSE),
    ("attention/output_dense", "attention_1/output/dense", "attention/dense", DENSE),
    ("attention_norm", "LayerNorm", "attention/LayerNorm", NORM),
    ("feed_forward/intermediate_dense", "ffn_1/intermediate/dense", "ffn", DENSE),
    ("feed_forward/linear_dense", "ffn_1/intermediate/dense_1", "ffn_gate", DENSE),  # ours
    ("feed_forward/output_dense", "ffn_1/intermediate/output/dense", "ffn_output", DENSE),
    ("feed_forward_norm", "LayerNorm_1", "full_layer_layer_norm", NORM),
)
GROUPS = tuple(
    (
        "encoder_{i}/" + ours,
        "bert/encoder/transformer/group_{i}/inner_group_0/" + scope,
        weights,
    )
    for ours, scope, _, weights in IN_GROUP
)
HUGGINGFACE_GROUPS = tuple(
    (
        "encoder_{i}/" + ours,
        "bert/encoder/albert_layer_groups.{i}.albert_layers.0/" + s,
        weights,
    )
    for ours, _, s, weights in IN_GROUP
)
HUGGINGFACE_HEADS = (
    ("mlm_dense", "predictions/dense", DENSE),
    ("mlm_norm", "predictions/LayerNorm", NORM),
    ("mlm_bias", "predictions", (("bias", "bias", "bias"),)),
    ("pooler", "bert/pooler", DENSE),
    ("nsp", "sop_classifier/classifier", DENSE),
)
# Group 0 in the place of one that a checkpoint lacks.
FIRST_GROUP = {r"(group_|groups\.)\d+": r"\g<1>0"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ALBERT(BERT, family="albert"):
    """The sizes of an ALBERT.

    `embedding_projection` says whether a layer widens the embeddings. Default: where they are
    narrower, and in the configurations of transformers, which always has the layer.

    Raises:
        ValueError: as of `BERT`, or narrow embeddings are not to be widened.

    Example:
        >>> model = build_transformer_model("bert_config.json", model="albert")
    """

    embedding_size: int | None = 128
    num_hidden_groups: int | None = 1
    embedding_projection: bool | None = None

    implied: ClassVar[Mapping[str, Any]] = {
        **IMPLIED,
        "position_embedding_type": "absolute",
        "inner_group_num": 1,
    }
    names: ClassVar[Mapping[str, NameTable]] = {
        "tensorflow": dataclasses.replace(
            tensorflow_names((*EMBEDDINGS, PROJECTION, *GROUPS, *HEADS)), fallbacks=FIRST_GROUP
        ),
        "huggingface": dataclasses.replace(
            huggingface_names(
                (*EMBEDDINGS, PROJECTION, *HUGGINGFACE_GROUPS, *HUGGINGFACE_HEADS),
                model="albert",
            ),
            fallbacks=FIRST_GROUP,
        ),
    }
    narrow_embeddings: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        narrow = super().projects_embeddings
        if self.embedding_projection is None:
            object.__setattr__(self, "embedding_projection", narrow)
        if narrow and not self.embedding_projection:
            raise ValueError(
                f"embedding_projection must be True for embedding_size={self.embedding_size} "
                f"and hidden_size={self.hidden_size}, got False."
            )

    @classmethod
    def from_config(cls: type[Sizes], config: Mapping[str, Any]) -> Sizes:
        """Read a configuration of Google's or of transformers; see `Family.from_config`."""
        if config.get("model_type") == cls.model_type:
            config = {"embedding_projection": True, **config}
        return super().from_config(config)

    @property
    def is_known_elsewhere(self) -> bool:
        groups = dataclasses.replace(self, num_hidden_groups=None)
        return bool(self.embedding_projection) and super(ALBERT, groups).is_known_elsewhere

    @property
    def projects_embeddings(self) -> bool:
        return bool(self.embedding_projection)
