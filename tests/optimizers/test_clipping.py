"""ClipOptimizer against float64 NumPy, and the laws that clipping obeys."""

import contextlib
from itertools import pairwise

import keras
import numpy as np
import pytest
from keras import ops
from optimizers.test_accumulation import LR, StopAfter, build, distance, fit, run, weights_of
from reference import clipping
from reference import optimizers as numpy_optimizers
from reference.problems import Regression

from keras_ext.optimizers import AccumOptimizer
from keras_ext.optimizers.clipping import (
    ClipOptimizer,
    adaptive_clip,
    hard_clip,
    smooth_clip,
    unit_axes,
)
from keras_ext.training import with_objective

BACKEND = keras.backend.backend()
JIT = BACKEND != "torch"
CLIP = 0.5  # below every norm that occurs in Regression, so it acts
RATIO = 0.2  # clips some units of Regression and leaves others
CLIPS = {"hard": hard_clip, "smooth": smooth_clip}

tensorflow_only = pytest.mark.skipif(BACKEND != "tensorflow", reason="a TensorFlow matter")


def tensors(*arrays, dtype="float32"):
    return [ops.convert_to_tensor(np.asarray(a), dtype) for a in arrays]


def arrays(values):
    return [ops.convert_to_numpy(ops.cast(v, "float32")).astype("float64") for v in values]


def some_gradients(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=s).astype("float32").astype("float64") for s in [(5, 3), (3,), ()]]


def adam(**arguments):
    return keras.optimizers.Adam(LR, **arguments)


def axes_of(problem):
    """Rows of the table, columns of the kernel, the whole bias."""
    return [1, 0, 0] if problem.embedding else [0, 0]


def expected_clip(problem, kind, scope="global"):
    def clip(grads, weights):
        if kind == "adaptive":
            return clipping.adaptive(grads, weights, RATIO, axes_of(problem))
        return getattr(clipping, kind)(grads, CLIP, scope)

    return clip


CASES = [
    ("hard", "global"),
    ("hard", "variable"),
    ("smooth", "global"),
    ("smooth", "variable"),
    ("adaptive", "global"),
]


def wrapped(kind, scope="global", optimizer=None, **arguments):
    threshold = RATIO if kind == "adaptive" else CLIP
    return ClipOptimizer(optimizer or adam(), threshold, kind, scope, **arguments)


def batches(size, rows=48):
    return [slice(i, i + size) for i in range(0, rows, size)]


def trained(problem, kind, scope="global", size=16, update=None):
    update = clipping.before(
        update or numpy_optimizers.adam(LR), expected_clip(problem, kind, scope)
    )
    return problem.train(update, batches(size))


# --- equality with NumPy in fit


@pytest.mark.parametrize(
    ("embedding", "mode"), [(False, "eager"), (True, "compiled")], ids=["dense", "embedding"]
)
@pytest.mark.parametrize(("kind", "scope"), CASES)
def test_fit_equals_the_reference(kind, scope, embedding, mode):
    problem = Regression(embedding)
    compiled = {"run_eagerly": True} if mode == "eager" else {"jit_compile": JIT}
    optimizer = wrapped(kind, scope)
    actual = fit(build(problem), problem, optimizer, 16, **compiled)
    assert distance(actual, trained(problem, kind, scope)) < 2e-6
    plain = problem.train(numpy_optimizers.adam(LR), batches(16))
    assert distance(actual, plain) > 1e-4  # clipping acted
    assert int(optimizer.iterations) == 3
    assert int(optimizer.skipped) == 0


@pytest.mark.parametrize("kind", ["hard", "smooth", "adaptive"])
def test_sgd_moves_by_the_clipped_gradient(kind):
    problem = Regression(embedding=True)
    optimizer = wrapped(kind, optimizer=keras.optimizers.SGD(1.0))
    actual = fit(build(problem), problem, optimizer, 48)
    grads = problem.gradients(problem.weights)
    moved = [w - a for w, a in zip(problem.weights, actual, strict=True)]
    clipped = expected_clip(problem, kind)(grads, problem.weights)
    assert distance(moved, clipped) < 1e-6
    assert distance(moved, grads) > 1e-2


def test_wide_bounds_change_nothing():
    problem = Regression(embedding=False)
    plain = fit(build(problem), problem, adam(), 8)
    for kind in ("hard", "adaptive"):
        clipped = fit(build(problem), problem, ClipOptimizer(adam(), 1e4, kind), 8)
        assert distance(clipped, plain) < 1e-7


# --- repeated tokens


