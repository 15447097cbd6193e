"""Module replacing: a trained module gives way, at random, to a smaller one in training.

    y = successor(x)      with probability p, drawn once for the module and the batch
        predecessor(x)    otherwise
    y = successor(x)      in inference

The predecessor is frozen. With the loss of the task alone, the successors learn to work
between predecessors, and as p grows to 1, among themselves. No loss compares their outputs.

Only the branch that was drawn is computed, forwards and backwards, so with n modules a forward
pass costs n (p + (1-p) c) on average, where c is the cost of a predecessor in successors.
Backwards a predecessor passes the gradient on (half of its own backward pass) and gets none.
A successor that was not drawn has gradient zero; Adam still moves it by its momentum.

Source: Xu et al. 2020, arXiv 2002.02925 (BERT-of-Theseus); kexue.fm/archives/7575.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ext import backend
from keras_ext.layers.transformer import serialize_unbuilt


@keras.saving.register_keras_serializable(package="keras_ext")
class TheseusModule(keras.layers.Layer):
    """Train a successor in the place of a frozen predecessor, by replacing it at random.

        y = successor(x) with probability p, else predecessor(x); successor(x) in inference

    Modules draw independently of each other, and the whole batch has one draw. The state of the
    draws is saved with the weights, so a run goes on with the draws it would have had. Replicas
    of a `tf.distribute` strategy have equal draws. The mask passes through both branches.

    On TensorFlow, XLA (`jit_compile=True`) can train it only with `module.recompute = True`:
    the branch is then run again for its gradient, with the same dropout, which costs one more
    forward pass. The model of `build_theseus_model` sets this attribute by itself; in a model
    of your own, set it before training. It changes no result, and other backends ignore it.

    Args:
        predecessor: a layer, or layers called one after the other. They are frozen.
        successor: the same; its output has the shape and dtype of the predecessor's.
        predecessor_dropout: whether the predecessor runs in training mode, with its dropout, as
            in the original code. Default: False, it is the function that it is in inference.
        seed: of the draws. Default: a random one.

    Call arguments:
        inputs: what both branches take: one tensor.
        replacement_rate: p, a number or a scalar tensor in [0, 1], for instance of
            `ReplacementRate`, which is shared by all modules of a model. Default: 0.5.

    Raises:
        ValueError: a branch has no layer, their outputs differ in shape, or p is a number
            outside [0, 1].

    Example:
        >>> x = keras.ops.ones((2, 5, 8))
        >>> module = TheseusModule([FeedForward(64), FeedForward(64)], FeedForward(64))
        >>> tuple(module(x, replacement_rate=0.5, training=True).shape)
        (2, 5, 8)

    Reference: Xu et al. 2020, arXiv 2002.02925.
    """

    def __init__(
        self,
        predecessor: keras.layers.Layer | Sequence[keras.layers.Layer],
        successor: keras.layers.Layer | Sequence[keras.layers.Layer],
        predecessor_dropout: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(autocast=False, **kwargs)  # the branches cast their inputs themselves
        self.supports_masking = True
        self.predecessor = _as_list(predecessor, "predecessor")
        self.successor = _as_list(successor, "successor")
        self.predecessor_dropout = predecessor_dropout
        self.recompute = False
        self.settled = False  # True: p will stay 1, and what is compiled is the successor alone
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.outlet = keras.layers.Identity(name="outlet", dtype=self.dtype_policy)

    def build(self, inputs_shape: tuple, replacement_rate_shape: tuple | None = None) -> None:
        inputs = keras.KerasTensor(inputs_shape, dtype=self.compute_dtype)
        old, new = (
            _run(layers, inputs, training=False).shape
            for layers in (self.predecessor, self.successor)
        )
        if old != new:
            raise ValueError(
                f"successor must give the shape of the predecessor, {old}, got {new}. "
                "Add a projection to it."
            )
        for layer in self.predecessor:
            layer.trainable = True  # on TensorFlow, False after False would not reach sublayers
            layer.trainable = False

    def call(
        self, inputs: Any, replacement_rate: Any = 0.5, training: bool | None = None
    ) -> Any:
        _check_rate("replacement_rate", replacement_rate)
        if not training or self.settled:
            return _run(self.successor, inputs, training=bool(training))
        outputs = backend.run_either(
            keras.random.uniform((), seed=self.seed_generator) < replacement_rate,
            lambda x: _run(self.successor, x, training=True),
            self._replace_nothing,
            inputs,
            recompute=self.recompute,
        )
        # Layers called next without `training` take over that of the last call, which may be
        # the predecessor's. This call makes it ours again.
        return self.outlet(outputs, training=True)

    def _replace_nothing(self, inputs: Any) -> Any:
        outputs = _run(self.predecessor, inputs, training=self.predecessor_dropout)
        # Run eagerly, the successor would have no gradient instead of zero, and a step in which
        # all modules drew their predecessors would be an error. So one element of each of its
        # weights goes into a sum that is not used.
        weights = [v for layer in self.successor for v in layer.trainable_variables]
        unused = sum(ops.cast(v[(0,) * len(v.shape)], outputs.dtype) for v in weights)
        return outputs + ops.where(False, unused, ops.zeros((), outputs.dtype))

    def compute_output_shape(
        self, inputs_shape: tuple, replacement_rate_shape: tuple | None = None
    ) -> tuple:
        shape = inputs_shape
        for layer in self.successor:
            shape = layer.compute_output_shape(shape)
        return shape

    def save_own_variables(self, store: dict[str, Any]) -> None:
        store["seed_state"] = self.seed_generator.state

    def load_own_variables(self, store: dict[str, Any]) -> None:
        self.seed_generator.state.assign(store["seed_state"])

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "predecessor": [serialize_unbuilt(layer) for layer in self.predecessor],
            "successor": [serialize_unbuilt(layer) for layer in self.successor],
            "predecessor_dropout": self.predecessor_dropout,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TheseusModule":
        branches = {
            name: [keras.saving.deserialize_keras_object(layer) for layer in config[name]]
            for name in ("predecessor", "successor")
        }
        return cls(**{**config, **branches})


@keras.saving.register_keras_serializable(package="keras_ext")
class ReplacementRate(keras.layers.Layer):
    """The replacement rate p of all modules of a model: a variable, given out as a tensor.

    Assign to `rate` to change it: `layer.rate.assign(0.7)`. In a callback, touch `self.model`
    before (on JAX that brings the variables up to date); `ConstantReplacement` and
    `LinearReplacement` do.

    Args:
        rate: p at the beginning. Default: 0.5.

    Call arguments:
        inputs: any tensor; the layer only takes its place in the graph of the model from it.

    Raises:
        ValueError: `rate` is not in [0, 1].

    Example:
        >>> x = keras.Input((5, 8))
        >>> y = TheseusModule(FeedForward(64), FeedForward(16))(x, ReplacementRate(0.3)(x))

    Reference: Xu et al. 2020, arXiv 2002.02925.
    """

    def __init__(self, rate: float = 0.5, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.supports_masking = True
        self.initial_rate = _check_rate("rate", rate)

    def build(self, inputs_shape: tuple) -> None:
        self.rate = self.add_weight(
            shape=(),
            initializer=keras.initializers.Constant(self.initial_rate),
            dtype="float32",
            trainable=False,
            autocast=False,  # the steps of a schedule are below the resolution of bfloat16
            name="rate",
        )

    def call(self, inputs: Any) -> Any:
        return ops.add(self.rate, 0.0)  # a tensor, not the variable

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        return None

    def compute_output_spec(self, inputs: Any) -> keras.KerasTensor:
        return keras.KerasTensor((), dtype="float32")

    def compute_output_shape(self, inputs_shape: tuple) -> tuple:
        return ()

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rate": self.initial_rate}


def _run(layers: Sequence[keras.layers.Layer], x: Any, training: bool) -> Any:
    for layer in layers:
        x = layer(x, training=training)
    return x


def _as_list(layers: Any, name: str) -> list[keras.layers.Layer]:
    layers = list(layers) if isinstance(layers, list | tuple) else [layers]
    if not layers or not all(isinstance(layer, keras.layers.Layer) for layer in layers):
        raise ValueError(f"{name} must be a layer or a list of layers, got {layers!r}.")
    return layers


def _check_rate(name: str, rate: Any) -> Any:
    if isinstance(rate, int | float) and not 0 <= rate <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {rate}.")
    return rate
