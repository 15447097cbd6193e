"""RoBERTa, XLM-RoBERTa and CamemBERT: BERTs whose positions are counted from the padding's id.

    h   = Dropout(LayerNorm(E_token[ids] + E_segment[0] + E_position[row]))
    row = pad + (number of tokens so far that are no padding), for padding itself row = pad
    mlm = LayerNorm(gelu(h W + b)) E_tokenᵀ + b

There is one segment, and no input for it. Of `max_position_embeddings` rows the first pad + 1
are for no token: 514 mean texts of 512 tokens. In the head there is a gelu whatever
`hidden_act` is. What bert4keras calls "roberta" (RoBERTa-wwm, roberta_zh) are plain BERTs.

Source: Liu et al. 2019, arXiv 1907.11692; Conneau et al. 2019, arXiv 1911.02116; Martin et al.
2019, arXiv 1911.03894; huggingface.co/docs/transformers/model_doc/roberta.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import keras
from keras import ops

from keras_ext import layers
from keras_ext.models.bert import BERT, BLOCKS, DENSE, EMBEDDINGS, NORM, huggingface_names
from keras_ext.models.family import ACTIVATIONS, Sizes
from keras_ext.models.names import NameTable

LAYERS = (
    *EMBEDDINGS,
    *BLOCKS,
    ("mlm_dense", "lm_head/dense", DENSE),
    ("mlm_norm", "lm_head/layer_norm", NORM),
    ("mlm_bias", "lm_head", (("bias", "output_bias", "bias"),)),
    ("pooler", "bert/pooler/dense", DENSE),
)

PLAIN_BERT = (
    "is a plain BERT, as are RoBERTa-wwm and all that bert4keras calls 'roberta'. Give "
    "model='bert'."
)


@keras.saving.register_keras_serializable(package="keras_ext")
class OffsetPositionEmbedding(layers.PositionEmbedding):
    """Add one learned vector per position, of which padding has none.

        y_t = x_t + P[pad + t + 1] for the t-th token, t = 0, 1 ...;  x_t + P[pad] for padding

    Args:
        max_length: rows of the table. A text has at most `max_length` - pad - 1 tokens.
        padding_id: pad, the id of padding. Default: 1.
        **kwargs: those of `PositionEmbedding`.

    Call arguments:
        inputs: (batch, length, width). The output is like it.
        token_ids: integers (batch, length).
        positions: integers (batch, length) from 0, where tokens stand. What is beyond the table
            gives NaN. Default: their number among the tokens that are no padding.

    Raises:
        ValueError: the table has no row for a token, or the inputs are longer.

    Example:
        >>> layer = OffsetPositionEmbedding(max_length=514)
        >>> token_ids = np.array([[0, 31, 2, 1]])
        >>> tuple(layer(keras.ops.zeros((1, 4, 8)), token_ids).shape)
        (1, 4, 8)
    """

    counts_tokens = True  # so that a token which is made padding moves the others

    def __init__(self, max_length: int, padding_id: int = 1, **kwargs: Any) -> None:
        super().__init__(max_length, **kwargs)
        self.padding_id = padding_id
        if max_length < padding_id + 2:
            raise ValueError(
                f"max_length must be at least padding_id + 2 = {padding_id + 2}, got "
                f"{max_length}."
            )

    def build(  # type: ignore[override]  # it asks where padding is
        self,
        inputs_shape: tuple,
        token_ids_shape: tuple,
        positions_shape: tuple | None = None,
    ) -> None:
        super().build(inputs_shape)

    def call(  # type: ignore[override]
        self, inputs: Any, token_ids: Any, positions: Any = None
    ) -> Any:
        real = ops.cast(ops.not_equal(token_ids, self.padding_id), "int32")
        if positions is None:
            self._check_length(inputs.shape[1])
            positions = ops.cumsum(real, axis=1) - 1
        rows = (ops.cast(positions, "int32") + 1) * real + self.padding_id
        # What backends make of a row that there is not differs, and some say nothing.
        last = self.max_length - 1
        # A slice, so that the gradient is dense: see `SegmentEmbedding`.
        chosen = ops.take(self.embeddings[:], ops.clip(rows, 0, last), axis=0)
        return inputs + ops.where((rows <= last)[..., None], chosen, float("nan"))

    def compute_output_shape(  # type: ignore[override]
        self,
        inputs_shape: tuple,
        token_ids_shape: tuple,
        positions_shape: tuple | None = None,
    ) -> tuple:
        return super().compute_output_shape(inputs_shape, positions_shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "padding_id": self.padding_id}

    def _check_length(self, length: int | None) -> None:
        tokens = self.max_length - self.padding_id - 1
        if length is not None and length > tokens:
            raise ValueError(
                f"The inputs have length {length}, but {self.name} has only {tokens} "
                f"positions: max_length={self.max_length} without the first padding_id + 1 = "
                f"{self.padding_id + 1}. Truncate the inputs."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoBERTa(BERT, family="roberta"):
    """The sizes of a RoBERTa. Its heads are `with_mlm` and `with_pool`.

    Its only input is `token_ids`, unless `type_vocab_size` is greater than 1.

    Raises:
        ValueError: as of `BERT`, or `max_position_embeddings` leaves no position for a token.

    Example:
        >>> sizes = {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 2}
        >>> sizes |= {"num_attention_heads": 2, "intermediate_size": 32}
        >>> model = build_transformer_model(sizes, model="roberta", with_mlm=True)
        >>> hidden, logits = model(np.array([[0, 31, 2, 1]]))
    """

    type_vocab_size: int = 1
    pad_token_id: int = 1

    names: ClassVar[Mapping[str, NameTable]] = {
        "huggingface": dataclasses.replace(
            huggingface_names(LAYERS, model="roberta"),
            copies={"lm_head.decoder.bias": "lm_head.bias"},
            outputs=("lm_head.decoder.weight",),
            foreign={r"^bert[/.]": PLAIN_BERT},
        )
    }
    heads: ClassVar[Mapping[str, str]] = {"with_mlm": "mlm", "with_pool": "pooled"}
    applications: ClassVar[tuple[str, ...]] = ("encoder",)
    counts_from_padding: ClassVar[bool] = True

    @classmethod
    def from_config(cls: type[Sizes], config: Mapping[str, Any]) -> Sizes:
        """Read a configuration of transformers; see `Family.from_config`."""
        if config.get("model_type") == "bert":
            raise ValueError(f"The model of this configuration {PLAIN_BERT}")
        return super().from_config(config)

    def segment_inputs(self) -> list[keras.KerasTensor]:
        return super().segment_inputs() if self.type_vocab_size > 1 else []

    def add_positions(self, hidden: Any, positions: list[Any], max_length: int) -> Any:
        return OffsetPositionEmbedding(
            max_length,
            padding_id=self.pad_token_id,
            embeddings_initializer=self.table_initializer(),
            name="position_embedding",
        )(hidden, *positions)

    def places(self, token_ids: Any, positions: list[Any]) -> list[Any]:
        return [token_ids, *positions]

    @property
    def head_activation(self) -> Callable[[Any], Any]:
        return ACTIVATIONS["gelu"]


class XLMRoBERTa(RoBERTa, family="xlm-roberta"):
    """The sizes of an XLM-RoBERTa, a RoBERTa of a hundred languages.

    Example:
        >>> sizes = {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 2}
        >>> sizes |= {"num_attention_heads": 2, "intermediate_size": 32}
        >>> model = build_transformer_model(sizes, model="xlm-roberta")
        >>> model(np.array([[0, 31, 2, 1]])).shape[-1]
        16
    """


class CamemBERT(RoBERTa, family="camembert"):
    """The sizes of a CamemBERT, a RoBERTa of French.

    Example:
        >>> sizes = {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 2}
        >>> sizes |= {"num_attention_heads": 2, "intermediate_size": 32}
        >>> model = build_transformer_model(sizes, model="camembert")
        >>> model(np.array([[0, 31, 2, 1]])).shape[-1]
        16
    """
