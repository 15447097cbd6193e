"""BERT: a bidirectional Transformer encoder with post-norm blocks.

    h      = Dropout(LayerNorm(E_token[ids] + E_segment[segments] + E_position))
    h      = block(h), once per block
    mlm    = LayerNorm(gelu(h W + b)) E_tokenᵀ + b       logits over the vocabulary
    pooled = tanh(h[:, 0] W + b)
    nsp    = pooled W + b                                logits of (next, random)

As `application` "lm" the same weights are a language model, in which tokens see no later ones,
as "unilm" a UniLM: tokens of segment 0 see all of segment 0, those of segment 1 all before them
and themselves. `with_mlm` then predicts the next token.

This file is the family: its configuration, its layers and the names its weights have in
checkpoints. RoBERTa-wwm, MacBERT, RBT3 and the models of UER are BERTs. A relative of BERT is
a file with a subclass that overrides what differs: `position`, `embed`, `block`, `heads`.

Layer names are part of the API: `token_ids`, `segment_ids`, `token_embedding`,
`segment_embedding`, `position_embedding`, `embedding_norm`, `embedding_dropout`,
`embedding_projection` where embeddings are narrower than the blocks, `encoder_0` and so on,
`mlm_dense`, `mlm_norm`, `mlm_bias`, `pooler`, `nsp`. The input of `mlm_bias` is a second call
of `token_embedding`.

Source: Devlin et al. 2018, arXiv 1810.04805; github.com/google-research/bert; UniLM: Dong et
al. 2019, arXiv 1905.03197; kexue.fm/archives/6933.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import keras
from keras import ops

from keras_ext import layers
from keras_ext.models.family import Family, Sizes, Trunk
from keras_ext.models.names import NameTable

# Fields of the same configuration format with which a model would be none of those here.
IMPLIED = {"is_decoder": False, "tie_word_embeddings": True}

# The fields as UER names them.
UER_FIELDS = {
    "emb_size": "embedding_size",
    "feedforward_size": "intermediate_size",
    "heads_num": "num_attention_heads",
    "layers_num": "num_hidden_layers",
    "max_seq_length": "max_position_embeddings",
}

# Fields of UER's configurations, with the values that mean no change.
UER_IMPLIED = {
    "layernorm_positioning": "post",
    "feed_forward": "dense",
    "mask": "fully_visible",
    "encoder": "transformer",
    "remove_transformer_bias": False,
    "remove_embedding_layernorm": False,
    "remove_attention_scale": False,
    "relative_position_embedding": False,
    "rotary_position_embedding": False,
    "parameter_sharing": False,
    "factorized_embedding_parameterization": False,
    "tie_weights": True,
}

# Weights of a layer: ours, TensorFlow's, Hugging Face's. `.T` marks a transposed matrix.
DENSE = (("kernel", "kernel", "weight.T"), ("bias", "bias", "bias"))
NORM = (("gamma", "gamma", "weight"), ("beta", "beta", "bias"))
NSP = (("kernel", "output_weights.T", "weight.T"), ("bias", "output_bias", "bias"))


def table(name: str) -> tuple[tuple[str, str, str], ...]:
    """The weight of an embedding."""
    return (("embeddings", name, f"{name}.weight"),)


# Layer, its scope in a TensorFlow checkpoint (with dots it is Hugging Face's), its weights.
Layers = Iterable[tuple[str, str, tuple[tuple[str, str, str], ...]]]

IN_BLOCK = (
    ("attention/query_dense", "attention/self/query", DENSE),
    ("attention/key_dense", "attention/self/key", DENSE),
    ("attention/value_dense", "attention/self/value", DENSE),
    ("attention/output_dense", "attention/output/dense", DENSE),
    ("attention_norm", "attention/output/LayerNorm", NORM),
    ("feed_forward/intermediate_dense", "intermediate/dense", DENSE),
    ("feed_forward/linear_dense", "intermediate/dense_1", DENSE),  # of a gate; the name is ours
    ("feed_forward/output_dense", "output/dense", DENSE),
    ("feed_forward_norm", "output/LayerNorm", NORM),
)
EMBEDDINGS = (
    ("token_embedding", "bert/embeddings", table("word_embeddings")),
    ("segment_embedding", "bert/embeddings", table("token_type_embeddings")),
    ("position_embedding", "bert/embeddings", table("position_embeddings")),
    ("embedding_norm", "bert/embeddings/LayerNorm", NORM),
)
BLOCKS = tuple(
    ("encoder_{i}/" + ours, "bert/encoder/layer_{i}/" + s, w) for ours, s, w in IN_BLOCK
)
HEADS = (
    ("mlm_dense", "cls/predictions/transform/dense", DENSE),
    ("mlm_norm", "cls/predictions/transform/LayerNorm", NORM),
    ("mlm_bias", "cls/predictions", (("bias", "output_bias", "bias"),)),
    ("pooler", "bert/pooler/dense", DENSE),
    ("nsp", "cls/seq_relationship", NSP),
)


SCOPES = ("cls.", "")  # of predictions, at Hugging Face; without any, ALBERT's

LAYERS = (*EMBEDDINGS, *BLOCKS, *HEADS)
WITHOUT_POSITIONS = tuple(row for row in LAYERS if row[0] != "position_embedding")

HEAD = r"mlm_|pooler$|nsp$|discriminator_"  # layers of heads


def tensorflow_names(layers: Layers, model: str = "bert") -> NameTable:
    """The names in TensorFlow checkpoints, of a model whose scope is `model`."""
    return NameTable(
        weights={
            f"{layer}/{ours}": f"{scope}/{theirs}".replace("bert/", f"{model}/")
            for layer, scope, weights in layers
            for ours, theirs, _ in weights
        },
        ignored={r"/adam_[mv]$": "optimizer slot", r"^global_step$": "step counter"},
        optional=HEAD,
    )


def huggingface_names(layers: Layers, model: str = "bert") -> NameTable:
    """The names in Hugging Face checkpoints, of a model whose prefix is `model`."""
    return NameTable(
        weights={
            f"{layer}/{ours}": f"{scope}/{theirs}".replace("bert/", f"{model}.")
            .replace("/", ".")
            .replace("layer_{i}", "layer.{i}")
            for layer, scope, weights in layers
            for ours, _, theirs in weights
        },
        ignored={
            r"\.(position_ids|embed_positions\.weight|positions_encoding)$": "constant",
        },
        renamed={
            # A model saved without heads.
            r"^(embeddings|encoder|pooler)": rf"{model}.\1",
            r"\.LayerNorm\.gamma$": ".LayerNorm.weight",
            r"\.LayerNorm\.beta$": ".LayerNorm.bias",
        },
        copies={f"{x}predictions.decoder.bias": f"{x}predictions.bias" for x in SCOPES},
        outputs=(
            *(f"{x}predictions.decoder.weight" for x in SCOPES),
            "generator_lm_head.weight",
        ),
        optional=HEAD,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmented(Family, abstract=True):
    """A family of token and segment ids: encoder, language model or UniLM.

    With `type_vocab_size` 0 (`segment_vocab_size` in bert4keras) it has no segments. Tokens of
    the id `pad_token_id` are padding, which is masked. Default: 0.
    """

    type_vocab_size: int = 2
    pad_token_id: int = 0

    applications: ClassVar[tuple[str, ...]] = ("encoder", "lm", "unilm")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.application == "unilm" and not self.type_vocab_size:
            raise ValueError(
                "type_vocab_size must be positive for application='unilm', whose segments say "
                "what sees what, got 0."
            )
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id must be from 0 to {self.vocab_size - 1}, the last of the "
                f"vocabulary, got {self.pad_token_id}."
            )

    @classmethod
    def from_config(cls: type[Sizes], config: Mapping[str, Any]) -> Sizes:
        """See `Family.from_config`; a padding of null is the usual one."""
        if config.get("pad_token_id") is None:
            config = {key: value for key, value in config.items() if key != "pad_token_id"}
        return super().from_config(config)

    @property
    def is_known_elsewhere(self) -> bool:
        return bool(self.type_vocab_size) and super().is_known_elsewhere

    def trunk(self) -> Trunk:
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        segments = self.segment_inputs()
        positions = self.position_ids()
        token_embedding = self.token_embedding()
        hidden = token_embedding(token_ids)
        if self.type_vocab_size:
            hidden = layers.SegmentEmbedding(
                self.type_vocab_size,
                embeddings_initializer=self.table_initializer(),
                name="segment_embedding",
            )(hidden, *(segments or [ops.zeros_like(token_ids)]))
        pattern = self.pattern(positions)
        if self.application == "unilm":
            pattern["attention_mask"] = layers.PrefixMask(name="prefix_mask")(*segments)
        hidden = self.embed(hidden, self.places(token_ids, positions))
        hidden = self.encode(hidden, **pattern)
        return Trunk([token_ids, *segments, *positions], token_embedding, hidden)

    def token_embedding(self, **options: Any) -> layers.TokenEmbedding:
        return super().token_embedding(padding_id=self.pad_token_id, **options)

    def segment_inputs(self) -> list[keras.KerasTensor]:
        """The input of segments, if there is to be one; without it all tokens are of the first
        segment, if there is one."""
        if not self.type_vocab_size:
            return []
        return [keras.Input((None,), dtype="int32", name="segment_ids")]

    def places(self, token_ids: Any, positions: list[Any]) -> list[Any]:
        """What tells `embed` where tokens stand: custom positions, if there are such."""
        return positions

    @abc.abstractmethod
    def embed(self, hidden: Any, positions: list[Any]) -> Any:
        """What enters the first block, made of the embeddings of tokens and segments."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BERT(Segmented, family="bert"):
    """The sizes of a BERT, and how it is built from them.

    The fields are those of `bert_config.json`, of which the first five have no default; those
    of bert4keras, `attention_head_size` (by default the width divided by the heads) and
    `attention_key_size` (by default the same), the width of queries and keys; `embedding_size`,
    the width of the embeddings (by default `hidden_size`); and `pooler_activation`, "tanh" or
    "linear". `application` is "encoder", "lm" or "unilm".

    Raises:
        ValueError: as of `Family`, or the heads do not divide the width.

    Example:
        >>> bert = BERT.from_config(json.loads(Path("bert_config.json").read_text()))
        >>> larger = dataclasses.replace(bert, num_hidden_layers=2)
        >>> model = larger.build(with_mlm=True)
    """

    embedding_size: int | None = None
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    attention_head_size: int | None = None
    attention_key_size: int | None = None
    pooler_activation: str = "tanh"

    aliases: ClassVar[Mapping[str, str]] = UER_FIELDS
    implied: ClassVar[Mapping[str, Any]] = {
        **IMPLIED,
        **UER_IMPLIED,
        "position_embedding_type": "absolute",
        "use_relative_position": False,
    }
    names: ClassVar[Mapping[str, NameTable]] = {
        "tensorflow": tensorflow_names(LAYERS),
        "huggingface": huggingface_names(LAYERS),
    }
    heads: ClassVar[Mapping[str, str]] = {
        "with_mlm": "mlm",
        "with_nsp": "nsp",
        "with_pool": "pooled",
    }
    head_activations: ClassVar[Mapping[str, str]] = {"with_pool": "pooler_activation"}
    takes_gates: ClassVar[bool] = True
    narrow_embeddings: ClassVar[bool] = False  # whether embedding_size may differ

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pooler_activation not in ("tanh", "linear"):
            raise ValueError(
                "pooler_activation, or with_pool, must be 'tanh' or 'linear', got "
                f"{self.pooler_activation!r}."
            )
        object.__setattr__(self, "embedding_size", self.embedding_width)  # it is frozen
        if not self.narrow_embeddings and self.embedding_size != self.hidden_size:
            raise ValueError(
                f"embedding_size must be hidden_size={self.hidden_size} for "
                f"{type(self).__name__}, got {self.embedding_size}."
            )

    @property
    def is_known_elsewhere(self) -> bool:
        size = self.hidden_size // self.num_attention_heads
        return (
            super().is_known_elsewhere
            and not self.gated
            and self.pooler_activation == "tanh"
            and self.attention_head_size in (None, size)
            and self.attention_key_size in (None, size)
        )

    @property
    def heads_divide_width(self) -> bool:
        return self.attention_head_size is None

    @property
    def attention_sizes(self) -> tuple[int, int]:
        size = self.attention_head_size or super().attention_sizes[1]
        return self.attention_key_size or size, size

    @property
    def embedding_width(self) -> int:
        """`embedding_size`, or its default."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def projects_embeddings(self) -> bool:
        """Whether a layer widens the embeddings."""
        return self.embedding_width != self.hidden_size

    def token_embedding(self, **options: Any) -> layers.TokenEmbedding:
        return super().token_embedding(output_dim=self.embedding_width, **options)

    def embed(self, hidden: Any, positions: list[Any]) -> Any:
        """Add positions to the embeddings of tokens and segments, normalise, drop, widen."""
        if self.learned_positions:
            hidden = self.add_positions(hidden, positions, self.max_position_embeddings)
        hidden = self.drop(self.norm("embedding_norm")(hidden))
        if not self.projects_embeddings:
            return hidden
        return self.dense(self.hidden_size, "embedding_projection")(hidden)

    def mlm(self, trunk: Trunk) -> Any:
        """Logits over the vocabulary, (batch, length, vocab_size)."""
        dense = self.dense(self.embedding_width, "mlm_dense", activation=self.head_activation)
        hidden = self.norm("mlm_norm")(dense(trunk.hidden))
        return layers.Bias(name="mlm_bias")(trunk.token_embedding(hidden, reverse=True))

    @property
    def head_activation(self) -> Callable[[Any], Any]:
        """Of the layer before the logits."""
        return self.activation

    def nsp(self, trunk: Trunk) -> Any:
        """Logits of (next, random), (batch, 2)."""
        return self.dense(2, "nsp")(self.pooled(trunk))

    def pooled(self, trunk: Trunk) -> Any:
        """The first token, (batch, hidden_size)."""
        pooler = self.dense(self.hidden_size, "pooler", activation=self.pooler_activation)
        return trunk.once("pooled", lambda: pooler(trunk.hidden[:, 0]))

    def initializer(self) -> keras.initializers.Initializer:
        return keras.initializers.TruncatedNormal(stddev=self.initializer_range)