def hit_one_row(optimizer, times=16):
    """Movement of a (4, 1) table under SGD(1) whose row 2 occurs `times` in the batch."""
    inputs = keras.Input((times,), dtype="int32")
    hidden = keras.layers.Embedding(4, 1, embeddings_initializer="zeros")(inputs)
    model = keras.Model(inputs, hidden)
    model.compile(optimizer, loss=lambda y, p: ops.sum(p))
    rows = np.full((1, times), 2, "int32")
    model.fit(rows, np.zeros((1, times, 1)), verbose=0)
    return -weights_of(model)[0].ravel()


@pytest.mark.parametrize("kind", ["hard", "smooth"])
def test_the_norm_of_a_row_hit_16_times_is_16(kind):
    optimizer = ClipOptimizer(keras.optimizers.SGD(1.0), 8.0, kind)
    expected = {"hard": 8.0, "smooth": 16 * 8 / (16 + 8)}[kind]
    np.testing.assert_allclose(hit_one_row(optimizer), [0, 0, expected, 0], rtol=1e-6)


@tensorflow_only
def test_keras_takes_4_for_it():
    # Seen in Keras 3.10 to 3.15. When this fails, Keras adds up repeated rows before clipping.
    plain = keras.optimizers.SGD(1.0)
    clipped = keras.optimizers.SGD(1.0, global_clipnorm=1.0)
    np.testing.assert_allclose(hit_one_row(plain)[2], 16, rtol=1e-6)
    np.testing.assert_allclose(hit_one_row(clipped)[2], 4, rtol=1e-6)


# --- laws of the functions


@pytest.mark.parametrize("scope", ["global", "variable"])
@pytest.mark.parametrize("kind", ["hard", "smooth"])
@pytest.mark.parametrize("threshold", [1e-3, 0.7, 3.0, 1e3])
def test_function_equals_the_reference(kind, scope, threshold):
    grads = some_gradients()
    actual = arrays(CLIPS[kind](tensors(*grads), threshold, scope))
    expected = getattr(clipping, kind)(grads, threshold, scope)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=5e-7)


@pytest.mark.parametrize("length", [0.01, 0.5, 1.0, 2.0, 100.0])
def test_smooth_is_between_half_of_hard_and_hard(length):
    grads = some_gradients()
    grads = tensors(*(g * length / clipping.norm(*grads) for g in grads))
    hard, smooth = (clipping.norm(*arrays(f(grads, 1.0))) for f in (hard_clip, smooth_clip))
    assert 0.5 * hard * (1 - 1e-6) <= smooth <= hard
    assert (smooth < 0.5001 * hard) == (length == 1.0)
    if length == 1.0:
        np.testing.assert_allclose(smooth, 0.5 * hard, rtol=1e-6)


@pytest.mark.parametrize("c", [2.0**-20, 2.0, 2.0**15])
@pytest.mark.parametrize("kind", ["hard", "smooth"])
def test_scale_law(kind, c):
    # clip(c g; c t) = c clip(g; t), to the bit for powers of two
    grads = some_gradients()
    left = arrays(CLIPS[kind](tensors(*(c * g for g in grads)), 0.75 * c))
    right = arrays(CLIPS[kind](tensors(*grads), 0.75))
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, c * b)


@pytest.mark.parametrize("kind", ["hard", "smooth"])
def test_norm_direction_and_limits(kind):
    grads = some_gradients()
    total = clipping.norm(*grads)
    clip = CLIPS[kind]
    clipped = arrays(clip(tensors(*grads), 0.5))
    assert clipping.norm(*clipped) <= 0.5 * (1 + 1e-6)
    for a, g in zip(clipped, grads, strict=True):
        np.testing.assert_allclose(a / clipping.norm(*clipped), g / total, rtol=1e-6)
    wide, narrow = arrays(clip(tensors(*grads), 1e9)), arrays(clip(tensors(*grads), 1e-9))
    for w, n, g in zip(wide, narrow, grads, strict=True):
        np.testing.assert_allclose(w, g, rtol=1e-6)  # c to infinity: the identity
        np.testing.assert_allclose(n / 1e-9, g / total, rtol=1e-6)  # c to 0: c g / ||g||


def test_hard_is_idempotent_and_exactly_the_identity_up_to_the_threshold():
    grads = tensors(*some_gradients())
    once = hard_clip(grads, 0.5)
    assert distance(arrays(hard_clip(once, 0.5)), arrays(once)) < 1e-7
    for a, b in zip(arrays(hard_clip(grads, 100.0)), arrays(grads), strict=True):
        np.testing.assert_array_equal(a, b)
    smooth = smooth_clip(grads, 0.5)
    assert distance(arrays(smooth_clip(smooth, 0.5)), arrays(smooth)) > 0.01


