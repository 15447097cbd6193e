"""PyTorch: everything is eager, a conditional is an `if`."""

import torch


def cond(predicate, true_fn, false_fn, variables):
    """Run `true_fn()` or `false_fn()`; `variables` is what JAX needs to know."""
    (true_fn if predicate else false_fn)()


@torch.no_grad()
def add_to(variables, tensors):
    values = [v.value for v in variables]
    torch._foreach_add_(values, [t.to(v.dtype) for t, v in zip(tensors, values, strict=True)])


def values(gradient):
    return gradient


def map_values(fn, gradient):
    return fn(gradient)


def densify(gradient):
    return gradient


def copies(variables):
    return [v.value.detach().clone() for v in variables]


def apply_gradients(optimizer, grads, variables, after=()):
    optimizer.apply(grads, variables)


def merge_replicas(fn, grads, *scalars):
    fn(grads, *scalars)


def num_replicas():
    return 1


def has_value(variable):
    return True
