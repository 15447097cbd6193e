"""GAU-alpha: a RoFormerV2 of gated attention units, 24 where it has 12 blocks.

    h = RMS(h + Dropout(GAU(h)))

Source: kexue.fm/archives/9052; checkpoints: github.com/ZhuiyiTechnology/GAU-alpha.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from keras_ext import layers
from keras_ext.models.bert import Layers, huggingface_names, tensorflow_names
from keras_ext.models.names import NameTable
from keras_ext.models.roformer_v2 import TABLES, RoFormerV2

KERNEL = (("kernel", "kernel", "weight.T"),)


def _units(scope: str) -> Layers:
    """The weights of all units, whose names in a checkpoint begin with `scope`."""
    unit, theirs = "encoder_{i}/attention", scope + "/encoder/layer_{i}/gau/"
    return (
        (f"{unit}/input_dense", f"{theirs}i_dense", KERNEL),
        (f"{unit}/output_dense", f"{theirs}o_dense", KERNEL),
        (unit, f"{theirs}q_scaleoffset", (("query_gamma", "gamma", "weight"),)),
        (unit, f"{theirs}k_scaleoffset", (("key_gamma", "gamma", "weight"),)),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GAUAlpha(RoFormerV2, family="gau_alpha"):
    """The sizes of a GAU-alpha: `attention_key_size` is the width of queries and keys, all
    units have one head. Its only head for tasks is `with_mlm`.

    `transformers` has no such model; what is saved has names made like those of TensorFlow.

    Example:
        >>> model = build_transformer_model("bert_config.json", model="gau_alpha")
    """

    num_attention_heads: int = 1
    attention_key_size: int = 128
    hidden_act: str = "swish"

    names: ClassVar[Mapping[str, NameTable]] = {
        "tensorflow": tensorflow_names((*TABLES, *_units("GAU_alpha"))),
        "huggingface": huggingface_names((*TABLES, *_units("bert")), model="gau_alpha"),
    }

    def block(self, side: str, number: int) -> layers.GatedAttentionBlock:
        return layers.GatedAttentionBlock(
            layers.GatedAttentionUnit(
                self.intermediate_size,
                self.attention_key_size,
                activation=self.activation,
                dropout=self.attention_probs_dropout_prob,
                position=self.position(),
                causal=self.application == "lm",
                kernel_initializer=self.initializer(),
                name="attention",
            ),
            dropout=self.hidden_dropout_prob,
            norm=self.norm(),
            name=f"{side}_{number}",
        )

    @property
    def gain(self) -> float:
        return self.num_hidden_layers ** (-2 / 3)