def test_smooth_grows_strictly_and_stays_below_the_threshold():
    lengths = [2.0**k for k in range(-10, 11)]
    out = [float(arrays(smooth_clip(tensors([n]), 1.0))[0][0]) for n in lengths]
    assert all(a < b for a, b in pairwise(out))
    assert out[-1] < 1.0
    hard = [float(arrays(hard_clip(tensors([n]), 1.0))[0][0]) for n in lengths]
    assert hard == [min(1.0, n) for n in lengths]


@pytest.mark.parametrize("kind", ["hard", "smooth"])
def test_the_mean_of_the_clipped_is_not_the_clipped_mean(kind):
    def moved(optimizer):
        variable = keras.Variable([0.0])
        for gradient in (1000.0, -998.0):
            optimizer.apply(tensors([gradient]), [variable])
        return float(-ops.convert_to_numpy(variable)[0])

    sgd = keras.optimizers.SGD
    outside = moved(AccumOptimizer(ClipOptimizer(sgd(1.0), 1.0, kind), 2))
    inside = moved(ClipOptimizer(AccumOptimizer(sgd(1.0), 2), 1.0, kind))
    np.testing.assert_allclose(outside, {"hard": 1.0, "smooth": 0.5}[kind], rtol=1e-6)
    assert abs(inside) < 1e-5  # +1 and -1, or 1000 / 1001 and -998 / 999


def test_opposite_gradients_cancel_before_clipping():
    # g1 = -g2: nothing is left to be clipped, whatever their size.
    optimizer = AccumOptimizer(ClipOptimizer(keras.optimizers.SGD(1.0), 1.0, "smooth"), 2)
    variable = keras.Variable([3.0])
    for gradient in (1e6, -1e6):
        optimizer.apply(tensors([gradient]), [variable])
    assert ops.convert_to_numpy(variable) == [3.0]


# --- adaptive


def variables_of(weights):
    return [keras.Variable(np.asarray(w, "float32")) for w in weights]


def test_adaptive_equals_the_reference():
    rng = np.random.default_rng(0)
    shapes = [(6, 5), (3, 3, 4, 2), (5, 4, 3), (2, 2, 2, 3, 4), (7,), (), (1, 6)]
    axes = [0, (0, 1, 2), (0, 1), (0, 1, 2, 3), 0, (), (0, 1)]
    grads = [rng.normal(size=s) for s in shapes]
    weights = [rng.normal(size=s) for s in shapes]
    weights[0][:, 0] = 0  # a unit that starts at zero: limit 0.3 * 1e-3
    grads[1][..., 0] *= 1e-3  # one that is within the limit
    grads[2][..., 0] = 0
    actual = arrays(adaptive_clip(tensors(*grads), variables_of(weights), 0.3))
    expected = clipping.adaptive(grads, weights, 0.3, axes)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(actual[0][:, 0]), 0.3e-3, rtol=1e-6)
    np.testing.assert_array_equal(actual[1][..., 0], grads[1][..., 0].astype("float32"))


@pytest.mark.parametrize("c", [2.0**-5, 2.0**20])
def test_adaptive_is_invariant_to_the_scale_of_the_weights(c):
    # (W, G) -> (c W, c G), to the bit for powers of two, above the smallest weight norm
    weights, grads = some_gradients(0), some_gradients(1)
    clipped = arrays(adaptive_clip(tensors(*grads), variables_of(weights), 0.3))
    weights = [c * w for w in weights]
    again = arrays(adaptive_clip(tensors(*(c * g for g in grads)), variables_of(weights), 0.3))
    for a, b in zip(again, clipped, strict=True):
        np.testing.assert_array_equal(a, c * b)


