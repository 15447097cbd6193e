"""PyTorch: everything is eager, a conditional is an `if`."""

import keras
import numpy as np
import torch
import torch.utils.checkpoint


def run_if(predicate, fn, otherwise=None):
    """See `keras_ext.backend`."""
    if predicate:
        fn()
    elif otherwise is not None:
        otherwise()


@torch.no_grad()
def add_to(variables, tensors, scale=1):
    values = [v.value for v in variables]
    tensors = [t.to(v.dtype) for t, v in zip(tensors, values, strict=True)]
    torch._foreach_add_(values, tensors, alpha=float(scale))


def values(gradient):
    return gradient


def map_values(fn, gradient):
    return fn(gradient)


def densify(gradient):
    return gradient


def copies(variables):
    return [v.value.detach().clone() for v in variables]


def apply_gradients(optimizer, grads, variables, after=(), whole=()):
    """See `keras_ext.backend`."""
    optimizer.apply(grads, variables)


def merge_replicas(fn, grads, *scalars):
    fn(grads, *scalars)


def num_replicas():
    return 1


def has_value(variable):
    return True


def concrete(tensor):
    """See `keras_ext.backend`."""
    if not isinstance(tensor, torch.Tensor):
        return np.asarray(tensor)
    # A compiler, and the transformations of torch.func, give their tensors no values.
    if torch.compiler.is_compiling() or tensor.device.type != "cpu":
        return None
    try:
        return tensor.detach().numpy()
    except RuntimeError:
        return None


def value_and_grad(fn, has_aux=False):
    """See `keras_ext.backend`."""

    def alias(tensor):  # the gradient is that of this use of x, also if `args` hold it
        if tensor.requires_grad:
            return tensor.view_as(tensor)
        return tensor.detach().requires_grad_()

    def run(x, *args):
        x = keras.tree.map_structure(keras.ops.convert_to_tensor, x)
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            x = keras.tree.map_structure(alias, x)
            out = fn(x, *args)
            value, flat = out[0] if has_aux else out, keras.tree.flatten(x)
            if value.requires_grad:
                flat = torch.autograd.grad(
                    value, flat, create_graph=differentiable, materialize_grads=True
                )
            else:  # it does not depend on x, nor on weights
                flat = [torch.zeros_like(t) for t in flat]
        if not differentiable:
            out = keras.tree.map_structure(_detached, out)
        return out, keras.tree.pack_sequence_as(x, flat)

    return run


def _detached(leaf):
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def cond(predicate, true_fn, false_fn, inputs, variables, recompute=False):
    """See `keras_ext.backend`."""
    return true_fn(inputs) if predicate else false_fn(inputs)


def recompute(fn, tensors, variables):
    """See `keras_ext.backend`. torch's own generator is set back by `checkpoint`."""
    before = list(zip(variables, copies(variables), strict=True))
    called = []

    def run():
        if not called:
            called.append(True)
            return fn(*tensors)
        with keras.StatelessScope(before, initialize_variables=False):
            return fn(*tensors)

    return torch.utils.checkpoint.checkpoint(run, use_reentrant=False)


def product_flops(fn, specs):
    raise NotImplementedError(
        "FLOPs are counted on TensorFlow and JAX; PyTorch has torch.utils.flop_counter."
    )


def compile(fn, variables, jit_compile=True):
    """See `keras_ext.backend`. It runs eagerly, without gradients."""
    return torch.no_grad()(fn)


def adopt(array):
    """See `keras_ext.backend`."""
    return torch.from_numpy(array)
