import itertools

import keras
import numpy as np
import pytest

from keras_ext.text import BucketedBatches
from keras_ext.text.batches import choose_lengths

ROWS, CLASSES, VOCABULARY = 45, 3, 11


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(0)
    sizes = np.concatenate([random.integers(1, 40, ROWS - 1), [64]])
    token_ids = [random.integers(1, VOCABULARY, size).tolist() for size in sizes]
    return token_ids, random.integers(0, CLASSES, ROWS)


def batches_of(dataset):
    return [dataset[index] for index in range(len(dataset))]


def rows_of(dataset):
    return np.concatenate([rows for _, rows in dataset._plan])


def test_padding_of_another_id():
    dataset = BucketedBatches([[2, 3], [4]], segment_ids=[[1, 1], [1]], padding_id=9)
    ((tokens, segments),) = dataset[0]
    assert (tokens[:2, :3].tolist(), set(tokens[:, 2:].ravel())) == (
        [[2, 3, 9], [4, 9, 9]],
        {9},
    )
    assert segments[0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_every_row_once_in_few_shapes(data, seed, batch_size):
    token_ids, labels = data
    dataset = BucketedBatches(token_ids, labels, batch_size=batch_size, seed=seed)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        batches = batches_of(dataset)
        assert len(batches) == -(-ROWS // batch_size)
        assert sorted(rows_of(dataset)) == list(range(ROWS))
        assert sum(weight.sum() for _, _, weight in batches) == ROWS
        assert len({tokens.shape for (tokens, _), _, _ in batches}) <= 5
        assert sum((weight == 0).any() for _, _, weight in batches) <= 1


def test_batches_hold_the_rows(data):
    token_ids, labels = data
    segment_ids = [[index % 2] * len(row) for index, row in enumerate(token_ids)]
    dataset = BucketedBatches(token_ids, labels, segment_ids=segment_ids, batch_size=8, seed=1)
    for index, (length, rows) in enumerate(dataset._plan):
        (tokens, segments), targets, weight = dataset[index]
        assert tokens.shape == segments.shape == (8, length)
        assert tokens.dtype == segments.dtype == "int32"
        for line, row in enumerate(rows):
            size = len(token_ids[row])
            assert tokens[line].tolist() == token_ids[row] + [0] * (length - size)
            assert segments[line].tolist() == segment_ids[row] + [0] * (length - size)
            assert targets[line] == labels[row]
        assert (tokens[len(rows) :] == tokens[0]).all()
        assert weight.tolist() == [1] * len(rows) + [0] * (8 - len(rows))


def test_segments_are_zero_by_default_and_labels_optional(data):
    dataset = BucketedBatches(data[0], batch_size=8)
    assert all(not segments.any() for ((_, segments),) in batches_of(dataset))


def test_order_depends_on_seed_and_epoch_only(data):
    def order(seed, *epochs):
        dataset = BucketedBatches(*data, batch_size=8, seed=seed)
        for epoch in epochs:
            dataset.set_epoch(epoch)
        return rows_of(dataset).tolist()

    assert order(0, 0, 1, 2) == order(0, 2)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)
    assert order(0) == order(0, 0)
    assert order(None, 0) == order(None, 1)


def test_restore_brings_rows_into_their_order(data):
    dataset = BucketedBatches(data[0], batch_size=8)
    outputs = np.concatenate([tokens[:, :1] for ((tokens, _),) in batches_of(dataset)])
    assert dataset.restore(outputs)[:, 0].tolist() == [row[0] for row in data[0]]
    assert dataset.restore([int(row[0]) for row in outputs]) == [row[0] for row in data[0]]
    with pytest.raises(ValueError, match="must have 48 rows"):
        dataset.restore(outputs[1:])


def test_rows_of_several_texts():
    choices = [[[7] * 3, [8] * 9], [[5], [6] * 2], [[4] * 8, [3]]]
    dataset = BucketedBatches(choices, np.arange(3), batch_size=2)
    assert dataset.lengths == [8, 16]
    for index, (length, rows) in enumerate(dataset._plan):
        (tokens, segments), targets, _ = dataset[index]
        assert tokens.shape == segments.shape == (2, 2, length)
        for line, row in enumerate(rows):
            assert targets[line] == row
            for text, ids in zip(tokens[line], choices[row], strict=True):
                assert text.tolist() == ids + [0] * (length - len(ids))


@pytest.mark.parametrize("seed", range(20))
def test_first_two_batches_differ_in_length(data, seed):
    dataset = BucketedBatches(*data, batch_size=4, seed=seed)
    assert dataset._plan[0][0] != dataset._plan[1][0]


def test_choose_lengths_is_optimal():
    sizes = np.random.default_rng(0).integers(1, 80, 60)
    chosen = choose_lengths(sizes)

    def padded(lengths):
        return sum(min(length for length in lengths if length >= size) for size in sizes)

    options = itertools.combinations(range(8, 80, 8), 4)
    assert padded(chosen) == min(padded([*option, 80]) for option in options)
    assert choose_lengths([3, 5]) == [8]
    assert choose_lengths([9, 12, 30]) == [16, 32]


def classifier():
    keras.utils.set_random_seed(0)
    tokens = keras.Input((None,), dtype="int32", name="token_ids")
    segments = keras.Input((None,), dtype="int32", name="segment_ids")
    hidden = keras.layers.Embedding(VOCABULARY, 4, mask_zero=True)(tokens)
    hidden = hidden + keras.layers.Embedding(2, 4)(segments)
    pooled = keras.layers.GlobalAveragePooling1D()(hidden, mask=keras.ops.not_equal(tokens, 0))
    outputs = keras.layers.Dense(CLASSES)(pooled)
    model = keras.Model([tokens, segments], outputs)
    crossentropy = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )
    model.compile(
        keras.optimizers.SGD(0.1),
        crossentropy,
        weighted_metrics=[
            keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="crossentropy"),
            keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
        ],
    )
    return model


