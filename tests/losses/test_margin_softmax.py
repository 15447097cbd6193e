"""Margin softmax: values and gradients against float64, invariants, and a peer."""

import itertools

import keras
import numpy as np
import pytest
from compiled import float64
from keras import ops
from reference import margin_softmax as reference

from keras_ext.backend import value_and_grad
from keras_ext.layers.cosine import CosineDense, cosine_scores
from keras_ext.losses import (
    AMSoftmax,
    ArcFace,
    ASoftmax,
    CombinedMargin,
    CosineSoftmax,
    SimpleASoftmax,
    adaptive_margin,
    margin_softmax_loss,
)

JIT = [False] if keras.backend.backend() == "torch" else [False, True]
CLASSES = 7
RANDOM = np.random.default_rng(0)
COSINES = RANDOM.uniform(-1, 1, (64, CLASSES)).astype("float32")
LABELS = RANDOM.integers(0, CLASSES, 64)
GRID = np.linspace(0, np.pi, 721)

CASES = {
    "none": (CosineSoftmax(30), np.cos),
    "am": (AMSoftmax(0.35, 30), reference.am),
    "arc": (ArcFace(0.5, 64), reference.arc),
    "arc easy": (ArcFace(0.5, 64, easy_margin=True), reference.arc_easy),
    "a": (ASoftmax(4), reference.a),
    "a annealed": (ASoftmax(3, annealing=5.0), lambda t: reference.a(t, 3, 5.0)),
    "simple a": (SimpleASoftmax(), reference.simple_a),
    "combined": (
        CombinedMargin(0.9, 0.4, 0.15),
        lambda t: reference.combined(t, 0.9, 0.4, 0.15),
    ),
}
FALLING = [name for name in CASES if name not in ("simple a", "arc easy")]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def per_example(loss, labels, cosines):
    return ops.convert_to_numpy(margin_softmax_loss(labels, cosines, loss.target, loss.scale))


def psi(loss, theta=GRID):
    return ops.convert_to_numpy(loss.target(ops.convert_to_tensor(np.cos(theta), "float32")))


class Cosines(keras.layers.Layer):
    """Cosines that are weights, so that SGD(1) shows their gradient."""

    def build(self, inputs_shape):
        self.cosines = self.add_weight(shape=(4, 5), name="cosines")

    def call(self, inputs):
        return inputs + self.cosines


def gradient(loss, labels, cosines, jit=False):
    model = keras.Sequential([keras.Input((5,), 4), Cosines()])
    model.set_weights([cosines])
    model.compile(keras.optimizers.SGD(1.0), loss, jit_compile=jit)
    model.train_on_batch(np.zeros((4, 5), "float32"), labels)
    return cosines - model.get_weights()[0]


def test_values(case):
    loss, angle_fn = case
    expected = reference.loss(LABELS, COSINES, angle_fn, loss.scale)
    np.testing.assert_allclose(per_example(loss, LABELS, COSINES), expected, rtol=3e-5)
    np.testing.assert_allclose(float(loss(LABELS, COSINES)), expected.mean(), rtol=1e-5)


def test_float64_values(case):
    loss, angle_fn = case
    cosines = COSINES.astype("float64")
    with float64():
        result = per_example(loss, LABELS, cosines)
        config = {**loss.get_config(), "dtype": "float64", "reduction": "sum"}
        total = ops.convert_to_numpy(type(loss).from_config(config)(LABELS, cosines))
    expected = reference.loss(LABELS, cosines, angle_fn, loss.scale)
    # The arctan2 of Keras is one of float32 on PyTorch and JAX.
    rtol = 1e-5 if isinstance(loss, CombinedMargin) else 1e-10
    np.testing.assert_allclose(result, expected, rtol=rtol)
    np.testing.assert_allclose(total, expected.sum(), rtol=rtol)


def test_small_losses_are_exact_relatively():
    cosines = np.array([[0.9, 0.1], [1.0, -0.1], [0.95, 0.31], [1.0, 1.0]], "float32")
    expected = reference.loss([0] * 4, cosines, reference.am, 30)
    assert expected.min() < 1e-9
    assert expected.max() > 10
    losses = per_example(AMSoftmax(), np.zeros(4, "int32"), cosines)
    np.testing.assert_allclose(losses, expected, rtol=5e-6)


