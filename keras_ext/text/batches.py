"""Length-bucketed batches: little padding, few shapes, every row exactly once.

A sequence of length n goes to the shortest bucket length L >= n, and a batch holds rows
of one bucket, padded to (batch_size, L). A compiled model therefore sees at most as many
shapes as there are buckets. Rows that do not fill a batch of their bucket move up to the
next, so there are ceil(rows / batch_size) batches, as without buckets; only the last one
is filled up, with copies of its first row of sample weight zero. (Rows of nothing but
padding would do, were it not for models that divide by the number of tokens: zero times
NaN is NaN.)

What the zero weights need from `compile`:

- a loss with `reduction="mean_with_sample_weight"` (the default divides by all rows);
- `weighted_metrics=`, not `metrics=` (which ignore sample weights);
- not the figure `loss` that Keras prints: it weighs the mean of each batch by its number
  of rows, filling included. Put the loss among the weighted metrics to get it exactly.

Keras does not tell a dataset the epoch, and shuffles batches itself unless told not to, so
training takes:

    order = LambdaCallback(on_epoch_begin=lambda epoch, logs: batches.set_epoch(epoch))
    model.fit(batches, shuffle=False, epochs=3, callbacks=[order])

Bucketing changes which rows meet in a batch, not which rows are seen. Do not use it where
the rows of a batch must be a random sample (batch normalisation, in-batch negatives).
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np

MAX_LENGTHS = 5
MULTIPLE = 8


class BucketedBatches(keras.utils.PyDataset):
    """Batches `((token_ids, segment_ids), labels, sample_weight)` of few shapes.

    `token_ids` and `segment_ids` are int32 of (batch_size, L), padded with `padding_id` and 0;
    `sample_weight` is float32 of (batch_size,), 1 for rows and 0 for filling. Without
    labels a batch is `((token_ids, segment_ids),)`. Where a row is several texts, such as the
    choices of a question, they are (batch_size, texts, L), L that of the longest text.

    Args:
        token_ids: one sequence of ids per row, each of at least one id; or a list of as many
            such sequences for every row.
        labels: array of (rows, ...), or None.
        segment_ids: sequences as long as those of `token_ids`. Default: zeros,
            also for pairs, as RoBERTa-style checkpoints were trained and the reference
            code of CLUE has it.
        padding_id: the id of padding, that of the model. Default: 0.
        batch_size: rows in every batch. Default: 32.
        lengths: the bucket lengths. Default: at most five, see `choose_lengths`.
        seed: shuffle rows and batches by it. Default: None, sorted by bucket, for
            evaluation; see `restore`.

    Raises:
        ValueError: the inputs do not fit together, or a row is longer than `lengths`.

    The order depends on `seed` and on the epoch set by `set_epoch`, on nothing else, so a
    run resumed at epoch e sees what it would have seen.

    Example:
        >>> batches = BucketedBatches([[2, 5, 3], [2, 6, 7, 3]], labels=[0, 1], seed=0)
        >>> (token_ids, segment_ids), labels, sample_weight = batches[0]
        >>> token_ids.shape, float(sample_weight.sum())
        ((32, 8), 2.0)
    """

    def __init__(
        self,
        token_ids: Sequence[Sequence[int]],
        labels: np.ndarray | None = None,
        *,
        segment_ids: Sequence[Sequence[int]] | None = None,
        padding_id: int = 0,
        batch_size: int = 32,
        lengths: Sequence[int] | None = None,
        seed: int | None = None,
    ):
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        sizes = _check_rows(token_ids, segment_ids, labels)
        self.token_ids, self.segment_ids = token_ids, segment_ids
        self.labels = None if labels is None else np.asarray(labels)
        self.batch_size, self.seed, self.padding_id = batch_size, seed, padding_id
        self.lengths = sorted(set(choose_lengths(sizes) if lengths is None else lengths))
        if sizes.max() > self.lengths[-1]:
            raise ValueError(
                f"lengths reach {self.lengths[-1]}, but a row has {sizes.max()} ids: "
                "add a longer bucket, or truncate when encoding."
            )
        bucket = np.searchsorted(self.lengths, sizes)
        self._buckets = [np.flatnonzero(bucket == index) for index in range(len(self.lengths))]
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of epoch `epoch`, counted from 0."""
        self._plan = self._make_plan(epoch)

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int):
        length, rows = self._plan[index]
        weight = (np.arange(self.batch_size) < len(rows)).astype("float32")
        rows = np.concatenate([rows, np.repeat(rows[:1], self.batch_size - len(rows))])
        tokens = self._pad(self.token_ids, rows, length, self.padding_id)
        if self.segment_ids is None:
            segments = np.zeros_like(tokens)
        else:
            segments = self._pad(self.segment_ids, rows, length)
        if self.labels is None:
            return ((tokens, segments),)
        return (tokens, segments), self.labels[rows], weight

    def restore(self, outputs: np.ndarray | list) -> np.ndarray | list:
        """Bring `model.predict(batches)` into the order of the rows, without the filling.

        Args:
            outputs: array of (len(batches) * batch_size, ...), or a list of as many objects.

        Returns:
            Array of (rows, ...), or a list.
        """
        if len(outputs) != len(self) * self.batch_size:
            raise ValueError(
                f"outputs must have {len(self) * self.batch_size} rows, those of "
                f"predict(batches), got {len(outputs)}."
            )
        places = np.empty(len(self.token_ids), int)
        for index, (_, rows) in enumerate(self._plan):
            places[rows] = index * self.batch_size + np.arange(len(rows))
        if isinstance(outputs, list):
            return [outputs[place] for place in places]
        return outputs[places]

    def _make_plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """(bucket length, indices of at most batch_size rows) for every batch."""
        random = None if self.seed is None else np.random.default_rng((self.seed, epoch))
        plan, left = [], np.empty(0, int)
        for length, rows in zip(self.lengths, self._buckets, strict=True):
            rows = rows if random is None else random.permutation(rows)
            rows = np.concatenate([left, rows])
            full = len(rows) - len(rows) % self.batch_size
            plan += [(length, batch) for batch in rows[:full].reshape(-1, self.batch_size)]
            left = rows[full:]
        if len(left):
            plan.append((self.lengths[-1], left))
        if random is not None:
            plan = [plan[index] for index in random.permutation(len(plan))]
        return _differ_in_length(plan)

    def _pad(self, sequences, rows: np.ndarray, length: int, padding: int = 0) -> np.ndarray:
        texts = [text for row in rows for text in _texts(sequences[row])]
        padded = np.full((len(texts), length), padding, "int32")
        for line, text in enumerate(texts):
            padded[line, : len(text)] = text
        several = _is_nested(sequences[rows[0]])
        return padded.reshape(len(rows), -1, length) if several else padded


