"""LowRankOptimizer against LoRA layers, float64 NumPy, GaLore's own projector and algebra."""

import importlib.util
import itertools

import keras
import numpy as np
import pytest
from keras import ops
from optimizers.test_accumulation import LR, StopAfter, build, distance, fit, weights_of
from reference import low_rank as reference
from reference import optimizers as numpy_optimizers
from reference.problems import Regression

from keras_ext import optimizers
from keras_ext.optimizers import AccumOptimizer

CLASSES = {
    "lora": optimizers.LoRAOptimizer,
    "additive": optimizers.AdditiveLowRankOptimizer,
    "random": optimizers.RandomProjectionOptimizer,
    "galore": optimizers.GaLoreOptimizer,
}


def low_rank_optimizer(optimizer, rank, mode="lora", **options):
    if mode in ("additive", "galore"):
        options.pop("seed", None)  # they draw nothing
    return CLASSES[mode](optimizer, rank, **options)


BACKEND = keras.backend.backend()
MODES = tuple(CLASSES)
COMPILED = {
    "eager": {"run_eagerly": True},
    "xla": {"jit_compile": BACKEND != "torch"},
}
OPTIMIZERS = {
    "momentum": (lambda: keras.optimizers.SGD(LR, 0.9), numpy_optimizers.sgd(LR, 0.9)),
    # Keras rounds 1 - beta_2^t to float32: 3e-5 of the first step, 3e-6 with this rate.
    "adam": (lambda: keras.optimizers.Adam(LR), numpy_optimizers.adam(LR)),
    "adamw": (
        lambda: keras.optimizers.AdamW(LR, weight_decay=0.1),
        numpy_optimizers.adam(LR, weight_decay=0.1),
    ),
}
compiled = pytest.mark.parametrize("mode", COMPILED)
inner = pytest.mark.parametrize("name", OPTIMIZERS)
one_mode_each = pytest.mark.parametrize(
    ("name", "mode"), [("momentum", "eager"), ("adam", "xla"), ("adamw", "eager")]
)


def rng(seed=0):
    return np.random.default_rng(seed)


def numpy_of(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def batches(problem, size=8):
    return [slice(i, i + size) for i in range(0, len(problem.x), size)]


def single(shape, seed=0, dtype="float32", constraint=None):
    """One matrix as a variable of a layer, whose value float32 holds exactly."""
    layer = keras.layers.Dense(
        shape[1], use_bias=False, kernel_constraint=constraint, dtype=dtype
    )
    layer.build((None, shape[0]))
    layer.kernel.assign(rng(seed).normal(size=shape).astype("float32"))
    return layer.kernel


def step(optimizer, variable, *gradients):
    for gradient in gradients:
        optimizer.apply([ops.convert_to_tensor(gradient, variable.dtype)], [variable])
    return numpy_of(variable)


def start_at(optimizer, model, values):
    """Build, and let A of the i-th matrix start at values[i]."""
    optimizer.build(model.trainable_variables)
    matrices = [v for v in model.trainable_variables if len(v.shape) == 2]
    for variable, value in zip(matrices, values, strict=True):
        # A copy: TensorFlow may keep the memory of an array and update it in place.
        optimizer.factors(variable)[0].assign(value.copy())


def starts(problem, rank=2):
    return [
        rng(i).normal(size=(len(w), rank)).astype("float32")
        for i, w in enumerate(problem.weights)
        if w.ndim == 2
    ]


# --- "lora" is the LoRA layer


@one_mode_each
def test_equals_lora_layers(name, mode):
    alpha = 3.0
    problem = Regression(embedding=True)  # every token is repeated in every batch
    make, _ = OPTIMIZERS[name]
    rank = 2
    layered = build(problem)
    embedding, dense = layered.layers[1], layered.layers[-1]
    for layer in (embedding, dense):
        layer.enable_lora(rank, lora_alpha=alpha)
    first = starts(problem, rank)
    embedding.lora_embeddings_a.assign(first[0].copy())
    dense.lora_kernel_a.assign(first[1].copy())
    # AccumOptimizer(., 1) sums repeated tokens, which Keras on TensorFlow squares singly.
    fit(layered, problem, AccumOptimizer(make(), 1), 8, epochs=2, **COMPILED[mode])

    model = build(problem)
    optimizer = low_rank_optimizer(make(), rank, alpha=alpha)
    start_at(optimizer, model, first)
    fit(model, problem, optimizer, 8, epochs=2, **COMPILED[mode])

    merged = [numpy_of(v) for v in (embedding.embeddings, dense.kernel, dense.bias)]
    assert distance(weights_of(model), merged) < 3e-6
    pairs = [embedding.lora_embeddings_a, embedding.lora_embeddings_b]
    pairs += [dense.lora_kernel_a, dense.lora_kernel_b]
    kept = [f for v in model.trainable_variables[:2] for f in optimizer.factors(v)]
    assert distance([numpy_of(v) for v in kept], [numpy_of(v) for v in pairs]) < 3e-6
    assert distance(weights_of(model), problem.weights) > LR  # it moved


@inner
def test_lora_equals_the_reference(name):
    problem = Regression(embedding=True)
    make, update = OPTIMIZERS[name]
    first = starts(problem)
    forms = [
        reference.Lora(problem.weights[0], first[0].astype("float64"), 1.5),
        reference.Lora(problem.weights[1], first[1].astype("float64"), 1.5),
        reference.Whole(problem.weights[2]),
    ]
    expected, _ = reference.train(problem, forms, update, batches(problem))
    model, optimizer = build(problem), low_rank_optimizer(make(), 2, alpha=3)
    start_at(optimizer, model, first)
    assert distance(fit(model, problem, optimizer, 8), expected) < 1e-5


def test_factors_merge_into_a_lora_layer():
    problem = Regression(embedding=False)
    model = build(problem)
    optimizer = low_rank_optimizer(keras.optimizers.Adam(LR), 2, alpha=1.0)
    fit(model, problem, optimizer, 8)
    a, b = optimizer.factors(model.layers[-1].kernel)
    other = build(problem)  # at W0
    other.layers[-1].enable_lora(2, lora_alpha=1.0)
    other.layers[-1].lora_kernel_a.assign(numpy_of(a))
    other.layers[-1].lora_kernel_b.assign(numpy_of(b))
    other.layers[-1].bias.assign(numpy_of(model.layers[-1].bias))
    outputs = [m.predict(problem.x, verbose=0) for m in (model, other)]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)