@pytest.mark.parametrize(
    ("name", "jit"), [*((name, False) for name in CASES), ("arc", JIT[-1])]
)
def test_gradients_are_those_of_finite_differences(name, jit):
    loss, angle_fn = CASES[name]
    theta = np.random.default_rng(1).uniform(0.3, 2.4, (4, 5))
    cosines, labels = np.cos(theta).astype("float32"), np.array([0, 2, 4, 4])
    difference, step = np.zeros((4, 5)), 1e-6
    for index in np.ndindex(4, 5):
        moved = np.zeros((4, 5))
        moved[index] = step
        up, down = (
            reference.loss(labels, cosines + sign * moved, angle_fn, loss.scale).mean()
            for sign in (1, -1)
        )
        difference[index] = (up - down) / (2 * step)
    result = gradient(loss, labels, cosines, jit)
    np.testing.assert_allclose(result, difference, rtol=1e-3, atol=2e-5)


def test_gradients_are_finite_at_the_ends(case):
    loss, _ = case
    ends = np.array([1, 1 + 2e-7, -1, -1 - 2e-7], "float32")
    cosines = np.repeat(ends[:, None], 5, axis=1)
    result = gradient(loss, np.arange(4), cosines)
    assert np.isfinite(result).all()
    assert (np.abs(result).max(axis=1) > 1e-3).all()


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="JAX alone refuses closures under its jit"
)
def test_a_compiled_loss_has_the_gradient_of_an_eager_one():
    import jax

    def loss(cosines, labels):
        return AMSoftmax()(labels, cosines)

    result = jax.grad(jax.jit(loss))(COSINES, LABELS)
    np.testing.assert_allclose(result, jax.grad(loss)(COSINES, LABELS), atol=1e-7)


def test_gradients_can_be_differentiated_again():
    # As a gradient penalty does, through the gradients that the layer and the loss define.
    random = np.random.default_rng(6)
    features, kernel = (random.normal(size=s).astype("float32") for s in [(3, 4), (4, 5)])
    step = 1e-2 * random.normal(size=(3, 4)).astype("float32")
    slope = value_and_grad(lambda x: AMSoftmax(scale=3)(np.arange(3), cosine_scores(x, kernel)))

    def penalty(x):
        return ops.sum(ops.square(slope(x)[1]))

    up, down = (
        ops.convert_to_numpy(penalty(ops.convert_to_tensor(features + sign * step)))
        for sign in (1, -1)
    )
    _, result = value_and_grad(penalty)(ops.convert_to_tensor(features))
    result = np.sum(ops.convert_to_numpy(result) * step)
    np.testing.assert_allclose(result, (up - down) / 2, rtol=5e-3)
    assert abs(result) > 1e-4


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="XLA tells its memory on JAX")
def test_memory_is_the_cosines_and_their_gradient():
    import jax

    def loss(features, kernel):
        return ArcFace()(np.zeros(64), cosine_scores(features, kernel))

    arrays = np.ones((64, 64), "float32"), np.ones((64, 4000), "float32")
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2.2 * 64 * 4000 * 4


def test_one_hot_and_column_labels_give_the_same():
    loss = ArcFace()
    expected = float(loss(LABELS, COSINES))
    assert float(loss(LABELS[:, None], COSINES)) == expected
    assert float(loss(np.eye(CLASSES)[LABELS], COSINES)) == expected
    grouped = loss(LABELS.reshape(8, 8), COSINES.reshape(8, 8, CLASSES))
    np.testing.assert_allclose(float(grouped), expected, rtol=1e-6)
    assert float(loss(np.zeros(2), np.ones((2, 1), "float32"))) == 0  # a single class


