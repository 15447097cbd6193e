"""The bias alone."""

import numpy as np
from keras import ops

from keras_ext.layers import Bias


def test_it_starts_at_zero_and_is_added():
    layer = Bias()
    x = np.arange(6.0, dtype="float32").reshape(2, 3)
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(x)), x)
    layer.set_weights([np.array([1.0, 2.0, 3.0])])
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(x)), x + np.arange(1, 4))
