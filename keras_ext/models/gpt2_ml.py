"""GPT2-ML: the blocks of Grover, whose feed-forward layer stands between two norms.

    h      = Norm(E_token[ids] + E_position)
    h      = h + Attention(h);  h = Norm₁(h + FeedForward(Norm₀(h))),  once per block
    logits = h E_tokenᵀ

Source: Zellers et al. 2019 (Grover), arXiv 1905.12616; github.com/imcaspar/gpt2-ml, whose
Chinese checkpoint has 48 blocks of 1536 and a vocabulary of BERT's kind.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import keras

from keras_ext.layers import TransformerBlock
from keras_ext.models.bert import DENSE, NORM, table
from keras_ext.models.gpt import GPT
from keras_ext.models.names import NameTable

LAYERS = (
    ("token_embedding", "embeddings", table("word_embed")),
    ("position_embedding", "embeddings", table("pos_embed")),
    ("embedding_norm", "embeddings/LayerNorm_embed_norm", NORM),
    ("encoder_{i}/attention/query_dense", "layer{i:02d}/query_layer", DENSE),
    ("encoder_{i}/attention/key_dense", "layer{i:02d}/key_layer", DENSE),
    ("encoder_{i}/attention/value_dense", "layer{i:02d}/value_layer", DENSE),
    ("encoder_{i}/attention/output_dense", "layer{i:02d}/context_projection_layer", DENSE),
    ("encoder_{i}/attention_norm", "layer{i:02d}/LayerNorm_mlp_ln0", NORM),
    ("encoder_{i}/feed_forward/intermediate_dense", "layer{i:02d}/intermediate", DENSE),
    ("encoder_{i}/feed_forward/output_dense", "layer{i:02d}/output", DENSE),
    ("encoder_{i}/feed_forward_norm", "layer{i:02d}/LayerNorm_mlp_ln1", NORM),
)


@keras.saving.register_keras_serializable(package="keras_ext")
class GroverBlock(TransformerBlock):
    """A `TransformerBlock` with both norms around its feed-forward layer.

        h = x + Dropout(Attention(x)),    y = Norm₁(h + Dropout(FeedForward(Norm₀(h))))

    Norm₀ is `attention_norm`, Norm₁ `feed_forward_norm`.
    """

    def _sublayers(
        self, x: Any, attend: Any, cross_attend: Any, condition: Any, training: bool | None
    ) -> Any:
        given = () if condition is None else (condition,)
        x = x + self.dropout_layer(attend(x), training=training)
        y = self.feed_forward(self.attention_norm(x, *given), training=training)
        return self.feed_forward_norm(x + self.dropout_layer(y, training=training), *given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2ML(GPT, family="gpt2_ml"):
    """The sizes of a GPT2-ML; see `GPT`.

    Example:
        >>> config = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4}
        >>> gpt2_ml = build_transformer_model(config, model="gpt2_ml", with_mlm=True)
        >>> hidden, logits = gpt2_ml(np.array([[5, 3, 8]]))
    """

    hidden_act: str = "gelu"
    max_position_embeddings: int = 1024

    activations: ClassVar[Mapping[str, str]] = {}
    names: ClassVar[Mapping[str, NameTable]] = {
        "tensorflow": NameTable(
            weights={
                f"{layer}/{ours}": f"newslm/{scope}/{theirs}"
                for layer, scope, weights in LAYERS
                for ours, theirs, _ in weights
            },
            ignored={r"/adam_[mv]$": "optimizer slot", r"^global_step$": "step counter"},
        ),
        # Of our making, as there is no such model at Hugging Face.
        "huggingface": NameTable(
            weights={
                f"{layer}/{ours}": f"newslm.{scope.replace('/', '.')}.{theirs}"
                for layer, scope, weights in LAYERS
                for ours, _, theirs in weights
            },
            ignored={},
        ),
    }

    def embed(self, hidden: Any, positions: list[Any]) -> Any:
        """Add positions to the embeddings of tokens, normalise, drop."""
        hidden = self.add_positions(hidden, positions, self.max_position_embeddings)
        return self.drop(self.norm("embedding_norm")(hidden))

    def block(self, side: str, number: int) -> GroverBlock:
        return GroverBlock.from_config(super().block(side, number).get_config())
