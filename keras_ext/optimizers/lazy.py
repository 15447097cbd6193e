"""Lazy updates of embedding tables: a token that is absent from the batch does not move.

    row of w <- row of w'  if its gradient is not zero,    w' = where the inner optimizer goes
                row of w   otherwise

Momentum and weight decay move all rows of a table at every step, also those of tokens that
have not occurred for a thousand steps. Here a row moves only with a gradient of its own.

Exact: a row without gradient is constant bit for bit, the other rows are those of the inner
optimizer. Only the weights are lazy: the moments inside go on decaying for absent tokens, as
in bert4keras. (In LazyAdam, and in `torch.optim.SparseAdam`, the moments of absent rows stand
still as well, so a token that returns is moved by a momentum as old as its last occurrence;
here most of that has decayed.) Cost: a copy of the table and one pass over it and its
gradient; no time is saved.

Nothing is lazy where every row has a gradient: a table that also serves as output matrix
(tied weights, as in masked language models), or an L2 regularizer in the loss.

Source: bert4keras `extend_with_lazy_optimization`; kexue.fm/archives/6869.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ext.optimizers import nesting
from keras_ext.optimizers.selection import Selectable, Selection, some
from keras_ext.optimizers.update_wrapper import UpdateWrapper


@keras.saving.register_keras_serializable(package="keras_ext")
class LazyOptimizer(UpdateWrapper):
    """Move only those rows of an embedding table that have a gradient.

        row of w <- row of w' if its gradient is not zero, else row of w

    Args:
        optimizer: the `keras.optimizers.Optimizer` to wrap, or its name.
        include: which variables, of which those of two dimensions are lazy: regular expressions
            searched in `variable.path`, layers, variables, or a list of these. Default
            r"embeddings$", the name of the table in `keras.layers.Embedding` and in
            `keras_ext.layers`.
        name: name of the wrapper.

    Accumulation goes outside, `AccumOptimizer(LazyOptimizer(...), k)`: the tokens of an update
    are those of all its micro-batches. A constraint acts inside and is not applied again, so
    one that couples the rows (`MaxNorm(axis=0)`) holds for w' only.

    Raises:
        ValueError: the optimizer inside accumulates gradients; when built, no variable of two
            dimensions matches.

    Example:
        >>> inputs = keras.Input((3,), dtype="int32")
        >>> tokens = keras.Model(inputs, keras.layers.Embedding(9, 1)(inputs))
        >>> tokens.compile(LazyOptimizer(keras.optimizers.AdamW(1e-3)), loss="mse")

    Reference: kexue.fm/archives/6869.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        include: Selectable | Sequence[Selectable] = r"embeddings$",
        name: str | None = None,
    ):
        super().__init__(optimizer, name=name)
        self.include = Selection("include", include)
        nesting.refuse(
            self,
            nesting.accumulates,
            "optimizer {name!r} accumulates micro-batches, and the rows of the last are not "
            "those of all. Put the accumulation outside: "
            "AccumOptimizer(LazyOptimizer(optimizer), accum_steps).",
        )

    def build(self, variables: list) -> None:
        found = self.include.indices(variables)
        self._tables = frozenset(i for i in found if len(variables[i].shape) == 2)
        if not self._tables:
            raise ValueError(
                f"include: {self.include.config()} match no variable of two dimensions, only "
                f"{some([variables[i].path for i in found])}. Name the tables."
            )
        super().build(variables)

    def rewrites(self, index: int) -> bool:
        return index in self._tables

    def constrains(self, index: int) -> bool:
        return False  # or it would move the rows that are to stay

    def rewrite(self, index: int, old: Any, new: Any, grad: Any, before: Any) -> Any:
        if grad is None:
            return old
        present = ops.any(grad != 0, axis=1, keepdims=True)  # (rows, 1)
        return ops.where(present, new, old)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"include": self.include.config()}
