"""GPT: a language model of post-norm blocks, in which tokens see no later ones.

    h      = Dropout(E_token[ids] + E_position)
    h      = block(h), once per block
    logits = h E_tokenᵀ

There are no segments, and no id is padding: texts of a batch are padded behind, with any id,
and nothing before it changes.

Source: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training".
Names in TensorFlow checkpoints are those of bert4keras's conversions.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import keras

from keras_ext.models.bert import BLOCKS, EMBEDDINGS, tensorflow_names
from keras_ext.models.family import Family, Sizes, Trunk
from keras_ext.models.names import NameTable

# Field -> its name in Hugging Face configurations.
FIELDS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "hidden_dropout_prob": "resid_pdrop",
    "attention_probs_dropout_prob": "attn_pdrop",
    "layer_norm_eps": "layer_norm_epsilon",
    "hidden_act": "afn",
}

# Layer of a block, its scope in Hugging Face's, the part of that.
IN_BLOCK = (
    ("attention/query_dense", "attn.c_attn", "[0/3]"),
    ("attention/key_dense", "attn.c_attn", "[1/3]"),
    ("attention/value_dense", "attn.c_attn", "[2/3]"),
    ("attention/output_dense", "attn.c_proj", ""),
    ("feed_forward/intermediate_dense", "mlp.c_fc", ""),
    ("feed_forward/output_dense", "mlp.c_proj", ""),
)


def huggingface_names(tables: Mapping[str, str], norms: Mapping[str, str]) -> NameTable:
    """The names in Hugging Face checkpoints: those of all GPTs, and of tables and norms."""
    dense = {"kernel": "weight", "bias": "bias"}
    norm = {"gamma": "weight", "beta": "bias"}
    names = {
        **{f"{layer}/embeddings": f"{theirs}.weight" for layer, theirs in tables.items()},
        **{
            f"encoder_{{i}}/{layer}/{ours}": f"h.{{i}}.{scope}.{theirs}{part}"
            for layer, scope, part in IN_BLOCK
            for ours, theirs in dense.items()
        },
        **{
            f"{layer}/{ours}": f"{scope}.{theirs}"
            for layer, scope in norms.items()
            for ours, theirs in norm.items()
        },
    }
    first = "|".join(sorted({name.split(".")[0] for name in names.values()}))
    return NameTable(
        weights={ours: f"transformer.{theirs}" for ours, theirs in names.items()},
        ignored={
            r"\.attn\.(bias|masked_bias)$": "constant",
            r"\.position_ids$": "constant",
        },
        renamed={rf"^({first})\.": r"transformer.\1."},  # a model saved without its head
        outputs=("lm_head.weight",),
    )


def conversion_names(rows: Any) -> NameTable:
    """The names in TensorFlow checkpoints converted for bert4keras."""
    table = tensorflow_names(rows, model="gpt")
    weights = {k: v.replace("/encoder/", "/transformer/") for k, v in table.weights.items()}
    return dataclasses.replace(table, weights=weights)


TABLES = tuple(row for row in EMBEDDINGS if row[0] in ("token_embedding", "position_embedding"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT(Family, family="openai-gpt"):
    """The sizes of a GPT. Its only head is `with_mlm`, the logits of the next token.

    Configurations may name the fields as BERT's or as Hugging Face's do, such as `n_embd`.
    `intermediate_size` is four times the width by default, and `embd_pdrop` is taken to be the
    same as `resid_pdrop`.

    Example:
        >>> config = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4}
        >>> gpt = build_transformer_model(config, model="openai-gpt", with_mlm=True)
        >>> hidden, logits = gpt(np.array([[5, 3, 8]]))
    """

    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    application: str = "lm"
    max_position_embeddings: int = 512
    initializer_range: float = 0.02

    implied: ClassVar[Mapping[str, Any]] = {"tie_word_embeddings": True}
    fields: ClassVar[Mapping[str, str]] = FIELDS
    activations: ClassVar[Mapping[str, str]] = {"gelu": "gelu_new"}  # which OpenAI calls gelu
    names: ClassVar[Mapping[str, NameTable]] = {
        "tensorflow": conversion_names((*TABLES, *BLOCKS)),
        "huggingface": huggingface_names(
            {"token_embedding": "tokens_embed", "position_embedding": "positions_embed"},
            {
                "encoder_{i}/attention_norm": "h.{i}.ln_1",
                "encoder_{i}/feed_forward_norm": "h.{i}.ln_2",
            },
        ),
    }
    heads: ClassVar[Mapping[str, str]] = {"with_mlm": "mlm"}
    applications: ClassVar[tuple[str, ...]] = ("lm",)

    @classmethod
    def from_config(cls: type[Sizes], config: Mapping[str, Any]) -> Sizes:
        """Read the fields of Hugging Face or of BERT; see `Family.from_config`."""
        width = config.get("hidden_size", config.get(cls.fields["hidden_size"]))
        inner = {cls.fields.get("intermediate_size", "intermediate_size"), "intermediate_size"}
        if width is not None and all(config.get(name) is None for name in inner):
            config = {**config, "intermediate_size": 4 * width}
        return super().from_config(config)

    def trunk(self) -> Trunk:
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        positions = self.position_ids()
        token_embedding = self.token_embedding(mask_zero=False)
        hidden = self.encode(self.embed(token_embedding(token_ids), positions))
        return Trunk([token_ids, *positions], token_embedding, hidden)

    def embed(self, hidden: Any, positions: list[Any]) -> Any:
        """Add positions to the embeddings of tokens, drop."""
        return self.drop(self.add_positions(hidden, positions, self.max_position_embeddings))

    def mlm(self, trunk: Trunk) -> Any:
        """Logits of the next token, (batch, length, vocab_size)."""
        return trunk.token_embedding(trunk.hidden, reverse=True)

    def initializer(self) -> keras.initializers.Initializer:
        return keras.initializers.TruncatedNormal(stddev=self.initializer_range)