def test_first_factors_are_those_of_keras():
    optimizer = low_rank_optimizer("sgd", 4, seed=1)
    kernels = [single((300, 7)), single((300, 7))]
    optimizer.build(kernels)
    (a, b), (other, _) = (map(numpy_of, optimizer.factors(k)) for k in kernels)
    limit = np.sqrt(6 / 300)  # he_uniform, fan in 300
    assert np.abs(a).max() <= limit
    assert abs(a.std() / (limit / np.sqrt(3)) - 1) < 0.05
    assert np.abs(a - other).max() > limit  # drawn for each matrix
    assert not b.any()


def test_sgd_step_of_lora_expands():
    kernel = single((6, 5))
    optimizer = low_rank_optimizer(keras.optimizers.SGD(LR), 2)
    optimizer.build([kernel])
    a, b, g = (rng(i).normal(size=s) for i, s in ((1, (6, 2)), (2, (2, 5)), (3, (6, 5))))
    for factor, value in zip(optimizer.factors(kernel), (a, b), strict=True):
        factor.assign(value)
    before = numpy_of(kernel)
    moved = step(optimizer, kernel, g) - before
    expected = -LR * (g @ b.T @ b + a @ a.T @ g) + LR**2 * g @ b.T @ a.T @ g
    np.testing.assert_allclose(moved, expected, atol=2e-6)


def test_drift_of_lora_is_rounding():
    kernel, steps = single((8, 6)), 300
    start = numpy_of(kernel)
    optimizer = low_rank_optimizer(keras.optimizers.Adam(1e-3), 2, alpha=4.0, seed=0)
    step(optimizer, kernel, *rng().normal(size=(steps, 8, 6)))
    a, b = map(numpy_of, optimizer.factors(kernel))
    error = np.abs(numpy_of(kernel) - start - 2 * a @ b).max()
    # Each step rounds once: at most half a unit of the last place of W, mostly much less.
    assert error < steps * np.abs(start).max() * 2**-24
    assert np.abs(2 * a @ b).max() > 1e-2


# --- "additive"


