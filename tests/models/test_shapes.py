"""Compiled models see as many shapes as there are buckets, whatever the batch and texts."""

import keras
import numpy as np
import pytest
from families import SIZES
from keras import ops

from keras_ext.models import BERT
from keras_ext.text import BucketedBatches

SHAPES = {
    **SIZES,
    "num_hidden_layers": 1,
    "max_position_embeddings": 512,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LENGTHS = [32, 512]
ROWS = np.random.default_rng(0).permutation([1, *range(3, 33, 3), *range(34, 513, 14)])


class Traced(keras.layers.Layer):
    """Notes the shape it is given whenever Python runs it."""

    seen = ()

    def call(self, inputs):
        self.seen = (*self.seen, tuple(inputs.shape))
        return inputs


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="PyTorch traces nothing")
@pytest.mark.parametrize("batch_size", [1, 32])
def test_texts_of_up_to_512_tokens_are_traced_once_per_bucket(batch_size):
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, 11, length).tolist() for length in ROWS]
    options = {"batch_size": batch_size, "lengths": LENGTHS}
    training = BucketedBatches(texts, np.arange(len(texts)) % 2, seed=0, **options)
    evaluation = BucketedBatches(texts, **options)
    assert {x.shape for ((x, _),) in evaluation} <= {(batch_size, n) for n in LENGTHS}

    bert = BERT(**SHAPES).build()
    traced = Traced()
    model = keras.Model(bert.inputs, keras.layers.Dense(2)(traced(bert.output[:, 0])))
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )
    model.compile("sgd", loss, jit_compile=True)
    # On JAX, Keras calls the model once more to build the metrics.
    for least, most in ((1, len(LENGTHS) + 1), (0, 0)):
        traced.seen = ()
        model.fit(training, shuffle=False, verbose=0)
        assert least <= len(traced.seen) <= most
        traced.seen = ()
        predicted = evaluation.restore(model.predict(evaluation, verbose=0))
        assert least <= len(traced.seen) <= most
        training.set_epoch(1)
    for row in (0, 1, 2):
        tokens = np.array([texts[row]])
        alone = ops.convert_to_numpy(model([tokens, np.zeros_like(tokens)]))
        np.testing.assert_allclose(predicted[row], alone[0], atol=1e-5)
