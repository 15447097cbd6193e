"""T5 and mT5: an encoder and a decoder of pre-norm blocks, with biases for relative positions.

    encoder   x = x + Attention(n, n; b), n = RMS(x);  x = x + FeedForward(RMS(x))
    decoder   the same, causal, with an attention to the encoder's output between the two
    logits    = RMS(y) Eᵀ/√d for T5, RMS(y) W for T5 1.1 and mT5, whose feed-forward is gated

No layer has a bias of its own, scores are not divided by √d, and all blocks of a side share one
`T5Bias`. Encoder and decoder share the token embedding.

As `application` "seq2seq" the model maps `[token_ids, decoder_token_ids]` to the hidden states
of the decoder, whose first token is 0 and seen like any other; "encoder" maps `token_ids` to
those of the encoder, "decoder" maps `[memory, memory_mask, decoder_token_ids]`: the encoder's
hidden states (batch, sources, width) and where they count, boolean (batch, sources).

Layer names: `token_ids`, `token_embedding`, `encoder_position`, `encoder_0` ...,
`encoder_norm`; `decoder_token_ids`, `decoder_position`, `decoder_0` ..., `decoder_norm`,
`lm_head`; `memory`, `memory_mask`.

Source: Raffel et al. 2020, arXiv 1910.10683; Shazeer 2020, arXiv 2002.05202 (T5 1.1); Xue et
al. 2021 (mT5), arXiv 2010.11934; kexue.fm/archives/7867.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import keras

from keras_ext import layers
from keras_ext.models.family import Family, Sizes, Trunk
from keras_ext.models.names import NameTable

# Field -> its name in Hugging Face configurations.
FIELDS = {
    "hidden_size": "d_model",
    "head_size": "d_kv",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "hidden_dropout_prob": "dropout_rate",
    "layer_norm_eps": "layer_norm_epsilon",
}
GATED = {"gelu": "gelu_new"}  # what T5 calls gated-gelu has the tanh

# Sublayer -> its name in both kinds of checkpoints, whose weights are kernels alone.
PROJECTIONS = {"query_dense": "q", "key_dense": "k", "value_dense": "v", "output_dense": "o"}
FEED_FORWARD = {"intermediate_dense": "wi_0", "linear_dense": "wi_1", "output_dense": "wo"}
# Layers of heads, and of a side, which a model may be without.
SIDE = r"lm_head$|encoder_|decoder_"


def _names(block: str, sub: str, kernel: str, projection: str, scale: str) -> dict[str, str]:
    """Weights of the blocks of both sides, in one format of checkpoints.

    Args:
        block: "block_{i:03d}/" or its like, the scope of a block.
        sub: "layer_00" or its like, that a digit is added to.
        kernel, projection, scale: what the weights of dense layers, projections and norms are
            called.
    """
    names, dot = {}, block[-1]
    for side, attentions in {
        "encoder": {"attention": "SelfAttention"},
        "decoder": {"attention": "SelfAttention", "cross_attention": "EncDecAttention"},
    }.items():
        ours, theirs = f"{side}_{{i}}/", f"{side}{dot}{block}"
        for number, (attention, scope) in enumerate(attentions.items()):
            at = f"{theirs}{sub}{number}{dot}"
            names[f"{ours}{attention}_norm/gamma"] = f"{at}layer_norm{dot}{scale}"
            for layer, letter in PROJECTIONS.items():
                path = f"{ours}{attention}/{layer}/kernel"
                names[path] = f"{at}{scope}{dot}{letter}{projection}"
        at = f"{theirs}{sub}{len(attentions)}{dot}"
        names[f"{ours}feed_forward_norm/gamma"] = f"{at}layer_norm{dot}{scale}"
        for layer, scope in FEED_FORWARD.items():
            path = f"{ours}feed_forward/{layer}/kernel"
            names[path] = f"{at}DenseReluDense{dot}{scope}{kernel}"
        names[f"{side}_norm/gamma"] = f"{side}{dot}final_layer_norm{dot}{scale}"
    return names


def _position_names(name: str) -> dict[str, str]:
    """The biases of both sides, which stand in their first blocks."""
    sides = ("encoder", "decoder")
    return {f"{side}_position/embeddings": name.format(side=side) for side in sides}


TENSORFLOW = NameTable(
    weights={
        "token_embedding/embeddings": "shared/embedding",
        **_position_names("{side}/block_000/layer_000/SelfAttention/relative_attention_bias.T"),
        **_names("block_{i:03d}/", "layer_00", "/kernel", "", "scale"),
        "lm_head/kernel": "decoder/logits/kernel",
    },
    ignored={r"_slot_v[rc]?$": "optimizer slot", r"^global_step$": "step counter"},
    outputs=("decoder/logits/kernel.T",),
    optional=SIDE,
    renamed={  # mT5's
        r"^(encoder|decoder)/rms_norm/": r"\1/final_layer_norm/",
        "rms_norm": "layer_norm",
    },
    fallbacks={r"/wi_0/": "/wi/"},
)
HUGGINGFACE = NameTable(
    weights={
        "token_embedding/embeddings": "shared.weight",
        **_position_names(
            "{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ),
        **_names("block.{i}.", "layer.", ".weight.T", ".weight.T", "weight"),
        "lm_head/kernel": "lm_head.weight.T",
    },
    ignored={r"EncDecAttention\.relative_attention_bias": "unused"},
    copies={f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")},
    outputs=("lm_head.weight",),
    optional=SIDE,
    # transformers ties the head of a T5 1.1 that it makes itself.
    fallbacks={r"\.wi_0\.": ".wi.", r"^lm_head\.": "shared."},
)


def _not_gated(table: NameTable) -> NameTable:
    """What is `wi_0` beside a gate is `wi` without one."""
    weights = {ours: theirs.replace("wi_0", "wi") for ours, theirs in table.weights.items()}
    return dataclasses.replace(table, weights=weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5(Family, family="t5"):
    """The sizes of a T5; fields may be named as here or as Hugging Face does.

    Its only head is `with_mlm`, the logits of the decoder's next token. `application` is
    "seq2seq", "encoder" or "decoder". Kernels are drawn with the variance of Lecun's rule
    times `initializer_factor`²; `initializer_range` is not its.

    Raises:
        ValueError: as of `Family`.

    Example:
        >>> sizes = {"vocab_size": 100, "d_model": 32, "d_ff": 64, "num_layers": 2}
        >>> sizes |= {"num_heads": 4, "d_kv": 8}
        >>> t5 = build_transformer_model(sizes, model="t5", with_mlm=True)
        >>> hidden, logits = t5([np.array([[5, 3, 1]]), np.array([[0, 7]])])
    """

    head_size: int = 64
    num_decoder_layers: int | None = None
    num_decoder_groups: int | None = None
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    hidden_act: str = "relu"
    layer_norm_eps: float = 1e-6
    initializer_factor: float = 1.0
    tie_word_embeddings: bool = True
    application: str = "seq2seq"

    fields: ClassVar[Mapping[str, str]] = FIELDS
    implied: ClassVar[Mapping[str, Any]] = {"pad_token_id": 0, "initializer_range": 0.02}
    names: ClassVar[Mapping[str, NameTable]] = {
        "tensorflow": TENSORFLOW,
        "huggingface": HUGGINGFACE,
    }
    heads: ClassVar[Mapping[str, str]] = {"with_mlm": "mlm"}
    takes_gates: ClassVar[bool] = True
    applications: ClassVar[tuple[str, ...]] = ("seq2seq", "encoder", "decoder")
    learned_positions: ClassVar[bool] = False
    takes_positions: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.num_decoder_layers is None:
            object.__setattr__(self, "num_decoder_layers", self.num_hidden_layers)
        super().__post_init__()
        if not self.gated:
            object.__setattr__(self, "names", {k: _not_gated(v) for k, v in self.names.items()})
        if self.application == "encoder":
            object.__setattr__(self, "heads", {})
            object.__setattr__(self, "architectures", ("T5EncoderModel",))

    @classmethod
    def from_config(cls: type[Sizes], config: Mapping[str, Any]) -> Sizes:
        """Read the fields of Hugging Face, or ours; see `Family.from_config`.

        transformers 5 writes `tie_word_embeddings` True for any T5, and what it was into
        `scale_decoder_outputs`.
        """
        config = dict(config)
        scaled = config.get("scale_decoder_outputs")
        if scaled is not None:
            config["tie_word_embeddings"] = scaled
        kind = config.pop("feed_forward_proj", None)
        if kind is not None:
            gate, _, activation = kind.rpartition("-")
            if gate not in ("", "gated"):
                raise ValueError(f"feed_forward_proj must be like gated-gelu, got {kind!r}.")
            config["gated"] = bool(gate)
            config["hidden_act"] = GATED.get(activation, activation) if gate else activation
        dropout = config.get("dropout_rate", config.get("hidden_dropout_prob"))
        if dropout is not None:
            config.setdefault("attention_probs_dropout_prob", dropout)
        return super().from_config(config)

    def to_config(self) -> dict[str, Any]:
        config = super().to_config()
        named = {new: old for old, new in GATED.items()}
        activation = named.get(self.hidden_act, self.hidden_act)
        kind = f"gated-{activation}" if self.gated else self.hidden_act
        return {**config, "feed_forward_proj": kind}

    @property
    def is_known_elsewhere(self) -> bool:
        if self.application == "encoder":  # which its architecture says
            return dataclasses.replace(self, application="seq2seq").is_known_elsewhere
        return super().is_known_elsewhere and self.num_decoder_groups is None

    @property
    def heads_divide_width(self) -> bool:
        return False

    @property
    def sides(self) -> dict[str, int]:
        sides = {"encoder": self.num_hidden_layers, "decoder": self.num_decoder_layers or 0}
        return {s: n for s, n in sides.items() if self.application in ("seq2seq", s)}

    def trunk(self) -> Trunk:
        token_embedding = self.token_embedding()
        if self.application == "decoder":
            memory = keras.Input((None, self.hidden_size), name="memory")
            memory_mask = keras.Input((None,), dtype="bool", name="memory_mask")
            inputs = [memory, memory_mask]
            memory = layers.WithMask(name="memory_states")(inputs)
        else:
            token_ids = keras.Input((None,), dtype="int32", name="token_ids")
            inputs, memory = [token_ids], self.side("encoder", token_embedding(token_ids))
        if self.application == "encoder":
            return Trunk(inputs, token_embedding, memory)
        token_ids = keras.Input((None,), dtype="int32", name="decoder_token_ids")
        tokens = layers.WithMask(name="decoder_tokens")(token_embedding(token_ids))
        hidden = self.side("decoder", tokens, memory=memory)
        return Trunk([*inputs, token_ids], token_embedding, hidden)

    def side(self, side: str, tokens: Any, **memory: Any) -> Any:
        """Hidden states of the encoder, or with its output as memory those of the decoder."""
        hidden = self.drop(tokens, f"{side}_dropout")
        bias = layers.T5Bias(
            self.num_attention_heads,
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
            bidirectional=side == "encoder",
            name=f"{side}_position",
        )(hidden)
        hidden = self.encode(hidden, side, attention_bias=bias, **memory)
        return self.drop(self.norm(f"{side}_norm")(hidden), f"{side}_output_dropout")

    def block(self, side: str, number: int) -> layers.TransformerBlock:
        def attention(name: str, causal: bool) -> layers.MultiHeadAttention:
            return layers.MultiHeadAttention(
                self.num_attention_heads,
                self.head_size,
                dropout=self.attention_probs_dropout_prob,
                causal=causal,
                scale=1.0,
                use_bias=False,
                kernel_initializer=self.initializer(),
                # So that scores have variance 1, as they are not divided by √d.
                query_initializer=self.initializer(1 / self.head_size),
                name=name,
            )

        decodes = side == "decoder"
        return layers.TransformerBlock(
            attention("attention", causal=decodes),
            layers.FeedForward(
                self.intermediate_size,
                activation=self.activation,
                kernel_initializer=self.initializer(),
                use_bias=False,
                gated=self.gated,
                dropout=self.hidden_dropout_prob,
                name="feed_forward",
            ),
            dropout=self.hidden_dropout_prob,
            norm=self.norm(),
            pre_norm=True,
            cross_attention=attention("cross_attention", causal=False) if decodes else None,
            name=f"{side}_{number}",
        )

    def mlm(self, trunk: Trunk) -> Any:
        """Logits over the vocabulary, of the decoder, (batch, length, vocab_size)."""
        if self.tie_word_embeddings:
            return trunk.token_embedding(trunk.hidden * self.hidden_size**-0.5, reverse=True)
        return self.dense(self.vocab_size, "lm_head", use_bias=False)(trunk.hidden)

    def norm(self, name: str | None = None) -> layers.RMSNorm:
        return layers.RMSNorm(epsilon=self.layer_norm_eps, name=name)

    def initializer(self, gain: float = 1.0) -> keras.initializers.Initializer:
        """Of a kernel that keeps this share of the variance."""
        gain *= self.initializer_factor**2
        return keras.initializers.VarianceScaling(gain, "fan_in", "truncated_normal")

    def table_initializer(self) -> keras.initializers.Initializer:
        return keras.initializers.RandomNormal(stddev=self.initializer_factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MT5(T5, family="mt5"):
    """The sizes of an mT5: a T5 that is gated, with a head of its own; see `T5`.

    `tie_word_embeddings` of its configurations is passed over: transformers writes True in
    them, whatever the weights are.

    Example:
        >>> sizes = {"vocab_size": 100, "d_model": 32, "d_ff": 64, "num_layers": 2}
        >>> sizes |= {"num_heads": 4, "d_kv": 8}
        >>> mt5 = build_transformer_model(sizes, model="mt5", application="encoder")
        >>> hidden = mt5(np.array([[5, 3, 1]]))
    """

    hidden_act: str = "gelu_new"
    gated: bool = True
    tie_word_embeddings: bool = False

    @classmethod
    def from_config(cls: type[Sizes], config: Mapping[str, Any]) -> Sizes:
        """See `T5.from_config`."""
        return super().from_config({**config, "tie_word_embeddings": False})
