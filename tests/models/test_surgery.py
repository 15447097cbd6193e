"""Other attention, vocabulary, blocks, positions and names."""

import keras
import numpy as np
import pytest
from families import random_model
from keras import ops
from models.small_bert import SIZES

from keras_ext.layers import MultiHeadAttention
from keras_ext.models import build_transformer_model, save_transformer_model
from keras_ext.models.surgery import (
    condition_norms,
    extend_positions,
    rename_layers,
    replace_attention,
    select_blocks,
    select_tokens,
    share_blocks,
)

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
    with pytest.raises(
        ValueError, match=r"blocks must be numbers of encoder_0, encoder_1, got \[2, 1\]"
    ):
        replace_attention(model, same_heads, blocks=[2, 1])
    with pytest.raises(ValueError, match="has no layers encoder_0"):
        replace_attention(
            keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), same_heads
        )


# ------------------------------------------------------------------ vocabulary


@pytest.fixture(scope="module")
def with_mlm():
    bert = build_transformer_model({**SIZES, "initializer_range": 0.5}, with_mlm=True)
    bert.get_layer("mlm_bias").set_weights([np.linspace(-1, 1, SIZES["vocab_size"])])
    return bert


def test_tokens_that_are_kept_have_the_outputs_they_had(with_mlm, tmp_path):
    kept = [0, 9, 3, 4, 7]
    small = select_tokens(with_mlm, kept)
    ids = np.array([[1, 2, 3, 0], [4, 4, 1, 2]], "int32")  # of the new vocabulary
    old = with_mlm([np.array(kept, "int32")[ids], 0 * ids])
    new = small([ids, 0 * ids])
    np.testing.assert_allclose(*map(ops.convert_to_numpy, (new[0], old[0])), atol=1e-6)
    logits = ops.convert_to_numpy(old[1])[..., kept]
    np.testing.assert_allclose(ops.convert_to_numpy(new[1]), logits, atol=1e-5)
    save_transformer_model(small, tmp_path)
    again = build_transformer_model(tmp_path, with_mlm=True)
    np.testing.assert_array_equal(
        *(ops.convert_to_numpy(m([ids, 0 * ids])[1]) for m in (small, again))
    )


def test_new_tokens_are_means_of_old_ones(with_mlm):
    size = SIZES["vocab_size"]
    larger = select_tokens(with_mlm, [*range(size), [3, 5, 5]])
    for name in ("token_embedding", "mlm_bias"):
        (old,), (new,) = (model.get_layer(name).get_weights() for model in (with_mlm, larger))
        np.testing.assert_array_equal(new[:size], old)
        np.testing.assert_allclose(new[size], old[3] / 3 + old[5] * 2 / 3, rtol=1e-6)


def test_a_head_with_a_matrix_of_its_own_is_pruned_too():
    model, kept = random_model("mt5", with_mlm=True), [0, 9, 3, [4, 4, 7]]
    small = select_tokens(model, kept)
    ids = np.array([[1, 2, 1, 0], [2, 2, 1, 1]], "int32")
    old = np.array([0, 9, 3], "int32")[ids]
    new, logits = (ops.convert_to_numpy(m([x, x])[-1]) for m, x in ((small, ids), (model, old)))
    assert new.shape[-1] == 4
    np.testing.assert_allclose(new[..., :3], logits[..., [0, 9, 3]], atol=1e-5)
    mean = logits[..., 4] * 2 / 3 + logits[..., 7] / 3
    np.testing.assert_allclose(new[..., 3], mean, atol=1e-5)


def test_padding_that_is_not_0_is_found_again(tmp_path):
    """The rest sees no padding, whatever its id is then."""
    given = {"local_attention": 2, "pad_token_id": 3}
    model = build_transformer_model({**SIZES, **given}, model="modernbert")
    small = select_tokens(model, [0, 9, 4, 3, 1][::-1])
    new, old = np.array([[0, 2, 3, 1, 1]]), np.array([[1, 4, 9, 3, 3]])
    found, expected = (ops.convert_to_numpy(m(x)) for m, x in ((small, new), (model, old)))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    longer = ops.convert_to_numpy(small(np.pad(new, ((0, 0), (0, 2)), constant_values=1)))
    np.testing.assert_allclose(longer[:, :3], expected[:, :3], atol=1e-6)
    save_transformer_model(small, tmp_path)
    again = ops.convert_to_numpy(build_transformer_model(tmp_path)(new))
    np.testing.assert_array_equal(again, found)
    with pytest.raises(ValueError, match="tokens must have 3, the padding, got"):
        select_tokens(model, [0, 9])


