"""BERT: a bidirectional Transformer encoder with post-norm blocks.

    h      = Dropout(LayerNorm(E_token[ids] + E_segment[segments] + E_position))
    h      = block(h), once per block
    mlm    = LayerNorm(gelu(h W + b)) E_tokenᵀ + b       logits over the vocabulary
    pooled = tanh(h[:, 0] W + b)
    nsp    = pooled W + b                                logits of (next, random)

This file is the family: its configuration, its layers and the names its weights have in
checkpoints. A relative of BERT is a subclass that overrides `embed`, `block` or `names`.

Layer names are part of the API: `token_ids`, `segment_ids`, `token_embedding`,
`segment_embedding`, `position_embedding`, `embedding_norm`, `embedding_dropout`, `encoder_0`
and so on, `mlm_dense`, `mlm_norm`, `mlm_bias`, `pooler`, `nsp`. The input of `mlm_bias` is a
second call of `token_embedding`.

Source: Devlin et al. 2018, arXiv 1810.04805; github.com/google-research/bert.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import keras

from keras_ext import layers
from keras_ext.models.checkpoints import NameTable

ACTIVATIONS = {
    "gelu": keras.activations.gelu,  # exact, by erf
    "gelu_new": layers.gelu_tanh,
    "gelu_pytorch_tanh": layers.gelu_tanh,
    "relu": keras.activations.relu,
}

# Fields that other models of the same configuration format vary, and BERT does not.
IMPLIED = {
    "model_type": "bert",
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "use_relative_position": False,
    "is_decoder": False,
    "tie_word_embeddings": True,
}

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


def _table(name: str) -> tuple[tuple[str, str, str], ...]:
    return (("embeddings", name, f"{name}.weight"),)


# Layer, its scope in a TensorFlow checkpoint (with dots it is Hugging Face's), its weights.
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
LAYERS = (
    ("token_embedding", "bert/embeddings", _table("word_embeddings")),
    ("segment_embedding", "bert/embeddings", _table("token_type_embeddings")),
    ("position_embedding", "bert/embeddings", _table("position_embeddings")),
    ("embedding_norm", "bert/embeddings/LayerNorm", NORM),
    *(("encoder_{i}/" + ours, "bert/encoder/layer_{i}/" + s, w) for ours, s, w in IN_BLOCK),
    ("mlm_dense", "cls/predictions/transform/dense", DENSE),
    ("mlm_norm", "cls/predictions/transform/LayerNorm", NORM),
    ("mlm_bias", "cls/predictions", (("bias", "output_bias", "bias"),)),
    ("pooler", "bert/pooler/dense", DENSE),
    ("nsp", "cls/seq_relationship", NSP),
)

TENSORFLOW = NameTable(
    weights={
        f"{layer}/{ours}": f"{scope}/{theirs}"
        for layer, scope, weights in LAYERS
        for ours, theirs, _ in weights
    },
    ignored={r"/adam_[mv]$": "optimizer slot", r"^global_step$": "step counter"},
)

HUGGINGFACE = NameTable(
    weights={
        f"{layer}/{ours}": f"{scope}/{theirs}".replace("/", ".").replace("layer_", "layer.")
        for layer, scope, weights in LAYERS
        for ours, _, theirs in weights
    },
    ignored={
        r"\.position_ids$": "constant",
        r"^cls\.predictions\.decoder\.": "tied to the token embedding and the MLM bias",
    },
    renamed={
        r"^(embeddings|encoder|pooler)\.": r"bert.\1.",  # a BertModel saved without heads
        r"\.LayerNorm\.gamma$": ".LayerNorm.weight",
        r"\.LayerNorm\.beta$": ".LayerNorm.bias",
    },
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BERT:
    """The sizes of a BERT, and how it is built from them.

    The fields are those of `bert_config.json`; the first five have no default.

    Raises:
        ValueError: the activation is unknown, or the heads do not divide the width.

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
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12

    names: ClassVar[Mapping[str, NameTable]] = {
        "tensorflow": TENSORFLOW,
        "huggingface": HUGGINGFACE,
    }

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {self.hidden_act!r}."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of "
                f"num_attention_heads={self.num_attention_heads}."
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "BERT":
        """Read Google's, Hugging Face's or UER's fields; others, such as `directionality`, say
        nothing about the model and are passed over.

        Raises:
            ValueError: a required field is missing, or a field asks for another architecture.
        """
        config = {UER_FIELDS.get(key, key): value for key, value in config.items()}
        for key, value in {**IMPLIED, "embedding_size": config.get("hidden_size")}.items():
            if config.get(key, value) not in (value, None):
                raise ValueError(f"{key} must be {value!r} for BERT, got {config[key]!r}.")
        fields = dataclasses.fields(cls)
        for field in fields:
            if field.default is dataclasses.MISSING and field.name not in config:
                raise ValueError(f"The configuration lacks {field.name!r}. Add it.")
        return cls(**{f.name: config[f.name] for f in fields if f.name in config})

    def build(
        self,
        with_mlm: bool = False,
        with_nsp: bool = False,
        with_pool: bool = False,
        name: str = "bert",
    ) -> keras.Model:
        """The functional model with fresh weights; see `build_transformer_model`."""
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        segment_ids = keras.Input((None,), dtype="int32", name="segment_ids")
        token_embedding = layers.TokenEmbedding(
            self.vocab_size,
            self.hidden_size,
            embeddings_initializer=self._initializer(),
            mask_zero=True,
            name="token_embedding",
        )
        hidden = self.embed(token_embedding(token_ids), segment_ids)
        for i in range(self.num_hidden_layers):
            hidden = self.block(name=f"encoder_{i}")(hidden)
        outputs = [hidden]  # (batch, length, hidden_size)
        if with_mlm:
            outputs.append(self._mlm(hidden, token_embedding))  # (batch, length, vocab_size)
        if with_nsp or with_pool:
            pooled = self._dense(self.hidden_size, "pooler", activation="tanh")(hidden[:, 0])
        if with_nsp:
            outputs.append(self._dense(2, "nsp")(pooled))  # (batch, 2)
        if with_pool:
            outputs.append(pooled)  # (batch, hidden_size)
        outputs = outputs if len(outputs) > 1 else hidden
        return keras.Model([token_ids, segment_ids], outputs, name=name)

    def embed(self, tokens: keras.KerasTensor, segment_ids: keras.KerasTensor) -> Any:
        """Add segments and positions to the token embeddings, normalise, drop."""
        hidden = layers.SegmentEmbedding(
            self.type_vocab_size,
            embeddings_initializer=self._initializer(),
            name="segment_embedding",
        )(tokens, segment_ids)
        hidden = layers.PositionEmbedding(
            self.max_position_embeddings,
            embeddings_initializer=self._initializer(),
            name="position_embedding",
        )(hidden)
        hidden = self._norm("embedding_norm")(hidden)
        return keras.layers.Dropout(self.hidden_dropout_prob, name="embedding_dropout")(hidden)

    def block(self, name: str) -> layers.TransformerBlock:
        """One encoder block."""
        return layers.TransformerBlock(
            layers.MultiHeadAttention(
                self.num_attention_heads,
                self.hidden_size // self.num_attention_heads,
                dropout=self.attention_probs_dropout_prob,
                kernel_initializer=self._initializer(),
                name="attention",
            ),
            layers.FeedForward(
                self.intermediate_size,
                activation=ACTIVATIONS[self.hidden_act],
                kernel_initializer=self._initializer(),
                name="feed_forward",
            ),
            dropout=self.hidden_dropout_prob,
            epsilon=self.layer_norm_eps,
            name=name,
        )

    def _mlm(self, hidden: Any, token_embedding: layers.TokenEmbedding) -> Any:
        activation = ACTIVATIONS[self.hidden_act]
        hidden = self._dense(self.hidden_size, "mlm_dense", activation=activation)(hidden)
        hidden = self._norm("mlm_norm")(hidden)
        return layers.Bias(name="mlm_bias")(token_embedding(hidden, reverse=True))

    def _dense(self, units: int, name: str, activation: Any = None) -> keras.layers.Dense:
        return keras.layers.Dense(
            units, activation=activation, kernel_initializer=self._initializer(), name=name
        )

    def _norm(self, name: str) -> keras.layers.LayerNormalization:
        return keras.layers.LayerNormalization(epsilon=self.layer_norm_eps, name=name)

    def _initializer(self) -> keras.initializers.Initializer:
        # One for each layer: an initializer draws the same numbers again at its second use.
        return keras.initializers.TruncatedNormal(stddev=self.initializer_range)