@pytest.fixture(scope="module")
def kernels():
    """name -> (a layer's variable, axes of one unit)."""
    attention = keras.layers.MultiHeadAttention(2, 3, kernel_initializer="zeros")
    attention.build((None, 4, 8), (None, 4, 8))
    dense = keras.layers.Dense(5, kernel_initializer="zeros")
    dense.build((None, 4))
    convolution = {1: keras.layers.Conv1D, 2: keras.layers.Conv2D, 3: keras.layers.Conv3D}
    for rank, layer in convolution.items():
        convolution[rank] = layer(5, 3, kernel_initializer="zeros")
        convolution[rank].build((None, *[9] * rank, 4))
    gru = keras.layers.GRUCell(5, kernel_initializer="zeros", recurrent_initializer="zeros")
    gru.build((None, 4))
    embedding = keras.layers.Embedding(7, 4, embeddings_initializer="zeros")
    embedding.build()
    found = {v.path.partition("/")[2]: v for v in attention.trainable_variables}
    return {
        "Dense": (dense.kernel, (0,)),  # (inputs, units)
        "Dense bias": (dense.bias, (0,)),
        "Conv1D": (convolution[1].kernel, (0, 1)),  # (size, inputs, filters)
        "Conv2D": (convolution[2].kernel, (0, 1, 2)),
        "Conv3D": (convolution[3].kernel, (0, 1, 2, 3)),
        "GRU bias": (gru.bias, (0, 1)),  # (2, 3 units)
        "Embedding": (embedding.embeddings, (1,)),  # (tokens, width)
        "query": (found["query/kernel"], (0,)),  # (inputs, heads, head_dim)
        "value": (found["value/kernel"], (0,)),
        "query bias": (found["query/bias"], (0, 1)),  # (heads, head_dim)
        "output": (found["attention_output/kernel"], (0, 1)),  # (heads, head_dim, outputs)
    }


def test_units_of_keras_layers(kernels):
    for name, (variable, axes) in kernels.items():
        assert unit_axes(variable) == axes, (name, variable.path, variable.shape)


def test_a_row_of_a_table_is_clipped_alone():
    optimizer = ClipOptimizer(keras.optimizers.SGD(1.0), 0.1, "adaptive")
    layer = keras.layers.Embedding(3, 2)
    layer.build()
    layer.embeddings.assign([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]])
    optimizer.apply(tensors([[30.0, 40.0], [0.03, 0.04], [1.0, 0.0]]), [layer.embeddings])
    moved = arrays([layer.embeddings])[0]
    expected = [[2.7, 3.6], [2.97, 3.96], [-1e-4, 0]]
    np.testing.assert_allclose(moved, expected, rtol=1e-6)


def test_excluded_variables_are_not_clipped():
    problem = Regression(embedding=True)
    optimizer = wrapped(
        "adaptive", optimizer=keras.optimizers.SGD(1.0), exclude=r"dense\w*/(kernel|bias)$"
    )
    actual = fit(build(problem), problem, optimizer, 48)
    grads = problem.gradients(problem.weights)
    moved = [w - a for w, a in zip(problem.weights, actual, strict=True)]
    clipped = expected_clip(problem, "adaptive")(grads, problem.weights)
    assert distance(moved, [clipped[0], *grads[1:]]) < 1e-6
    assert distance(clipped[1:], grads[1:]) > 1e-3


# --- agreement with optax


@pytest.mark.parametrize("threshold", [0.5, 100.0])
def test_equals_optax_clip_by_global_norm(threshold):
    optax = pytest.importorskip("optax")
    grads = [g.astype("float32") for g in some_gradients()]
    expected, _ = optax.clip_by_global_norm(threshold).update(grads, optax.EmptyState())
    assert distance(arrays(hard_clip(tensors(*grads), threshold)), expected) < 1e-7


def test_equals_optax_adaptive_grad_clip(kernels):
    # Where optax leaves the axes to be said (Conv1D, tables, biases of rank 2), we say ours.
    optax = pytest.importorskip("optax")
    rng = np.random.default_rng(0)
    default = {"Dense", "Dense bias", "Conv2D", "query"}
    for name in ("Dense", "Dense bias", "Conv2D", "query", "Conv1D", "Embedding", "query bias"):
        variable, axes = kernels[name]
        weight, grad = rng.normal(size=(2, *variable.shape)).astype("float32")
        variable.assign(weight)
        clip = optax.adaptive_grad_clip(0.7, axis=None if name in default else axes)
        (expected,), _ = clip.update([grad], clip.init([weight]), [weight])
        (actual,) = arrays(adaptive_clip(tensors(grad), [variable], 0.7))
        np.testing.assert_allclose(actual, expected, rtol=1e-6, err_msg=name)
        if name not in default:
            clip = optax.adaptive_grad_clip(0.7)
            (other,), _ = clip.update([grad], clip.init([weight]), [weight])
            assert np.abs(actual - other).max() > 1e-3, name


# --- the article's example


def descend(optimizer, steps):
    theta, path = keras.Variable([10.0]), []
    for _ in range(steps):
        optimizer.apply([4 * theta.value**3], [theta])
        path.append(float(ops.convert_to_numpy(theta)[0]))
    return path


