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
a file with a subclass that overrides what differs: `position`, `embed`, `encode`, `block`,
`heads`.

Layer names are part of the API: `token_ids`, `segment_ids`, `token_embedding`,
`segment_embedding`, `position_embedding`, `embedding_norm`, `embedding_dropout`,
`embedding_projection` where embeddings are narrower than the blocks, `encoder_0` and so on,
`mlm_dense`, `mlm_norm`, `mlm_bias`, `pooler`, `nsp`. The input of `mlm_bias` is a second call
of `token_embedding`.

Source: Devlin et al. 2018, arXiv 1810.04805; github.com/google-research/bert; UniLM: Dong et
al. 2019, arXiv 1905.03197; kexue.fm/archives/6933.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import keras

from keras_ext import layers
from keras_ext.models.checkpoints import NameTable

ACTIVATIONS = {
    "gelu": keras.activations.gelu,  # exact, by erf
    "gelu_new": layers.gelu_tanh,
    "gelu_pytorch_tanh": layers.gelu_tanh,
    "relu": keras.activations.relu,
    "silu": keras.activations.silu,
    "swish": keras.activations.silu,
}

# Fields of the same configuration format with which a model would be none of those here.
IMPLIED = {"pad_token_id": 0, "is_decoder": False, "tie_word_embeddings": True}

# The same fields as UER names them.
UER_FIELDS = {
    "emb_size": "embedding_size",
    "feedforward_size": "intermediate_size",
    "heads_num": "num_attention_heads",
    "layers_num": "num_hidden_layers",
    "max_seq_length": "max_position_embeddings",
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


LAYERS = (*EMBEDDINGS, *BLOCKS, *HEADS)
WITHOUT_POSITIONS = tuple(row for row in LAYERS if row[0] != "position_embedding")


TIED = "tied to the token embedding and the MLM bias"


def tensorflow_names(layers: Layers, model: str = "bert") -> NameTable:
    """The names in TensorFlow checkpoints, of a model whose scope is `model`."""
    return NameTable(
        weights={
            f"{layer}/{ours}": f"{scope}/{theirs}".replace("bert/", f"{model}/")
            for layer, scope, weights in layers
            for ours, theirs, _ in weights
        },
        ignored={r"/adam_[mv]$": "optimizer slot", r"^global_step$": "step counter"},
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
            r"(predictions\.decoder|generator_lm_head\.weight)": TIED,
        },
        renamed={
            # A model saved without heads.
            r"^(embeddings|encoder|pooler)": rf"{model}.\1",
            r"\.LayerNorm\.gamma$": ".LayerNorm.weight",
            r"\.LayerNorm\.beta$": ".LayerNorm.bias",
        },
    )


@keras.saving.register_keras_serializable(package="keras_ext")
class PrefixMask(keras.layers.Layer):
    """What tokens of a UniLM see, boolean (batch, length, length), for its segment ids."""

    def call(self, segment_ids: Any) -> Any:
        return layers.masks.segments(segment_ids)

    def compute_output_spec(self, segment_ids: Any) -> keras.KerasTensor:
        length = segment_ids.shape[1]
        return keras.KerasTensor((segment_ids.shape[0], length, length), dtype="bool")


