"""JAX compiles an eager computation operation by operation: as one it takes a tenth."""

import keras


def compiled(fn):
    """`fn` as one program on JAX, and as it is elsewhere."""
    if keras.backend.backend() != "jax":
        return fn
    import jax

    return jax.jit(fn)