def test_gradient_descent_on_theta_to_the_4():
    # (L0, L1) = (12, 3): 12 t^2 <= 12 + 3 * 4 |t|^3. Gradient descent with 1 / L0 diverges.
    rate = 1 / 12
    plain = descend(keras.optimizers.SGD(rate), 4)
    assert abs(plain[-1]) > 1e20
    path = descend(ClipOptimizer(keras.optimizers.SGD(rate), 12 / 3, "smooth"), 40)
    assert all(a > b > 0 for a, b in pairwise(path))  # 4 = L0 / L1
    np.testing.assert_allclose(path[0], 10 - rate * 4000 * 4 / 4004, rtol=1e-6)
    assert path[-1] < 0.4


# --- edges


@pytest.mark.parametrize("kind", ["hard", "smooth", "adaptive"])
def test_zero_gradients_stay_zero(kind):
    variable, scalar = keras.Variable([1.0, 0.0]), keras.Variable(0.0)
    optimizer = ClipOptimizer(keras.optimizers.SGD(1.0), 0.5, kind)
    optimizer.apply([ops.zeros(2), ops.zeros(())], [variable, scalar])
    np.testing.assert_array_equal(ops.convert_to_numpy(variable), [1.0, 0.0])
    assert ops.convert_to_numpy(scalar) == 0.0
    assert int(optimizer.skipped) == 0


def test_the_state_stays_free_of_recorded_gradients():
    # Outside of fit nothing tells PyTorch not to record; what it records grows with each step.
    variable = keras.Variable([3.0, 4.0])
    optimizer = wrapped("adaptive", optimizer=keras.optimizers.SGD(0.1, 0.9))
    optimizer.apply(tensors([30.0, 40.0]), [variable])
    state = [v.value for v in optimizer.variables]
    assert not any(getattr(value, "requires_grad", False) for value in state)


@pytest.mark.parametrize("scope", ["global", "variable"])
@pytest.mark.parametrize("size", [1e30, 1e-12, 1e18])
def test_norms_do_not_overflow(size, scope):
    # 1e30^2 is no float32; the norm is.
    grads = [size * g for g in some_gradients()]
    actual = arrays(hard_clip(tensors(*grads), 0.5, scope))
    for a, e in zip(actual, clipping.hard(grads, 0.5, scope), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-6)


