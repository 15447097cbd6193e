"""Several steps of one network for one of another, though every step differentiates both.

    every step        optimizer updates the weights that are not slow
    every k-th step   slow_optimizer updates the slow ones, with the gradient of that step

For adversarial training with one loss (`keras_ext.training.SingleLossGAN`), where a
discriminator often makes two to five steps for one of its generator. A gradient of zero would
not do: it still moves Adam's weights, decays its moments, and counts.

Exact: between two of its updates nothing of the slow side changes, bit for bit, neither weights
nor moments nor the step count of schedules and bias correction; the fast side does not know of
the slow one. Two optimizers, so each has its own learning rate and its own clipping. Cost: what
an update costs, when it is made. The gradients of the slow side are computed at every step, and
thrown away k - 1 times of k: with F_G and F_D the costs of a forward pass of generator and
discriminator, these steps cost 2 F_G + F_D more than they have to, of 3 F_G + 7 F_D.

Source: Arjovsky et al. 2017, arXiv 1701.07875 (five); Su 2018, arXiv 1811.07296 (two).
"""

import re
from typing import Any

import keras
from keras import ops

from keras_ext import backend
from keras_ext.optimizers.patterns import as_patterns, matched
from keras_ext.optimizers.wrapper import OptimizerWrapper


@keras.saving.register_keras_serializable(package="keras_ext")
class PeriodicOptimizer(OptimizerWrapper):
    """An optimizer for some variables at every step, another for the rest at every k-th.

    Args:
        optimizer: the `keras.optimizers.Optimizer` of the variables that are not slow, or its
            name. `learning_rate` and `iterations` are its own.
        slow_optimizer: that of the slow ones. An object of its own, not the same twice.
        slow: which variables are slow: a layer or a model, or a regular expression that is
            searched in `variable.path`.
        period: k >= 1, in steps. The slow update comes at the end of a period.
        name: name of the wrapper.

    Raises:
        ValueError: an argument is out of range; when built, no variable is slow, or all are.

    Example:
        >>> sgd, slow = keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.1)
        >>> model.compile(PeriodicOptimizer(sgd, slow, slow="bias", period=2), loss="mse")
        >>> history = model.fit(x, y, batch_size=8, verbose=0)  # 4 kernels, 2 biases

    Reference: Su 2018, arXiv 1811.07296.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        slow_optimizer: keras.optimizers.Optimizer | str,
        slow: str | keras.layers.Layer,
        period: int = 2,
        name: str | None = None,
    ) -> None:
        super().__init__(optimizer, name=name)
        self.slow_optimizer = keras.optimizers.get(slow_optimizer)
        if self.slow_optimizer is self.inner_optimizer:
            raise ValueError(
                "slow_optimizer must be another object than optimizer, got the same one. "
                "Create two: each keeps the moments of its own variables."
            )
        if isinstance(period, bool) or not isinstance(period, int) or period < 1:
            raise ValueError(f"period must be an integer >= 1, got {period!r}.")
        if not isinstance(slow, keras.layers.Layer):
            as_patterns("slow", [slow])
        self._slow = slow  # a layer has no paths before it is built
        self.period = period

    @property
    def slow(self) -> str:
        """As a regular expression, of a layer one for exactly its paths; so it is saved."""
        if isinstance(self._slow, str):
            return self._slow
        return f"^({'|'.join(re.escape(w.path) for w in self._slow.weights)})$"

    def build(self, variables: list) -> None:
        chosen = matched("slow", self.slow, variables)
        if len(chosen) == len(variables):
            raise ValueError(
                f"slow must leave variables to the optimizer, {self._slow!r} is all of them."
            )
        if not isinstance(self._slow, str):
            inside = {id(w) for w in self._slow.weights}
            if any(id(variables[i]) not in inside for i in chosen):
                raise ValueError(
                    f"slow: variables outside of {self._slow.name!r} have the same paths as "
                    "some inside. Give their layers different names."
                )
        self._slow_indices = chosen
        self._fast_indices = [i for i in range(len(variables)) if i not in chosen]
        self.step = self.add_variable((), dtype="int", name="step")
        super().build(variables)
        self.slow_optimizer.build(self.slow_variables)

    @property
    def inner_variables(self) -> list:
        return [self._trainable_variables[i] for i in self._fast_indices]

    @property
    def slow_variables(self) -> list:
        return [self._trainable_variables[i] for i in self._slow_indices]

    @property
    def variables(self) -> list:
        return super().variables + self.slow_optimizer.variables

    def apply(self, grads: list, trainable_variables: list | None = None) -> None:
        backend.merge_replicas(self._apply, self.align(grads, trainable_variables))

    def _apply(self, grads: list) -> None:
        self.apply_inner([grads[i] for i in self._fast_indices])
        slow_grads = [grads[i] for i in self._slow_indices]
        self.step.assign_add(1)
        backend.run_if(
            ops.equal(self.step % self.period, 0),
            lambda: backend.apply_gradients(
                self.slow_optimizer, slow_grads, self.slow_variables
            ),
            variables=self.slow_variables + self.slow_optimizer.variables,
        )

    @OptimizerWrapper.loss_scale_factor.setter
    def loss_scale_factor(self, value: Any) -> None:
        for name in ("inner_optimizer", "slow_optimizer"):
            if hasattr(self, name):
                getattr(self, name).loss_scale_factor = value

    def finalize_variable_values(self, var_list: list) -> None:
        super().finalize_variable_values(var_list)
        known = {id(v) for v in self.slow_variables}
        self.slow_optimizer.finalize_variable_values([v for v in var_list if id(v) in known])

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "slow_optimizer": keras.saving.serialize_keras_object(self.slow_optimizer),
            "slow": self.slow,
            "period": self.period,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        slow_optimizer = keras.saving.deserialize_keras_object(
            config["slow_optimizer"], custom_objects=custom_objects
        )
        return super().from_config(config | {"slow_optimizer": slow_optimizer}, custom_objects)
