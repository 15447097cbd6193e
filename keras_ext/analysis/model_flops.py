"""What a model costs: the FLOPs of all matrix products and convolutions in it.

The model is traced and nothing is computed, so a model of any size and length can be counted.
Products are 2 FLOPs for each multiplication. What is done number by number (norms, softmax,
activations) is not counted: by XLA's count below 2 % of a BERT-base and 3 % of a BERT of width
128, though more of the time. Where the GELU has an erf, which XLA makes a long polynomial on a
CPU, it counts 9 % there, and 5 % at width 256.
"""

from typing import Any

import keras

from keras_ext import backend


def model_flops(model: keras.Model, batch_size: int, length: int | None = None) -> int:
    """FLOPs of one forward pass in inference; a training step takes about three times as many.

    Args:
        model: any model with inputs of known shape.
        batch_size: for the first axis of all inputs.
        length: for all other axes of unknown size.

    Raises:
        ValueError: an axis is of unknown size and `length` is None.

    Example:
        >>> inputs = keras.Input((4,))
        >>> model_flops(keras.Model(inputs, keras.layers.Dense(3)(inputs)), batch_size=10)
        240
    """

    def size_of(tensor: keras.KerasTensor) -> tuple[int, ...]:
        sizes = tensor.shape[1:]
        if length is not None:
            sizes = tuple(length if n is None else n for n in sizes)
        if None in sizes:
            raise ValueError(f"length must be given: {tensor.name} has shape {tensor.shape}.")
        return (batch_size, *sizes)

    specs = [(size_of(tensor), tensor.dtype) for tensor in model.inputs]

    def run(*inputs: Any) -> Any:
        return model(keras.tree.pack_sequence_as(model.input, inputs), training=False)

    return backend.product_flops(run, specs)
