"""Conditional random field: against the sum over all paths, in float64."""

from itertools import pairwise, product

import keras
import numpy as np
import pytest
from compiled import compiled, float64, unseen
from keras import ops

from keras_ext.backend import value_and_grad
from keras_ext.layers import linear_chain as functions
from keras_ext.layers.crf import CRF

JIT = keras.backend.backend() != "torch"  # there it means torch.compile, which needs minutes
COMPILED = {"tensorflow": (False, True), "jax": (True,), "torch": (False,)}


crf_decode = compiled(functions.crf_decode)
crf_log_partition = compiled(functions.crf_log_partition)
crf_marginals = compiled(functions.crf_marginals)
crf_negative_log_likelihood = compiled(functions.crf_negative_log_likelihood)
crf_path_score = compiled(functions.crf_path_score)

NUMBER = 3
# Full, padded, padded on the left, with a gap, a single position, nothing.
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 0], [0] * 4])
MASK = MASK.astype(bool)
RANDOM = np.random.default_rng(0)
EMISSIONS = RANDOM.normal(size=(6, 4, NUMBER))
TAGS = np.where(MASK, RANDOM.integers(NUMBER, size=(6, 4)), [-100, 99, 7, -1])
WEIGHTS = [RANDOM.normal(size=s) for s in ((NUMBER, NUMBER), (NUMBER,), (NUMBER,))]


def paths_of(emissions, transitions, start, end, mask):
    """For each row all paths of the kept positions, and their scores."""
    for row, kept in zip(emissions, mask, strict=True):
        row = row[kept]
        paths = list(product(range(row.shape[1]), repeat=len(row)))
        scores = []
        for path in paths:
            score = sum(row[t, tag] for t, tag in enumerate(path))
            score += sum(transitions[pair] for pair in pairwise(path))
            scores.append(score + (start[path[0]] + end[path[-1]] if path else 0))
        yield paths, np.array(scores, "float64")


def log_partition(emissions, *weights, mask):
    tops = [(s.max(), s) for _, s in paths_of(emissions, *weights, mask)]
    return np.array([top + np.log(np.exp(s - top).sum()) for top, s in tops])


def path_score(emissions, tags, *weights, mask):
    found = zip(paths_of(emissions, *weights, mask), tags, mask, strict=True)
    return np.array([s[paths.index(tuple(y[kept]))] for (paths, s), y, kept in found])


def best_path(emissions, *weights, mask):
    best = np.zeros(mask.shape, int)
    for row, kept, (paths, scores) in zip(
        best, mask, paths_of(emissions, *weights, mask), strict=True
    ):
        row[kept] = paths[scores.argmax()]
    return best


def slopes(function, arrays, h=1e-5):
    """The derivatives of a function of a list of arrays, by central differences."""
    gradients = []
    for index, array in enumerate(arrays):
        gradient = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            value = []
            for sign in (1, -1):
                moved = [a.copy() for a in arrays]
                moved[index][place] += sign * h
                value.append(function(moved))
            gradient[place] = (value[0] - value[1]) / (2 * h)
        gradients.append(gradient)
    return gradients


def as_float32(arrays):
    return [np.asarray(a, "float32") for a in arrays]


def numpy(x):
    return ops.convert_to_numpy(x)


def test_sum_score_and_best_path_are_those_of_all_paths():
    emissions, *weights = as_float32([EMISSIONS, *WEIGHTS])
    expected = log_partition(emissions, *weights, mask=MASK)
    result = numpy(crf_log_partition(emissions, *weights, MASK))
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)
    score = path_score(emissions, TAGS, *weights, mask=MASK)
    result = numpy(crf_path_score(emissions, TAGS, *weights, MASK))
    np.testing.assert_allclose(result, score, rtol=1e-6, atol=1e-6)
    result = numpy(crf_negative_log_likelihood(emissions, TAGS, *weights, MASK))
    np.testing.assert_allclose(result, expected - score, rtol=1e-6, atol=1e-6)
    assert result[-1] == 0  # the one path of nothing
    decoded = numpy(crf_decode(emissions, *weights, MASK))
    np.testing.assert_array_equal(decoded, best_path(emissions, *weights, mask=MASK))


