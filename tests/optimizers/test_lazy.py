"""LazyOptimizer: rows without gradient stay bit for bit, the others are the inner ones."""

import keras
import numpy as np
import pytest
from keras import ops
from optimizers.test_accumulation import BACKEND, LR, build, distance, fit, weights_of
from reference.problems import VOCABULARY, Regression

from keras_ext.layers import PositionEmbedding, SegmentEmbedding, TokenEmbedding
from keras_ext.optimizers import AccumOptimizer, LazyOptimizer, MultiplierOptimizer

INNER = {
    "momentum": lambda: keras.optimizers.SGD(LR, 0.9),
    "adamw": lambda: keras.optimizers.AdamW(LR, weight_decay=0.1),
    "rmsprop": lambda: keras.optimizers.RMSprop(LR, momentum=0.5),
}
ABSENT = [4, 5]  # in the second epoch


def plain(inner):
    """The inner optimizer; on TensorFlow with the gradients of repeated tokens summed."""
    return MultiplierOptimizer(inner, {})


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "eager") for name in INNER), ("momentum", "xla")]
)
def test_absent_rows_stay_and_the_others_are_the_inner_ones(name, mode):
    problem = Regression(embedding=True)
    compiled = {"run_eagerly": True} if mode == "eager" else {"jit_compile": BACKEND != "torch"}
    optimizers = {"plain": plain(INNER[name]()), "lazy": LazyOptimizer(INNER[name]())}
    tables = {}
    for kind, optimizer in optimizers.items():
        model = build(problem)
        # All tokens, so each has a momentum; then one step without two of them.
        fit(model, problem, optimizer, 48, **compiled)
        before = weights_of(model)[0]
        model.fit(problem.x % 4, problem.y, batch_size=48, shuffle=False, verbose=0)
        tables[kind] = before, weights_of(model)[0]
    (start, inner), (same, lazy) = tables["plain"], tables["lazy"]
    np.testing.assert_array_equal(start, same)
    np.testing.assert_array_equal(lazy[ABSENT], start[ABSENT])
    np.testing.assert_array_equal(lazy[:4], inner[:4])
    assert np.abs(inner[ABSENT] - start[ABSENT]).max() > LR / 10  # the inner one drifts


def test_the_moments_of_absent_rows_decay_as_usual():
    problem = Regression(embedding=True)
    states = []
    for wrap in (plain, LazyOptimizer):
        optimizer = wrap(INNER["adamw"]())
        fit(build(problem), problem, optimizer, 48)
        states.append([ops.convert_to_numpy(v) for v in optimizer.variables])
    for a, b in zip(*states, strict=True):
        np.testing.assert_array_equal(a, b)


def test_padding_is_absent():
    # Token 0 is gathered, but its vectors get zero gradients.
    class Masked(keras.layers.Layer):
        def call(self, x, ids):
            return x * ops.cast(ids != 0, x.dtype)[..., None]

    inputs = keras.Input((3,), dtype="int32")
    hidden = Masked()(keras.layers.Embedding(5, 2)(inputs), inputs)
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling1D()(hidden))
    before = model.get_weights()[0]
    model.compile(LazyOptimizer(keras.optimizers.AdamW(LR, weight_decay=0.5)), loss="mse")
    model.fit(np.array([[0, 1, 1], [2, 0, 0]]), np.ones((2, 2)), verbose=0)
    moved = np.any(model.get_weights()[0] != before, axis=1)
    np.testing.assert_array_equal(moved, [False, True, True, False, False])


def test_no_gradient_at_all():
    table = keras.Variable(np.ones((2, 2)), name="embeddings")
    other = keras.Variable([1.0], name="other")
    optimizer = LazyOptimizer(keras.optimizers.AdamW(LR, weight_decay=0.5))
    optimizer.build([table, other])
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([None, ops.ones(1)], [table, other])
    np.testing.assert_array_equal(ops.convert_to_numpy(table), np.ones((2, 2)))
    optimizer.apply([ops.zeros((2, 2)), ops.zeros(1)], [table, other])
    np.testing.assert_array_equal(ops.convert_to_numpy(table), np.ones((2, 2)))


def test_a_nan_row_is_present_and_stays_alone():
    table = keras.Variable(np.ones((3, 1)), name="embeddings")
    optimizer = LazyOptimizer(keras.optimizers.SGD(1.0))
    optimizer.apply([ops.convert_to_tensor([[np.nan], [0.0], [1.0]])], [table])
    np.testing.assert_array_equal(ops.convert_to_numpy(table), [[np.nan], [1.0], [0.0]])


