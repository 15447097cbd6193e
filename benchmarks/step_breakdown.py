"""Where a fine-tuning step goes: TensorFlow's graph against XLA on JAX, by kind of operation.

    python benchmarks/step_breakdown.py

The model, batch and step of `bert_step.py`, on one core; needs TensorFlow and JAX in one
environment. Every operation (TensorFlow) or thunk (XLA) of a step is timed by the profiler of
its backend, and counted by the name that its layer gave it; a fusion counts for the operation
it ends with. Prints CPU milliseconds by phase and kind, the largest differences first, then the
steps without a profiler: of TensorFlow; of JAX; of JAX with its other random numbers, half the
work (JAX_THREEFRY_PARTITIONABLE=0); with GELU as x/2 (1 + erf(x/√2)), where JAX has an erfc;
and where the Dense layers multiply tensors (batch, length, width) and not matrices
(batch · length, width).
"""

import collections
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bert_step import keras_case, processor
from measure import cpu_ms, options, pin_to_one_core, report, take_turns

CASES = {
    "TF graph": ("tensorflow", ""),
    "JAX": ("jax", ""),
    "JAX, other random numbers": ("jax", "random"),
    "JAX, GELU by erf": ("jax", "erf"),
    "JAX, tensors": ("jax", "tensors"),
}
# The first pattern that is found in the name of an operation.
KINDS = {
    "random numbers": r"bernoulli|random_uniform|u32\[",
    "update": r"adam_w",
    "products of kernels, for the kernel": r"MatMul_1:_MklMatMul|dot\.\S* .*_dense/transpose$",
    "products of kernels": r"MatMul:_MklMatMul|FusedMatMul|_dense/dot_general$",
    "products of attention": r"BatchMatMul|b\w+d,b\w+->b|bhts,bshd",
    "GELU and bias": r"intermediate_dense",
    "layer normalisation": r"_norm",
    "embeddings": r"embedding(?!_dropout)",
    "softmax, masks, heads": r"attention",
}


def main() -> None:
    turns = options(__doc__).parse_args().turns
    cases = {
        name: (None, backend, [name, variant]) for name, (backend, variant) in CASES.items()
    }
    figures = take_turns(__file__, cases, turns)
    steps = {name: case.pop("step_ms") for name, case in figures.items()}
    columns = [
        collections.Counter(figures[name]) for name in ("TF graph", "JAX", "JAX, tensors")
    ]
    tensorflow, jax, _ = columns
    print(processor())
    print(f"{'phase':10}{'kind':37}{'TF graph':>9}{'JAX':>7}{'tensors':>9}{'JAX - TF':>10}")
    for key in sorted(tensorflow | jax, key=lambda key: tensorflow[key] - jax[key]):
        phase, kind = key.split(": ")
        print_row(phase, kind, *(column[key] for column in columns))
    print_row("all", "", *(column.total() for column in columns))
    for name, step in steps.items():
        print(f"{name:25}{step:7.1f} ms a step, {step / steps['TF graph']:.2f} of TF graph")
    print(f"JAX with matrices / with tensors: {steps['JAX'] / steps['JAX, tensors']:.2f}")


def print_row(phase: str, kind: str, tensorflow: float, jax: float, tensors: float) -> None:
    print(
        f"{phase:10}{kind:37}{tensorflow:9.1f}{jax:7.1f}{tensors:9.1f}{jax - tensorflow:+10.1f}"
    )


def run_case(name: str, variant: str) -> None:
    pin_to_one_core()
    with tempfile.TemporaryDirectory() as directory:
        os.environ["XLA_FLAGS"] = (
            f"--xla_dump_to={directory} --xla_dump_hlo_as_text "
            "--xla_dump_hlo_module_re=.*train_step.*"
        )
        if variant == "tensors":
            multiply_tensors()
        elif variant == "random":
            os.environ["JAX_THREEFRY_PARTITIONABLE"] = "0"
        elif variant == "erf":
            write_gelu_by_erf()
        jit = CASES[name][0] == "jax"
        step, _, _ = keras_case("ours", "gelu", jit)
        step_ms = cpu_ms(step)
        events = jax_events if jit else tensorflow_events
        times = collections.Counter()
        for operation, milliseconds in events(step, Path(directory)):
            times[classify(operation)] += milliseconds
    report(step_ms=step_ms, **times)


def multiply_tensors() -> None:
    """As the layers did before, and as a Dense of Keras does."""
    from keras_ext.layers import transformer
    from keras_ext.layers.attention import projected

    for module in (transformer, projected):
        module.by_rows = lambda layer, x: layer(x)


def write_gelu_by_erf() -> None:
    from keras import ops

    from keras_ext.models import bert

    bert.ACTIVATIONS["gelu"] = lambda x: x * (1 + ops.erf(x * 0.5**0.5)) / 2


def classify(operation: str) -> str:
    if re.search("adam_w", operation):
        phase = "update"
    elif re.search(r"transpose\(|gradient_tape", operation):
        phase = "backward"
    else:
        phase = "forward"
    kinds = (kind for kind, pattern in KINDS.items() if re.search(pattern, operation))
    return f"{phase}: {next(kinds, 'all else')}"


def tensorflow_events(step, directory: Path) -> Iterator[tuple[str, float]]:
    """Name and milliseconds of every operation: `path/of/layers/name:Kind`."""
    import tensorflow as tf

    tf.profiler.experimental.start(str(directory))
    step()
    tf.profiler.experimental.stop()
    for line, name, milliseconds in profile(directory):
        if line.startswith("tf_Compute") and re.search(r"(?<!:):(?!:)", name):
            yield name, milliseconds


def jax_events(step, directory: Path) -> Iterator[tuple[str, float]]:
    """Of every thunk: `name.number type path/of/layers/operation`."""
    import jax

    with jax.profiler.trace(str(directory)):
        step()
    (program,) = directory.glob("*cpu_after_optimizations.txt")
    described = {}
    for line in program.read_text().splitlines():
        if instruction := re.match(r"\s*(?:ROOT )?%?(\S+) = \(?(\w+\[)", line):
            path = re.search(r'op_name="([^"]*)"', line)
            described[instruction[1]] = f"{instruction[2]} {path[1] if path else ''}"
    for line, name, milliseconds in profile(directory):
        if line.startswith("tf_XLA") and name in described:
            yield f"{name} {described[name]}", milliseconds


def profile(directory: Path) -> Iterator[tuple[str, str, float]]:
    """(line, name, milliseconds) of what a profiler wrote; both write the same format."""
    from jax.profiler import ProfileData

    (file,) = directory.rglob("*.xplane.pb")
    for plane in ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                yield line.name, event.name, event.duration_ns / 1e6


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in CASES:
        run_case(*sys.argv[1:])
    else:
        main()