def test_float64_values():
    layer = CRF(dtype="float64")
    with float64():
        outputs = layer(EMISSIONS, mask=MASK)
        layer.set_weights(WEIGHTS)
        losses = layer.loss(reduction=None)(np.where(MASK, TAGS, -100), outputs)
        log_z = functions.crf_log_partition(EMISSIONS, *WEIGHTS, MASK)
        results = [numpy(losses), numpy(log_z)]
    expected = log_partition(EMISSIONS, *WEIGHTS, mask=MASK)
    score = path_score(EMISSIONS, TAGS, *WEIGHTS, mask=MASK)
    np.testing.assert_allclose(results[0], expected - score, rtol=1e-13)
    np.testing.assert_allclose(results[1], expected, rtol=1e-13)


def test_what_stands_at_padding_does_not_matter():
    emissions, *weights = as_float32([EMISSIONS, *WEIGHTS])
    dirty = np.where(MASK[..., None], emissions, np.nan).astype("float32")
    for function in (crf_log_partition, crf_decode, crf_marginals):
        clean = numpy(function(emissions, *weights, MASK))
        np.testing.assert_array_equal(numpy(function(dirty, *weights, MASK)), clean)


def test_gradients_are_those_of_the_sum_over_all_paths():
    arrays = [EMISSIONS, *WEIGHTS]
    factors = np.arange(1.0, 7)  # rows are not mixed up

    def reference(arrays):
        log_z = log_partition(*arrays, mask=MASK)
        return factors @ (log_z - path_score(arrays[0], TAGS, *arrays[1:], mask=MASK))

    def loss(arrays):
        emissions, *weights = arrays
        rows = crf_negative_log_likelihood(emissions, TAGS, *weights, MASK)
        return ops.sum(rows * ops.convert_to_tensor(factors, rows.dtype))

    gradients = compiled(value_and_grad(loss))(as_float32(arrays))[1]
    expected = slopes(reference, arrays)
    for gradient, slope in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(numpy(gradient), slope, rtol=2e-5, atol=2e-5)
    assert not numpy(gradients[0])[~MASK].any()


def test_second_derivatives():
    arrays = as_float32([EMISSIONS[:4], *WEIGHTS])
    direction = [RANDOM.normal(size=a.shape).astype("float32") for a in arrays]

    def slope(arrays):  # along the direction
        total = lambda arrays: ops.sum(crf_log_partition(*arrays, MASK[:4]))  # noqa: E731
        gradients = value_and_grad(total)(arrays)[1]
        return sum(ops.sum(d * g) for g, d in zip(gradients, along, strict=True))

    along = [ops.convert_to_tensor(d) for d in direction]
    gradients = compiled(value_and_grad(slope))(arrays)[1]
    curvature = sum(np.sum(numpy(g) * d) for g, d in zip(gradients, direction, strict=True))

    def value(h):
        moved = [a.astype("float64") + h * d for a, d in zip(arrays, direction, strict=True)]
        return log_partition(*moved, mask=MASK[:4]).sum()

    h = 1e-4
    expected = (value(h) - 2 * value(0) + value(-h)) / h**2
    np.testing.assert_allclose(curvature, expected, rtol=1e-4)


def test_marginals_are_probabilities():
    emissions, *weights = as_float32([EMISSIONS, *WEIGHTS])
    marginals = numpy(crf_marginals(emissions, *weights, MASK))
    np.testing.assert_allclose(marginals.sum(-1), MASK, atol=1e-6)
    paths, scores = next(paths_of(emissions, *weights, MASK))
    probability = np.exp(scores - scores.max())
    for t in range(4):
        shares = np.bincount([path[t] for path in paths], probability) / probability.sum()
        np.testing.assert_allclose(marginals[0, t], shares, atol=1e-6)


def test_zero_weights_are_independent_positions():
    emissions, tags, mask = EMISSIONS.astype("float32"), TAGS % NUMBER, np.ones_like(MASK)
    zeros = [np.zeros_like(w, "float32") for w in WEIGHTS]
    crossentropy = keras.losses.sparse_categorical_crossentropy(
        tags, emissions, from_logits=True
    )
    result = numpy(crf_negative_log_likelihood(emissions, tags, *zeros, mask))
    np.testing.assert_allclose(result, numpy(crossentropy).sum(-1), rtol=1e-6)
    best = numpy(crf_decode(emissions, *zeros, mask))
    np.testing.assert_array_equal(best, emissions.argmax(-1))


def test_a_single_position_adds_start_and_end():
    emissions, tags = EMISSIONS[:, :1].astype("float32"), TAGS[:, :1] % NUMBER
    _, start, end = as_float32(WEIGHTS)
    loss = crf_negative_log_likelihood(emissions, tags, *as_float32(WEIGHTS))
    crossentropy = keras.losses.sparse_categorical_crossentropy(
        tags, emissions + start + end, from_logits=True
    )
    np.testing.assert_allclose(numpy(loss), numpy(crossentropy)[:, 0], rtol=1e-5)


