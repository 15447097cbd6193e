"""Whole-word masks, drawn anew for every batch, and what is to be predicted under them.

Of each row the words are taken in random order until they have 15 % of its tokens; the word
that crosses this budget is taken with the probability with which the expected number of
masked tokens is exactly the budget. All pieces of a word are masked together. Of the masked
tokens 80 % become [MASK], 10 % a random token, and 10 % stay as they are.

A batch depends on the seed and the number of the step alone, so that a resumed run sees what
an undisturbed one would have seen.

Source: Devlin et al. 2018, arXiv 1810.04805; Cui et al. 2019, arXiv 1906.08101 (whole words).
"""

import math
from typing import NamedTuple

import numpy as np

from keras_ext.text.tokenizer import SPECIAL_TOKENS

SHARE, AS_MASK, AS_RANDOM = 0.15, 0.8, 0.1


class MaskedRows(NamedTuple):
    """What the model reads and is to predict; the last three are (rows, places).

    A row with fewer masked tokens than places has others at the end, of weight 0.
    """

    token_ids: np.ndarray  # (rows, length)
    positions: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    def batch(self) -> tuple:
        """Inputs, targets and weights for Keras. Segment ids are zero."""
        inputs = (self.token_ids, np.zeros_like(self.token_ids), self.positions)
        return inputs, self.targets, self.weights


def places(length: int) -> int:
    """Places for predictions in a row: the budget, and a last word of four pieces."""
    return math.ceil(SHARE * length) + 3


class WordMasking:
    """Masks for rows of token ids.

    Args:
        vocabulary: the tokens, of which the special ones are neither masked nor drawn.
    """

    def __init__(self, vocabulary: list[str]):
        self.special = np.isin(np.array(vocabulary), SPECIAL_TOKENS)
        self.ordinary = np.flatnonzero(~self.special)
        self.mask = vocabulary.index("[MASK]")

    def __call__(
        self, rows: np.ndarray, starts: np.ndarray, rng: np.random.Generator
    ) -> MaskedRows:
        """Draw the masks of rows.

        Args:
            rows: token ids (rows, length).
            starts: where a word starts, of the same shape; special tokens are words.
            rng: what to draw with.
        """
        masked = self.choose(rows, starts, rng)
        # The masked positions first, in order, then others.
        positions = np.argsort(~masked, axis=1, kind="stable")[:, : places(rows.shape[1])]
        weights = np.take_along_axis(masked, positions, axis=1)
        targets = np.take_along_axis(rows, positions, axis=1)
        draw = rng.random(targets.shape)
        random = rng.choice(self.ordinary, targets.shape)
        shown = np.where(draw < AS_RANDOM, random, targets)
        shown = np.where(draw >= 1 - AS_MASK, self.mask, shown)
        token_ids = rows.copy()
        np.put_along_axis(token_ids, positions, np.where(weights, shown, targets), axis=1)
        return MaskedRows(
            token_ids, positions.astype("int32"), targets, weights.astype("float32")
        )

    def choose(
        self, rows: np.ndarray, starts: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Which tokens to mask, bool (rows, length)."""
        count, length = rows.shape
        ordinary = ~self.special[rows]
        words = np.cumsum(starts, axis=1) - 1  # the number of each token's word in its row
        numbers = words + length * np.arange(count)[:, None]
        sizes = np.bincount(numbers[ordinary], minlength=rows.size).reshape(count, length)
        order = np.argsort(rng.random(sizes.shape), axis=1)
        sizes = np.take_along_axis(sizes, order, axis=1)  # 0 of what is special, or no word
        after = np.cumsum(sizes, axis=1)
        budget = SHARE * ordinary.sum(axis=1, keepdims=True)
        # True of words within the budget; of the one that crosses it, with probability
        # (budget - before) / size.
        taken = after - sizes + rng.random((count, 1)) * sizes < budget
        taken &= after <= places(length)
        chosen = np.empty_like(taken)
        np.put_along_axis(chosen, order, taken, axis=1)
        return np.take_along_axis(chosen, words, axis=1) & ordinary


class MaskedText:
    """The batches of a run, by the number of the step.

    Every epoch has the rows in an order of its own; rows that fill no batch at its end are
    left out.

    Args:
        rows, starts: as for `WordMasking`; at least a batch.
        masking: what masks them, or another objective.
        batch_size: rows of a batch.
        seed: of orders and masks.
    """

    def __init__(self, rows, starts, masking: WordMasking, batch_size: int, seed: int):
        self.rows, self.starts, self.masking = rows, starts, masking
        self.batch_size, self.seed = batch_size, seed
        self.epoch, self.order = None, None

    def draw(self, step: int) -> MaskedRows:
        """The batch of a step."""
        epoch, index = divmod(step, len(self.rows) // self.batch_size)
        epoch += 1  # to NumPy the seeds [s], [s, 0] and [s, 0, 0] are the same
        if epoch != self.epoch:
            self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
            self.epoch = epoch
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        rng = np.random.default_rng([self.seed, epoch, 1 + index])
        return self.masking(self.rows[chosen], self.starts[chosen], rng)
