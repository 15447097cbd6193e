"""The one place that talks to TensorFlow, JAX or PyTorch directly.

Everything else is written in `keras.ops`. What Keras has no neutral form for
stands here once per backend, under one name:

| function | purpose |
|---|---|
| `run_if(predicate, fn, otherwise=None)` | a conditional that assigns |
| `cond(predicate, true_fn, false_fn, inputs, variables, ...)` | one of two functions |
| `add_to(variables, tensors, scale)` | `variable += scale * tensor`, also sparse |
| `values(gradient)` | the tensor of values that a dense or sparse gradient stores |
| `map_values(fn, gradient)` | apply an elementwise function to them |
| `densify(gradient)` | the gradient as one tensor, rows of repeated tokens summed |
| `copies(variables)` | tensors that keep their values when the variables change |
| `apply_gradients(optimizer, grads, variables, ...)` | one update, also within `run_if` |
| `merge_replicas(fn, grads, *scalars)` | call `fn` once with the sums over all replicas |
| `num_replicas()` | replicas whose gradients the optimizer has to sum itself |
| `value_and_grad(fn, has_aux)` | of the first argument; itself differentiable |
| `product_flops(fn, specs)` | of `fn` on inputs of these (shape, dtype) |
| `recompute(fn, tensors, variables)` | `fn(*tensors)`, computed again for the gradient |
| `compile(fn, variables, jit_compile)` | a program of `fn`, which reads the variables |
| `adopt(array)` | a tensor of an array that will not change: its memory, if aligned to 64 |
| `concrete(tensor)` | its values as a NumPy array; None if they cannot be seen yet |
| `has_value(variable)` | False where a failed JAX training step left a variable empty |

`value_and_grad(fn, has_aux=False)(x, *args)` returns `(value, gradient)`: `fn(x, *args)` gives
a scalar, and the gradient has the structure of x. With `has_aux`, `fn` returns a tuple that
starts with the scalar, and `value` is this tuple. It works eagerly and compiled, also within a
loss that is differentiated in turn (as often as one likes, and without a second evaluation of
`fn`), and random seeds and moving averages that `fn` updates are updated once.

`cond(predicate, true_fn, false_fn, inputs, variables, recompute=False)` returns
`true_fn(inputs)` or `false_fn(inputs)`, a tensor, and computes only that. `inputs` is a tensor;
`variables` are those that the functions may assign (random seeds, moving averages; others do
no harm), and each is assigned once. With `recompute` TensorFlow runs the function again for the
gradient, on the same draws, instead of keeping what it computed: without it XLA cannot compile
the gradient. JAX and PyTorch ignore it.

`recompute(fn, tensors, variables)` returns `fn(*tensors)`, a tensor; some of `tensors` may be
None. What `fn` computes is not kept for the gradient, but computed again on the same draws.
`variables` are those that it may assign.

`run_if(predicate, fn, otherwise=None)` calls `fn()` if `predicate` holds, else `otherwise()`.
What they assign need not be listed. On TensorFlow it returns a tensor that exists when it is
done.

`apply_gradients(optimizer, grads, variables, after=(), whole=())` is one update. On TensorFlow
it waits for the tensors in `after`: what was read of variables that hold another value
afterwards. In a strategy the gradients are sums over the replicas already, but those marked in
`whole` (one boolean per variable) belong to each replica.

`concrete(tensor)` is for checks of values, which must not cost time: it is None while a program
is traced or compiled, and for what lies on an accelerator, where a look would wait for all that
the accelerator still has to compute. In the memory of the host there is nothing to wait for.

Only the backend that Keras itself runs on is imported.
"""

import importlib

import keras

if keras.backend.backend() not in ("tensorflow", "jax", "torch"):
    raise ImportError(
        f"keras_ext runs on the tensorflow, jax and torch backends of Keras, got "
        f"{keras.backend.backend()!r}. Set KERAS_BACKEND to one of them before importing keras."
    )
_backend = importlib.import_module(f"keras_ext.backend.{keras.backend.backend()}")

add_to = _backend.add_to
adopt = _backend.adopt
compile = _backend.compile
concrete = _backend.concrete
cond = _backend.cond
values = _backend.values
map_values = _backend.map_values
densify = _backend.densify
copies = _backend.copies
apply_gradients = _backend.apply_gradients
merge_replicas = _backend.merge_replicas
num_replicas = _backend.num_replicas
product_flops = _backend.product_flops
recompute = _backend.recompute
run_if = _backend.run_if
has_value = _backend.has_value
value_and_grad = _backend.value_and_grad

__all__ = [
    "add_to",
    "adopt",
    "apply_gradients",
    "compile",
    "concrete",
    "cond",
    "copies",
    "densify",
    "has_value",
    "map_values",
    "merge_replicas",
    "num_replicas",
    "product_flops",
    "recompute",
    "run_if",
    "value_and_grad",
    "values",
]
