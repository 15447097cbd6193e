"""GlobalPointer: scores against float64 loops, masks in every dtype, and training."""

import keras
import numpy as np
import pytest
from compiled import compiled, float64
from keras import ops
from reference import global_pointer as reference

from keras_ext.backend import value_and_grad
from keras_ext.layers import EfficientGlobalPointer, GlobalPointer, mask_spans, span_scores
from keras_ext.losses import MultilabelCrossentropy

JIT = keras.backend.backend() != "torch"  # there it means torch.compile, which needs minutes
HEADS, SIZE, LENGTH, WIDTH = 3, 4, 6, 5
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(2, LENGTH, WIDTH)).astype("float32")
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], bool)
KEPT = np.broadcast_to(
    (np.tri(LENGTH, dtype=bool).T & MASK[:, None] & MASK[:, :, None])[:, None],
    (2, HEADS, LENGTH, LENGTH),
)


def numpy(x):
    return ops.convert_to_numpy(ops.cast(x, "float32"))


def call(layer, hidden=HIDDEN, mask=MASK):
    if not layer.built:
        layer.build(hidden.shape)
    return compiled(lambda hidden, mask: layer(hidden, mask=mask))(hidden, mask)


def randomized(layer):
    """The layer, built, with weights that are nowhere zero."""
    layer.build(HIDDEN.shape)
    random = np.random.default_rng(1)
    layer.set_weights([random.normal(size=w.shape) for w in layer.weights])
    return layer


def expected(layer):
    """Unmasked scores in float64, from the weights of the layer."""
    weights = [w.astype("float64") for w in layer.get_weights()]
    projected = HIDDEN @ weights[0] + weights[1]  # (batch, length, [heads, query and] size)
    if type(layer) is GlobalPointer:
        projected = projected.reshape(2, LENGTH, HEADS, 2, SIZE)
        query, key = projected[..., 0, :], projected[..., 1, :]
        extra = 0
    else:
        # The slices of bert4keras 0.11, whose trained heads are to be read.
        query, key = projected[..., None, ::2], projected[..., None, 1::2]
        types = np.swapaxes(projected @ weights[2] + weights[3], 1, 2) / 2
        extra = types[:, ::2, None, :] + types[:, 1::2, :, None]
    pairs = zip(query, key, strict=True)
    return np.stack([reference.span_scores(q, k, layer.rope) for q, k in pairs]) + extra


@pytest.mark.parametrize(
    ("make", "rope", "tril"),
    [
        (GlobalPointer, True, True),
        (GlobalPointer, False, False),
        (EfficientGlobalPointer, True, False),
    ],
)
def test_equals_the_definition(make, rope, tril):
    layer = randomized(make(HEADS, SIZE, rope=rope, tril=tril))
    kept = KEPT | np.swapaxes(KEPT, 2, 3) if not tril else KEPT
    scores = np.where(kept, expected(layer), -16384)
    np.testing.assert_allclose(numpy(call(layer)), scores, rtol=1e-5, atol=1e-4)


# On JAX the cosines that Keras gives are of float32.
@pytest.mark.parametrize(("rope", "rtol"), [(False, 1e-11), (True, 1e-5)])
def test_float64_scores(rope, rtol):
    query, key = np.random.default_rng(3).normal(size=(2, 1, LENGTH, HEADS, SIZE))
    with float64():
        scores = ops.convert_to_numpy(mask_spans(span_scores(query, key, rope), tril=False))
    assert scores.dtype == "float64"
    expected = reference.span_scores(query[0], key[0], rope)
    np.testing.assert_allclose(scores[0], expected, rtol=rtol)


@pytest.mark.parametrize("make", [GlobalPointer, EfficientGlobalPointer])
def test_a_float64_layer_stays_float64(make):
    with float64():
        layer = randomized(make(HEADS, SIZE, dtype="float64"))
        scores = ops.convert_to_numpy(layer(HIDDEN.astype("float64"), mask=MASK))
    assert scores.dtype == "float64"
    # The matmul in a Dense of Keras is one of float32 on PyTorch and JAX.
    np.testing.assert_allclose(scores, np.where(KEPT, expected(layer), -16384), rtol=1e-4)