def test_unit_norms_do_not_overflow():
    grads, weights = some_gradients(0), some_gradients(1)
    grads[0][:, 1] *= 1e30  # beside units of ordinary size
    weights[0][:, 2] *= 1e25
    actual = arrays(adaptive_clip(tensors(*grads), variables_of(weights), 0.1))
    for a, e in zip(actual, clipping.adaptive(grads, weights, 0.1, [0, 0, ()]), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_norms_of_half_precision_are_summed_in_float32(dtype):
    # 4096 times 300: the norm 19200 is a float16, the sum of squares is not; and in bfloat16
    # the sum would stop growing at 256 of them.
    (clipped,) = hard_clip(tensors(np.full(4096, 300.0), dtype=dtype), 19200 / 4)
    assert keras.backend.standardize_dtype(clipped.dtype) == dtype
    np.testing.assert_array_equal(arrays([clipped])[0], 75.0)


def test_float64_norms_are_summed_in_float64():
    context = contextlib.nullcontext()
    if BACKEND == "jax":
        import jax

        context = jax.enable_x64(True)
    with context:
        grads = [g * np.pi for g in some_gradients(0)]
        weights = [w * np.pi for w in some_gradients(1)]
        variables = [keras.Variable(w, dtype="float64") for w in weights]
        hard = hard_clip(tensors(*grads, dtype="float64"), 0.5)
        adaptive = adaptive_clip(tensors(*grads, dtype="float64"), variables, 0.5)
        hard, adaptive = ([ops.convert_to_numpy(g) for g in x] for x in (hard, adaptive))
    assert distance(hard, clipping.hard(grads, 0.5)) < 1e-15
    assert distance(adaptive, clipping.adaptive(grads, weights, 0.5, [0, 0, ()])) < 1e-15


def test_bfloat16_variables():
    problem = Regression(embedding=False)
    variables = [keras.Variable(w, dtype="bfloat16") for w in problem.weights]
    grads = problem.gradients(problem.weights)
    optimizer = ClipOptimizer(keras.optimizers.SGD(1.0), CLIP)
    optimizer.apply(tensors(*grads, dtype="bfloat16"), variables)
    expected = [w - g for w, g in zip(problem.weights, clipping.hard(grads, CLIP), strict=True)]
    assert {v.dtype for v in variables} == {"bfloat16"}
    assert distance(arrays([v.value for v in variables]), expected) < 2.0**-7


def test_absent_gradients_pass_through():
    used, unused = keras.Variable([1.0]), keras.Variable([1.0])
    decay = keras.optimizers.SGD(1.0, weight_decay=0.5)
    for kind in ("hard", "adaptive"):
        optimizer = ClipOptimizer(decay.from_config(decay.get_config()), 0.5, kind)
        with pytest.warns(UserWarning, match="Gradients do not exist"):
            optimizer.apply([ops.ones(1), None], [used, unused])
        assert ops.convert_to_numpy(unused) == [1.0]
        with pytest.raises(ValueError, match="No gradients provided"):
            optimizer.apply([None, None], [used, unused])


def test_the_weight_of_a_batch_is_no_gradient():
    # Its "gradient" is the number of rows; AccumOptimizer must get it as it is.
    variable = keras.Variable([0.0])
    carrier = keras.Variable(0.0)
    carrier.carries_batch_weight = True
    optimizer = ClipOptimizer(AccumOptimizer(keras.optimizers.SGD(1.0), 2), 4.0)
    for gradient, rows in ((8.0, 3.0), (2.0, 1.0)):
        optimizer.apply(tensors([gradient], rows), [variable, carrier])
    np.testing.assert_allclose(ops.convert_to_numpy(variable), [-(3 * 4 + 1 * 2) / 4])
    assert ops.convert_to_numpy(carrier) == 0


@pytest.mark.parametrize("order", ["clip the mean", "clip the parts"])
def test_unequal_micro_batches_in_fit(order):
    problem = Regression(embedding=True, rows=16)  # batches of 6, 6 and 4 rows
    sgd = keras.optimizers.SGD(1.0)
    optimizer = (
        AccumOptimizer(ClipOptimizer(sgd, CLIP), 3)
        if order == "clip the mean"
        else ClipOptimizer(AccumOptimizer(sgd, 3), CLIP)
    )
    actual = fit(with_objective(build(problem), []), problem, optimizer, 6, jit_compile=JIT)
    if order == "clip the mean":
        grads = clipping.hard(problem.gradients(problem.weights), CLIP)
    else:
        parts = [problem.gradients(problem.weights, rows) for rows in batches(6, 16)]
        parts = [clipping.hard(part, CLIP) for part in parts]
        grads = [(6 * a + 6 * b + 4 * c) / 16 for a, b, c in zip(*parts, strict=True)]
    expected = [w - g for w, g in zip(problem.weights, grads, strict=True)]
    assert distance(actual, expected) < 1e-6


def test_clipping_of_the_inner_optimizer_acts_once_more():
    variable = keras.Variable([0.0, 0.0])
    optimizer = ClipOptimizer(keras.optimizers.SGD(1.0, clipvalue=0.5), 1.0)
    optimizer.apply(tensors([6.0, 8.0]), [variable])  # hard: (.6, .8)
    np.testing.assert_allclose(ops.convert_to_numpy(variable), [-0.5, -0.5])


# --- loss scales


@pytest.mark.parametrize(("kind", "scope"), CASES)
def test_a_static_loss_scale_is_divided_out_of_the_norm(kind, scope):
    problem = Regression(embedding=True)
    optimizer = wrapped(kind, scope, adam(loss_scale_factor=1024.0))
    actual = fit(build(problem), problem, optimizer, 16)
    assert distance(actual, trained(problem, kind, scope)) < 2e-6


def test_loss_scale_optimizer_outside():
    problem = Regression(embedding=True)
    optimizer = keras.optimizers.LossScaleOptimizer(wrapped("hard"))
    actual = fit(build(problem), problem, optimizer, 16)
    assert distance(actual, trained(problem, "hard")) < 2e-6


def test_loss_scale_optimizer_outside_sees_the_overflow():
    problem = Regression(embedding=False)
    problem.y[0] = np.inf
    clip = wrapped("hard")
    optimizer = keras.optimizers.LossScaleOptimizer(clip)
    actual = fit(build(problem), problem, optimizer, 16)
    update = clipping.before(numpy_optimizers.adam(LR), expected_clip(problem, "hard"))
    assert distance(actual, problem.train(update, batches(16)[1:])) < 2e-6
    assert float(ops.convert_to_numpy(optimizer.dynamic_scale)) == 2.0**14
    assert int(clip.skipped) == 0


def test_mixed_float16_puts_its_loss_scale_outside():
    problem = Regression(embedding=True)
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = build(problem)
        actual = fit(model, problem, wrapped("smooth"), 16)
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert distance(actual, trained(problem, "smooth")) < 5e-3  # half-precision activations
    assert distance(actual, problem.weights) > LR


# --- norms that are not finite


def snapshot(variables):
    return [ops.convert_to_numpy(v).copy() for v in variables]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("kind", "scope"), CASES)
