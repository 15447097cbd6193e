"""Compiled forms of functions that tests call, eager elsewhere; float64 on all backends."""

import contextlib

import keras

from keras_ext import backend


def float64():
    """A context in which float64 exists: JAX has it on request only."""
    if keras.backend.backend() != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.enable_x64(True)


def compiled(fn):
    """`fn` as one program on JAX, and as it is elsewhere.

    JAX compiles an eager computation operation by operation: as one it takes a tenth.
    """
    if keras.backend.backend() != "jax":
        return fn
    import jax

    return jax.jit(fn)


def unseen(fn, monkeypatch):
    """`fn` as a program (XLA); on PyTorch eager, but as if no value could be seen."""
    if keras.backend.backend() != "torch":
        return backend.compile(fn, [])
    monkeypatch.setattr("keras_ext.labels.concrete", lambda tensor: None)
    return fn


def compiled_step(step, variables, xla=False):
    """`step()`, which assigns some of the variables, as one program (eager on PyTorch)."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(step, jit_compile=xla)
    if keras.backend.backend() == "torch":
        return step
    import jax

    @jax.jit
    def pure(values):
        scope = keras.StatelessScope(list(zip(variables, values, strict=True)))
        with scope:
            step()
        return [scope.get_current_value(v) for v in variables]

    def run():
        for variable, value in zip(variables, pure([v.value for v in variables]), strict=True):
            variable.assign(value)

    return run