def test_with_rope_positions_count_by_their_difference_alone():
    row = np.random.default_rng(2).normal(size=(2, 1, 1, 2, 8)).astype("float32")
    query, key = np.repeat(row, 7, axis=2)  # the same token everywhere
    scores = numpy(compiled(span_scores)(query, key))[0]
    np.testing.assert_allclose(scores[:, 1:, 1:], scores[:, :-1, :-1], atol=1e-5)
    assert np.ptp(scores, axis=(1, 2)).min() > 0.1
    assert np.ptp(numpy(span_scores(query, key, rope=False))[0], axis=(1, 2)).max() < 1e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_masked_scores_are_nothing_also_in_half_precision(dtype):
    scores = call(GlobalPointer(HEADS, SIZE, dtype=dtype))
    assert keras.backend.standardize_dtype(scores.dtype) == dtype
    assert (numpy(scores) == -16384)[~KEPT].all()
    assert np.isfinite(numpy(scores + scores)).all()  # of two pointers that are added

    def losses(scores):
        flat = ops.reshape(scores, (2, HEADS, -1))
        # Reading comprehension: the softmax over all spans.
        one = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        several = MultilabelCrossentropy(class_axes=2)
        none = np.zeros((2, HEADS, LENGTH, LENGTH))
        loss = one(np.ones((2, HEADS)), flat) + several(none, scores)
        return loss, ops.softmax(flat)

    (loss, probabilities), gradient = compiled(value_and_grad(losses, has_aux=True))(scores)
    assert np.isfinite(numpy(loss))
    assert (numpy(probabilities).reshape(KEPT.shape)[~KEPT] == 0).all()
    assert np.isfinite(numpy(gradient)).all()
    assert (numpy(gradient)[~KEPT] == 0).all()
    assert (numpy(gradient)[KEPT] != 0).all()


def test_a_text_of_one_token_and_an_empty_one():
    scores = call(GlobalPointer(HEADS, SIZE), HIDDEN[:, :1], np.array([[True], [False]]))
    scores = numpy(scores)
    assert scores.shape == (2, HEADS, 1, 1)
    assert (scores[0] > -100).all()
    assert (scores[1] == -16384).all()


def test_keras_masks_of_an_embedding_work_and_end_here():
    ids = np.where(MASK, 3, 0)
    inputs = keras.Input((None,), dtype="int32")
    embedding = keras.layers.Embedding(5, WIDTH, mask_zero=True)
    layer = EfficientGlobalPointer(HEADS, SIZE)
    outputs = layer(embedding(inputs))
    assert outputs.shape == (None, HEADS, None, None)
    # A mask (batch, length) left on the outputs would be taken for weights by the loss.
    assert getattr(outputs, "_keras_mask", None) is None
    scores = keras.Model(inputs, outputs).predict(ids, verbose=0)
    assert ((scores == -16384) == ~KEPT).all()
    np.testing.assert_allclose(scores, numpy(call(layer, numpy(embedding(ids)))), rtol=1e-4)


def test_weights_of_the_efficient_form():
    layer = EfficientGlobalPointer(HEADS, SIZE, use_bias=False)
    layer.build((None, None, WIDTH))
    assert layer.count_params() == 2 * WIDTH * SIZE + HEADS * 4 * SIZE
    layer = GlobalPointer(HEADS, SIZE, use_bias=False)
    layer.build((None, None, WIDTH))
    assert layer.count_params() == HEADS * 2 * WIDTH * SIZE


def test_learns_to_find_nested_spans():
    """Type 0 is "1 2", type 1 is "1 2 3" around it; 0 is padding."""
    ids = np.array([[4, 1, 2, 3, 4, 1], [1, 2, 3, 1, 2, 0], [4, 4, 2, 1, 0, 0]])
    spans = np.full((3, 2, 2, 2), -1)
    spans[0, :, 0] = [[1, 2], [1, 3]]
    spans[1, 0], spans[1, 1, 0] = [[0, 1], [3, 4]], [0, 2]
    keras.utils.set_random_seed(0)
    inputs = keras.Input((None,), dtype="int32")
    hidden = keras.layers.Embedding(5, 8, mask_zero=True)(inputs)
    model = keras.Model(inputs, GlobalPointer(2, 8)(hidden))
    loss = MultilabelCrossentropy(class_axes=2, sparse=True)
    model.compile(keras.optimizers.Adam(0.1), loss, jit_compile=JIT)
    steps = [np.tile(a, (20, *[1] * (a.ndim - 1))) for a in (ids, spans)]
    model.fit(*steps, batch_size=3, shuffle=False, verbose=0)
    found = np.argwhere(model.predict(ids, verbose=0) > 0)
    assert {tuple(row) for row in found} == {
        (text, head, *span)
        for text, head in np.ndindex(3, 2)
        for span in spans[text, head]
        if span[0] >= 0
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 0}, "heads must be positive, got 0"),
        ({"heads": 1, "head_size": 0}, "head_size must be positive, got 0"),
        ({"heads": 1, "head_size": 3}, "head_size must be even with rope=True, got 3"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        EfficientGlobalPointer(**arguments)


def test_mask_spans_takes_numbers_for_a_mask():
    scores = numpy(
        mask_spans(np.zeros((1, 1, 2, 2), "float32"), np.array([[1, 0]]), tril=False)
    )
    np.testing.assert_array_equal(scores[0, 0], [[0, -16384], [-16384, -16384]])
