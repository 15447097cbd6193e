"""Transformer-based text autoencoder (T-TA): a masked language model of all tokens in one pass.

    Q_0 = LN(P),    K = V = LN(E + P) in all layers,    Q_l = Block(Q_(l-1); K, V)

Queries start from positions alone, keys and values are the embedded tokens and never change,
and no token attends to itself. So the output at i knows all tokens but x_i, and predicts it:

    logits_i = E Q_L,i + b,    p(x_i | all others) for all i in one pass

where a masked language model needs a pass for each i. The price: keys and values are not
contextual. There is no [MASK], and all tokens are targets in training, not 15 %.

Pieces of one word see each other, so their probabilities are high.

Source: Shin et al. 2020, arXiv 2004.08097; kexue.fm/archives/7661.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ext import layers
from keras_ext.layers import masks

BATCH_SIZE = 32


@keras.saving.register_keras_serializable(package="keras_ext")
class OtherTokens(keras.layers.Layer):
    """The mask that hides from each token itself, (1, length, length), for hidden states."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, inputs: Any) -> Any:
        return masks.others(ops.shape(inputs)[1])

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        return None

    def compute_output_spec(self, inputs: Any) -> keras.KerasTensor:
        return keras.KerasTensor((1, inputs.shape[1], inputs.shape[1]), dtype="bool")


@keras.saving.register_keras_serializable(package="keras_ext")
class TTA(keras.Model):
    """A text autoencoder: token ids (batch, length) -> logits (batch, length, vocab_size).

    Its targets are its inputs; padding, id 0, is not to be counted:

        tta.compile("adamw", SparseCategoricalCrossentropy(from_logits=True, ignore_class=0))
        tta.fit(token_ids, token_ids)

    For another task take `tta.get_layer("encoder_2").output`.

    Args:
        vocab_size: rows of the token table.
        num_layers: number of blocks. Default: 3.
        hidden_size: width. Default: 512.
        num_heads: heads of a block; they divide `hidden_size`. Default: 8.
        intermediate_size: width of the feed-forward layers. Default: 2048.
        max_length: longest text. Default: 128.
        dropout: rate after embeddings and sublayers. Default: 0.1.
        tokenizer: a `WordPieceTokenizer` for `score`. It is not saved: set the attribute
            again after loading. Default: None.

    Raises:
        ValueError: `num_heads` does not divide `hidden_size`, or a size is not positive.

    Example:
        >>> tta = TTA(vocab_size=100, num_layers=2, hidden_size=16, num_heads=2)
        >>> tta.score(np.array([[2, 5, 3], [4, 0, 0]])).shape
        (2,)

    Reference: Shin et al. 2020, arXiv 2004.08097.
    """

    def __init__(
        self,
        vocab_size: int,
        num_layers: int = 3,
        hidden_size: int = 512,
        num_heads: int = 8,
        intermediate_size: int = 2048,
        max_length: int = 128,
        dropout: float = 0.1,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        sizes = {
            "vocab_size": vocab_size,
            "num_layers": num_layers,
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "intermediate_size": intermediate_size,
            "max_length": max_length,
        }
        for name, number in sizes.items():
            if number < 1:
                raise ValueError(f"{name} must be positive, got {number}.")
        if hidden_size % num_heads:
            raise ValueError(
                f"num_heads must divide hidden_size={hidden_size}, got {num_heads}."
            )
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        embedding = layers.TokenEmbedding(
            vocab_size, hidden_size, mask_zero=True, name="token_embedding"
        )
        add_positions = layers.PositionEmbedding(max_length, name="position_embedding")
        drop = keras.layers.Dropout(dropout, name="dropout")
        tokens = embedding(token_ids)
        memory = _norm("token_norm")(add_positions(tokens))
        memory = drop(memory)  # (batch, length, hidden_size)
        hidden = drop(_norm("position_norm")(add_positions(ops.zeros_like(tokens))))
        not_itself = OtherTokens(name="other_tokens")(tokens)
        for i in range(num_layers):
            block = layers.TransformerBlock(
                layers.MultiHeadAttention(num_heads, hidden_size // num_heads),
                layers.FeedForward(intermediate_size),
                dropout,
                name=f"encoder_{i}",
            )
            hidden = block(hidden, attention_mask=not_itself, memory=memory)
        logits = layers.Bias(name="bias")(embedding(hidden, reverse=True))
        super().__init__(token_ids, logits, **kwargs)
        self.sizes = {**sizes, "dropout": dropout}
        self.tokenizer = tokenizer

    def score(self, texts: Sequence[str] | np.ndarray) -> np.ndarray:
        """Pseudo-log-likelihoods Σ_i ln p(x_i | all others), in one pass.

        Args:
            texts: strings, for which the model needs its `tokenizer`, [CLS] and [SEP] are not
                counted; or token ids (texts, length), of which all but 0 are counted.

        Returns: float64 (texts,).

        Raises:
            ValueError: strings are given, and there is no tokenizer.
        """
        if len(texts) and isinstance(texts[0], str):
            token_ids, counted = self._encode(list(texts))
        else:
            token_ids = np.asarray(texts, "int32")
            counted = token_ids != 0
        scores = np.zeros(len(token_ids))
        for start in range(0, len(token_ids), BATCH_SIZE):
            rows = slice(start, start + BATCH_SIZE)
            logits = self.predict_on_batch(token_ids[rows]).astype("float64")
            logits -= logits.max(-1, keepdims=True)
            chosen = np.take_along_axis(logits, token_ids[rows, :, None], -1)[..., 0]
            log_probabilities = chosen - np.log(np.exp(logits).sum(-1))
            scores[rows] = np.where(counted[rows], log_probabilities, 0).sum(-1)
        return scores

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, and which of them are of the texts; both (texts, longest)."""
        if self.tokenizer is None:
            raise ValueError(
                "The model has no tokenizer to score strings with: set `tokenizer`, or give "
                "token ids."
            )
        max_length = self.sizes["max_length"]
        encoded = self.tokenizer.encode_batch(texts, max_length=max_length)
        longest = max(len(encoding.token_ids) for encoding in encoded)
        token_ids = np.zeros((len(texts), longest), "int32")
        counted = np.zeros(token_ids.shape, bool)
        for row, encoding in enumerate(encoded):
            size = len(encoding.token_ids)
            token_ids[row, :size] = encoding.token_ids
            counted[row, :size] = [start < end for start, end in encoding.offsets]
        return token_ids, counted

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name, "trainable": self.trainable, **self.sizes}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "TTA":
        return cls(**config)


def _norm(name: str) -> keras.layers.LayerNormalization:
    return keras.layers.LayerNormalization(epsilon=1e-12, name=name)