@one_mode_each
@pytest.mark.parametrize(("rank", "target"), [(1, None), (2, "embed")])
def test_additive_equals_the_reference(rank, target, name, mode):
    problem = Regression(embedding=True)
    make, update = OPTIMIZERS[name]
    forms = [reference.Additive(problem.weights[0], rank)]
    forms += [reference.Additive(problem.weights[1], 1) if rank == 1 else None]
    forms = [
        form or reference.Whole(w)
        for form, w in zip([*forms, None], problem.weights, strict=True)
    ]
    expected, parameters = reference.train(problem, forms, update, batches(problem))
    model = build(problem)
    optimizer = low_rank_optimizer(make(), rank, mode="additive", include=target)
    assert distance(fit(model, problem, optimizer, 8, **COMPILED[mode]), expected) < 1e-5
    kept = optimizer.factors(model.trainable_variables[0])
    assert distance([numpy_of(v) for v in kept], parameters[0]) < 1e-5


# --- "galore"


@one_mode_each
def test_galore_equals_the_reference(name, mode):
    problem = Regression(embedding=True)
    make, update = OPTIMIZERS[name]
    decay = LR * 0.1 if name == "adamw" else 0.0
    update = numpy_optimizers.adam(LR) if decay else update
    expected = reference.train_galore(problem, update, batches(problem), 2, 2, 0.5, decay)
    optimizer = low_rank_optimizer(make(), 2, mode="galore", update_gap=2, scale=0.5)
    actual = fit(build(problem), problem, optimizer, 8, **COMPILED[mode])
    assert distance(actual, expected) < 2e-5  # singular vectors in float32


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_equals_the_projector_of_galore(shape):
    package = importlib.util.find_spec("galore_torch")
    if package is None:
        pytest.skip(
            "needs galore-torch and PyTorch; the test above has NumPy's vectors instead"
        )
    import torch

    # The file itself: the package imports bitsandbytes.
    path = f"{package.submodule_search_locations[0]}/galore_projector.py"
    spec = importlib.util.spec_from_file_location("galore_projector", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs = module.GaLoreProjector(rank=2, update_proj_gap=3, scale=0.25)
    kernel = single(shape)
    expected = numpy_of(kernel)
    optimizer = low_rank_optimizer(
        keras.optimizers.SGD(1.0), 2, mode="galore", update_gap=3, scale=0.25
    )
    for t, grad in enumerate(rng().normal(size=(5, *shape)).astype("float32")):
        # PyTorch's kernels are (out, in).
        small = theirs.project(torch.from_numpy(grad.T.copy()), t)
        expected -= theirs.project_back(small).numpy().T
        np.testing.assert_allclose(step(optimizer, kernel, grad), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (1, 3)])
def test_galore_at_full_rank_under_sgd_is_sgd(shape):
    kernel = single(shape)
    grads = rng(1).normal(size=(5, *shape))
    expected = numpy_of(kernel) - grads.sum(0)
    optimizer = low_rank_optimizer(
        keras.optimizers.SGD(1.0), min(shape), mode="galore", include="kernel", update_gap=2
    )
    np.testing.assert_allclose(step(optimizer, kernel, *grads), expected, atol=1e-5)


def test_projector_is_renewed_every_update_gap():
    kernel = single((6, 4))
    optimizer = low_rank_optimizer(keras.optimizers.SGD(1.0), 2, mode="galore", update_gap=3)
    seen = []
    for grad in rng().normal(size=(7, 6, 4)):
        step(optimizer, kernel, grad)
        p = numpy_of(optimizer.factors(kernel)[0])
        np.testing.assert_allclose(p.T @ p, np.eye(2), atol=1e-6)
        seen.append(p)
    changed = [np.abs(p - q).max() > 1e-3 for p, q in itertools.pairwise(seen)]
    assert changed == [False, False, True, False, False, True]
    for p, q in ((seen[2], seen[3]), (seen[5], seen[6])):
        assert (np.sum(p * q, axis=0) >= 0).all()  # the sign is that of the vector before


def test_a_matrix_that_gets_its_first_gradient_late():
    kernel, bias = single((6, 4)), keras.Variable(np.zeros(4, "float32"))
    optimizer = low_rank_optimizer(keras.optimizers.SGD(1.0), 2, mode="galore")
    start, grad = numpy_of(kernel), rng().normal(size=(6, 4)).astype("float32")
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([None, ops.ones(4)], [kernel, bias])
    np.testing.assert_array_equal(numpy_of(kernel), start)
    optimizer.apply([ops.convert_to_tensor(grad), ops.ones(4)], [kernel, bias])
    p = reference.projector(grad.astype("float64"), 2)
    np.testing.assert_allclose(numpy_of(kernel), start - grad @ p @ p.T, atol=1e-5)