def test_bfloat16_table():
    table = keras.Variable(np.ones((2, 1)), dtype="bfloat16", name="embeddings")
    optimizer = LazyOptimizer(keras.optimizers.SGD(0.5, momentum=0.5))
    for gradient in ([[1.0], [1.0]], [[0.0], [1.0]]):
        optimizer.apply([ops.convert_to_tensor(gradient, "bfloat16")], [table])
    np.testing.assert_array_equal(
        ops.convert_to_numpy(ops.cast(table, "float32")), [[0.5], [-0.25]]
    )


def test_row_constraints_hold_and_move_no_absent_row():
    layer = keras.layers.Embedding(2, 2, embeddings_constraint=keras.constraints.UnitNorm(1))
    layer.build()
    start = np.array([[0.1, np.sqrt(0.99)], [0.3, np.sqrt(0.91)]], "float32")
    layer.embeddings.assign(start)
    optimizer = LazyOptimizer(keras.optimizers.SGD(0.5))
    optimizer.apply([ops.convert_to_tensor([[1.0, 0.0], [0.0, 0.0]])], [layer.embeddings])
    after = ops.convert_to_numpy(layer.embeddings)
    np.testing.assert_array_equal(after[1], start[1])
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), 1, rtol=1e-5)
    assert after[0, 0] < 0


def test_the_tokens_of_an_accumulated_update_are_those_of_the_cycle():
    table = keras.Variable(np.ones((3, 1)), name="embeddings")
    optimizer = AccumOptimizer(LazyOptimizer(keras.optimizers.SGD(1.0, momentum=0.9)), 2)
    for gradient in ([[2.0], [2.0], [2.0]],) * 2 + (
        [[2.0], [0.0], [0.0]],
        [[0.0], [2.0], [0.0]],
    ):
        optimizer.apply([ops.convert_to_tensor(gradient)], [table])
    # First update: 1 - 2. Second: rows 0 and 1 by 0.9 * -2 - 1, row 2 not at all.
    np.testing.assert_allclose(ops.convert_to_numpy(table), [[-3.8], [-3.8], [-1.0]], rtol=1e-6)


@pytest.mark.parametrize(
    "inner",
    [
        lambda: AccumOptimizer("sgd", 2),
        lambda: keras.optimizers.LossScaleOptimizer(AccumOptimizer("sgd", 2)),
        lambda: keras.optimizers.SGD(gradient_accumulation_steps=2),
    ],
)
def test_accumulation_inside_is_refused(inner):
    with pytest.raises(ValueError, match=r"accumulates micro-batches.*AccumOptimizer\(Lazy"):
        LazyOptimizer(inner())


def test_an_accumulation_of_one_step_inside_is_none():
    problem = Regression(embedding=True)
    inside = LazyOptimizer(AccumOptimizer(INNER["adamw"](), 1))
    around = AccumOptimizer(LazyOptimizer(INNER["adamw"]()), 1)
    results = [fit(build(problem), problem, optimizer, 8) for optimizer in (inside, around)]
    assert distance(*results) < 1e-6


# --- which variables


def lazy_paths(model, **arguments):
    optimizer = LazyOptimizer("sgd", **arguments)
    variables = model.trainable_variables
    optimizer.build(variables)
    return [v.path for i, v in enumerate(variables) if optimizer.rewrites(i)]


def embedding_model():
    tokens, segments = (keras.Input((3,), dtype="int32") for _ in range(2))
    hidden = TokenEmbedding(VOCABULARY, 4, name="tokens")(tokens)
    hidden = SegmentEmbedding(2, name="segments")(hidden, segments)
    hidden = PositionEmbedding(3, name="positions")(hidden)
    hidden = hidden + keras.layers.Embedding(VOCABULARY, 4, name="plain")(tokens)
    return keras.Model([tokens, segments], keras.layers.Dense(2, name="dense")(hidden))


def test_default_is_every_embedding_table():
    tables = ["tokens", "segments", "positions", "plain"]
    assert set(lazy_paths(embedding_model())) == {f"{name}/embeddings" for name in tables}


def test_patterns_take_only_two_dimensions():
    assert lazy_paths(embedding_model(), include="dense|^tokens") == [
        "tokens/embeddings",
        "dense/kernel",
    ]
    assert lazy_paths(embedding_model(), include=["^tokens", "plain"]) == [
        "tokens/embeddings",
        "plain/embeddings",
    ]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("tokenz", "'tokenz' matches no variable.*tokens/embeddings"),
        ("bias", "match no variable of two dimensions, only dense/bias"),
        ([], "match no variable of two dimensions"),
    ],
)
def test_patterns_that_find_nothing(patterns, message):
    with pytest.raises(ValueError, match=message):
        lazy_paths(embedding_model(), include=patterns)


@pytest.mark.parametrize("patterns", ["(", ["embeddings", 3]])
def test_bad_patterns(patterns):
    with pytest.raises(ValueError, match=r"include must be .*layers or variables, got"):
        LazyOptimizer("sgd", patterns)