Sizes = TypeVar("Sizes", bound="BERT")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BERT:
    """The sizes of a BERT, and how it is built from them.

    The fields are those of `bert_config.json`; the first five have no default, and
    `embedding_size`, the width of the embeddings, is `hidden_size` by default. `application` is
    "encoder", "lm" or "unilm".

    Raises:
        ValueError: the activation or the application is unknown, or the heads do not divide the
            width.

    Example:
        >>> bert = BERT.from_config(json.loads(Path("bert_config.json").read_text()))
        >>> larger = dataclasses.replace(bert, num_hidden_layers=2)
        >>> model = larger.build(with_mlm=True)
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    embedding_size: int | None = None
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    application: str = "encoder"

    family: ClassVar[str] = "bert"  # `model_type` of its configurations
    # Fields of configurations that it does not have, with the only values that fit it.
    implied: ClassVar[Mapping[str, Any]] = {
        **IMPLIED,
        "position_embedding_type": "absolute",
        "use_relative_position": False,
    }
    names: ClassVar[Mapping[str, NameTable]] = {
        "tensorflow": tensorflow_names(LAYERS),
        "huggingface": huggingface_names(LAYERS),
    }
    heads: ClassVar[tuple[str, ...]] = ("with_mlm", "with_nsp", "with_pool")  # of `build`
    applications: ClassVar[tuple[str, ...]] = ("encoder", "lm", "unilm")
    learned_positions: ClassVar[bool] = True
    use_bias: ClassVar[bool] = True  # in the blocks
    pre_norm: ClassVar[bool] = False  # in the blocks
    heads_divide_width: ClassVar[bool] = True
    narrow_embeddings: ClassVar[bool] = False  # whether embedding_size may differ

    def __post_init__(self) -> None:
        object.__setattr__(self, "embedding_size", self.embedding_width)  # it is frozen
        if not self.narrow_embeddings and self.embedding_size != self.hidden_size:
            raise ValueError(
                f"embedding_size must be hidden_size={self.hidden_size} for "
                f"{type(self).__name__}, got {self.embedding_size}."
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {self.hidden_act!r}."
            )
        if self.application not in self.applications:
            raise ValueError(
                f"application must be one of {', '.join(self.applications)} for "
                f"{type(self).__name__}, got {self.application!r}."
            )
        if self.heads_divide_width and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of "
                f"num_attention_heads={self.num_attention_heads}."
            )

    @classmethod
    def from_config(cls: type[Sizes], config: Mapping[str, Any]) -> Sizes:
        """Read Google's, Hugging Face's or UER's fields; others, such as `directionality`, say
        nothing about the model and are passed over.

        Raises:
            ValueError: a required field is missing, or a field asks for another architecture.
        """
        config = {UER_FIELDS.get(key, key): value for key, value in config.items()}
        for key, value in {**cls.implied, "model_type": cls.family}.items():
            if config.get(key, value) not in (value, None):
                raise ValueError(
                    f"{key} must be {value!r} for {cls.__name__}, got {config[key]!r}."
                )
        fields = dataclasses.fields(cls)
        for field in fields:
            if field.default is dataclasses.MISSING and field.name not in config:
                raise ValueError(f"The configuration lacks {field.name!r}. Add it.")
        return cls(**{f.name: config[f.name] for f in fields if f.name in config})

    def to_config(self) -> dict[str, Any]:
        """What `from_config` reads, in the fields of Hugging Face."""
        return {"model_type": self.family, **dataclasses.asdict(self)}

    @property
    def embedding_width(self) -> int:
        """`embedding_size`, or its default."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    def build(self, *, name: str | None = None, **heads: bool) -> keras.Model:
        """The functional model with fresh weights; see `build_transformer_model`.

        Args:
            name: of the model. Default: that of the family.
            **heads: which of `self.heads` it has. Default: none.
        """
        for head in heads:
            if head not in self.heads:
                raise TypeError(
                    f"{type(self).__name__}.build() got an unexpected keyword argument {head!r}"
                )
        inputs, token_embedding, hidden = self.trunk()
        wanted = {head for head, value in heads.items() if value}
        outputs = [hidden, *self.head_outputs(wanted, hidden, token_embedding)]
        inputs, outputs = (x if len(x) > 1 else x[0] for x in (inputs, outputs))
        return keras.Model(inputs, outputs, name=name or self.family)

    def head_outputs(
        self, wanted: Collection[str], hidden: Any, token_embedding: layers.TokenEmbedding
    ) -> list[Any]:
        """What the heads make of the last hidden states, (batch, length, hidden_size)."""
        outputs = []
        if "with_mlm" in wanted:
            outputs.append(self.mlm(hidden, token_embedding))  # (batch, length, vocab_size)
        if "with_nsp" in wanted or "with_pool" in wanted:
            pooled = self.dense(self.hidden_size, "pooler", activation="tanh")(hidden[:, 0])
        if "with_nsp" in wanted:
            outputs.append(self.dense(2, "nsp")(pooled))  # (batch, 2)
        if "with_pool" in wanted:
            outputs.append(pooled)  # (batch, hidden_size)
        return outputs

    def trunk(self) -> tuple[list, layers.TokenEmbedding, Any]:
        """Inputs, the token embedding, and the last hidden states."""
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        segment_ids = keras.Input((None,), dtype="int32", name="segment_ids")
        token_embedding = layers.TokenEmbedding(
            self.vocab_size,
            self.embedding_width,
            embeddings_initializer=self.table_initializer(),
            mask_zero=True,
            name="token_embedding",
        )
        hidden = self.embed(self.add_segments(token_embedding(token_ids), segment_ids))
        pattern = {}
        if self.application == "unilm":
            pattern["attention_mask"] = PrefixMask(name="prefix_mask")(segment_ids)
        hidden = self.encode(hidden, **pattern)
        return [token_ids, segment_ids], token_embedding, hidden

    def embed(self, hidden: Any) -> Any:
        """Add positions to the embeddings of tokens and segments, normalise, drop, widen."""
        if self.learned_positions:
            hidden = self.add_positions(hidden)
        hidden = self.drop(self.norm("embedding_norm")(hidden))
        if self.embedding_width == self.hidden_size:
            return hidden
        return self.dense(self.hidden_size, "embedding_projection")(hidden)

    def add_segments(self, tokens: Any, segment_ids: Any) -> Any:
        return layers.SegmentEmbedding(
            self.type_vocab_size,
            embeddings_initializer=self.table_initializer(),
            name="segment_embedding",
        )(tokens, segment_ids)

    def add_positions(self, hidden: Any) -> Any:
        return layers.PositionEmbedding(
            self.max_position_embeddings,
            embeddings_initializer=self.table_initializer(),
            name="position_embedding",
        )(hidden)

    def drop(self, hidden: Any) -> Any:
        return keras.layers.Dropout(self.hidden_dropout_prob, name="embedding_dropout")(hidden)

    def encode(self, hidden: Any, **pattern: Any) -> Any:
        """All blocks, called with `pattern`."""
        for i in range(self.num_hidden_layers):
            hidden = self.block(name=f"encoder_{i}")(hidden, **pattern)
        return hidden

    def block(self, name: str) -> keras.layers.Layer:
        """One encoder block."""
        return layers.TransformerBlock(
            layers.MultiHeadAttention(
                self.num_attention_heads,
                self.hidden_size // self.num_attention_heads,
                dropout=self.attention_probs_dropout_prob,
                position=self.position(),
                causal=self.application == "lm",
                use_bias=self.use_bias,
                kernel_initializer=self.initializer(),
                name="attention",
            ),
            layers.FeedForward(
                self.intermediate_size,
                activation=ACTIVATIONS[self.hidden_act],
                kernel_initializer=self.initializer(),
                use_bias=self.use_bias,
                name="feed_forward",
            ),
            dropout=self.hidden_dropout_prob,
            norm=self.norm(),
            pre_norm=self.pre_norm,
            name=name,
        )

    def position(self) -> Any:
        """What tells the attention of a block where tokens stand."""
        return None

    def mlm(self, hidden: Any, token_embedding: layers.TokenEmbedding) -> Any:
        """Logits over the vocabulary."""
        activation = ACTIVATIONS[self.hidden_act]
        hidden = self.dense(self.embedding_width, "mlm_dense", activation=activation)(hidden)
        hidden = self.norm("mlm_norm")(hidden)
        return layers.Bias(name="mlm_bias")(token_embedding(hidden, reverse=True))

    def dense(self, units: int, name: str, activation: Any = None) -> keras.layers.Dense:
        return keras.layers.Dense(
            units, activation=activation, kernel_initializer=self.initializer(), name=name
        )

    def norm(self, name: str | None = None) -> keras.layers.Layer:
        return keras.layers.LayerNormalization(epsilon=self.layer_norm_eps, name=name)

    def initializer(self) -> keras.initializers.Initializer:
        """Of a kernel: one for each layer, as it would draw the same numbers a second time."""
        return keras.initializers.TruncatedNormal(stddev=self.initializer_range)

    def table_initializer(self) -> keras.initializers.Initializer:
        """Of an embedding."""
        return self.initializer()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of weights, by path, that are enough to tell all sizes."""
        tables = {
            "token_embedding": self.vocab_size,
            "segment_embedding": self.type_vocab_size,
        }
        if self.learned_positions:
            tables["position_embedding"] = self.max_position_embeddings
        kernel, shape = self.block_kernel()
        return {
            **{f"{x}/embeddings": (rows, self.embedding_width) for x, rows in tables.items()},
            **{f"encoder_{i}/{kernel}": shape for i in range(self.num_blocks)},
        }

    @property
    def num_blocks(self) -> int:
        """Number of blocks with weights of their own."""
        return self.num_hidden_layers

    def block_kernel(self) -> tuple[str, tuple[int, int]]:
        """The kernel of a block that tells its sizes: its path there, and its shape."""
        return "feed_forward/intermediate_dense/kernel", (
            self.hidden_size,
            self.intermediate_size,
        )