# --- "random"


def test_random_step_is_right_on_average():
    kernel, draws = single((6, 5)), 400
    grad = rng().normal(size=(6, 5))
    optimizer = low_rank_optimizer(keras.optimizers.SGD(1.0), 2, mode="random", seed=3)
    values = [numpy_of(kernel)]
    for _ in range(draws):
        values.append(step(optimizer, kernel, grad).copy())
    steps = -np.diff(values, axis=0)
    error = steps.std(0, ddof=1) / np.sqrt(draws)  # of the mean, element by element
    # 30 elements: none beyond 4.5 deviations but with probability 2e-4.
    assert (np.abs(steps.mean(0) - grad) < 4.5 * error).all()
    along = (steps * grad).sum((1, 2)) / (grad**2).sum()
    deviation = along.std(ddof=1) / np.sqrt(draws)
    assert abs(along.mean() - 1) < 4.5 * deviation
    assert abs(along.mean() - 2) > 10 * deviation  # what the article's update would give


def test_random_step_is_its_formula():
    kernel = single((6, 5))
    grads = rng().normal(size=(3, 6, 5))
    expected = numpy_of(kernel)
    seed = keras.random.SeedGenerator(5)
    for grad in grads:
        a, b = (
            numpy_of(keras.random.normal(shape, stddev=2**-0.5, seed=seed))
            for shape in ((6, 2), (2, 5))
        )
        expected -= 0.1 * (grad @ b.T @ b + a @ a.T @ grad) / 2
    optimizer = low_rank_optimizer(keras.optimizers.SGD(0.1), 2, mode="random", seed=5)
    np.testing.assert_allclose(step(optimizer, kernel, *grads), expected, atol=2e-6)


@compiled
def test_random_draws_anew_in_every_step(mode):
    problem = Regression(embedding=False)
    optimizer = low_rank_optimizer(keras.optimizers.SGD(LR), 1, mode="random", seed=1)
    model = build(problem)
    fit(model, problem, optimizer, 8, **COMPILED[mode])
    moved = weights_of(model)[0] - problem.weights[0]
    assert np.linalg.matrix_rank(moved, tol=1e-5) == 3  # one pair of draws would give 2


# --- what holds in every mode


@pytest.mark.parametrize("mode", MODES)
def test_building_and_zero_gradients_move_nothing(mode):
    kernel = single((6, 4))
    start = numpy_of(kernel)
    optimizer = low_rank_optimizer(keras.optimizers.Adam(LR), 2, mode=mode)
    optimizer.build([kernel])
    np.testing.assert_array_equal(numpy_of(kernel), start)
    np.testing.assert_array_equal(step(optimizer, kernel, *np.zeros((2, 6, 4))), start)


@pytest.mark.parametrize(
    ("mode", "bound", "steps"),
    [("lora", 2, 5), ("additive", 4, 5), ("galore", 2, 5), ("random", 4, 1)],
)
def test_rank_of_the_change(mode, bound, steps):
    kernel = single((12, 8))
    start = numpy_of(kernel)
    optimizer = low_rank_optimizer(keras.optimizers.SGD(0.1, 0.9), 2, mode=mode)
    moved = step(optimizer, kernel, *rng().normal(size=(steps, 12, 8))) - start
    singular = np.linalg.svd(moved, compute_uv=False)
    assert singular[bound - 1] > 1e-4
    assert singular[bound] < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_other_variables_train_as_ever(mode):
    problem = Regression(embedding=True)
    make = OPTIMIZERS["adam"][0]
    model = build(problem)
    optimizer = low_rank_optimizer(make(), 1, mode=mode, include="embed")
    optimizer.build(model.trainable_variables)
    plain = AccumOptimizer(make(), 1)
    twins = [keras.Variable(w, dtype="float32") for w in problem.weights]
    for seed in range(3):
        grads = [
            ops.convert_to_tensor(rng(seed).normal(size=w.shape), "float32")
            for w in problem.weights
        ]
        optimizer.apply(grads, model.trainable_variables)
        plain.apply(grads, twins)
    assert distance(weights_of(model)[1:], [numpy_of(v) for v in twins[1:]]) < 1e-7
    assert int(optimizer.iterations) == 3