def test_sample_weights_and_reductions():
    weights = np.random.default_rng(2).uniform(size=64)
    losses = per_example(AMSoftmax(), LABELS, COSINES)
    total = float(AMSoftmax(reduction="sum")(LABELS, COSINES, weights))
    np.testing.assert_allclose(total, losses @ weights, rtol=1e-5)
    mean = AMSoftmax(reduction="mean_with_sample_weight")(LABELS, COSINES, weights)
    np.testing.assert_allclose(float(mean), losses @ weights / weights.sum(), rtol=1e-5)
    rows = ops.convert_to_numpy(AMSoftmax(reduction=None)(LABELS, COSINES))
    np.testing.assert_allclose(rows, losses, rtol=1e-6)


def test_without_margin_all_are_the_same():
    losses = [CosineSoftmax(30), AMSoftmax(0, 30), ArcFace(0, 30), ASoftmax(1, 30)]
    values = [per_example(loss, LABELS, COSINES) for loss in losses]
    for other in [*values[1:], per_example(CombinedMargin(1, 0, 0, 30), LABELS, COSINES)]:
        np.testing.assert_allclose(other, values[0], rtol=2e-5, atol=1e-6)


def test_target_never_exceeds_the_cosine_and_falls_with_the_angle():
    for name in FALLING:
        values = psi(CASES[name][0])
        assert (values <= np.cos(GRID) + 1e-6).all(), name
        assert (np.diff(values) < 1e-6).all(), name
    for name in ("a", "a annealed", "combined"):  # continuous
        assert np.abs(np.diff(psi(CASES[name][0]))).max() < 0.03, name


def test_loss_grows_with_the_margin():
    for make in (AMSoftmax, ArcFace):
        small, large = (per_example(make(m), LABELS, COSINES) for m in (0.2, 0.4))
        assert (small < large).all()


def test_combined_margin_holds_the_others():
    before = GRID[: np.searchsorted(GRID, np.pi - 0.5)]
    for combined, other, theta in [
        (CombinedMargin(1, 0, 0.35), AMSoftmax(), GRID),
        (CombinedMargin(4, 0, 0), ASoftmax(), GRID),
        (CombinedMargin(1, 0.5, 0), ArcFace(), before),
    ]:
        np.testing.assert_allclose(psi(combined, theta), psi(other, theta), atol=3e-6)


def test_large_scale_is_the_hinge_of_the_largest_margin():
    others = np.where(np.eye(CLASSES)[LABELS], -2, COSINES).max(1)
    hinge = np.maximum(0, others - COSINES[np.arange(64), LABELS] + 0.35)
    losses = per_example(AMSoftmax(scale=1e4), LABELS, COSINES) / 1e4
    np.testing.assert_allclose(losses, hinge, atol=3e-4)


def test_low_precision_cosines_are_computed_in_float32():
    cosines = ops.cast(COSINES, "bfloat16")
    exact = ArcFace()(LABELS, ops.cast(cosines, "float32"))
    for dtype in (None, "bfloat16"):  # which also would round class numbers
        loss = ArcFace(dtype=dtype)(LABELS, cosines)
        assert keras.backend.standardize_dtype(loss.dtype) == "float32"
        assert float(loss) == float(exact)


