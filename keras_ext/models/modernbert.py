"""ModernBERT: pre-norm blocks without biases, most of which see the tokens around them only.

    h      = Dropout(LayerNorm(E_token[ids]))
    h      = h + Dropout(Attention(n)), n = Norm(h);  h = h + W_o (gelu(m W) ⊙ m V), m = Norm(h)
    hidden = LayerNorm(h),    mlm = LayerNorm(gelu(hidden W)) E_tokenᵀ + b

Every third block sees all tokens, the others those at distances up to `local_attention` / 2.
Positions are rotary, with a base for either kind, the two halves of a head making the pairs.
The first block has no norm before its attention. There are no segments; padding is not 0.

Source: Warner et al. 2024, arXiv 2412.13663; checkpoints: answerdotai/ModernBERT-base, -large.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import keras

from keras_ext import layers
from keras_ext.models.family import ACTIVATIONS, Family, Sizes, Trunk
from keras_ext.models.names import NameTable

FULL, LOCAL = "full_attention", "sliding_attention"

DENSE = {"kernel": "weight.T", "bias": "bias"}
NORM = {"gamma": "weight", "beta": "bias"}
# Layer -> its name at Hugging Face, its weights, its part of them.
LAYERS: dict[str, tuple[str, dict[str, str], str]] = {
    "embedding_norm": ("model.embeddings.norm", NORM, ""),
    "encoder_{i}/attention_norm": ("model.layers.{i}.attn_norm", NORM, ""),
    "encoder_{i}/attention/query_dense": ("model.layers.{i}.attn.Wqkv", DENSE, "[0/3]"),
    "encoder_{i}/attention/key_dense": ("model.layers.{i}.attn.Wqkv", DENSE, "[1/3]"),
    "encoder_{i}/attention/value_dense": ("model.layers.{i}.attn.Wqkv", DENSE, "[2/3]"),
    "encoder_{i}/attention/output_dense": ("model.layers.{i}.attn.Wo", DENSE, ""),
    "encoder_{i}/feed_forward_norm": ("model.layers.{i}.mlp_norm", NORM, ""),
    "encoder_{i}/feed_forward/intermediate_dense": ("model.layers.{i}.mlp.Wi", DENSE, "[0/2]"),
    "encoder_{i}/feed_forward/linear_dense": ("model.layers.{i}.mlp.Wi", DENSE, "[1/2]"),
    "encoder_{i}/feed_forward/output_dense": ("model.layers.{i}.mlp.Wo", DENSE, ""),
    "output_norm": ("model.final_norm", NORM, ""),
    "mlm_dense": ("head.dense", DENSE, ""),
    "mlm_norm": ("head.norm", NORM, ""),
    "mlm_bias": ("decoder", {"bias": "bias"}, ""),
}


@keras.saving.register_keras_serializable(package="keras_ext")
class ModernBERTBlock(layers.TransformerBlock):
    """A pre-norm `TransformerBlock` that drops nothing of its feed-forward layer's output.

    Args:
        first: there is no norm before the attention. Default: False.
        *args, **kwargs: those of `TransformerBlock`.
    """

    def __init__(self, *args: Any, first: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.first = first
        if first:
            # Keras lists the one before, too, and quantises no model with layers not built.
            self.attention_norm.built = True
            self.attention_norm = _NoNorm(name="attention_norm")

    def _sublayers(
        self, x: Any, attend: Any, cross_attend: Any, condition: Any, training: bool | None
    ) -> Any:
        given = () if condition is None else (condition,)
        y = attend(self.attention_norm(x, *given))
        x = x + self.dropout_layer(y, training=training)
        return x + self.feed_forward(self.feed_forward_norm(x, *given), training=training)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "first": self.first}


class _NoNorm(keras.layers.Layer):
    """In the place of a norm."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True

    def build(self, inputs_shape: tuple, condition_shape: tuple | None = None) -> None:
        pass

    def call(self, inputs: Any, condition: Any = None) -> Any:
        return inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModernBERT(Family, family="modernbert"):
    """The sizes of a ModernBERT; fields may be named as here or as Hugging Face does.

    Its only head is `with_mlm`. `layer_types` says of each block whether its attention is
    "full_attention" or "sliding_attention"; by default, and from a configuration with
    `global_attn_every_n_layers`, every third (n-th) is full, beginning with the first.
    `hidden_dropout_prob` is the rate after the embeddings, `mlp_dropout` that within the
    feed-forward layers, and the attention's output is dropped at the rate of its weights.

    Raises:
        ValueError: as of `Family`, or `layer_types` does not fit the number of blocks.

    Example:
        >>> sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3}
        >>> sizes |= {"num_attention_heads": 4, "intermediate_size": 64, "pad_token_id": 3}
        >>> model = build_transformer_model(sizes, model="modernbert", with_mlm=True)
        >>> hidden, logits = model(np.array([[5, 7, 3]]))
    """

    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    mlp_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    layer_types: tuple[str, ...] | None = None
    local_attention: int = 128
    global_rope_theta: float = 160_000.0
    local_rope_theta: float | None = 10_000.0
    max_position_embeddings: int = 8192  # it limits nothing
    pad_token_id: int = 50283
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    classifier_activation: str = "gelu"
    classifier_bias: bool = False
    decoder_bias: bool = True
    initializer_range: float = 0.02

    fields: ClassVar[Mapping[str, str]] = {
        "hidden_act": "hidden_activation",
        "layer_norm_eps": "norm_eps",
        "hidden_dropout_prob": "embedding_dropout",
        "attention_probs_dropout_prob": "attention_dropout",
    }
    implied: ClassVar[Mapping[str, Any]] = {
        "tie_word_embeddings": True,
        "position_embedding_type": "absolute",  # what files say, and no program reads
        "rope_scaling": None,
    }
    names: ClassVar[Mapping[str, NameTable]] = {
        "huggingface": NameTable(
            weights={
                "token_embedding/embeddings": "model.embeddings.tok_embeddings.weight",
                **{
                    f"{layer}/{ours}": f"{name}.{theirs}{part}"
                    for layer, (name, weights, part) in LAYERS.items()
                    for ours, theirs in weights.items()
                },
            },
            ignored={},
            outputs=("decoder.weight",),
            optional="mlm_",
            renamed={r"^(embeddings|layers|final_norm)\.": r"model.\1."},
        )
    }
    heads: ClassVar[Mapping[str, str]] = {"with_mlm": "mlm"}
    learned_positions: ClassVar[bool] = False

    def __post_init__(self) -> None:
        kinds = self.layer_types or _every(3, self.num_hidden_layers)
        object.__setattr__(self, "layer_types", tuple(kinds))
        super().__post_init__()
        if self.num_hidden_groups is not None:
            raise ValueError(
                f"num_hidden_groups must be None for ModernBERT, whose blocks differ, got "
                f"{self.num_hidden_groups}."
            )
        if len(kinds) != self.num_hidden_layers or not {*kinds} <= {FULL, LOCAL}:
            raise ValueError(
                f"layer_types must name {FULL} or {LOCAL} for each of num_hidden_layers="
                f"{self.num_hidden_layers} blocks, got {kinds}."
            )
        if self.classifier_activation not in ACTIVATIONS:
            raise ValueError(
                f"classifier_activation must be one of {', '.join(ACTIVATIONS)}, got "
                f"{self.classifier_activation!r}."
            )

    @classmethod
    def from_config(cls: type[Sizes], config: Mapping[str, Any]) -> Sizes:
        """Read what transformers 4 or 5 writes; see `Family.from_config`."""
        config = dict(config)
        if "norm_eps" in config:
            config.pop("layer_norm_eps", None)  # what files say, and no program reads
        number = config.pop("global_attn_every_n_layers", None)
        if config.get("layer_types") is None and number is not None:
            config["layer_types"] = _every(number, config.get("num_hidden_layers", 0))
        for kind, rope in (config.pop("rope_parameters", None) or {}).items():
            if rope.get("rope_type", "default") != "default":
                raise ValueError(
                    f"rope_parameters must be of the type 'default' for {cls.__name__}, got "
                    f"{rope}."
                )
            config["global_rope_theta" if kind == FULL else "local_rope_theta"] = rope[
                "rope_theta"
            ]
        return super().from_config(config)

    def to_config(self) -> dict[str, Any]:
        config = super().to_config()
        config["rope_parameters"] = {  # as version 5 reads it, and version 4 the fields
            kind: {"rope_theta": self.base(kind), "rope_type": "default"}
            for kind in (FULL, LOCAL)
        }
        if self.period is not None:
            config["global_attn_every_n_layers"] = self.period
        return config

    @property
    def period(self) -> int | None:
        """n, where every n-th block is full, and no other."""
        numbers = range(1, self.num_hidden_layers + 1)
        periods = (n for n in numbers if _every(n, len(numbers)) == self.layer_types)
        return next(periods, None)

    @property
    def is_known_elsewhere(self) -> bool:
        return super().is_known_elsewhere and self.period is not None

    def base(self, kind: str) -> float:
        """That of the rotary positions in blocks of this kind."""
        if kind == FULL or self.local_rope_theta is None:
            return self.global_rope_theta
        return self.local_rope_theta

    def trunk(self) -> Trunk:
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        positions = self.position_ids()
        token_embedding = self.token_embedding(padding_id=self.pad_token_id)
        hidden = self.drop(self.norm("embedding_norm")(token_embedding(token_ids)))
        hidden = self.encode(hidden, **self.pattern(positions))
        hidden = self.norm("output_norm")(hidden)
        return Trunk([token_ids, *positions], token_embedding, hidden)

    def block(self, side: str, number: int) -> ModernBERTBlock:
        assert self.layer_types is not None  # since `__post_init__`
        kind = self.layer_types[number]
        return ModernBERTBlock(
            layers.MultiHeadAttention(
                self.num_attention_heads,
                self.hidden_size // self.num_attention_heads,
                dropout=self.attention_probs_dropout_prob,
                window=self.local_attention // 2 + 1 if kind == LOCAL else None,
                position=layers.RotaryPosition(self.base(kind), interleaved=False),
                use_bias=self.attention_bias,
                kernel_initializer=self.initializer(),
                output_initializer=self.output_initializer(),
                name="attention",
            ),
            layers.FeedForward(
                self.intermediate_size,
                activation=self.activation,
                kernel_initializer=self.initializer(),
                output_initializer=self.output_initializer(),
                use_bias=self.mlp_bias,
                gated=True,
                dropout=self.mlp_dropout,
                name="feed_forward",
            ),
            dropout=self.attention_probs_dropout_prob,
            norm=self.norm(),
            pre_norm=True,
            first=number == 0,
            name=f"{side}_{number}",
        )

    def mlm(self, trunk: Trunk) -> Any:
        """Logits over the vocabulary, (batch, length, vocab_size)."""
        dense = keras.layers.Dense(
            self.hidden_size,
            activation=ACTIVATIONS[self.classifier_activation],
            use_bias=self.classifier_bias,
            kernel_initializer=self.output_initializer(),
            name="mlm_dense",
        )
        hidden = self.norm("mlm_norm")(dense(trunk.hidden))
        logits = trunk.token_embedding(hidden, reverse=True)
        return layers.Bias(name="mlm_bias")(logits) if self.decoder_bias else logits

    def norm(self, name: str | None = None) -> keras.layers.LayerNormalization:
        return keras.layers.LayerNormalization(
            epsilon=self.layer_norm_eps, center=self.norm_bias, name=name
        )

    def initializer(self) -> keras.initializers.Initializer:
        return keras.initializers.TruncatedNormal(stddev=self.initializer_range)

    def output_initializer(self) -> keras.initializers.Initializer:
        """Of the last kernel of a sublayer, so that sums do not grow with their number."""
        deviation = self.initializer_range / (2 * self.num_hidden_layers) ** 0.5
        return keras.initializers.TruncatedNormal(stddev=deviation)

    def of_blocks(self, side: str, numbers: Iterable[int]) -> dict[str, Any]:
        numbers = [*numbers]
        if numbers[0] != 0:
            raise ValueError("its first block has a norm before the attention")
        assert self.layer_types is not None  # since `__post_init__`
        return {"layer_types": tuple(self.layer_types[i] for i in numbers)}


def _every(period: int, number: int) -> tuple[str, ...]:
    """The kinds of so many blocks, of which every n-th is full."""
    return tuple(LOCAL if i % period else FULL for i in range(number))
