"""Two virtual devices for the distribution tests, and what tests and docstrings share."""

import os
from pathlib import Path

# Before any backend starts: afterwards its number of devices is fixed.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)

import keras
import numpy as np
import pytest

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 2
    )

ROOT = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout; tests that need it are skipped without."""
    folder = Path(os.environ.get("KERAS_EXT_SHARED", ROOT / ".." / "shared"))
    if not folder.is_dir():
        pytest.skip("real data is not beside this checkout")
    return folder.resolve()


@pytest.fixture(autouse=True)
def docstring_names(request, doctest_namespace):
    """What the examples in docstrings take for granted: a model, some data, public names."""
    if not isinstance(request.node, pytest.DoctestItem):
        return
    import keras_ext

    keras.utils.set_random_seed(0)
    for part in map(keras_ext.__dict__.get, keras_ext.__all__):
        doctest_namespace.update({name: getattr(part, name) for name in part.__all__})
    inputs = keras.Input((4,))
    doctest_namespace.update(
        keras=keras,
        np=np,
        model=keras.Model(inputs, keras.layers.Dense(1)(inputs)),
        x=np.ones((32, 4), "float32"),
        y=np.ones((32, 1), "float32"),
    )