def test_padding_counts_neither_in_loss_nor_in_metrics(data):
    token_ids, labels = data
    model, dataset = classifier(), BucketedBatches(*data, batch_size=8)
    figures = model.evaluate(dataset, return_dict=True, verbose=0)
    logits = dataset.restore(model.predict(dataset, verbose=0))
    alone = model((np.array(token_ids[:1]), np.zeros((1, len(token_ids[0])), "int32")))
    np.testing.assert_allclose(logits[:1], keras.ops.convert_to_numpy(alone), atol=1e-6)
    shifted = logits - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(ROWS), labels]
    np.testing.assert_allclose(figures["crossentropy"], losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(figures["accuracy"], (logits.argmax(axis=1) == labels).mean())


def test_padded_rows_give_no_gradient(data):
    """One step on the padded batch is one step on its real rows."""
    padded = BucketedBatches(data[0][:5], data[1][:5], batch_size=8)
    exact = BucketedBatches(data[0][:5], data[1][:5], batch_size=5)
    weights = []
    for dataset in (padded, exact):
        model = classifier()
        model.fit(dataset, shuffle=False, verbose=0)
        weights.append([keras.ops.convert_to_numpy(weight) for weight in model.weights])
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_fit_runs_through_all_lengths_and_epochs(data):
    model, dataset = classifier(), BucketedBatches(*data, batch_size=4, seed=0)
    order = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: dataset.set_epoch(epoch)
    )
    history = model.fit(dataset, shuffle=False, epochs=3, verbose=0, callbacks=[order]).history
    assert history["crossentropy"][-1] < history["crossentropy"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_ids": []}, "there are no rows"),
        ({"token_ids": [[1], []]}, "row 1 has none"),
        ({"token_ids": [[[1], []]]}, "row 0 has none"),
        ({"token_ids": [[[1], [2]], [[3]]]}, "row 0 has 2, row 1 has 1"),
        ({"token_ids": [[1, 2]], "segment_ids": [[0]]}, "same lengths"),
        ({"token_ids": [[1]], "labels": [1, 2]}, "labels has 2 rows and token_ids 1"),
        ({"token_ids": [[1] * 9], "lengths": [8]}, "reach 8, but a row has 9"),
        ({"token_ids": [[1]], "batch_size": 0}, "at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BucketedBatches(**arguments)
