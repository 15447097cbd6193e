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

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from keras_ext import layers
from keras_ext.models.bert import BLOCKS, EMBEDDINGS, NORM, huggingface_names
from keras_ext.models.family import Family, Trunk
from keras_ext.models.names import NameTable

BATCH_SIZE = 32

LAYERS = (
    *(row for row in EMBEDDINGS if row[0] in ("token_embedding", "position_embedding")),
    ("token_norm", "bert/embeddings/token_norm", NORM),
    ("position_norm", "bert/embeddings/position_norm", NORM),
    *BLOCKS,
    ("mlm_bias", "cls/predictions", (("bias", "output_bias", "bias"),)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TTA(Family, family="tta"):
    """The sizes of a text autoencoder. Its only head is `with_mlm`, p(x_i | all others).

    Its targets are its inputs; padding, id 0, is not to be counted:

        tta = build_transformer_model(sizes, model="tta", with_mlm=True)
        logits = keras.Model(tta.inputs, tta.outputs[1])
        logits.compile("adamw", SparseCategoricalCrossentropy(from_logits=True, ignore_class=0))
        logits.fit(token_ids, token_ids)

    What is saved has names of our making, as there is no such model at Hugging Face.

    Example:
        >>> sizes = {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 2}
        >>> sizes |= {"num_attention_heads": 2, "intermediate_size": 32}
        >>> tta = build_transformer_model(sizes, model="tta", with_mlm=True)
        >>> hidden, logits = tta(np.array([[5, 3, 8]]))

    Reference: Shin et al. 2020, arXiv 2004.08097.
    """

    max_position_embeddings: int = 128
    initializer_range: float = 0.02

    names: ClassVar[Mapping[str, NameTable]] = {
        "huggingface": huggingface_names(LAYERS, model="tta")
    }
    heads: ClassVar[Mapping[str, str]] = {"with_mlm": "mlm"}
    implied: ClassVar[Mapping[str, Any]] = {"pad_token_id": 0}

    def trunk(self) -> Trunk:
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        positions = self.position_ids()
        token_embedding = self.token_embedding()
        add_positions = layers.PositionEmbedding(
            self.max_position_embeddings,
            embeddings_initializer=self.table_initializer(),
            name="position_embedding",
        )
        tokens = token_embedding(token_ids)
        memory = self.norm("token_norm")(add_positions(tokens, *positions))
        memory = self.drop(memory)  # (batch, length, hidden_size)
        queries = add_positions(ops.zeros_like(tokens), *positions)
        queries = self.drop(self.norm("position_norm")(queries), "position_dropout")
        others = layers.OtherTokens(name="other_tokens")(tokens)
        hidden = self.encode(queries, attention_mask=others, memory=memory)
        return Trunk([token_ids, *positions], token_embedding, hidden)

    def mlm(self, trunk: Trunk) -> Any:
        """Logits over the vocabulary, (batch, length, vocab_size)."""
        logits = trunk.token_embedding(trunk.hidden, reverse=True)
        return layers.Bias(name="mlm_bias")(logits)

    def initializer(self) -> keras.initializers.Initializer:
        return keras.initializers.TruncatedNormal(stddev=self.initializer_range)


def pseudo_log_likelihoods(
    model: keras.Model, texts: Sequence[str] | np.ndarray, tokenizer: Any = None
) -> np.ndarray:
    """Pseudo-log-likelihoods Σ_i ln p(x_i | all others) by a text autoencoder, in one pass.

    Args:
        model: of the family "tta", with its logits.
        texts: strings, of which [CLS] and [SEP] are not counted; or token ids (texts, length),
            of which all but 0 are counted.
        tokenizer: a `WordPieceTokenizer`, for strings. Default: None.

    Returns: float64 (texts,).

    Raises:
        ValueError: the model is no text autoencoder with logits, or strings come without a
            tokenizer.

    Example:
        >>> sizes = {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 2}
        >>> sizes |= {"num_attention_heads": 2, "intermediate_size": 32}
        >>> tta = build_transformer_model(sizes, model="tta", with_mlm=True)
        >>> pseudo_log_likelihoods(tta, np.array([[2, 5, 3], [4, 0, 0]])).shape
        (2,)

    Reference: Shin et al. 2020, arXiv 2004.08097.
    """
    if not any(isinstance(layer, layers.OtherTokens) for layer in model.layers):
        raise ValueError(
            f"model must be a text autoencoder, whose tokens see all but themselves, got "
            f"{model.name}. Build it with model='tta', with_mlm=True."
        )
    embedding = model.get_layer("token_embedding")
    number = [i for i, x in enumerate(model.outputs) if x.shape[-1] == embedding.input_dim]
    if len(number) != 1:
        raise ValueError(f"{model.name} must have logits. Build it with_mlm=True.")
    if len(texts) and isinstance(texts[0], str):
        max_length = model.get_layer("position_embedding").max_length
        token_ids, counted = _encoded([*texts], tokenizer, max_length)
    else:
        token_ids = np.asarray(texts, "int32")
        counted = token_ids != 0
    scores = np.zeros(len(token_ids))
    for start in range(0, len(token_ids), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        outputs = keras.tree.flatten(model.predict_on_batch(token_ids[rows]))
        logits = outputs[number[0]].astype("float64")
        logits -= logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, token_ids[rows, :, None], -1)[..., 0]
        log_probabilities = chosen - np.log(np.exp(logits).sum(-1))
        scores[rows] = np.where(counted[rows], log_probabilities, 0).sum(-1)
    return scores


def _encoded(
    texts: list[str], tokenizer: Any, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, and which of them are of the texts; both (texts, longest)."""
    if tokenizer is None:
        raise ValueError("tokenizer must be given for strings, got None. Or give token ids.")
    encoded = tokenizer.encode_batch(texts, max_length=max_length)
    longest = max(len(encoding.token_ids) for encoding in encoded)
    token_ids = np.zeros((len(texts), longest), "int32")
    counted = np.zeros(token_ids.shape, bool)
    for row, encoding in enumerate(encoded):
        size = len(encoding.token_ids)
        token_ids[row, :size] = encoding.token_ids
        counted[row, :size] = [start < end for start, end in encoding.offsets]
    return token_ids, counted
