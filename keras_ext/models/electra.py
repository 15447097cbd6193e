"""ELECTRA: a BERT trained to find tokens that a small generator has replaced.

    generator:      logits = LayerNorm(gelu(h W + b)) E_tokenᵀ + b    over the vocabulary
    discriminator:  logit  = gelu(h W + b) w + c > 0 where a token is replaced

Embeddings may be narrower than the blocks. The discriminator is the model for other tasks. A
TensorFlow checkpoint has both, which share the embeddings; Hugging Face's has one.

Source: Clark et al. 2020, arXiv 2003.10555; github.com/google-research/electra.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from keras import ops

from keras_ext import layers
from keras_ext.models.bert import (
    ACTIVATIONS,
    BERT,
    BLOCKS,
    DENSE,
    EMBEDDINGS,
    IMPLIED,
    NORM,
    huggingface_names,
    tensorflow_names,
)
from keras_ext.models.checkpoints import NameTable

TRUNK = (*EMBEDDINGS, ("embedding_projection", "bert/embeddings_project", DENSE), *BLOCKS)
GENERATOR_HEAD = (
    ("mlm_dense", "generator_predictions/dense", DENSE),
    ("mlm_norm", "generator_predictions/LayerNorm", NORM),
)
MLM_BIAS = (("bias", "output_bias", "bias"),)


def _of_generator(table: NameTable) -> NameTable:
    """Its blocks have a scope of their own, its embeddings that of the discriminator."""
    weights = {
        path: name
        if name.startswith("electra/embeddings/")
        else name.replace("electra/", "generator/")
        for path, name in table.weights.items()
    }
    return dataclasses.replace(table, weights=weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ELECTRA(BERT):
    """The sizes of an ELECTRA discriminator. Its only head is `with_discriminator`.

    Example:
        >>> model = build_transformer_model("bert_config.json", model="electra")
    """

    family: ClassVar[str] = "electra"
    implied: ClassVar[Mapping[str, Any]] = {**IMPLIED, "position_embedding_type": "absolute"}
    names: ClassVar[Mapping[str, NameTable]] = {
        "tensorflow": tensorflow_names(
            (
                *TRUNK,
                ("discriminator_dense", "discriminator_predictions/dense", DENSE),
                ("discriminator_prediction", "discriminator_predictions/dense_1", DENSE),
            ),
            model="electra",
        ),
        "huggingface": huggingface_names(
            (
                *TRUNK,
                ("discriminator_dense", "discriminator_predictions/dense", DENSE),
                (
                    "discriminator_prediction",
                    "discriminator_predictions/dense_prediction",
                    DENSE,
                ),
            ),
            model="electra",
        ),
    }
    heads: ClassVar[tuple[str, ...]] = ("with_discriminator",)
    narrow_embeddings: ClassVar[bool] = True

    def head_outputs(
        self, wanted: Collection[str], hidden: Any, token_embedding: layers.TokenEmbedding
    ) -> list[Any]:
        outputs = super().head_outputs(wanted, hidden, token_embedding)
        if "with_discriminator" in wanted:
            activation = ACTIVATIONS[self.hidden_act]
            x = self.dense(self.hidden_size, "discriminator_dense", activation)(hidden)
            x = self.dense(1, "discriminator_prediction")(x)
            outputs.append(ops.squeeze(x, -1))  # (batch, length)
        return outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class ELECTRAGenerator(ELECTRA):
    """The sizes of an ELECTRA generator. Its only head is `with_mlm`.

    Example:
        >>> model = build_transformer_model("bert_config.json", model="electra_generator")
    """

    names: ClassVar[Mapping[str, NameTable]] = {
        "tensorflow": _of_generator(
            tensorflow_names(
                (*TRUNK, *GENERATOR_HEAD, ("mlm_bias", "generator_predictions", MLM_BIAS)),
                model="electra",
            )
        ),
        "huggingface": huggingface_names(
            (*TRUNK, *GENERATOR_HEAD, ("mlm_bias", "generator_lm_head", MLM_BIAS)),
            model="electra",
        ),
    }
    heads: ClassVar[tuple[str, ...]] = ("with_mlm",)
