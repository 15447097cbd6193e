"""Compiled forms of functions that tests call, eager elsewhere."""

import keras


def compiled(fn):
    """`fn` as one program on JAX, and as it is elsewhere.

    JAX compiles an eager computation operation by operation: as one it takes a tenth.
    """
    if keras.backend.backend() != "jax":
        return fn
    import jax

    return jax.jit(fn)


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