def test_skip_leaves_no_trace(kind, scope, bad):
    problem = Regression(embedding=False)
    variables = [keras.Variable(w, dtype="float32") for w in problem.weights]
    optimizer = wrapped(kind, scope, adam(use_ema=True, weight_decay=0.1))
    good = tensors(*problem.gradients(problem.weights))
    optimizer.apply(good, variables)
    before = snapshot(variables + optimizer.inner_optimizer.variables)
    poison = problem.gradients(problem.weights)
    poison[1][-1] = bad  # one element of the bias
    optimizer.apply(tensors(*poison), variables)
    for a, b in zip(
        before, snapshot(variables + optimizer.inner_optimizer.variables), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert int(optimizer.skipped) == 1
    optimizer.apply(good, variables)
    assert int(optimizer.skipped) == 1
    assert int(optimizer.iterations) == 2


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("hard", "eager"), ("smooth", "eager"), ("adaptive", "eager"), ("hard", "compiled")],
)
def test_skip_in_fit(kind, mode):
    problem = Regression(embedding=True)
    problem.y[16:20] = np.nan  # in the second of 3 batches
    compiled = {"run_eagerly": True} if mode == "eager" else {"jit_compile": JIT}
    optimizer = wrapped(kind)
    actual = fit(build(problem), problem, optimizer, 16, **compiled)
    update = clipping.before(numpy_optimizers.adam(LR), expected_clip(problem, kind))
    expected = problem.train(update, [slice(0, 16), slice(32, 48)])
    assert distance(actual, expected) < 2e-6
    assert int(optimizer.skipped) == 1
    assert int(optimizer.iterations) == 2


def test_skip_inside_and_around_an_accumulation():
    problem = Regression(embedding=False)
    good = [problem.gradients(problem.weights, slice(i, i + 8)) for i in (0, 8, 16)]
    poison = [np.full_like(g, np.nan) for g in good[0]]
    around = ClipOptimizer(AccumOptimizer(adam(), 3), CLIP)
    actual = run(around, problem, [good[0], poison, good[1], good[2]])
    expected = run(ClipOptimizer(AccumOptimizer(adam(), 3), CLIP), problem, good)
    assert distance(actual, expected) == 0
    assert int(around.skipped) == 1
    assert int(around.iterations) == 1
    inside = AccumOptimizer(ClipOptimizer(adam(), CLIP), 2)
    actual = run(inside, problem, [good[0], poison, good[1], good[2]])  # loses the first cycle
    expected = run(AccumOptimizer(ClipOptimizer(adam(), CLIP), 2), problem, good[1:])
    assert distance(actual, expected) == 0
    assert int(inside.inner_optimizer.skipped) == 1
    assert int(inside.iterations) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["hard", "smooth"])
def test_propagate_poisons_what_shares_the_norm(kind, bad):
    for scope, poisoned in (("global", [True, True]), ("variable", [True, False])):
        first, second = keras.Variable([1.0, 1.0]), keras.Variable([1.0])
        optimizer = wrapped(kind, scope, keras.optimizers.SGD(1.0), nonfinite="propagate")
        optimizer.apply(tensors([1.0, bad], [1.0]), [first, second])
        assert [np.isnan(a).all() for a in arrays([first, second])] == poisoned
        assert int(optimizer.iterations) == 1
        assert int(optimizer.skipped) == 0


def test_propagate_adaptive_poisons_the_unit():
    kernel = keras.Variable(np.ones((2, 2), "float32"))
    optimizer = wrapped("adaptive", "global", keras.optimizers.SGD(1.0), nonfinite="propagate")
    optimizer.apply(tensors([[1.0, np.inf], [1.0, 1.0]]), [kernel])
    assert np.isnan(arrays([kernel])[0]).tolist() == [[False, True], [False, True]]


# --- saving


def test_saved_in_the_middle_it_resumes_bit_for_bit(tmp_path):
    kind = "adaptive"  # the contract has "hard"
    problem = Regression(embedding=True)
    problem.y[8] = np.nan  # the second of 6 batches is skipped
    whole = build(problem)
    fit(whole, problem, wrapped(kind), 8)
    model = build(problem)
    path = tmp_path / "mid.keras"
    fit_args = {"batch_size": 8, "shuffle": False, "verbose": 0}
    model.compile(wrapped(kind), loss="mse")
    model.fit(problem.x, problem.y, callbacks=[StopAfter(3, path)], **fit_args)
    resumed = keras.saving.load_model(path)
    assert int(resumed.optimizer.skipped) == 1
    assert int(resumed.optimizer.iterations) == 2
    resumed.fit(problem.x[24:], problem.y[24:], **fit_args)
    for a, b in zip(
        snapshot(whole.weights + whole.optimizer.variables),
        snapshot(resumed.weights + resumed.optimizer.variables),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["hard", "adaptive"])
