"""The interface of decoding: every attention reads a text in pieces as it reads it at once."""

import inspect
import itertools

import keras
import numpy as np
import pytest
from compiled import compiled
from keras import ops

from keras_ext.layers import (
    FavorAttention,
    GatedAttentionUnit,
    LinearAttention,
    MultiHeadAttention,
    PolynomialAttention,
    RelativePosition,
    ReRoPE,
    RotaryPosition,
)
from keras_ext.layers.attention.decoding import DecodingAttention

RNG = np.random.default_rng(0)
LENGTH, PADDING = 46, (0, 7, 46)  # more than a block of a window; the last text is empty


def squared(x):
    return ops.square(x)


FEATURE_MAPS = {name: name for name in ("elu", "exp", "taylor")} | {"squared": squared}


def heads(**options):
    return MultiHeadAttention(2, 4, causal=True, **options)


ATTENTIONS = {
    "softmax": lambda: heads(num_kv_heads=1, position=RotaryPosition()),
    "log-n": lambda: heads(log_length=4, value_dim=3),
    "window 1": lambda: heads(window=1),
    "window 5": lambda: heads(window=5, position=RotaryPosition(), num_kv_heads=1),
    "window 7": lambda: heads(window=7, position=ReRoPE(3, 2.0), log_length=4),
    "window 40": lambda: heads(window=40, position=RelativePosition(2), value_dim=3),
    "gated": lambda: GatedAttentionUnit(6, 4, position=RotaryPosition(), causal=True),
    **{
        f"linear {name}": lambda feature_map=feature_map: LinearAttention(
            2, 4, 3, num_kv_heads=1, feature_map=feature_map, causal=True, chunk_size=4
        )
        for name, feature_map in FEATURE_MAPS.items()
    },
    "polynomial": lambda: PolynomialAttention(2, 4, 3, causal=True, chunk_size=4),
    "favor": lambda: FavorAttention(2, 4, num_features=16, causal=True, seed=0),
}


def whole(layer, x, valid):
    if isinstance(layer, GatedAttentionUnit):
        return ops.convert_to_numpy(compiled(lambda x: layer(x, mask=valid))(x))
    return ops.convert_to_numpy(compiled(lambda x: layer(x, x, value_mask=valid))(x))


def in_pieces(layer, x, valid, pieces):
    state, step = layer.initial_state(len(x), x.shape[1]), compiled(layer.step)
    found, kinds = [], keras.tree.map_structure(lambda s: (tuple(s.shape), s.dtype), state)
    for start, end in itertools.pairwise(pieces):
        output, state = step(x[:, start:end], state, valid[:, start:end])
        found.append(ops.convert_to_numpy(output))
        assert keras.tree.map_structure(lambda s: (tuple(s.shape), s.dtype), state) == kinds
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_pieces_equal_the_whole(name):
    keras.utils.set_random_seed(0)
    layer = ATTENTIONS[name]()
    layer.build(*[(3, LENGTH, 8)] * (1 if isinstance(layer, GatedAttentionUnit) else 2))
    x = RNG.normal(size=(3, LENGTH, 8)).astype("float32")
    valid = np.arange(LENGTH) >= np.array(PADDING)[:, None]
    x[~valid] = 1e3  # none of it may enter, nor set the scale of the others
    expected = whole(layer, x, valid)
    for pieces in ((0, 3, 4, 41, 45, 46), (0, 38, *range(39, 47))):
        found = in_pieces(layer, x, valid, pieces)
        np.testing.assert_allclose(found[valid], expected[valid], atol=1e-5)
        assert np.isfinite(found).all()
    # That there is no padding need not be said.
    step = compiled(lambda x: layer.step(x, layer.initial_state(1, LENGTH)))
    outputs = ops.convert_to_numpy(step(x[:1])[0])
    np.testing.assert_allclose(outputs, expected[:1], atol=1e-5)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_all_have_the_interface(name):
    layer = ATTENTIONS[name]()
    assert isinstance(layer, DecodingAttention)
    wanted = inspect.signature(DecodingAttention.step).parameters
    parameters = inspect.signature(layer.step).parameters
    assert [*parameters][:3] == [*wanted][1:]
    assert {*parameters} >= {*layer.step_patterns}
    assert [*inspect.signature(layer.initial_state).parameters] == ["batch_size", "max_length"]


def test_what_the_next_tokens_see_of_each_other():
    """Not causal: those of the first piece see each other, later ones all before them."""
    x = RNG.normal(size=(2, 7, 8)).astype("float32")
    valid = np.arange(7) >= np.array([[0], [2]])
    seen = np.tri(7, dtype="bool")
    seen[:4, :4] = True
    for rank in (3, 4):
        pattern = seen[(None,) * (rank - 2)]
        for layer in (
            MultiHeadAttention(2, 4, position=RotaryPosition()),
            GatedAttentionUnit(6, 4, position=RotaryPosition()),
        ):
            inputs = (x,) if isinstance(layer, GatedAttentionUnit) else (x, x)
            mask = np.logical_and(
                pattern, valid[:, None] if rank == 3 else valid[:, None, None]
            )
            layer.build(*[x.shape] * len(inputs))
            run = compiled(lambda *x, layer=layer, mask=mask: layer(*x, attention_mask=mask))
            expected, step = ops.convert_to_numpy(run(*inputs)), compiled(layer.step)
            state = layer.initial_state(2, 9)
            for start, end in ((0, 4), (4, 6), (6, 7)):
                among = pattern[..., start:end, start:end]
                output, state = step(x[:, start:end], state, valid[:, start:end], among)
                rows = valid[:, start:end]
                np.testing.assert_allclose(
                    ops.convert_to_numpy(output)[rows], expected[:, start:end][rows], atol=1e-5
                )


def test_steps_that_are_refused():
    x, mask = np.ones((1, 2, 8), "float32"), np.ones((1, 2, 2), "bool")
    for layer in (GatedAttentionUnit(6, 4), MultiHeadAttention(2, 4), LinearAttention(2, 4)):
        with pytest.raises(ValueError, match="step needs causal=True"):
            layer.step(x, layer.initial_state(1, 4))
    window, linear = heads(window=3), LinearAttention(2, 4, causal=True)
    with pytest.raises(ValueError, match="A window takes no attention_mask or attention_bias"):
        window.step(x, window.initial_state(1, 4), attention_mask=mask)
    with pytest.raises(ValueError, match="LinearAttention has no scores that an attention_mas"):
        linear.step(x, linear.initial_state(1, 4), attention_mask=mask)
    with pytest.raises(ValueError, match='use feature_map="exp" for causal attention'):
        LinearAttention(2, 4, feature_map="softmax", causal=True)
