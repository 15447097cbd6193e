"""replace_attention."""

import keras
import numpy as np
import pytest
from keras import ops
from models.small_bert import SIZES

from keras_ext.layers import MultiHeadAttention
from keras_ext.models import build_transformer_model
from keras_ext.models.surgery import replace_attention

IDS = np.array([[1, 2, 3, 4], [5, 6, 0, 0]], "int32")
X = [IDS, np.zeros_like(IDS)]


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    bert = build_transformer_model({**SIZES, "num_hidden_layers": 2, "initializer_range": 0.5})
    return keras.Model(bert.inputs, keras.layers.Dense(3)(bert.output[:, 0]), name="classifier")


def outputs(model):
    return ops.convert_to_numpy(model(X))


def same_heads(old):
    return MultiHeadAttention(old.num_heads, old.key_dim)


def one_head(old):
    return MultiHeadAttention(1, old.num_heads * old.key_dim)


def test_the_same_attention_changes_nothing(model):
    changed = replace_attention(model, same_heads)
    assert [v.path for v in changed.weights] == [v.path for v in model.weights]
    np.testing.assert_allclose(outputs(changed), outputs(model), rtol=1e-6)


def test_weights_that_fit_are_kept_and_others_are_fresh(model, tmp_path):
    before = outputs(model)
    changed = replace_attention(model, one_head, blocks=[1])
    heads = [changed.get_layer(f"encoder_{i}").attention.num_heads for i in range(2)]
    assert heads == [SIZES["num_attention_heads"], 1]
    for old, new in zip(model.weights, changed.weights, strict=True):
        np.testing.assert_array_equal(*map(ops.convert_to_numpy, (old, new)))
    assert np.abs(outputs(changed) - before).max() > 1e-2
    back = replace_attention(
        changed, lambda old: same_heads(model.get_layer("encoder_1").attention)
    )
    np.testing.assert_allclose(outputs(back), before, rtol=1e-6)

    narrow = replace_attention(model, lambda old: MultiHeadAttention(1, 1))
    kernels = [v for v in narrow.weights if v.path.endswith("query_dense/kernel")]
    assert [v.shape[-1] for v in kernels] == [1, 1]
    narrow.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(outputs(loaded), outputs(narrow))
    np.testing.assert_array_equal(outputs(model), before)


def test_bad_blocks(model):
    with pytest.raises(ValueError, match=r"blocks must be among 0 to 1, got \[1, 2\]"):
        replace_attention(model, same_heads, blocks=[2, 1])
    with pytest.raises(ValueError, match="has no layers encoder_0"):
        replace_attention(
            keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), same_heads
        )