def test_config_round_trip(kind):
    scope = "global" if kind == "adaptive" else "variable"
    exclude = "head/" if kind == "adaptive" else None
    inner = keras.optimizers.AdamW(1e-3, weight_decay=0.01)
    optimizer = ClipOptimizer(inner, 2, kind, scope, "propagate", exclude, name="mine")
    config = keras.saving.serialize_keras_object(optimizer)
    for _ in range(2):  # from_config must not eat the dictionary
        copy = keras.saving.deserialize_keras_object(config)
        assert copy.get_config() == optimizer.get_config()
        assert isinstance(copy.inner_optimizer, keras.optimizers.AdamW)
    assert copy.threshold == 2.0
    assert copy.exclude.config() == ([] if exclude is None else [exclude])


# --- two devices


@pytest.mark.thorough
@tensorflow_only
def test_mirrored_strategy(mirrored):
    kind = "adaptive"  # the contract has "hard"
    # Two replicas, each half of a batch: what is clipped is the sum.
    problem = Regression(embedding=True)
    problem.y[8] = np.nan  # only one of the replicas sees it; both skip
    with mirrored.scope():
        model = build(problem)
        optimizer = wrapped(kind)
    distributed = fit(model, problem, optimizer, 8, jit_compile=False)
    single = fit(build(problem), problem, wrapped(kind), 8)
    assert distance(distributed, single) < 1e-6
    assert ops.convert_to_numpy(optimizer.skipped) == 1
    assert ops.convert_to_numpy(optimizer.iterations) == 5
    for weight in model.trainable_weights:
        first, second = (v.numpy() for v in weight.value.values)
        np.testing.assert_array_equal(first, second)


@pytest.mark.thorough
@tensorflow_only
@pytest.mark.parametrize("order", ["around", "loss scale"])
def test_mirrored_strategy_with_other_wrappers(mirrored, order):
    def make():
        if order == "around":
            return ClipOptimizer(AccumOptimizer(adam(), 3), CLIP)
        return keras.optimizers.LossScaleOptimizer(ClipOptimizer(adam(), CLIP))

    problem = Regression(embedding=False, rows=24)
    with mirrored.scope():
        model, optimizer = build(problem), make()
    distributed = fit(model, problem, optimizer, 8, jit_compile=False)
    single = fit(build(problem), problem, make(), 8)
    assert distance(distributed, single) < 1e-6


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution runs on JAX")
@pytest.mark.parametrize("kind", ["hard", "smooth", "adaptive"])
def test_data_parallel(kind):
    problem = Regression(embedding=True)
    problem.y[8] = np.nan
    single = fit(build(problem), problem, wrapped(kind), 8)
    devices = keras.distribution.list_devices()
    assert len(devices) == 2
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    try:
        optimizer = wrapped(kind)
        distributed = fit(build(problem), problem, optimizer, 8)
    finally:
        keras.distribution.set_distribution(None)
    assert distance(distributed, single) < 1e-6
    assert int(optimizer.skipped) == 1


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0}, "threshold must be a number > 0, got 0"),
        ({"threshold": -1.0}, "threshold must be a number > 0, got -1.0"),
        ({"threshold": np.nan}, "threshold must be a number > 0, got nan"),
        ({"threshold": np.inf}, "threshold must be a number > 0, got inf"),
        ({"threshold": "1"}, "threshold must be a number > 0, got '1'"),
        ({"threshold": True}, "threshold must be a number > 0, got True"),
        ({"threshold": 1, "kind": "soft"}, "kind must be one of .*got 'soft'"),
        ({"threshold": 1, "scope": "layer"}, "scope must be one of .*got 'layer'"),
        ({"threshold": 1, "nonfinite": "zero"}, "nonfinite must be one of .*got 'zero'"),
        (
            {"threshold": 1, "kind": "adaptive", "scope": "variable"},
            "scope must be left out for kind=\"adaptive\", got 'variable'",
        ),
        ({"threshold": 1, "exclude": "x"}, "exclude must be left out for kind='hard', got 'x'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClipOptimizer("sgd", **arguments)


def test_a_loss_scale_inside_is_refused():
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    for inner in (scaled, AccumOptimizer(scaled, 2)):
        with pytest.raises(ValueError, match="must be outside"):
            ClipOptimizer(inner, 1.0)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="clipnorm"):
        ClipOptimizer("sgd", 1.0, clipnorm=1.0)
