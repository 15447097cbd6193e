"""PyTorch: everything is eager, a conditional is an `if`."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import keras
import numpy as np
import torch
import torch.utils.checkpoint
from torch._subclasses import FakeTensorMode  # private, as there is no public name
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from keras_ext.backend import scope
from keras_ext.backend.scope import values_after  # noqa: F401 # part of the seam


def run_if(
    predicate: Any, fn: Callable[[], Any], otherwise: Callable[[], Any] | None = None
) -> None:
    """See `keras_ext.backend`."""
    if predicate:
        fn()
    elif otherwise is not None:
        otherwise()


def run_either(
    predicate: Any,
    true_fn: Callable[[Any], Any],
    false_fn: Callable[[Any], Any],
    inputs: Any,
    recompute: bool = False,
) -> Any:
    """See `keras_ext.backend`."""
    return true_fn(inputs) if predicate else false_fn(inputs)


def generator_state() -> Any:
    """See `keras_ext.backend`. A Dropout without a seed draws from torch's own generators."""
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_gpu else []


def _set_generator_state(state: Any) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


@contextlib.contextmanager
def substitute(
    variables: Iterable[keras.Variable],
    values: Iterable[Any],
    discard: Literal["all"] | Iterable[keras.Variable] = (),
    generator: Any = None,
) -> Iterator[scope.RecordingScope]:
    """See `keras_ext.backend`."""
    outside = generator_state() if generator is not None or discard == "all" else None
    if generator is not None:
        _set_generator_state(generator)
    try:
        with scope.substitute(variables, values, discard) as inside:
            yield inside
    finally:
        if outside is not None:
            _set_generator_state(outside)


@torch.no_grad()
def add_to(variables: Sequence[keras.Variable], tensors: Sequence[Any], scale: Any = 1) -> None:
    values = [v.value for v in variables]
    tensors = [t.to(v.dtype) for t, v in zip(tensors, values, strict=True)]
    torch._foreach_add_(values, tensors, alpha=float(scale))


def stored_values(gradient: Any) -> Any:
    return gradient


def map_values(fn: Callable, gradient: Any) -> Any:
    return fn(gradient)


def densify(gradient: Any) -> Any:
    return gradient


def snapshot(variables: Iterable[keras.Variable]) -> list[Any]:
    return [v.value.detach().clone() for v in variables]


def call_recorded(fn: Callable[[], Any]) -> tuple[Any, list[keras.Variable], list[Any]]:
    """See `keras_ext.backend`."""
    return scope.recorded_call(fn, snapshot)


def apply_gradients(
    optimizer: keras.Optimizer,
    grads: Sequence[Any],
    variables: Sequence[keras.Variable],
    after: Iterable[Any] = (),
    whole: Iterable[bool] = (),
) -> None:
    """See `keras_ext.backend`."""
    optimizer.apply(grads, variables)


def merge_replicas(fn: Callable, grads: Sequence[Any], *scalars: Any) -> None:
    fn(grads, *scalars)


def num_replicas() -> int:
    return 1


def has_value(variable: keras.Variable) -> bool:
    return True


def concrete(tensor: Any) -> Any:
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


def value_and_grad(fn: Callable, has_aux: bool = False, constant: bool = False) -> Callable:
    """See `keras_ext.backend`."""

    def alias(
        tensor: Any,
    ) -> Any:  # the gradient is that of this use of x, also if `args` hold it
        if tensor.requires_grad and not constant:
            return tensor.view_as(tensor)
        return tensor.detach().requires_grad_()

    def run(x: Any, *args: Any) -> Any:
        x = keras.tree.map_structure(keras.ops.convert_to_tensor, x)
        differentiable = torch.is_grad_enabled() and not constant
        # The fused kernels of attention cannot be differentiated twice.
        plain = sdpa_kernel(SDPBackend.MATH) if differentiable else contextlib.nullcontext()
        with torch.enable_grad(), plain:
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


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def recompute(fn: Callable, tensors: Sequence[Any]) -> Any:
    """See `keras_ext.backend`.

    `checkpoint` would set back torch's generator on a GPU only if it was given tensors of it.
    """
    generator = generator_state()
    first: list[scope.RecordingScope] = []
    before: dict[int, Any] = {}

    def run() -> Any:
        if first:  # for the gradient, when the scopes of the first call may be closed
            with substitute((), (), "all", generator) as again:
                again.state_mapping.update(before)
                return fn(*tensors)
        before.update(scope.seen_outside())
        with scope.RecordingScope() as inside:
            out = fn(*tensors)
        first.append(inside)
        # Copies: what the first call assigned is carried out in place.
        values = [v.clone() for v in scope.current_values(inside.assigned.values())]
        before.update(zip(inside.assigned, values, strict=True))
        return out

    out = torch.utils.checkpoint.checkpoint(run, use_reentrant=False, preserve_rng_state=False)
    first[0].assign_outside()
    first[0].add_losses_outside()
    return out


def map_chunks(fn: Callable, xs: Any) -> Any:
    """See `keras_ext.backend`."""
    xs = keras.tree.map_structure(keras.ops.convert_to_tensor, xs)

    def turn(i: int) -> Any:
        return recompute(fn, [keras.tree.map_structure(lambda x: x[i], xs)])

    ys = [turn(i) for i in range(len(keras.tree.flatten(xs)[0]))]
    return keras.tree.map_structure(lambda *parts: torch.stack(parts), *ys)


@torch.no_grad()
def product_flops(fn: Callable, specs: Iterable[tuple[tuple, str]]) -> int:
    """See `keras_ext.backend`. The fused kernels of attention are not counted on a CPU."""
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True), counter, sdpa_kernel(SDPBackend.MATH):
        fn(*[keras.ops.zeros(shape, dtype) for shape, dtype in specs])
    return counter.get_total_flops()


def compile(
    fn: Callable, variables: Sequence[keras.Variable], jit_compile: bool = True
) -> Callable:
    """See `keras_ext.backend`. It runs eagerly, without gradients."""
    return torch.no_grad()(fn)


def wrap_array(array: np.ndarray) -> Any:
    """See `keras_ext.backend`."""
    return torch.from_numpy(array)


def sync_variables(model: keras.Model) -> None:
    """See `keras_ext.backend`."""
