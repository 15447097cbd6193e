"""T-TA: no output knows its own token, and one pass scores as n passes do."""

import keras
import numpy as np
import pytest
from compiled import compiled
from keras import ops

from keras_ext import backend
from keras_ext.models import build_transformer_model, pseudo_log_likelihoods
from keras_ext.text import WordPieceTokenizer

RNG = np.random.default_rng(0)
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"天地玄黄宇宙洪荒"]


def small(**kwargs):
    keras.utils.set_random_seed(0)
    sizes = {"vocab_size": len(VOCABULARY), "hidden_size": 8, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 7}
    tta = build_transformer_model(sizes | kwargs, model="tta", with_mlm=True)
    model = keras.Model(tta.inputs, tta.outputs[1])
    for weight in model.weights:
        if "seed" not in weight.path:
            weight.assign(RNG.normal(size=weight.shape) * 0.5 + ("gamma" in weight.path))
    return model


def logits_of(model, token_ids):
    return model.predict_on_batch(np.asarray(token_ids, "int32"))


@pytest.mark.parametrize("length", [1, 2, 6])
def test_no_output_knows_its_own_token(length):
    model = small()
    token_ids = RNG.integers(1, 12, (1, length))
    logits = logits_of(model, token_ids)
    for i in range(length):
        changed = token_ids.copy()
        changed[0, i] = token_ids[0, i] % 11 + 1
        others = logits_of(model, changed)
        np.testing.assert_array_equal(others[0, i], logits[0, i])
        for j in set(range(length)) - {i}:
            assert (others[0, j] != logits[0, j]).any()


@pytest.mark.parametrize("length", [1, 5])
def test_the_gradient_to_its_own_token_is_zero(length):
    model = small()
    table = model.get_layer("token_embedding").embeddings
    token_ids = np.arange(length)[None] + 1
    # The logits of other tokens, as the table is also that of the output.
    factor = RNG.normal(size=12) * ~np.isin(np.arange(12), token_ids)
    for i in range(length):

        def loss(values, i=i):
            with keras.StatelessScope([(table, values)]):
                return ops.sum(ops.multiply(model(token_ids)[0, i], factor.astype("float32")))

        _, gradient = compiled(backend.value_and_grad(loss))(ops.convert_to_tensor(table))
        moved = (ops.convert_to_numpy(gradient)[token_ids[0]] != 0).any(-1)
        np.testing.assert_array_equal(moved, np.arange(length) != i)


def test_padding_changes_nothing():
    model = small()
    token_ids = RNG.integers(1, 12, (2, 4))
    padded = np.pad(token_ids, ((0, 0), (0, 3)))
    alone, together = (logits_of(model, x)[:, :4] for x in (token_ids, padded))
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_one_pass_scores_as_n_passes():
    model = small()
    token_ids = np.array([[5, 6, 7, 8], [9, 4, 0, 0], [4, 0, 0, 0]])
    scores = pseudo_log_likelihoods(model, token_ids)
    for row, ids in enumerate(token_ids):
        expected = 0
        for i in np.flatnonzero(ids):
            hidden = ids.copy()
            hidden[i] = RNG.integers(1, 12)  # whatever it is
            logits = logits_of(model, hidden[None])[0, i].astype("float64")
            expected += logits[ids[i]] - np.log(np.exp(logits).sum())
        np.testing.assert_allclose(scores[row], expected, rtol=1e-5)


def test_texts_are_scored_without_special_tokens():
    model, tokenizer = small(), WordPieceTokenizer(VOCABULARY)
    scores = pseudo_log_likelihoods(model, ["天地玄黄", "宇"], tokenizer)
    ids = [[2, 4, 5, 6, 7, 3], [2, 8, 3, 0, 0, 0]]
    log = np.asarray(ops.log_softmax(logits_of(model, ids)))
    expected = [sum(log[0, i, ids[0][i]] for i in (1, 2, 3, 4)), log[1, 1, 8]]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert pseudo_log_likelihoods(model, []).shape == (0,)
    with pytest.raises(ValueError, match="tokenizer must be given for strings, got None"):
        pseudo_log_likelihoods(model, ["天"])


def test_training_counts_no_padding_and_learns():
    token_ids = np.tile([[4, 5, 6, 0], [6, 5, 4, 0]], (8, 1)).astype("int32")
    model = small(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
    model.compile(keras.optimizers.Adam(0.02), loss)
    first = model.evaluate(token_ids, token_ids, verbose=0)
    np.testing.assert_allclose(
        first, -pseudo_log_likelihoods(model, token_ids).mean() / 3, rtol=1e-5
    )
    model.fit(token_ids, token_ids, 16, epochs=20, verbose=0)
    assert model.evaluate(token_ids, token_ids, verbose=0) < first / 2


def test_other_models_cannot_score():
    sizes = {"vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 16}
    for model, with_mlm, message in (
        ("bert", True, "model must be a text autoencoder, .* got bert"),
        ("tta", False, "tta must have logits"),
    ):
        other = build_transformer_model(sizes, model=model, with_mlm=with_mlm)
        with pytest.raises(ValueError, match=message):
            pseudo_log_likelihoods(other, np.array([[4, 5]]))