@pytest.mark.parametrize("mode", MODES)
def test_state_bytes(mode):
    n, m, r = 30, 20, 2
    kernel = single((n, m))

    def floats(optimizer):
        optimizer.build([kernel])
        assert all(v.dtype != "float64" for v in optimizer.variables)
        return sum(int(np.prod(v.shape)) for v in optimizer.variables if len(v.shape) == 2)

    adam = floats(keras.optimizers.Adam())
    ours = floats(low_rank_optimizer(keras.optimizers.Adam(), r, mode=mode))
    assert adam == 2 * n * m
    # Factors (or steps) and their two moments; galore: of R alone, and the projector.
    assert ours == (3 * r * n + r * m if mode == "galore" else 3 * r * (n + m))


@pytest.mark.parametrize("mode", ["galore", "random"])  # the contract has "additive"
def test_resumes_bit_for_bit(mode, tmp_path):
    problem = Regression(embedding=True)

    def make():
        options = {"update_gap": 2} if mode == "galore" else {}
        return low_rank_optimizer(keras.optimizers.Adam(LR), 1, mode=mode, seed=4, **options)

    whole = build(problem)
    fit(whole, problem, make(), 8)
    model = build(problem)
    model.compile(make(), loss="mse")
    path = tmp_path / "part.keras"
    model.fit(
        problem.x,
        problem.y,
        batch_size=8,
        shuffle=False,
        verbose=0,
        callbacks=[StopAfter(3, path)],
    )
    resumed = keras.saving.load_model(path)
    resumed.fit(problem.x[24:], problem.y[24:], batch_size=8, shuffle=False, verbose=0)
    states = [
        [*m.get_weights(), *map(numpy_of, m.optimizer.variables)] for m in (whole, resumed)
    ]
    for a, b in zip(*states, strict=True):
        np.testing.assert_array_equal(a, b)
    assert distance(whole.get_weights(), model.get_weights()) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_absent_gradients_pass(mode):
    used, unused = single((6, 4)), single((6, 4), seed=1)
    optimizer = low_rank_optimizer(keras.optimizers.AdamW(LR, weight_decay=0.5), 2, mode=mode)
    before = numpy_of(unused)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([ops.ones((6, 4)), None], [used, unused])
    np.testing.assert_array_equal(numpy_of(unused), before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite(mode, value):
    # As without the wrapper: the weights show it. Nothing hangs in the SVD.
    kernel = single((6, 4))
    optimizer = low_rank_optimizer("sgd", 2, mode=mode)
    grad = np.ones((6, 4))
    grad[2, 1] = value
    assert not np.isfinite(step(optimizer, kernel, grad)).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_scale_inside_skips_the_whole_update(mode):
    kernel = single((6, 4))
    start = numpy_of(kernel)
    inside = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(1.0, weight_decay=0.5), initial_scale=8.0
    )
    optimizer = low_rank_optimizer(inside, 2, mode=mode, seed=0)
    optimizer.build([kernel])
    plain = low_rank_optimizer(
        keras.optimizers.SGD(1.0, weight_decay=0.5), 2, mode=mode, seed=0
    )
    twin = single((6, 4))
    plain.build([twin])

    def stateless(grad):  # eagerly, LossScaleOptimizer leaks tracers on JAX
        if BACKEND != "jax":
            return step(optimizer, kernel, grad)
        weights, state = optimizer.stateless_apply(
            [v.value for v in optimizer.variables],
            [ops.convert_to_tensor(grad, "float32")],
            [kernel.value],
        )
        for v, value in zip([kernel, *optimizer.variables], weights + state, strict=True):
            v.assign(value)
        return numpy_of(kernel)

    grad = rng().normal(size=(6, 4))
    if mode != "random":  # which has drawn once more by then
        np.testing.assert_array_equal(stateless(np.full((6, 4), np.inf)), start)
        assert int(optimizer.iterations) == 0
    expected = step(plain, twin, grad)
    scale = float(optimizer.scale_loss(1.0))
    assert scale == (8.0 if mode == "random" else 4.0)
    np.testing.assert_allclose(stateless(scale * grad), expected, atol=1e-5)
    assert int(optimizer.iterations) == 1