def test_another_head_over_the_vocabulary_is_refused(model):
    own = keras.layers.Dense(SIZES["vocab_size"], name="own")(model.output)
    with pytest.raises(ValueError, match="own has 11 units, as many as there are tokens"):
        select_tokens(keras.Model(model.inputs, own), range(4))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], r"tokens\[0\] must be 0, the padding, got \[\]"),
        ([1, 2], r"tokens\[0\] must be 0, the padding, got \[1\]"),
        ([0, 11], r"tokens\[1\] must be one or several ids from 0 to 10, got 11"),
        ([0, -1], r"tokens\[1\] must be"),
        ([0, [3, 99]], r"tokens\[1\] must be"),
        ([0, []], r"tokens\[1\] must be"),
    ],
)
def test_bad_tokens(with_mlm, tokens, message):
    with pytest.raises(ValueError, match=message):
        select_tokens(with_mlm, tokens)


# ------------------------------------------------------------------ blocks


@pytest.mark.parametrize("kept", [[0], [1], [0, 2], [0, 1, 2]])
def test_blocks_that_are_kept_follow_one_another(kept):
    bert = build_transformer_model({**SIZES, "num_hidden_layers": 3, "initializer_range": 0.5})
    hidden = keras.Model(bert.inputs, bert.get_layer("embedding_dropout").output)(X)
    for i in kept:
        hidden = bert.get_layer(f"encoder_{i}")(hidden, attention_mask=(IDS != 0)[:, None])
    some = select_blocks(bert, kept)
    np.testing.assert_allclose(outputs(some), ops.convert_to_numpy(hidden), atol=1e-5)
    names = [layer.name for layer in some.layers if layer.name.startswith("encoder_")]
    assert names == [f"encoder_{i}" for i in range(len(kept))]
    paths = {w.path.split("/")[0] for w in some.weights if w.path.startswith("encoder_")}
    assert paths == set(names)  # so a checkpoint of so many blocks fits


def test_a_shared_block_is_kept_or_dropped_in_all_its_places():
    config = {**SIZES, "num_hidden_layers": 4, "num_hidden_groups": 2, "embedding_size": 4}
    albert = build_transformer_model(config, model="albert")
    hidden = keras.Model(albert.inputs, albert.get_layer("embedding_projection").output)(X)
    for _ in range(2):
        hidden = albert.get_layer("encoder_1")(hidden, attention_mask=(IDS != 0)[:, None])
    second = select_blocks(albert, [1])
    np.testing.assert_allclose(outputs(second), ops.convert_to_numpy(hidden), atol=1e-5)


@pytest.mark.parametrize("blocks", [[], [2], [1, 0], [0, 0], [-1]])
def test_bad_blocks_to_keep(model, blocks):
    with pytest.raises(ValueError, match="blocks must be rising numbers from 0 to 1, got"):
        select_blocks(model, blocks)


# ------------------------------------------------------------------ positions, names


@pytest.mark.parametrize(("groups", "firsts"), [(1, [0, 0, 0]), (2, [0, 0, 2]), (3, [0, 1, 2])])
def test_shared_blocks(groups, firsts, tmp_path):
    model = build_transformer_model({**SIZES, "num_hidden_layers": 3})
    shared = share_blocks(model, groups)
    names = [layer.name for layer in shared.layers if layer.name.startswith("encoder_")]
    assert names == [f"encoder_{g}" for g in range(groups)]
    blocks = [model.get_layer(f"encoder_{i}") for i in range(3)]
    for block, first in zip(blocks, firsts, strict=True):
        block.set_weights(blocks[first].get_weights())
    np.testing.assert_allclose(outputs(shared), outputs(model), atol=1e-6)
    save_transformer_model(shared, tmp_path)
    again = build_transformer_model(tmp_path)
    np.testing.assert_allclose(outputs(again), outputs(model), atol=1e-6)


def test_groups_that_cannot_share(model):
    for groups in (0, 3):
        with pytest.raises(
            ValueError, match=f"num_groups must be from 1 to 2, .* got {groups}"
        ):
            share_blocks(model, groups)


