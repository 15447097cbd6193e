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

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ext import arguments
from keras_ext.optimizers import nesting
from keras_ext.optimizers.base import carries_batch_weight
from keras_ext.optimizers.selection import Selectable, Selection
from keras_ext.optimizers.wrapper import OptimizerWrapper


@keras.saving.register_keras_serializable(package="keras_ext")
class PeriodicOptimizer(OptimizerWrapper):
    """An optimizer for some variables at every step, another for the rest at every k-th.

    Args:
        optimizer: the `keras.optimizers.Optimizer` of the variables that are not slow, or its
            name. `learning_rate` and `iterations` are its own.
        slow_optimizer: that of the slow ones. An object of its own, not the same twice.
        slow: which variables are slow: regular expressions searched in `variable.path`, layers
            or models, variables, or a list of these.
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

    branch_names = ("inner_optimizer", "slow_optimizer")

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        slow_optimizer: keras.optimizers.Optimizer | str,
        slow: Selectable | Sequence[Selectable],
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
        self.slow = Selection("slow", slow)
        self.period = arguments.integer("period", period)

    def build(self, variables: list) -> None:
        # Both sides may accumulate by the weight of the batch.
        carriers = {i for i, v in enumerate(variables) if carries_batch_weight(v)}
        slow = set(self.slow.indices(variables)) - carriers
        fast = set(range(len(variables))) - slow - carriers
        if not slow or not fast:
            raise ValueError(
                "slow must choose some variables and leave others to optimizer, "
                f"{self.slow.config()} is {'all' if slow else 'none'} of them."
            )
        self._fast_indices = sorted(fast | _taken(carriers, self.inner_optimizer))
        self._slow_indices = sorted(slow | _taken(carriers, self.slow_optimizer))
        self.step = self.add_variable((), dtype="int", name="step")
        super().build(variables)
        self.slow_optimizer.build(self.slow_variables)

    @property
    def inner_variables(self) -> list:
        return [self.model_variables[i] for i in self._fast_indices]

    @property
    def slow_variables(self) -> list:
        return [self.model_variables[i] for i in self._slow_indices]

    def update(self, grads: list) -> None:
        self.step_inner([grads[i] for i in self._fast_indices])
        slow_grads = [grads[i] for i in self._slow_indices]
        self.step.assign_add(1)
        self.when(
            ops.equal(self.step % self.period, 0),
            lambda: self.step_branch(self.slow_optimizer, slow_grads, self.slow_variables),
        )

    def _finish_inner(self, var_list: Any) -> bool:
        updated = super()._finish_inner(var_list)
        before = int(ops.convert_to_numpy(self.slow_optimizer.iterations))
        self.finish_branch(self.slow_optimizer, self.slow_variables, var_list)
        return updated or int(ops.convert_to_numpy(self.slow_optimizer.iterations)) != before

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "slow_optimizer": keras.saving.serialize_keras_object(self.slow_optimizer),
            "slow": self.slow.config(),
            "period": self.period,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        slow_optimizer = keras.saving.deserialize_keras_object(
            config["slow_optimizer"], custom_objects=custom_objects
        )
        return super().from_config(config | {"slow_optimizer": slow_optimizer}, custom_objects)


def _taken(carriers: set[int], optimizer: keras.optimizers.Optimizer) -> set[int]:
    """The carriers of the batch weight, where something inside takes it as such."""
    takes = any(getattr(o, "takes_batch_weight", False) for o in nesting.chain(optimizer))
    return carriers if takes else set()