def test_half_precision():
    # galore and random as any Keras optimizer: one rounding of the weight per update.
    for mode in ("galore", "random"):
        kernel, twin = single((6, 4), dtype="bfloat16"), single((6, 4))
        twin.assign(ops.cast(kernel, "float32"))
        a, b = (
            low_rank_optimizer(keras.optimizers.SGD(0.1), 2, mode=mode, seed=1)
            for _ in range(2)
        )
        grad = numpy_of(ops.cast(rng().normal(size=(6, 4)), "bfloat16"))
        error = np.abs(step(a, kernel, grad) - step(b, twin, grad))
        assert kernel.dtype == "bfloat16"
        assert (error <= np.abs(numpy_of(twin)) * 2**-8).all()
        assert {v.dtype for v in a.projections[0].coordinates} == {"float32"}
    for mode in ("lora", "additive"):
        with pytest.raises(ValueError, match="needs float32 weights, got bfloat16"):
            low_rank_optimizer("sgd", 2, mode=mode).build([single((6, 4), dtype="bfloat16")])


# --- weight decay


@pytest.mark.parametrize("mode", ["galore", "random"])
def test_decay_acts_on_the_weights_where_steps_start_from_zero(mode):
    kernel = single((6, 4))
    start = numpy_of(kernel)
    optimizer = low_rank_optimizer(keras.optimizers.AdamW(0.1, weight_decay=0.5), 2, mode=mode)
    moved = step(optimizer, kernel, *np.zeros((3, 6, 4)))
    np.testing.assert_allclose(moved, start * 0.95**3, rtol=1e-6)
    inside = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    kernel = single((6, 4))
    inside.exclude_from_weight_decay(var_list=[kernel])
    moved = step(low_rank_optimizer(inside, 2, mode=mode), kernel, *np.zeros((3, 6, 4)))
    np.testing.assert_array_equal(moved, start)


def test_decay_of_lora_leaves_the_weights_before_alone():
    kernel = single((6, 4))
    start = numpy_of(kernel)
    optimizer = low_rank_optimizer(keras.optimizers.AdamW(0.1, weight_decay=0.5), 2)
    optimizer.build([kernel])
    a, b = (rng(i).normal(size=s) for i, s in ((1, (6, 2)), (2, (2, 4))))
    for factor, value in zip(optimizer.factors(kernel), (a, b), strict=True):
        factor.assign(value)
    moved = step(optimizer, kernel, np.zeros((6, 4)))
    np.testing.assert_allclose(moved, start + (0.95**2 - 1) * a @ b, atol=1e-6)


# --- accumulation


@pytest.mark.parametrize("kind", MODES)
def test_accumulation_outside_equals_the_large_batch(kind):
    problem = Regression(embedding=True)

    def make():
        return low_rank_optimizer(keras.optimizers.Adam(LR), 1, mode=kind, seed=2)

    large = fit(build(problem), problem, make(), 16, **COMPILED["eager"])
    small = fit(build(problem), problem, AccumOptimizer(make(), 4), 4, **COMPILED["eager"])
    assert distance(large, small) < 5e-6


@pytest.mark.parametrize(
    ("kind", "mode"), [("lora", "eager"), ("additive", "eager"), ("lora", "xla")]
)
def test_accumulation_inside_equals_the_large_batch(kind, mode):
    problem = Regression(embedding=True)
    inside = AccumOptimizer(keras.optimizers.Adam(LR), 4)
    optimizers = [
        low_rank_optimizer(o, 1, mode=kind, seed=2) for o in (inside, keras.optimizers.Adam(LR))
    ]
    small, large = (
        fit(build(problem), problem, o, size, **COMPILED[mode])
        for o, size in zip(optimizers, (4, 16), strict=True)
    )
    assert distance(large, small) < 5e-6
    assert sum(int(np.prod(v.shape)) for v in inside.accumulators) < sum(
        w.size for w in problem.weights
    )


def test_the_remainder_of_an_accumulation_inside_is_followed():
    problem = Regression(embedding=True)

    def make(optimizer):
        return low_rank_optimizer(optimizer, 1, mode="lora", seed=2)

    model = build(problem)
    optimizer = make(AccumOptimizer(keras.optimizers.Adam(LR), 4))
    with pytest.warns(UserWarning, match="2 of 4 micro-batches"):
        small = fit(model, problem, optimizer, 8)
    twin = build(problem)
    twin.compile(make(keras.optimizers.Adam(LR)), loss="mse")
    for rows in (slice(0, 32), slice(32, 48)):
        twin.train_on_batch(problem.x[rows], problem.y[rows])
    assert distance(small, weights_of(twin)) < 5e-6


