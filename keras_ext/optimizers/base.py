"""What the optimizers of this package share: one `apply`, written once."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ext import backend
from keras_ext.numerics import at_least_float32


def carries_batch_weight(variable: Any) -> bool:
    """Whether the gradient of a variable is the weight of the batch, for `AccumOptimizer`.

    On JAX an optimizer sees nothing of a batch but gradients. A model that wants to tell the
    weight of a batch owns a scalar with the attribute `carries_batch_weight = True`: see
    `keras_ext.training.with_objective`.
    """
    return getattr(variable, "carries_batch_weight", False)


def is_overwritten(variable: Any) -> bool:
    """Whether a variable takes its gradient as its value (the scales of float8 training)."""
    return getattr(variable, "overwrite_with_gradient", False)


def refuse_overwritten(optimizer: Any, variables: list) -> None:
    """Raise a ValueError for variables of which a mean of gradients makes no sense."""
    for variable in filter(is_overwritten, variables):
        raise ValueError(
            f"{variable.path} takes its gradient as its value (float8 training): a mean of "
            f"gradients has no meaning there. Train it without {type(optimizer).__name__}."
        )


def variable_index(optimizer: keras.optimizers.Optimizer, variable: Any) -> int:
    """Place of a variable, as `update_step` gets it, in the list of those built for."""
    return optimizer._get_variable_index(variable)


def layout_of(variable: keras.Variable) -> Any:
    """How a weight is sharded, for the state that belongs to it."""
    return getattr(variable, "_layout", None)


class BaseOptimizer(keras.optimizers.Optimizer):
    """Base of optimizers that write `update(grads)` instead of `apply`.

    `update` gets one gradient for every variable that the optimizer was built for, or None:
    summed over the replicas of a strategy, as one tensor, rows of repeated tokens added up.
    It is called once, outside of the replicas, so it may use conditionals (`when`).

    Private names of Keras are used in this file and in wrapper.py only, as a test checks:
    `_variables` (what an optimizer itself created), `_trainable_variables` (what it was built
    for), `_get_variable_index`, `_check_variables_are_known`, `_filter_empty_gradients` (raises
    if there is no gradient, warns if one is missing), `_use_weight_decay` (the answer to
    `exclude_from_weight_decay`), and of a variable `_layout`.
    """

    # Whether `update` gets gradients of embeddings as one tensor. Otherwise on TensorFlow they
    # are `tf.IndexedSlices` with a row for every token, outside of tf.distribute.
    sums_rows = True

    def apply(self, grads: Any, trainable_variables: Any = None, weight: Any = None) -> None:
        """Take in the gradients of one batch.

        Args:
            grads: one gradient, or None, per variable.
            trainable_variables: the variables; not needed once the optimizer is built.
            weight: for `AccumOptimizer`, the weight of the batch; others refuse it.
        """
        grads = list(grads)
        if not grads:  # as in Keras
            return
        aligned = self._aligned(grads, trainable_variables)
        aligned, scalars = self.in_replica(aligned, weight)
        backend.merge_replicas(self._update_merged, aligned, *scalars)

    def _update_merged(self, grads: list, *scalars: Any) -> None:
        if self.sums_rows:
            grads = [None if g is None else backend.densify(g) for g in grads]
        self.update(grads, *scalars)

    def in_replica(self, grads: list, weight: Any) -> tuple[list, list]:
        """Whatever has to happen before gradients are summed over the replicas.

        Returns: gradients, and scalars to be summed as well and handed to `update`.
        """
        if weight is not None:
            raise ValueError(
                f"weight is for AccumOptimizer, which averages batches; {type(self).__name__} "
                f"{self.name!r} has no use for weight={weight!r}. Leave it out."
            )
        return grads, []

    def update(self, grads: list) -> None:
        """One call of `apply`: a tensor, or None, for every one of `model_variables`."""
        raise NotImplementedError

    def _aligned(self, grads: list, trainable_variables: Any) -> list:
        """Build if needed; one gradient, or None, for every variable built for."""
        if trainable_variables is None:
            if not self.built:
                raise ValueError(
                    f"{type(self).__name__} is not built yet. Pass trainable_variables, or "
                    "call build(trainable_variables) first."
                )
            trainable_variables = self._trainable_variables
        trainable_variables = list(trainable_variables)
        if len(grads) != len(trainable_variables):
            raise ValueError(
                f"grads has {len(grads)} entries for {len(trainable_variables)} variables. "
                "Pass one gradient, or None, per variable."
            )
        if not self.built:
            self.build(trainable_variables)
        self._check_variables_are_known(trainable_variables)
        pairs = list(zip(grads, trainable_variables, strict=True))
        pairs_of_weights = [(g, v) for g, v in pairs if not carries_batch_weight(v)]
        self._filter_empty_gradients(*map(list, zip(*pairs_of_weights, strict=True)))
        aligned = [None] * len(self._trainable_variables)
        for grad, variable in pairs:
            if isinstance(grad, np.ndarray):
                grad = ops.convert_to_tensor(grad, variable.dtype)
            aligned[self._get_variable_index(variable)] = grad
        return aligned

    def apply_gradients(self, grads_and_vars: Any) -> Any:
        """`apply` to pairs (gradient, variable). Returns the number of updates, as in Keras."""
        super().apply_gradients(grads_and_vars)
        return self.iterations

    @property
    def model_variables(self) -> list:
        """The variables that the optimizer was built for."""
        return list(self._trainable_variables)

    def build(self, variables: list) -> None:
        super().build(list(variables))
        self._trained = {id(v) for v in variables if v.trainable}

    def is_frozen(self, variable: keras.Variable) -> bool:
        """Whether a variable was trained when the optimizer was built, but is no more."""
        return id(variable) in self._trained and not variable.trainable

    @property
    def own_variables(self) -> list:
        """The state of this optimizer alone."""
        return list(self._variables)

    def add_sum_variable(self, like: Any, name: str) -> keras.Variable:
        """A variable for sums over steps: in float32 at least, whatever `like` is."""
        return self.add_variable(
            like.shape,
            dtype=at_least_float32(like.dtype),
            layout=layout_of(like),
            name=f"{like.path.replace('/', '_')}_{name}",
        )

    def decays(self, variable: Any) -> bool:
        """Whether weight decay acts on a variable: not if it was excluded."""
        return self._use_weight_decay(variable)

    def when(self, predicate: Any, fn: Any, otherwise: Any = None) -> Any:
        """Call `fn()` if the predicate holds, else `otherwise()`; either may assign variables.

        Returns: a tensor that exists when it is done, for `step_inner(after=...)`.
        """
        return backend.run_if(predicate, fn, otherwise)

    def finalize_variable_values(self, var_list: Any) -> None:
        """End of `fit`; Keras calls it."""
        # A fit that failed before or in its first step may leave variables without a value:
        # let its own error be seen.
        if self.built and all(map(backend.has_value, self.variables)):
            self.end_of_fit(lambda: self._finish_inner(var_list))

    def _finish_inner(self, var_list: Any) -> bool:
        return False

    def end_of_fit(self, finish_inner: Any) -> None:
        """What is left to do at the end of `fit`.

        Args:
            finish_inner: ends the inner optimizer's fit, to be called once; returns whether
                that updated the weights.
        """
        finish_inner()
