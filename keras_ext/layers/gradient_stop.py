"""Gradients that go where they are wanted: to the input alone, or backwards.

    gradient_only(f, x) = 0                 with d/dx = f'(x), d/dw = 0 for the weights w of f
    GradientReversal(s)(x) = x              with d/dx = -s

The first is how one scalar loss trains two networks that want opposite things: the generator's
loss reaches the generator *through* the discriminator and leaves it alone. Its source writes
it as f(x) - f(stop(x)), with f live in both terms: the value cancels, and so do the gradients
to w. That evaluates f twice, and with dropout in f the two draws differ and nothing cancels.
Here f is evaluated once and its gradient g is taken on the spot:

    gradient_only(f, x) = <stop(g), x - stop(x)>,    g = df/dx

Exact: the value is 0, the gradient is g, that of the weights is none at all, bit for bit and
for any f. Cost: one forward pass and one backward pass to the input. First derivatives only.

Reversal is the older trick for the case that both networks have the same loss up to the sign.

Source: kexue.fm/archives/6387; Ganin & Lempitsky 2014, arXiv 1409.7495 (reversal).
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_ext import backend


def gradient_only(f: Callable[[Any], Any], x: Any, has_aux: bool = False) -> Any:
    """Zero, with the gradient of f(x) to x and to nothing else.

        value 0,    d/dx = f'(x),    d/dw = 0 for whatever else f depends on

    Args:
        f: function that returns a scalar; with `has_aux`, a tuple (scalar, anything else).
        x: a tensor, or a structure of tensors.
        has_aux: whether to return what f returned, too. Default: False.

    Returns:
        The zero, or the tuple (zero, what f returned). That is evaluated at stop_gradient(x):
        it can be used in the loss of f's own weights, without a second forward pass.

    Raises:
        ValueError: f does not return a scalar.

    Example:
        >>> images = keras.ops.ones((2, 4))
        >>> zero = gradient_only(lambda images: keras.ops.mean(model(images)), images)
        >>> float(zero)
        0.0

    Reference: kexue.fm/archives/6387.
    """

    def with_aux(x):
        returned = f(x)
        value = returned[0] if has_aux else returned
        if len(value.shape):
            raise ValueError(
                f"f must return a scalar, got the shape {tuple(value.shape)}. Take its mean."
            )
        return value, returned

    stopped = keras.tree.map_structure(ops.stop_gradient, x)
    (_, returned), gradient = backend.value_and_grad(with_aux, has_aux=True)(stopped)
    zero = sum(
        ops.sum(ops.stop_gradient(g) * (live - still))
        for g, live, still in zip(*map(keras.tree.flatten, (gradient, x, stopped)), strict=True)
    )
    return (zero, returned) if has_aux else zero


@keras.saving.register_keras_serializable(package="keras_ext")
class GradientReversal(keras.layers.Layer):
    """The identity, whose gradient is reversed.

        y = x,    dL/dx = -scale dL/dy

    Between generator and discriminator it trains both with one loss, if their losses are each
    other's negative (Wasserstein); between features and a domain classifier it makes the
    features domain invariant. `scale` multiplies the gradient, which optimizers like Adam
    divide by its size: there only `MultiplierOptimizer` changes the pace.

    Args:
        scale: s >= 0. Default: 1.

    Raises:
        ValueError: `scale` is negative.

    Example:
        >>> layer = GradientReversal(scale=0.1)
        >>> tuple(layer(keras.ops.array([1.0, 2.0])).shape)
        (2,)

    Reference: Ganin & Lempitsky 2014, arXiv 1409.7495.
    """

    def __init__(self, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not scale >= 0:
            raise ValueError(
                f"scale must be at least 0, got {scale}. The layer brings the minus sign."
            )
        self.supports_masking = True
        self.scale = scale

    def call(self, inputs: Any) -> Any:
        stopped = ops.stop_gradient(inputs)
        return stopped - self.scale * (inputs - stopped)  # the bracket is exactly 0

    def compute_output_shape(self, inputs_shape: tuple) -> tuple:
        return inputs_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "scale": self.scale}