def test_one_tag_is_certain():
    emissions, weights = np.ones((2, 5, 1), "float32"), as_float32([[[2]], [3], [4]])
    tags = np.zeros((2, 5), int)
    loss = numpy(crf_negative_log_likelihood(emissions, tags, *weights))
    np.testing.assert_array_equal(loss, 0)
    score = numpy(crf_log_partition(emissions, *weights))
    np.testing.assert_allclose(score, 5 * 1 + 4 * 2 + 3 + 4)
    np.testing.assert_array_equal(numpy(crf_decode(emissions, *weights)), tags)


def test_small_losses_of_long_sequences_are_precise():
    # Scores are about 5e5, where float32 moves in steps of 0.03.
    best = RANDOM.integers(NUMBER, size=(1, 50))
    emissions = np.where(best[..., None] == np.arange(NUMBER), 1e4, -1e4)
    emissions[0, 20, best[0, 20]] = 1e4 - 2
    emissions[0, 20, (best[0, 20] + 1) % NUMBER] = 1e4
    other = best.copy()
    other[0, 20] = (best[0, 20] + 1) % NUMBER
    emissions = emissions.astype("float32")
    zeros = [np.zeros_like(w, "float32") for w in WEIGHTS]
    for tags, expected in ((best, np.log1p(np.exp(2))), (other, np.log1p(np.exp(-2)))):
        loss = numpy(crf_negative_log_likelihood(emissions, tags, *zeros))
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_array_equal(numpy(crf_decode(emissions, *zeros)), other)


def rest_of(emissions, tags, transitions, start, end):
    """R of one sequence, the paths that have left it, in float64."""
    emissions = emissions.astype("float64")
    emissions[0] += start
    emissions[-1] += end
    rho = emissions[0] - emissions[0, tags[0]]
    rho[tags[0]] = -np.inf
    for (last, tag), row in zip(pairwise(tags), emissions[1:], strict=True):
        full = rho.copy()
        full[last] = np.logaddexp(rho[last], 0)
        moves = transitions - transitions[last, tag]
        new = np.logaddexp.reduce(full[:, None] + moves, axis=0) + row - row[tag]
        new[tag] = np.logaddexp.reduce(rho + moves[:, tag])
        rho = new
    return np.logaddexp.reduce(rho)


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("margin", [2, 12, 18, 40, 80])
def test_tiny_losses_and_gradients_are_exact(margin, length):
    random = np.random.default_rng(margin + length)
    mask = np.ones((2, length), bool)
    mask[1, length // 2 : length - 1] = length < 3  # a gap
    tags = random.integers(NUMBER, size=(2, length))
    emissions = margin * (tags[..., None] == np.arange(NUMBER)) + random.normal(
        size=(2, length, NUMBER)
    )
    arrays = as_float32([emissions, *WEIGHTS])

    def reference(arrays):
        emissions, *weights = arrays
        rest = [
            rest_of(e[m], y[m], *weights) for e, y, m in zip(emissions, tags, mask, strict=True)
        ]
        return np.log1p(np.exp(np.array(rest, "longdouble")))

    def loss(arrays):
        emissions, *weights = arrays
        rows = crf_negative_log_likelihood(emissions, tags, *weights, mask)
        return ops.sum(rows), rows

    (_, rows), gradients = compiled(value_and_grad(loss, has_aux=True))(arrays)
    exact = [a.astype("float64") for a in arrays]
    expected = reference(exact)
    if margin == 80:
        assert expected.max() < 1e-30
    np.testing.assert_allclose(numpy(rows), expected.astype("float64"), rtol=2e-5)
    scale = float(expected.sum())
    slope = slopes(lambda arrays: float(reference(arrays).sum()) / scale, exact)
    for gradient, expected in zip(gradients, slope, strict=True):
        gradient = numpy(gradient).astype("float64") / scale
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=2e-6)


THOROUGH = pytest.mark.thorough


@pytest.mark.parametrize(
    "margin", [pytest.param(5, marks=THOROUGH), 15, pytest.param(40, marks=THOROUGH)]
)
def test_tiny_losses_of_two_thousand_steps(margin):
    random = np.random.default_rng(1)
    tags = random.integers(NUMBER, size=(1, 2000))
    emissions = margin * (tags[..., None] == np.arange(NUMBER))
    emissions = (emissions + random.normal(size=emissions.shape)).astype("float32")
    weights = as_float32(WEIGHTS)
    expected = np.logaddexp(0, rest_of(emissions[0], tags[0], *weights))
    loss = numpy(crf_negative_log_likelihood(emissions, tags, *weights))
    np.testing.assert_allclose(loss, expected, rtol=2e-4)