def test_extended_positions(model):
    size = SIZES["max_position_embeddings"]
    longer = extend_positions(model, 2 * size + 3, alpha=0.3)
    (old,), (new,) = (m.get_layer("position_embedding").get_weights() for m in (model, longer))
    np.testing.assert_allclose(new[:size], old, atol=1e-6)
    u = (old - 0.3 * old[0]) / 0.7
    for place, (i, j) in {size: (1, 0), 2 * size + 2: (2, 2)}.items():
        np.testing.assert_allclose(new[place], 0.3 * u[i] + 0.7 * u[j], atol=1e-6)
    np.testing.assert_allclose(outputs(longer), outputs(model), atol=1e-5)
    ids = np.ones((1, 2 * size + 3), "int32")
    assert np.isfinite(ops.convert_to_numpy(longer([ids, 0 * ids]))).all()
    for length in (size - 1, size**2 + 1):
        with pytest.raises(ValueError, match=f"max_length must be from {size} to {size**2}"):
            extend_positions(model, length)
    for alpha in (0, 0.5, 1, float("nan")):
        with pytest.raises(ValueError, match="alpha must be between 0 and 1, and not"):
            extend_positions(model, size, alpha)


def test_two_models_side_by_side(model, tmp_path):
    other = rename_layers(model, "other_")
    assert all(layer.name.startswith("other_") for layer in other.layers)
    both = keras.Model([*model.inputs, *other.inputs], [model.output, other.output])
    for output in both([*X, *X]):
        np.testing.assert_allclose(ops.convert_to_numpy(output), outputs(model), atol=1e-6)
    both.save(tmp_path / "both.keras")
    loaded = keras.models.load_model(tmp_path / "both.keras")
    np.testing.assert_allclose(
        ops.convert_to_numpy(loaded([*X, *X])[1]), outputs(model), atol=1e-6
    )


def test_one_after_the_other(with_mlm):
    """The tied embedding stays one."""
    small = select_tokens(with_mlm, range(8))
    small = extend_positions(select_blocks(small, [1]), 10)
    small = rename_layers(small, "a_")
    assert [x.shape[-1] for x in small.outputs] == [SIZES["hidden_size"], 8]
    assert sum(w.path.endswith("token_embedding/embeddings") for w in small.weights) == 1


# ------------------------------------------------------------------ conditions


def test_a_condition_makes_no_difference_at_first(with_mlm, tmp_path):
    changed = condition_norms(with_mlm, 3)
    assert [x.name for x in changed.inputs] == ["token_ids", "segment_ids", "condition"]
    condition = np.float32([[1, 2, 3], [-4, 5, 6]])
    for one, other in zip(changed([*X, condition]), with_mlm(X), strict=True):
        np.testing.assert_allclose(*map(ops.convert_to_numpy, (one, other)), atol=1e-5)
    paths = [w.path for w in changed.weights if not w.path.endswith("_kernel")]
    assert sorted(paths) == sorted(w.path for w in with_mlm.weights)
    norms = 2 * SIZES["num_hidden_layers"] + 2  # of the embeddings and of the MLM head
    assert len(changed.weights) - len(with_mlm.weights) == 2 * norms

    for weight in changed.weights:
        if weight.path.endswith("encoder_1/attention_norm/gamma_kernel"):
            weight.assign(np.ones(weight.shape))
    outputs = ops.convert_to_numpy(changed([*X, condition])[0])
    assert np.abs(outputs - ops.convert_to_numpy(with_mlm(X)[0])).max() > 0.1
    changed.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(ops.convert_to_numpy(loaded([*X, condition])[0]), outputs)


def test_each_text_has_its_own_condition(with_mlm):
    changed = condition_norms(with_mlm, 1)
    for index, weight in enumerate(changed.weights):
        if weight.path.endswith("_kernel"):
            weight.assign(np.random.default_rng(index).normal(size=weight.shape))
    both = ops.convert_to_numpy(changed([*X, np.float32([[1], [2]])])[0])
    for text, value in ((0, 1.0), (1, 2.0)):
        alone = changed([x[text : text + 1] for x in X] + [np.float32([[value]])])[0]
        np.testing.assert_allclose(both[text], ops.convert_to_numpy(alone)[0], atol=1e-5)


def test_norms_that_cannot_be_conditioned(with_mlm):
    with pytest.raises(ValueError, match="size must be positive, got 0"):
        condition_norms(with_mlm, 0)
    rms = build_transformer_model(SIZES, model="roformer_v2")
    with pytest.raises(ValueError, match="roformer_v2 has no LayerNormalization that could"):
        condition_norms(rms, 3)
