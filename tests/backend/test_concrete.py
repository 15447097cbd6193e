"""Values that can be seen, and those that cannot yet."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_ext import backend

VALUES = np.array([3, 1, 2], "int32")


def test_eager_tensors_and_arrays_can_be_seen():
    for tensor in (VALUES, VALUES.tolist(), ops.convert_to_tensor(VALUES)):
        np.testing.assert_array_equal(backend.concrete(tensor), VALUES)
    moving = ops.convert_to_tensor(VALUES.astype("float32"))
    seen = []

    def loss(x):  # what is differentiated can be seen on PyTorch and TensorFlow only
        seen.append((backend.concrete(moving), backend.concrete(x)))
        return ops.sum(x * moving)

    backend.value_and_grad(loss)(moving)
    np.testing.assert_array_equal(seen[0][0], VALUES)
    assert (seen[0][1] is None) == (keras.backend.backend() == "jax")


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="PyTorch runs eagerly")
def test_the_tensors_of_a_program_cannot():
    seen = []

    def program(x):
        seen.append(backend.concrete(x))
        return x + 1

    backend.compile(program, [])(ops.convert_to_tensor(VALUES))
    assert seen == [None]


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="of PyTorch")
def test_on_pytorch_neither_other_devices_nor_transformations():
    import torch

    assert backend.concrete(torch.zeros(3, device="meta")) is None
    seen = []
    torch.func.vmap(lambda x: seen.append(backend.concrete(x)) or x)(torch.zeros(3))
    assert seen == [None]
