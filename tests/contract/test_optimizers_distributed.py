"""Every public optimizer ends on two devices where it ends on one."""

import keras
import pytest
from contract.test_optimizers import ROWS, ROWS_OF_TABLE, assert_near, fit, model_of
from reference.problems import Regression

BACKEND = keras.backend.backend()


@pytest.fixture(params=ROWS_OF_TABLE, ids=[row.name for row in ROWS_OF_TABLE])
def row(request):
    return request.param


@pytest.fixture
def problem():
    return Regression(embedding=True, rows=ROWS)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="MirroredStrategy is TensorFlow's")
def test_mirrored_strategy(row, problem, mirrored):
    # Without XLA: under it Keras fails here with every optimizer.
    with mirrored.scope():
        model, optimizer = model_of(problem), row.make()
    actual = fit(model, problem, optimizer=optimizer, jit_compile=False)
    assert_near(actual, row, problem, 5e-6)


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution runs on JAX")
def test_data_parallel(row, problem):
    devices = keras.distribution.list_devices()
    assert len(devices) == 2
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    try:
        actual = fit(model_of(problem), problem, optimizer=row.make(), jit_compile=True)
    finally:
        keras.distribution.set_distribution(None)
    assert_near(actual, row, problem, 5e-6)
