"""Models with training objectives: the user's model, trained on another loss.

The result of `with_objective` is a `keras.Model` of the same graph and the same layers, so
paths, `get_layer`, `summary`, `count_params` and weight files are those of the user's model.

If `compile` is given an `AccumOptimizer`, batches tell it what they weigh. The mean of the
gradients of two means is not the gradient of the mean over both, unless they have the same
number of examples (or tokens). `AccumOptimizer` weighs each micro-batch by w_i, but an
optimizer in `fit` sees gradients and nothing else of a batch. So w_i travels as one: the model
owns a trainable scalar c, the carrier, and its loss is

    L + w (c - stop_gradient(c)),        d/dc = w,  value = L

`AccumOptimizer` takes the gradient of c as the weight. The carrier is in `trainable_variables`,
but not in `weights`, in files, in counts or in the summary.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_ext.layers.every import find_layer
from keras_ext.optimizers import nesting
from keras_ext.optimizers.accumulation import AccumOptimizer
from keras_ext.training.objective import Objective
from keras_ext.training.step import Batch, Step

Base: Any = keras.Model if TYPE_CHECKING else object


class ObjectiveMixin(Base):
    """What `with_objective` adds to a model, for subclasses of `keras.Model`.

    A subclass with a `compute_loss` or a `train_step` of its own takes objectives by this
    class before its own, and `set_objectives`.

    Example:
        >>> class Mine(keras.Model):
        ...     def __init__(self, **kwargs):
        ...         super().__init__(**kwargs)
        ...         self.dense = keras.layers.Dense(2)
        ...     def call(self, x, training=False):
        ...         return self.dense(x)
        >>> class MineWithObjectives(ObjectiveMixin, Mine):
        ...     pass
        >>> mine = MineWithObjectives()
        >>> mine.set_objectives([RDrop(from_logits=True)])
    """

    objectives: tuple[Objective, ...] = ()
    batch_weight: Callable | None = None

    def set_objectives(
        self, objectives: Sequence[Objective], batch_weight: Callable | None = None
    ) -> None:
        """Train on these from now on. See `with_objective`."""
        wrong = [o for o in objectives if not isinstance(o, Objective)]
        if wrong:
            raise ValueError(f"objectives must be Objectives, such as FGM(), got {wrong}.")
        if batch_weight is not None and not callable(batch_weight):
            raise ValueError(f"batch_weight must be callable, got {batch_weight!r}.")
        layers = [find_layer(self, name) for o in objectives for name in o.layers]
        for objective in objectives:
            objective.check(self)
        # Not tracked: tracked attributes would be saved, counted and listed.
        for name, value in (
            ("objectives", tuple(objectives)),
            ("batch_weight", batch_weight),
            ("_observed", list({id(layer): layer for layer in layers}.values())),
            ("_carrier", _carrier()),
        ):
            object.__setattr__(self, name, value)
        # Tracked: state of the training step, but no weights.
        self._objective_seeds = [s for o in objectives for s in o.seed_generators]
        self._objective_metrics = [m for o in objectives for m in o.metrics]
        self.train_function = None

    def make_train_function(self, force: bool = False) -> Any:
        # Here, for on JAX an error within a step leaves a model without weights.
        if "objectives" not in self.__dict__:
            raise ValueError(
                f"{self.name} has no objectives yet (clone_model does not copy them). Call "
                "set_objectives(objectives), a list, which may be empty."
            )
        if self.batch_weight is not None and not self._carriers:
            raise ValueError(
                "batch_weight is for an AccumOptimizer, got optimizer="
                f"{self.optimizer.name!r}. Leave batch_weight out."
            )
        for objective in self.objectives:
            objective.check(self)
        return super().make_train_function(force)

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        with Step(self, self._observed).open():
            return super().train_step(*args, **kwargs)

    def plain_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> Any:
        """The loss of the model without objectives."""
        return super().compute_loss(x, y, y_pred, sample_weight, True)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        step = Step.of(self)
        if not training or not (self.objectives or self._carriers):
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        if step is None:
            raise ValueError(
                f"{self.name} has objectives, so its loss in training needs the pass of a "
                "training step: use fit or train_on_batch, or training=False for the loss of "
                "y_pred alone."
            )
        if self.objectives:
            batch = Batch(x, y, sample_weight)
            loss = step.compute_loss(batch, y_pred, self.objectives)
        else:
            loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        for carrier in self._carriers:
            weight = ops.cast(self._weigh(x, y, y_pred, sample_weight), carrier.dtype)
            weight = ops.stop_gradient(weight)
            loss = loss + ops.cast(weight * (carrier - ops.stop_gradient(carrier)), loss.dtype)
        return loss

    def _weigh(self, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> Any:
        """What the loss of this batch was divided by."""
        if self.batch_weight is not None:
            return self.batch_weight(x, y, y_pred, sample_weight)
        losses = [loss for loss in keras.tree.flatten(self.loss) if loss is not None]
        by_weights = {
            getattr(loss, "reduction", None) == "mean_with_sample_weight" for loss in losses
        }
        if sample_weight is None or by_weights in ({False}, set()):
            return ops.shape(keras.tree.flatten(x)[0])[0]
        if len(by_weights) > 1 or len(keras.tree.flatten(sample_weight)) > 1:
            raise ValueError(
                f"The losses {losses} divide by different numbers. Give batch_weight, a "
                "function of (x, y, y_pred, sample_weight), to say what the batch weighs."
            )
        return ops.sum(ops.cast(keras.tree.flatten(sample_weight)[0], "float32"))

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict[str, Any]:
        logs = super().compute_metrics(x, y, y_pred, sample_weight)
        if Step.of(self) is None:  # no training: the objectives have measured nothing
            names = {m.name for o in self.objectives for m in o.metrics}
            logs = {name: value for name, value in logs.items() if name not in names}
        return logs

    @property
    def losses(self) -> list[Any]:
        step = Step.of(self)
        return super().losses if step is None or step.losses is None else step.losses

    @property
    def _carriers(self) -> list[keras.Variable]:
        optimizer, carrier = getattr(self, "optimizer", None), self.__dict__.get("_carrier")
        if carrier is None or optimizer is None:
            return []
        return [] if nesting.find(optimizer, AccumOptimizer) is None else [carrier]

    @property
    def variables(self) -> list[keras.Variable]:
        return super().variables + self._carriers

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        # A training step on TensorFlow and PyTorch reads this one, on JAX the variables.
        weights = super().trainable_weights
        return (
            weights if Step.of(self) is None or not self.trainable else weights + self._carriers
        )

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        return super().get_config() | {
            "objectives": [serialize(o) for o in self.objectives],
            "batch_weight": self.batch_weight and serialize(self.batch_weight),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        config = dict(config)
        objectives, batch_weight = config.pop("objectives"), config.pop("batch_weight")
        deserialize = keras.saving.deserialize_keras_object
        options = {} if custom_objects is None else {"custom_objects": custom_objects}
        model = super().from_config(config, **options)
        model.set_objectives(
            [deserialize(o, custom_objects) for o in objectives],
            batch_weight and deserialize(batch_weight, custom_objects),
        )
        return model


@keras.saving.register_keras_serializable(package="keras_ext")
class ObjectiveModel(ObjectiveMixin, keras.Model):
    """A functional model with objectives, as `with_objective` returns it."""


def with_objective(
    model: keras.Model,
    objectives: Sequence[Objective],
    batch_weight: Callable | None = None,
) -> keras.Model:
    """Return the model, trained by `fit` on the objectives around its loss.

        L = objectives[0](objectives[1](... (loss of compile))) + weight regularisers

    The result has the graph and the layers of `model`, and is to be compiled in its place.
    Metrics, `evaluate` and `predict` are those of the model; losses of `add_loss` count in
    each pass of an objective, regularisers once. With an `AccumOptimizer` micro-batches
    of unequal size have their exact weights, also with no objective, `with_objective(model,
    [])`. Model surgery takes the result as it takes the model, and returns a plain model: put
    the objectives on afterwards.

    Means and norms over the batch are those of each replica under `tf.distribute`, and of the
    whole batch under `keras.distribution`. With an `AccumOptimizer` they are those of each
    micro-batch.

    Args:
        model: a functional or a built Sequential model.
        objectives: such as `[FGM("token_embedding"), RDrop()]`, the outermost first.
        batch_weight: a function of (x, y, y_pred, sample_weight) that returns what the loss of
            this batch was divided by, a scalar; for a mean over tokens, say. It is for an
            `AccumOptimizer`. Default: None, the number of examples; the sum of the sample
            weights if there are any and the loss has reduction="mean_with_sample_weight".

    Returns:
        A `keras.Model`, not compiled. It shares the weights with `model`.

    Raises:
        ValueError: an objective does not fit the model; the model is a subclass that does
            more than its graph says, which would be lost (use `ObjectiveMixin`), or has
            objectives already.

    Example:
        >>> tokens = keras.Input((4,), dtype="int32")
        >>> x = keras.layers.Embedding(9, 8, name="token_embedding")(tokens)
        >>> x = keras.layers.Dropout(0.3)(keras.layers.Flatten()(x))
        >>> model = keras.Model(tokens, keras.layers.Dense(3, "softmax")(x))
        >>> model = with_objective(model, [FGM("token_embedding", 0.5), RDrop(4.0)])
        >>> model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        >>> history = model.fit(np.ones((6, 4)), np.ones(6), verbose=0)
    """
    if isinstance(model, keras.Sequential):
        if not model.built or not hasattr(model, "inputs") or model.inputs is None:
            raise ValueError(
                f"model must be built, got the Sequential {model.name!r} without an input. "
                "Add a keras.Input in front."
            )
        inputs, outputs = model.inputs, model.outputs
        inputs, outputs = (x[0] if len(x) == 1 else x for x in (inputs, outputs))
        model_class: Any = ObjectiveModel
    else:
        _check_class(model)
        inputs, outputs = model.input, model.output
        model_class = type(model) if isinstance(model, ObjectiveMixin) else ObjectiveModel
    result = model_class(inputs, outputs, name=model.name)
    result.set_objectives(objectives, batch_weight)
    return result


def _check_class(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise ValueError(f"model must be a keras.Model, got {model!r}.")
    if isinstance(model, ObjectiveMixin):
        if model.objectives or model.batch_weight is not None:
            raise ValueError(
                f"{model.name} has objectives already: {model.objectives}. Give the model that "
                "it was made of, or keras.Model(model.input, model.output), and all objectives "
                "in one list."
            )
        return
    mixin = (
        "Define class Mine(keras_ext.training.ObjectiveMixin, "
        f"{type(model).__name__}), and call set_objectives of such a model."
    )
    if getattr(model, "inputs", None) is None:
        raise ValueError(f"model must have a graph, but {model.name} is a subclass. {mixin}")
    own = takewhile(lambda c: not c.__module__.startswith("keras."), type(model).__mro__)
    lost = {n for c in own for n in vars(c) if n[:2] != "__" and hasattr(keras.Model, n)}
    lost -= {"get_config", "from_config"}
    if lost:
        raise ValueError(
            f"{type(model).__name__} overrides {sorted(lost)}, which would be lost. {mixin}"
        )


def _carrier() -> keras.Variable:
    carrier = keras.Variable(0.0, trainable=True, dtype="float32", name="batch_weight")
    carrier.carries_batch_weight = True  # so optimizers know it
    return carrier
