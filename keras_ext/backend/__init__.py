"""The one place that talks to TensorFlow, JAX or PyTorch directly.

Everything else is written in `keras.ops`. What Keras has no neutral form for stands here once
per backend, under one name. In alphabetical order:

`add_to(variables, tensors, scale=1)` does `variable += scale * tensor`, also with sparse
tensors.

`apply_gradients(optimizer, grads, variables, after=(), whole=())` is one update, also within
`run_if`. On TensorFlow it waits for the tensors in `after`: what was read of variables that
hold another value afterwards. In a strategy the gradients are sums over the replicas already,
but those marked in `whole` (one boolean per variable) belong to each replica.

`call_recorded(fn)` returns what `fn()` returns, the variables that it assigned, and a snapshot
of their values before it.

`compile(fn, variables, jit_compile=True)` returns a program of `fn`, which reads the variables
and may assign them. An assignment of another is an error on JAX.

`concrete(tensor)` returns the values as a NumPy array, or None if they cannot be seen: while a
program is traced or compiled, and of what lies on an accelerator, where a look would wait for
all that the accelerator still has to compute. It is for checks, which must not cost time.

`densify(gradient)` returns a gradient as one tensor, the rows of repeated tokens summed.

`generator_state()` returns where the random draws stand that are of no variable (those of
torch's own generator, from which a Dropout without a seed draws), for `substitute`.

`has_value(variable)` is False where a failed JAX training step left a variable empty.

`map_chunks(fn, xs)` returns `fn(x)` of each x along the first axis of `xs`, stacked. A loop
that keeps only this: for the gradient each chunk is computed again, on its own draws, and the
gradients of the weights are summed chunk by chunk. The gradient reaches `xs` too. Variables
that `fn` assigns go from chunk to chunk, and losses that it adds are summed. `xs` and the
results are tensors or structures of them.

`map_values(fn, gradient)` applies an elementwise function to the stored values of a gradient.

`merge_replicas(fn, grads, *scalars)` calls `fn` once, with the sums over all replicas.

`num_replicas()` returns how many replicas there are whose gradients the optimizer has to sum.

`product_flops(fn, specs)` counts those of `fn` on inputs of these (shape, dtype).

`recompute(fn, tensors)` returns `fn(*tensors)`, a tensor or a structure of them; some of
`tensors` may be None. What `fn` computes is not kept for the gradient, but computed again, on
the same draws.

`run_either(predicate, true_fn, false_fn, inputs, recompute=False)` returns `true_fn(inputs)` or
`false_fn(inputs)`, and computes only that. `inputs` and the results are tensors or structures
of them. With `recompute` TensorFlow runs the function again for the gradient, on the same
draws, instead of keeping what it computed: without it XLA cannot compile the gradient. JAX and
PyTorch ignore it. A loss that a branch adds is an error in a compiled program.

`run_if(predicate, fn, otherwise=None)` calls `fn()` if `predicate` holds, else `otherwise()`.
On TensorFlow it returns a tensor that exists when it is done.

`snapshot(variables)` returns tensors that keep their values when the variables change.

`stored_values(gradient)` returns the tensor of values that a dense or sparse gradient stores.

`substitute(variables, values, discard=(), generator=None)` is a context in which the variables
have these values: tensors, to which a gradient may be taken. Other variables are read as
outside. What is assigned inside, also to the substituted, is assigned outside at the end,
unless `discard` names it: some variables, such as all weights of a model, so that seeds move
but moving averages do not, or "all". Losses that layers add inside are in `losses` of what the
context gives, and the layers keep those of the pass before. To repeat the draws of a pass,
substitute its seeds by a `snapshot` from before, and give the `generator_state()` from before
as `generator`. Where it is given, and where all is discarded, the generator stands afterwards
where it stood.

`sync_variables(model)` lets variables be read and assigned between two training steps.

`value_and_grad(fn, has_aux=False, constant=False)(x, *args)` returns `(value, gradient)`:
`fn(x, *args)` gives a scalar, and the gradient has the structure of x. With `has_aux`, `fn`
returns a tuple that starts with the scalar, and `value` is this tuple. It works eagerly and
compiled, also within a loss that is differentiated in turn (as often as one likes, and without
a second evaluation of `fn`), and random seeds and moving averages that `fn` updates are updated
once. With `constant` no gradient flows through what it returns, which costs less on PyTorch;
without, attention there leaves its fused kernel, which has no second derivative.

`values_after(fn, variables, values)` returns the values that the variables would have after
`fn()` if these were those before. Nothing changes. TensorFlow refuses it.

`wrap_array(array)` returns a tensor of an array that will not change: its memory, if aligned to
64.

What functions assign need not be listed but for `compile` and `values_after`: a recording scope
finds out. On TensorFlow, `recompute`, `map_chunks` and `run_either(recompute=True)` have a
gradient of their own, which reaches their tensors and variables, also substituted ones, but no
other tensor that a function reads.

Only the backend that Keras itself runs on is imported.
"""

import importlib
from typing import TYPE_CHECKING

import keras

if keras.backend.backend() not in ("tensorflow", "jax", "torch"):
    raise ImportError(
        f"keras_ext runs on the tensorflow, jax and torch backends of Keras, got "
        f"{keras.backend.backend()!r}. Set KERAS_BACKEND to one of them before importing keras."
    )
if TYPE_CHECKING:  # the others have the same signatures
    from keras_ext.backend import jax as _backend
else:
    _backend = importlib.import_module(f"keras_ext.backend.{keras.backend.backend()}")

add_to = _backend.add_to
apply_gradients = _backend.apply_gradients
call_recorded = _backend.call_recorded
compile = _backend.compile
concrete = _backend.concrete
densify = _backend.densify
generator_state = _backend.generator_state
has_value = _backend.has_value
map_chunks = _backend.map_chunks
map_values = _backend.map_values
merge_replicas = _backend.merge_replicas
num_replicas = _backend.num_replicas
product_flops = _backend.product_flops
recompute = _backend.recompute
run_either = _backend.run_either
run_if = _backend.run_if
snapshot = _backend.snapshot
stored_values = _backend.stored_values
substitute = _backend.substitute
sync_variables = _backend.sync_variables
value_and_grad = _backend.value_and_grad
values_after = _backend.values_after
wrap_array = _backend.wrap_array

__all__ = [
    "add_to",
    "apply_gradients",
    "call_recorded",
    "compile",
    "concrete",
    "densify",
    "generator_state",
    "has_value",
    "map_chunks",
    "map_values",
    "merge_replicas",
    "num_replicas",
    "product_flops",
    "recompute",
    "run_either",
    "run_if",
    "snapshot",
    "stored_values",
    "substitute",
    "sync_variables",
    "value_and_grad",
    "values_after",
    "wrap_array",
]