def test_gradients_with_one_tag_are_zero():
    arrays = as_float32([np.ones((2, 5, 1)), [[2]], [3], [4]])

    def loss(arrays):
        return ops.sum(crf_negative_log_likelihood(arrays[0], np.zeros((2, 5)), *arrays[1:]))

    value, gradients = compiled(value_and_grad(loss))(arrays)
    for gradient in (value, *gradients):
        np.testing.assert_array_equal(numpy(gradient), 0)


def test_second_derivatives_of_the_loss():
    arrays = as_float32([EMISSIONS, *WEIGHTS])
    direction = [RANDOM.normal(size=a.shape).astype("float32") for a in arrays]
    along = [ops.convert_to_tensor(d) for d in direction]

    def slope(arrays):
        def total(arrays):
            emissions, *weights = arrays
            rows = functions.crf_negative_log_likelihood(emissions, TAGS, *weights, MASK)
            return ops.sum(rows)

        gradients = value_and_grad(total)(arrays)[1]
        return sum(ops.sum(d * g) for g, d in zip(gradients, along, strict=True))

    gradients = compiled(value_and_grad(slope))(arrays)[1]
    curvature = sum(np.sum(numpy(g) * d) for g, d in zip(gradients, direction, strict=True))

    def value(h):  # the score of the path is linear
        moved = [a.astype("float64") + h * d for a, d in zip(arrays, direction, strict=True)]
        return log_partition(*moved, mask=MASK).sum()

    h = 1e-4
    expected = (value(h) - 2 * value(0) + value(-h)) / h**2
    np.testing.assert_allclose(curvature, expected, rtol=1e-4)


@pytest.mark.parametrize("wrong", [NUMBER, 99, -1, 0.5, np.nan])
def test_tags_out_of_range(wrong, monkeypatch):
    arrays = as_float32([EMISSIONS, *WEIGHTS])
    tags = np.where(MASK, TAGS, np.nan).astype("float32")  # anything at padding
    tags[0, 2] = wrong
    with pytest.raises(ValueError, match=r"tags must be integers in \[0, 3\), got .*mask"):
        functions.crf_negative_log_likelihood(arrays[0], tags, *arrays[1:], MASK)
    with pytest.raises(ValueError, match="tags must be integers"):
        functions.crf_path_score(arrays[0], tags, *arrays[1:], MASK)
    if wrong != -1:  # which the loss leaves out
        layer = CRF()
        outputs = layer(arrays[0], mask=MASK)
        with pytest.raises(ValueError, match="tags must be integers"):
            layer.loss()(tags, outputs)

    def loss(arrays, tags):
        rows = functions.crf_negative_log_likelihood(arrays[0], tags, *arrays[1:], MASK)
        return ops.sum(rows), rows

    step = unseen(value_and_grad(loss, has_aux=True), monkeypatch)
    (_, rows), gradients = step(
        [ops.convert_to_tensor(a) for a in arrays], ops.convert_to_tensor(tags)
    )
    np.testing.assert_array_equal(np.isnan(numpy(rows)), [True] + [False] * 5)
    assert np.isnan(numpy(gradients[0])[0]).any()
    assert np.isfinite(numpy(gradients[0])[1:]).all()
    assert all(np.isnan(numpy(g)).any() for g in gradients[1:])


def test_impossible_tags_have_no_share():
    emissions, *weights = as_float32([EMISSIONS, *WEIGHTS])
    emissions[:, 1, 2] = -np.inf
    expected = log_partition(emissions, *weights, mask=MASK)
    result = numpy(crf_log_partition(emissions, *weights, MASK))
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)
    marginals = numpy(crf_marginals(emissions, *weights, MASK))
    np.testing.assert_allclose(marginals.sum(-1), MASK, atol=1e-6)
    assert not marginals[:, 1, 2].any()


def make_tagger(**kwargs):
    """Emissions are the rows of a table, ids 0 are padding."""
    inputs = keras.Input((None,), dtype="int32")
    table = keras.layers.Embedding(9, NUMBER, mask_zero=True)
    crf = CRF(keras.initializers.RandomNormal(stddev=1.0, seed=1), name="crf", **kwargs)
    return keras.Model(inputs, crf(table(inputs))), table, crf


IDS = np.array([[3, 1, 4, 1], [5, 8, 0, 0], [2, 6, 5, 3], [0, 0, 0, 0]], "int32")
LABELS = np.array([[0, 1, 2, 2], [1, 1, -100, 99], [2, 0, 1, 0], [-1] * 4])


