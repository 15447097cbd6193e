"""The one place that talks to TensorFlow, JAX or PyTorch directly.

Everything else is written in `keras.ops`. What Keras has no neutral form for
stands here once per backend, under one name:

| function | purpose |
|---|---|
| `cond(predicate, true_fn, false_fn, variables)` | a conditional whose branches assign |
| `add_to(variables, tensors)` | `variable += tensor` for many, sparse gradients included |
| `values(gradient)` | the tensor of values that a dense or sparse gradient stores |
| `map_values(fn, gradient)` | apply an elementwise function to them |
| `densify(gradient)` | the gradient as one tensor, rows of repeated tokens summed |
| `copies(variables)` | tensors that keep their values when the variables change |
| `apply_gradients(optimizer, grads, variables, after)` | one update, also within `cond` |
| `merge_replicas(fn, grads, *scalars)` | call `fn` once with the sums over all replicas |
| `num_replicas()` | replicas whose gradients the optimizer has to sum itself |
| `has_value(variable)` | False where a failed JAX training step left a variable empty |

Only the backend that Keras itself runs on is imported.
"""

import keras

if keras.backend.backend() == "tensorflow":
    from keras_ext.backend import tensorflow as _backend
elif keras.backend.backend() == "jax":
    from keras_ext.backend import jax as _backend
elif keras.backend.backend() == "torch":
    from keras_ext.backend import torch as _backend
else:
    raise ImportError(
        f"keras_ext runs on the tensorflow, jax and torch backends of Keras, got "
        f"{keras.backend.backend()!r}. Set KERAS_BACKEND to one of them before importing keras."
    )

cond = _backend.cond
add_to = _backend.add_to
values = _backend.values
map_values = _backend.map_values
densify = _backend.densify
copies = _backend.copies
apply_gradients = _backend.apply_gradients
merge_replicas = _backend.merge_replicas
num_replicas = _backend.num_replicas
has_value = _backend.has_value

__all__ = [
    "add_to",
    "apply_gradients",
    "cond",
    "copies",
    "densify",
    "has_value",
    "map_values",
    "merge_replicas",
    "num_replicas",
    "values",
]