def test_the_error_of_a_failing_step_is_not_hidden():
    def broken(y_true, y_pred):
        raise ZeroDivisionError("in the loss")

    problem = Regression(embedding=False)
    model = build(problem)
    model.compile(low_rank_optimizer("sgd", 2), loss=broken)
    with pytest.raises(ZeroDivisionError):
        model.fit(problem.x, problem.y, verbose=0)


# --- two devices


def make_for_devices(mode):
    gap = 2 if mode == "galore" else 200
    inside = keras.optimizers.Adam(LR, global_clipnorm=0.5)
    options = {"update_gap": gap} if mode == "galore" else {"seed": 6}
    return low_rank_optimizer(inside, 1, mode=mode, **options)


@pytest.mark.thorough
@pytest.mark.skipif(BACKEND != "tensorflow", reason="MirroredStrategy is TensorFlow's")
def test_mirrored_strategy(mirrored):
    mode = "galore"  # the contract has "additive"
    problem = Regression(embedding=True)
    with mirrored.scope():
        model, optimizer = build(problem), make_for_devices(mode)
    distributed = fit(model, problem, optimizer, 8, jit_compile=False)
    single_device = fit(build(problem), problem, make_for_devices(mode), 8)
    assert distance(distributed, single_device) < 5e-6
    for variable in [*model.trainable_weights, *optimizer.projections[0].coordinates]:
        first, second = (v.numpy() for v in variable.value.values)
        np.testing.assert_array_equal(first, second)


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution runs on JAX")
@pytest.mark.parametrize("mode", ["lora", "galore", "random"])
def test_data_parallel(mode):
    problem = Regression(embedding=True)
    single_device = fit(build(problem), problem, make_for_devices(mode), 8)
    devices = keras.distribution.list_devices()
    assert len(devices) == 2
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    try:
        distributed = fit(build(problem), problem, make_for_devices(mode), 8)
        assert distance(distributed, single_device) < 5e-6
    finally:
        keras.distribution.set_distribution(None)


# --- the choice of matrices, configuration, refusals


def test_which_matrices_are_chosen():
    inputs = keras.Input((3, 8))
    hidden = keras.layers.EinsumDense("btd,dhk->bthk", (3, 4, 6), bias_axes="hk")(inputs)
    hidden = keras.layers.Dense(5, name="dense")(keras.layers.Reshape((3, 24))(hidden))
    model = keras.Model(inputs, keras.layers.Dense(2)(hidden))

    def chosen(**options):
        optimizer = low_rank_optimizer("sgd", **options)
        optimizer.build(model.trainable_variables)
        return [part.variable.shape for part in optimizer.projections if part is not None]

    assert chosen(rank=3) == [(4, 6), (24, 5)]  # not (8, 4, 6); a bias can be a matrix
    assert chosen(rank=2, include="kernel") == [(24, 5), (5, 2)]
    with pytest.raises(ValueError, match="too small for rank=3"):
        chosen(rank=3, include="kernel")
    for options in ({"rank": 6}, {"rank": 1, "include": "^dense/bias"}):
        with pytest.raises(ValueError, match="no matrix is left for rank"):
            chosen(**options)


