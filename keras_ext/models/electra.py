"""ELECTRA: a BERT trained to find tokens that a small generator has replaced.

    generator:      logits = LayerNorm(gelu(h W + b)) E_tokenᵀ + b    over the vocabulary
    discriminator:  logit  = gelu(h W + b) w + c > 0 where a token is replaced

Embeddings may be narrower than the blocks. The discriminator is the model for other tasks. A
TensorFlow checkpoint has both, which share the embeddings; Hugging Face's has one. In the head
of the generator transformers has a gelu whatever `hidden_act` is, Google `hidden_act`.

Source: Clark et al. 2020, arXiv 2003.10555; github.com/google-research/electra.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from keras import ops

from keras_ext.models.bert import (
    BERT,
    BLOCKS,
    DENSE,
    EMBEDDINGS,
    IMPLIED,
    NORM,
    huggingface_names,
    tensorflow_names,
)
from keras_ext.models.family import ACTIVATIONS, Sizes, Trunk
from keras_ext.models.names import NameTable

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
class ELECTRA(BERT, family="electra"):
    """The sizes of an ELECTRA discriminator. Its only head is `with_discriminator`.

    Example:
        >>> model = build_transformer_model("bert_config.json", model="electra")
    """

    architectures: ClassVar[tuple[str, ...]] = ("ElectraForPreTraining",)
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
    heads: ClassVar[Mapping[str, str]] = {"with_discriminator": "discriminator"}
    narrow_embeddings: ClassVar[bool] = True

    def discriminator(self, trunk: Trunk) -> Any:
        """Logits, positive where a token is replaced, (batch, length)."""
        dense = self.dense(self.hidden_size, "discriminator_dense", activation=self.activation)
        logits = self.dense(1, "discriminator_prediction")(dense(trunk.hidden))
        return ops.squeeze(logits, -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ELECTRAGenerator(ELECTRA, family="electra_generator"):
    """The sizes of an ELECTRA generator. Its only head is `with_mlm`.

    `head_act` is the activation there. Default: "gelu" in the configurations of transformers,
    `hidden_act` in others.

    Example:
        >>> model = build_transformer_model("bert_config.json", model="electra_generator")
    """

    head_act: str | None = None

    model_type: ClassVar[str] = "electra"  # and another one of its architectures
    architectures: ClassVar[tuple[str, ...]] = ("ElectraForMaskedLM",)
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
    heads: ClassVar[Mapping[str, str]] = {"with_mlm": "mlm"}

    def __post_init__(self) -> None:
        object.__setattr__(self, "head_act", self.head_act or self.hidden_act)
        super().__post_init__()
        if self.head_act not in ACTIVATIONS:
            raise ValueError(
                f"head_act must be one of {', '.join(ACTIVATIONS)}, got {self.head_act!r}."
            )

    @classmethod
    def from_config(cls: type[Sizes], config: Mapping[str, Any]) -> Sizes:
        """Read a configuration of Google's or of transformers; see `Family.from_config`."""
        if config.get("model_type") == cls.model_type:
            config = {"head_act": "gelu", **config}
        return super().from_config(config)

    @property
    def is_known_elsewhere(self) -> bool:
        return self.head_act == "gelu" and super().is_known_elsewhere

    @property
    def head_activation(self) -> Callable[[Any], Any]:
        return ACTIVATIONS[str(self.head_act)]
