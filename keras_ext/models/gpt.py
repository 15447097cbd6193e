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
from typing import Any, ClassVar, TypeVar

import keras

from keras_ext import layers
from keras_ext.models.bert import BERT, BLOCKS, EMBEDDINGS, tensorflow_names
from keras_ext.models.checkpoints import NameTable

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
            r"^lm_head\.weight$": "tied to the token embedding",
        },
        renamed={rf"^({first})\.": r"transformer.\1."},  # a model saved without its head
    )


def conversion_names(rows: Any) -> NameTable:
    """The names in TensorFlow checkpoints converted for bert4keras."""
    table = tensorflow_names(rows, model="gpt")
    weights = {k: v.replace("/encoder/", "/transformer/") for k, v in table.weights.items()}
    return dataclasses.replace(table, weights=weights)


TABLES = tuple(row for row in EMBEDDINGS if row[0] in ("token_embedding", "position_embedding"))

Sizes = TypeVar("Sizes", bound="GPT")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT(BERT):
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

    family: ClassVar[str] = "openai-gpt"
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
    heads: ClassVar[tuple[str, ...]] = ("with_mlm",)
    applications: ClassVar[tuple[str, ...]] = ("lm",)

    @classmethod
    def from_config(cls: type[Sizes], config: Mapping[str, Any]) -> Sizes:
        """Read the fields of Hugging Face or of BERT; see `BERT.from_config`."""
        ours = {theirs: name for name, theirs in cls.fields.items()}
        config = {ours.get(key, key): value for key, value in config.items()}
        if "hidden_act" in config:
            activation = config["hidden_act"]
            config["hidden_act"] = cls.activations.get(activation, activation)
        if config.get("intermediate_size") is None and "hidden_size" in config:
            config["intermediate_size"] = 4 * config["hidden_size"]
        return super().from_config(config)

    def to_config(self) -> dict[str, Any]:
        config = super().to_config()
        theirs = {name: activation for activation, name in self.activations.items()}
        config["hidden_act"] = theirs.get(self.hidden_act, self.hidden_act)
        return {self.fields.get(key, key): value for key, value in config.items()}

    def trunk(self) -> tuple[list, layers.TokenEmbedding, Any]:
        """The input, the token embedding, and the last hidden states."""
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        token_embedding = layers.TokenEmbedding(
            self.vocab_size,
            self.hidden_size,
            embeddings_initializer=self.table_initializer(),
            name="token_embedding",
        )
        hidden = self.encode(self.embed(token_embedding(token_ids)))
        return [token_ids], token_embedding, hidden

    def embed(self, hidden: Any) -> Any:
        """Add positions to the embeddings of tokens, drop."""
        return self.drop(self.add_positions(hidden))

    def mlm(self, hidden: Any, token_embedding: layers.TokenEmbedding) -> Any:
        """Logits of the next token."""
        return token_embedding(hidden, reverse=True)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().shapes()
        return {k: v for k, v in shapes.items() if not k.startswith("segment_embedding/")}
