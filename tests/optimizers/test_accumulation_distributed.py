"""AccumOptimizer on two devices gives the single-device result."""

import keras
import numpy as np
import pytest
from keras import ops
from optimizers.test_accumulation import LR, build, distance, fit, weights_of
from reference import optimizers as numpy_optimizers
from reference.problems import Regression

from keras_ext.optimizers import AccumOptimizer, EMAOptimizer
from keras_ext.training import with_objective

BACKEND = keras.backend.backend()
tensorflow_only = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="MirroredStrategy is TensorFlow's"
)


def adam(**arguments):
    return keras.optimizers.Adam(LR, global_clipnorm=0.5, **arguments)


@tensorflow_only
@pytest.mark.parametrize("embedding", [False, True], ids=["dense", "embedding"])
def test_mirrored_strategy(mirrored, embedding):
    # Two replicas, each 4 of the 8 rows of a micro-batch; the clipping inside sees the sum.
    problem = Regression(embedding)
    with mirrored.scope():
        model = build(problem)
        optimizer = AccumOptimizer(adam(), 3)
    distributed = fit(model, problem, optimizer, 8, jit_compile=False)
    single = fit(build(problem), problem, AccumOptimizer(adam(), 3), 8)
    assert distance(distributed, single) < 1e-6
    assert ops.convert_to_numpy(optimizer.iterations) == 2


@tensorflow_only
def test_mirrored_strategy_applies_the_remainder(mirrored):
    problem = Regression(embedding=True)
    with mirrored.scope():
        model = build(problem)
        optimizer = AccumOptimizer(adam(), 4)
    with pytest.warns(UserWarning, match="2 of 4 micro-batches"):
        distributed = fit(model, problem, optimizer, 8, jit_compile=False)
    expected = problem.train(
        numpy_optimizers.adam(LR),
        [slice(0, 32), slice(32, 48)],
        lambda grads: numpy_optimizers.clip_global(grads, 0.5),
    )
    assert distance(distributed, expected) < 2e-6
    for weight in model.trainable_weights:  # both replicas hold the same
        first, second = (v.numpy() for v in weight.value.values)
        np.testing.assert_array_equal(first, second)


@pytest.mark.thorough
@tensorflow_only
def test_mirrored_strategy_inside_a_loss_scale(mirrored):
    problem = Regression(embedding=False)
    with mirrored.scope():
        model = build(problem)
        optimizer = keras.optimizers.LossScaleOptimizer(AccumOptimizer(adam(), 3))
    distributed = fit(model, problem, optimizer, 8, jit_compile=False)
    single = fit(build(problem), problem, AccumOptimizer(adam(), 3), 8)
    assert distance(distributed, single) < 1e-6


@tensorflow_only
def test_mirrored_strategy_with_a_weight_per_replica(mirrored):
    import tensorflow as tf

    # Replica r holds n_r rows; its gradient is that of its mean, divided by the replicas.
    problem = Regression(embedding=False, rows=16)
    parts = [[slice(0, 7), slice(7, 8)], [slice(8, 10), slice(10, 16)]]
    with mirrored.scope():
        variables = [keras.Variable(w, dtype="float32") for w in problem.weights]
        optimizer = AccumOptimizer(keras.optimizers.SGD(LR), 2)
        optimizer.build(variables)

    @tf.function
    def step(grads, weight):
        mirrored.run(lambda g, w: optimizer.apply(g, variables, weight=w), args=(grads, weight))

    for replicas in parts:
        grads = [
            [(g / 2).astype("float32") for g in problem.gradients(problem.weights, rows)]
            for rows in replicas
        ]
        sizes = [float(rows.stop - rows.start) for rows in replicas]

        def per_replica(values):
            return mirrored.experimental_distribute_values_from_function(
                lambda context: tf.constant(values[context.replica_id_in_sync_group])
            )

        per_variable = [per_replica(pair) for pair in zip(*grads, strict=True)]
        step(per_variable, per_replica(sizes))
    expected = problem.train(numpy_optimizers.sgd(LR), [slice(None)])
    assert distance([ops.convert_to_numpy(v) for v in variables], expected) < 1e-6


@tensorflow_only
@pytest.mark.parametrize("wrappers", [1, 2])
def test_mirrored_strategy_inside_wrappers_with_batch_weights(mirrored, wrappers):
    # Micro-batches of 8, 8 and 4 rows: their weights pass through the wrappers.
    problem = Regression(embedding=False, rows=20)

    def make():
        optimizer = AccumOptimizer(keras.optimizers.SGD(LR), 3)
        for _ in range(wrappers):
            optimizer = EMAOptimizer(optimizer)
        return optimizer

    with mirrored.scope():
        model, optimizer = with_objective(build(problem), []), make()
    distributed = fit(model, problem, optimizer, 8, jit_compile=False)
    expected = problem.train(numpy_optimizers.sgd(LR), [slice(0, 20)])
    assert distance(distributed, expected) < 1e-6


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution runs on JAX")
def test_data_parallel():
    problem = Regression(embedding=True)
    single = fit(build(problem), problem, AccumOptimizer(adam(), 3), 8)
    devices = keras.distribution.list_devices()
    assert len(devices) == 2
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    try:
        optimizer = AccumOptimizer(adam(), 3)
        model = build(problem)
        distributed = fit(model, problem, optimizer, 8)
        assert len(optimizer.accumulators[0].value.sharding.device_set) == 2
        assert distance(distributed, single) < 1e-6
        model.compile(AccumOptimizer(adam(), 4), loss="mse")  # and a remainder
        with pytest.warns(UserWarning, match="2 of 4"):
            model.fit(problem.x, problem.y, batch_size=8, shuffle=False, verbose=0)
        assert all(np.isfinite(w).all() for w in weights_of(model))
    finally:
        keras.distribution.set_distribution(None)