def test_config_round_trip():
    optimizer = low_rank_optimizer(
        keras.optimizers.AdamW(1e-3, weight_decay=0.1),
        4,
        mode="galore",
        include="kernel",
        update_gap=50,
        scale=0.25,
        name="mine",
    )
    config = keras.saving.serialize_keras_object(optimizer)
    assert config["registered_name"] == "keras_ext>GaLoreOptimizer"
    for _ in range(2):
        copy = keras.saving.deserialize_keras_object(config)
        assert copy.get_config() == optimizer.get_config()
        assert isinstance(copy.inner_optimizer, keras.optimizers.AdamW)
    lora = low_rank_optimizer("sgd", 4, alpha=8)
    assert optimizers.LoRAOptimizer.from_config(lora.get_config()).alpha == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"rank": True}, "rank must be an integer >= 1, got True"),
        ({"rank": 2, "alpha": 0}, "alpha must be a number > 0, got 0"),
        ({"rank": 2, "mode": "galore", "scale": -1.0}, "scale must be a number > 0, got -1"),
        ({"rank": 2, "mode": "galore", "update_gap": 0}, "update_gap must be an integer >= 1"),
        (
            {"rank": 2, "include": ["kernel", "("]},
            "include must be regular expressions, layers or variables, got '\\('",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        low_rank_optimizer("sgd", **arguments)


def test_unknown_arguments_are_refused():
    for mode, option in (("lora", "scale"), ("random", "alpha"), ("galore", "clipnorm")):
        with pytest.raises(TypeError, match=option):
            low_rank_optimizer("sgd", 2, mode, **{option: 1.0})


def test_averages_inside_are_refused():
    for inside in (keras.optimizers.SGD(use_ema=True), low_rank_optimizer("sgd", 2)):
        with pytest.raises(ValueError, match="would follow the coordinates"):
            low_rank_optimizer(inside, 2)


@pytest.mark.parametrize("mode", ["random", "galore"])
def test_what_cannot_stand_a_changing_basis_is_refused(mode):
    for inside in (
        AccumOptimizer("sgd", 2),
        keras.optimizers.SGD(gradient_accumulation_steps=2),
        keras.optimizers.LossScaleOptimizer(AccumOptimizer("sgd", 2)),
    ):
        with pytest.raises(ValueError, match="Accumulate outside"):
            low_rank_optimizer(inside, 2, mode=mode)
    with pytest.raises(ValueError, match="Ftrl needs the weights"):
        low_rank_optimizer("ftrl", 2, mode=mode)


def test_additive_needs_a_rank_that_divides():
    with pytest.raises(ValueError, match=r"divides both sides.*rank=2 for .*\(6, 5\)"):
        low_rank_optimizer("sgd", 2, mode="additive").build([single((6, 5))])


@pytest.mark.parametrize("mode", MODES)
def test_constraints(mode):
    kernel = single((6, 4), constraint="non_neg")
    optimizer = low_rank_optimizer("sgd", 2, mode=mode)
    if mode in ("lora", "additive"):
        with pytest.raises(ValueError, match="has a constraint"):
            optimizer.build([kernel])
    else:
        assert step(optimizer, kernel, np.zeros((6, 4))).min() == 0.0


def test_factors_of_what_has_none():
    kernel, bias = single((6, 4)), keras.Variable(np.zeros(4, "float32"))
    optimizer = low_rank_optimizer("sgd", 2)
    with pytest.raises(ValueError, match="do not exist yet"):
        optimizer.factors(kernel)
    optimizer.build([kernel, bias])
    assert [f.shape for f in optimizer.factors(kernel)] == [(6, 2), (2, 4)]
    with pytest.raises(ValueError, match="has no factors"):
        optimizer.factors(bias)
    optimizer = low_rank_optimizer("sgd", 2, mode="random")
    optimizer.build([kernel])
    with pytest.raises(ValueError, match="has no factors: RandomProjectionOptimizer"):
        optimizer.factors(kernel)


# --- gradients that are absent, or zero


@pytest.mark.parametrize("mode", ["lora", "additive"])
def test_factors_that_move_without_a_gradient_move_the_weights(mode):
    """The accumulation inside has a gradient of the step before."""
    kernels = [single((6, 4), seed) for seed in (0, 1)]
    starts = [numpy_of(kernel) for kernel in kernels]
    optimizer = low_rank_optimizer(
        AccumOptimizer(keras.optimizers.SGD(0.1), 2), 2, mode, seed=0
    )
    grad = ops.convert_to_tensor(rng(2).normal(size=(6, 4)).astype("float32"))
    optimizer.apply([grad, grad], kernels)
    optimizer.apply([grad, None], kernels)
    for kernel, start in zip(kernels, starts, strict=True):
        a, b = (numpy_of(factor) for factor in optimizer.factors(kernel))
        low = a @ b if mode == "lora" else np.tile(a, (1, 2)) + np.tile(b, (3, 1))
        assert np.abs(low).max() > 1e-3
        np.testing.assert_allclose(numpy_of(kernel), start + low, atol=1e-6)


def test_a_gradient_of_zeros_leaves_the_projector():
    kernel = single((6, 4))
    optimizer = low_rank_optimizer("sgd", 2, "galore", update_gap=1)
    step(optimizer, kernel, rng(1).normal(size=(6, 4)))
    before = numpy_of(optimizer.factors(kernel)[0])
    step(optimizer, kernel, np.zeros((6, 4)))
    np.testing.assert_array_equal(numpy_of(optimizer.factors(kernel)[0]), before)
