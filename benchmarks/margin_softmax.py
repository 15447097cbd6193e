"""AM-Softmax over many classes: ours and that of pytorch-metric-learning.

    python benchmarks/margin_softmax.py
    python benchmarks/margin_softmax.py --classes 20000 --turns 5

Loss and its gradients, by the features and by the class directions, of a batch of 64 features
of size 512: cosines, margin 0.35, scale 64, log-sum-exp. Ours is `CosineDense` and `AMSoftmax`,
the peer is `CosFaceLoss`, which is both in one. Plain PyTorch is the least that one would write
by hand: `normalize`, `linear`, the margin subtracted at the label, `cross_entropy`.

Prints for each case, on one core: CPU milliseconds; compile seconds (the first call beyond a
later one); MiB at the peak beyond parameters, features and results, where XLA tells, next to
those of one matrix of cosines; the loss. Then the ratios of our times to the peer's.

On AMD processors the MKL of stock PyTorch does not use AVX-512, while TensorFlow and JAX do.
Ratios to PyTorch are fair there only with a preloaded library (LD_PRELOAD) that defines
`int mkl_serv_intel_cpu_true(void) { return 1; }`.

At 20,000 classes the weights are 39 MiB. glibc maps blocks of more than 32 MiB anew at each
allocation, and page faults take up to two thirds of the time, most in PyTorch. Without them:
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=10000000000 MALLOC_TOP_PAD_=268435456.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from measure import cpu_ms, pin_to_one_core, report, take_turns

BATCH, DIM, MARGIN, SCALE = 64, 512, 0.35, 64.0
CLASSES = (1000, 20000)

# Keras backend and what compiles it.
OURS = {"TF graph": "tensorflow", "TF XLA": "tensorflow", "JAX": "jax"}
PEERS = ("pytorch-metric-learning", "plain PyTorch")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES)
    parser.add_argument("--turns", type=int, default=3, help="how often each case runs")
    arguments = parser.parse_args()
    for classes in arguments.classes:
        cases = {
            name: (None, OURS.get(name, "torch"), ["case", name, str(classes)])
            for name in (*OURS, *PEERS)
        }
        figures = take_turns(__file__, cases, arguments.turns)
        print_table(classes, {name: case for name, case in figures.items() if case})


def print_table(classes: int, figures: dict) -> None:
    matrix = BATCH * classes * 4 / 2**20
    print(f"{classes:,} classes, one matrix of cosines {matrix:.2f} MiB")
    print(f"{'case':26}{'ms':>8}{'compile s':>11}{'peak MiB':>10}{'loss':>10}")
    for name, case in figures.items():
        peak = "-" if case["peak_mib"] is None else f"{case['peak_mib']:.2f}"
        print(f"{name:26}{case['ms']:8.1f}{case['compile_s']:11.1f}{peak:>10}", end="")
        print(f"{case['loss']:10.4f}")
    for peer in figures.keys() & set(PEERS):
        ratios = {
            name: figures[name]["ms"] / figures[peer]["ms"] for name in OURS if name in figures
        }
        print(f"ours / {peer}:", ", ".join(f"{n} {ratio:.2f}" for n, ratio in ratios.items()))


def run_case(name: str, classes: int) -> None:
    pin_to_one_core()
    random = np.random.default_rng(0)
    features = random.normal(size=(BATCH, DIM)).astype("float32")
    kernel = random.normal(size=(DIM, classes)).astype("float32")
    labels = random.integers(0, classes, BATCH)
    make = {"TF graph": tensorflow, "TF XLA": tensorflow, "JAX": jax}.get(name, pytorch)
    step, peak = make(name, features, kernel, labels)
    start = time.process_time()
    loss = step()
    first = time.process_time() - start
    ms = cpu_ms(step, repeats=15)
    report(ms=ms, compile_s=first - ms / 1e3, peak_mib=peak(), loss=float(loss))


def our_loss(features, kernel, labels):
    from keras_ext.layers.cosine import cosine_scores
    from keras_ext.losses.margin_softmax import AMSoftmax

    return AMSoftmax(MARGIN, SCALE)(labels, cosine_scores(features, kernel))


def tensorflow(name: str, *arrays: np.ndarray) -> tuple[Callable, Callable]:
    import tensorflow as tf

    features, kernel, labels = map(tf.constant, arrays)

    @tf.function(jit_compile=name == "TF XLA")
    def gradients(features, kernel):
        with tf.GradientTape() as tape:
            tape.watch([features, kernel])
            loss = our_loss(features, kernel, labels)
        return loss, tape.gradient(loss, [features, kernel])

    return lambda: gradients(features, kernel)[0].numpy(), lambda: None


def jax(name: str, *arrays: np.ndarray) -> tuple[Callable, Callable]:
    import jax

    features, kernel, labels = map(jax.numpy.asarray, arrays)
    gradients = jax.jit(jax.value_and_grad(our_loss, argnums=(0, 1)))

    def step():
        return jax.block_until_ready(gradients(features, kernel, labels))[0]

    def peak():
        compiled = gradients.lower(features, kernel, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 2**20

    return step, peak


def pytorch(name: str, features: np.ndarray, kernel: np.ndarray, labels: np.ndarray) -> tuple:
    import torch

    labels = torch.from_numpy(labels)
    features = torch.from_numpy(features).requires_grad_()
    if name == "plain PyTorch":
        kernel = torch.from_numpy(kernel.T.copy()).requires_grad_()

        def loss_fn(features, labels):
            normalize, linear = torch.nn.functional.normalize, torch.nn.functional.linear
            logits = SCALE * linear(normalize(features), normalize(kernel))
            logits[torch.arange(BATCH), labels] -= SCALE * MARGIN
            return torch.nn.functional.cross_entropy(logits, labels)

    else:
        from pytorch_metric_learning.losses import CosFaceLoss

        loss_fn = CosFaceLoss(kernel.shape[1], DIM, margin=MARGIN, scale=SCALE)
        loss_fn.W.data = torch.from_numpy(kernel)
        kernel = loss_fn.W

    def step():
        features.grad = kernel.grad = None
        loss = loss_fn(features, labels)
        loss.backward()
        return loss.item()

    return step, lambda: None


if __name__ == "__main__":
    if sys.argv[1:2] == ["case"]:
        run_case(sys.argv[2], int(sys.argv[3]))
    else:
        main()