@pytest.mark.parametrize("jit", JIT)
def test_a_classifier_learns(jit):
    keras.utils.set_random_seed(0)
    features = np.random.default_rng(3).normal(size=(64, 4)).astype("float32")
    labels = np.argmax(features[:, :3], axis=1)
    model = keras.Sequential([keras.Input((4,)), CosineDense(3)])
    model.compile(
        keras.optimizers.Adam(0.1), AMSoftmax(), metrics=["accuracy"], jit_compile=jit
    )
    history = model.fit(features, labels, epochs=15, batch_size=32, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert history["accuracy"][-1] > 0.9


def test_config_round_trip(case):
    loss, _ = case
    config = keras.saving.serialize_keras_object(loss)
    copy = keras.saving.deserialize_keras_object(config)
    assert type(copy) is type(loss)
    assert copy.get_config() == loss.get_config()
    assert float(copy(LABELS, COSINES)) == float(loss(LABELS, COSINES))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CosineSoftmax(0), "scale must be positive, got 0"),
        (lambda: AMSoftmax(-0.1), "margin must not be negative, got -0.1"),
        (lambda: AMSoftmax(label_smoothing=0.1), "smoothed labels have none"),
        (lambda: ArcFace(28.6), r"margin must be in \[0, π\), in radians, got 28.6"),
        (lambda: ASoftmax(1.5), "margin must be a positive integer, got 1.5"),
        (lambda: ASoftmax(annealing=-1), "annealing must not be negative, got -1"),
        (lambda: CombinedMargin(m1=0), "m1 must be positive, got 0"),
        (lambda: CombinedMargin(m2=4), r"m2 must be in \[0, π\), in radians, got 4"),
        (lambda: CombinedMargin(m3=-1), "m3 must not be negative, got -1"),
        (lambda: AMSoftmax()(np.zeros((2, 3)), np.ones((2, 4))), "got shape \\(2, 3\\)"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_keywords_are_refused():
    for make in (CosineSoftmax, AMSoftmax, ArcFace, ASoftmax, SimpleASoftmax, CombinedMargin):
        with pytest.raises(TypeError, match="no_such_option"):
            make(no_such_option=1)


def test_adaptive_margin_is_the_mean_class_diameter():
    angles = np.radians([0, 60, 10, 10, 90])
    features = 3 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    labels = [0, 0, 2, 2, 2]
    centers = np.array([[0.5, 0, 0], [0, 1, 2]])  # directions at 0, 90 and 90 degrees
    radii = [(1 - 0.5) / 2, 2 * (1 - np.sin(np.radians(10))) / 3]
    np.testing.assert_allclose(adaptive_margin(features, labels, centers), sum(radii))
    to_mean = adaptive_margin(features[:2], [5, 5])
    np.testing.assert_allclose(to_mean, 2 * (1 - np.cos(np.radians(30))))
    with pytest.raises(ValueError, match=r"labels must be integers in \[0, 3\), got \[3\]"):
        adaptive_margin(features, [0, 1, 2, 3, 3], centers)
    assert adaptive_margin(features, np.array(labels, float), centers) == sum(radii)
    with pytest.raises(ValueError, match=r"got \[0.5, nan\]. centers has one column for each"):
        adaptive_margin(features, [0, 1, 2, 0.5, np.nan], centers)
    with pytest.raises(ValueError, match="one for each of the 5 features"):
        adaptive_margin(features, [0, 1])
    with pytest.raises(ValueError, match="features must have one row or more"):
        adaptive_margin(np.zeros((0, 2)), [])
    features[0] = np.nan
    assert np.isnan(adaptive_margin(features, labels))


def test_what_the_derivation_needs_root_of_one_minus_cosine_is_a_metric():
    points = np.random.default_rng(4).normal(size=(12, 3))
    distance = np.sqrt(np.maximum(0, 1 - reference.cosines(points, points.T)))
    for i, j, k in itertools.product(range(12), repeat=3):
        assert distance[i, k] <= distance[i, j] + distance[j, k] + 1e-7


@pytest.mark.parametrize("name", ["CosFaceLoss", "ArcFaceLoss", "SphereFaceLoss"])
def test_equals_pytorch_metric_learning(name):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch = pytest.importorskip("torch")
    ours = {"CosFaceLoss": AMSoftmax(0.35, 64), "ArcFaceLoss": ArcFace(np.radians(28.6), 64)}
    ours["SphereFaceLoss"] = ASoftmax(4, 64)
    peer = getattr(losses, name)(CLASSES, 3)  # margins as in ours by default
    features = np.random.default_rng(5).normal(size=(64, 3))
    features *= 64 / np.linalg.norm(features, axis=1, keepdims=True)  # SphereFace's scale
    peer.W.data = peer.W.data.double()
    kernel = peer.W.detach().numpy()
    inputs = torch.tensor(features, requires_grad=True)
    expected = peer(inputs, torch.from_numpy(LABELS))
    result = ours[name](LABELS, reference.cosines(features, kernel).astype("float32"))
    np.testing.assert_allclose(float(result), expected.item(), rtol=1e-5)