class Batches(keras.utils.PyDataset):
    """Two lengths; one on JAX, which compiles each of them anew."""

    sample_weight = np.array([1.0, 2.0, 0.0, 0.5], "float32")

    def __len__(self):
        return 1 if keras.backend.backend() == "jax" else 2

    def __getitem__(self, index):
        length = 4 - index
        return IDS[:, :length], LABELS[:, :length], self.sample_weight


@pytest.mark.parametrize("xla", COMPILED[keras.backend.backend()])
def test_fit_gives_all_weights_their_gradients(xla):
    model, _, crf = make_tagger()
    weights = [w.astype("float64") for w in model.get_weights()]
    batches = Batches()
    for batch in map(batches.__getitem__, range(len(batches))):

        def loss(weights, batch=batch):
            ids, labels, sample_weight = batch
            emissions, mask = weights[0][ids], ids != 0
            log_z = log_partition(emissions, *weights[1:], mask=mask)
            losses = log_z - path_score(emissions, labels, *weights[1:], mask=mask)
            return sample_weight @ losses / sample_weight.sum()

        weights = [w - slope for w, slope in zip(weights, slopes(loss, weights), strict=True)]
    model.compile(
        keras.optimizers.SGD(1.0),
        loss=crf.loss(reduction="mean_with_sample_weight"),
        jit_compile=xla,
        run_eagerly=not xla,
    )
    model.fit(batches, shuffle=False, verbose=0)
    for result, expected in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(result, expected, atol=1e-5)


def test_predictions_are_decoded():
    model, table, crf = make_tagger()
    model.compile(jit_compile=JIT)
    outputs = model.predict(IDS, verbose=0)
    mask = IDS != 0
    expected = best_path(table.get_weights()[0][IDS], *crf.get_weights(), mask=mask)
    decode = compiled(crf.decode)
    np.testing.assert_array_equal(numpy(decode(outputs)), expected)
    mask[:, 1:] = False  # sequences of length 1
    assert not numpy(decode(outputs, mask))[:, 1:].any()


def test_the_mask_of_the_call_and_negative_labels_count_in_bfloat16():
    layer = CRF(keras.initializers.RandomNormal(stddev=1.0, seed=1), dtype="mixed_bfloat16")
    given, labelled = MASK.copy(), MASK.copy()
    given[0, 1] = labelled[2, 3] = False
    outputs = layer(EMISSIONS.astype("float32"), mask=given)
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    loss = compiled(layer.loss(reduction=None).__call__)
    loss = loss(np.where(labelled, TAGS, -100), outputs)
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"
    emissions = numpy(ops.cast(ops.cast(EMISSIONS, "bfloat16"), "float32"))
    arguments = {"mask": given & labelled}
    expected = log_partition(emissions, *layer.get_weights(), **arguments)
    expected -= path_score(emissions, TAGS, *layer.get_weights(), **arguments)
    np.testing.assert_allclose(numpy(loss), expected, rtol=1e-5, atol=1e-6)


def test_a_loaded_model_needs_the_loss_of_its_own_layer(tmp_path):
    model, _, crf = make_tagger()
    model.compile("adam", crf.loss(reduction="mean_with_sample_weight"))
    model.optimizer.build(model.trainable_variables)
    model.optimizer.iterations.assign(7)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.loss.get_config() == model.loss.get_config()
    with pytest.raises(ValueError, match=r"loss=model.get_layer\('crf'\).loss\(\)"):
        loaded.evaluate(IDS, LABELS, verbose=0)
    loaded.compile(loaded.optimizer, loss=loaded.get_layer("crf").loss())
    assert loaded.loss.crf is loaded.get_layer("crf")
    assert int(loaded.optimizer.iterations) == 7


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="expected ndim=3"):
        CRF()(np.zeros((2, 3), "float32"))
    layer = CRF()
    outputs = layer(np.zeros((2, 4, 3), "float32"))
    with pytest.raises(ValueError, match=r"must be tags \(batch, length\), got shape"):
        layer.loss()(np.zeros((2, 4, 3)), outputs)
    with pytest.raises(ValueError, match=r"tags must have shape \(2, 4\), got shape \(1, 4\)"):
        functions.crf_path_score(outputs, np.zeros((1, 4)), *layer.potentials)
    with pytest.raises(ValueError, match="one weight for each sequence"):
        layer.loss()(np.zeros((2, 4)), outputs, np.ones((2, 4)))
