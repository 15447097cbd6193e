"""Training objectives: loss functions around the loss function of a model.

An objective gets `inner`, the loss function inside of it, and makes another of it. The
innermost one is what was given to `compile`, so that objectives nest:
`with_objective(model, [FGM("token_embedding"), RDrop()])` attacks the loss of R-Drop.

Beside the batch, an objective sees (in `step`) the value of a weight and of a layer's output,
can put others in their place, and can take gradients to them. A pass within
`step.replaced` or `step.shifted` has the same random draws as the pass before, changes no
state, and adds no loss to the layers. A further call of `inner` beside the first has draws of
its own, but moves no averages (of a batch normalisation, say) again.

Weight regularisers are no part of what is nested: they count once, at the end.
"""

from typing import Any

import keras

from keras_ext.training.step import Inner, Step


class Objective:
    """Base of the training objectives.

    A subclass defines `loss`, and `get_config` if it has arguments.

    Attributes:
        layers: names (or paths) of the layers whose outputs `loss` asks for.
        seed_generators: those that `loss` draws from.
        metrics: those that `loss` updates; `fit` reports them, `evaluate` does not.

    An objective holds no layer and no weight, so one object serves several models.

    Example:
        >>> class Twice(Objective):
        ...     def loss(self, inner, step):
        ...         (a, y_pred), (b, _) = inner(), inner()
        ...         return (a + b) / 2, y_pred
        >>> model = with_objective(model, [Twice()])
    """

    layers: tuple[str, ...] = ()
    seed_generators: tuple[keras.random.SeedGenerator, ...] = ()
    metrics: tuple[keras.metrics.Metric, ...] = ()

    def check(self, model: keras.Model) -> None:
        """Raise a ValueError if the model is not one for this objective.

        It is called before there is a loss, and again when `fit` begins.
        """

    def loss(self, inner: Inner, step: Step) -> tuple[Any, Any]:
        """The loss, a scalar, and the predictions for the objective outside.

        Args:
            inner: `inner()` is the loss and the predictions of the objective inside on this
                batch, `inner(batch)` on another `Batch`.
            step: the `Step`.
        """
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        return cls(**config)