def row_sizes(token_ids: Sequence) -> list[int]:
    """The length of every row, which is that of its longest text.

    Example:
        >>> row_sizes([[2, 5, 3], [2, 3]]), row_sizes([[[2, 5, 3], [2, 3]]])
        ([3, 2], [3])
    """
    return [max(map(len, _texts(row)), default=0) for row in token_ids]


def choose_lengths(sizes: Sequence[int] | np.ndarray) -> list[int]:
    """At most five bucket lengths, multiples of 8, for sequences of the given sizes.

    Every size goes up to the next multiple of 8; of those values the five (with the
    largest) are chosen that make the sum of all padded lengths least.

    Example:
        >>> choose_lengths([5, 9, 12, 30, 31, 33, 70])
        [8, 16, 32, 40, 72]
    """
    steps = -(-np.asarray(sizes) // MULTIPLE)
    values, counts = np.unique(steps, return_counts=True)
    total = np.concatenate([[0], np.cumsum(counts)])
    # best[j] = (padded sum, chosen ends) over the first j values with the lengths so far.
    best: list[tuple[float, list[int]]] = [(0, [])] + [(np.inf, [])] * len(values)
    for _ in range(min(MAX_LENGTHS, len(values))):
        best = [best[0]] + [
            min(
                (best[i][0] + values[j - 1] * (total[j] - total[i]), [*best[i][1], j - 1])
                for i in range(j)
            )
            for j in range(1, len(values) + 1)
        ]
    return [int(values[end]) * MULTIPLE for end in best[-1][1]]


def _check_rows(token_ids, segment_ids, labels) -> np.ndarray:
    """The length of every row; raises if rows are missing, empty or do not match."""
    shapes = [[len(text) for text in _texts(row)] for row in token_ids]
    empty = [index for index, lengths in enumerate(shapes) if not lengths or not all(lengths)]
    if empty or not shapes:
        where = f"row {empty[0]} has none" if empty else "there are no rows"
        raise ValueError(f"token_ids must have at least one id in every row: {where}.")
    uneven = [index for index, lengths in enumerate(shapes) if len(lengths) != len(shapes[0])]
    if uneven:
        raise ValueError(
            f"token_ids must have as many texts in every row: row 0 has {len(shapes[0])}, row "
            f"{uneven[0]} has {len(shapes[uneven[0]])}. Fill up with texts of one token."
        )
    if segment_ids is not None and shapes != [
        [len(text) for text in _texts(row)] for row in segment_ids
    ]:
        raise ValueError("segment_ids must have the same lengths as token_ids, row by row.")
    if labels is not None and len(labels) != len(shapes):
        raise ValueError(f"labels has {len(labels)} rows and token_ids {len(shapes)}.")
    return np.array([max(lengths) for lengths in shapes])


def _is_nested(row: Sequence) -> bool:
    return len(row) > 0 and isinstance(row[0], Sequence | np.ndarray)


def _texts(row: Sequence) -> Sequence[Sequence[int]]:
    return row if _is_nested(row) else [row]


def _differ_in_length(plan: list) -> list:
    """Swap the second batch so that it has another length than the first.

    On TensorFlow Keras reads batches 0 and 1 to learn the shapes: a dimension in which
    they agree is fixed for the whole `fit`, and the first batch of another length fails.
    """
    for index in range(1, len(plan)):
        if plan[index][0] != plan[0][0]:
            plan[1], plan[index] = plan[index], plan[1]
            break
    return plan
