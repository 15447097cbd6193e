"""Attention in linear time: ours, softmax attention, and the peers, as texts grow.

    python benchmarks/attention.py --peers path/to/python
    python benchmarks/attention.py --peers path/to/python --lengths 2048 --turns 5

The attention alone, without projections: queries, keys and values of one text of n tokens, 4
heads of 64, float32, in the order (text, token, head, component) that projections give. CPU
milliseconds of one core, forward and forward with the gradients of all three; MiB at the peak
of the process beyond that of the same case at the shortest length, so without libraries and
compilation. Then decoding, one token of a decoder of width 256 with projections, at different
lengths of what came before.

    softmax          all pairs; ours by `keras.ops.dot_product_attention`, PyTorch's fused
    efficient        softmax of queries over features, of keys over tokens: `LinearAttention`
                     with feature_map="softmax", and linear-attention-transformer
    causal           φ = elu + 1: `LinearAttention`, and fast-transformers, whose kernel is in
                     C++. linear-attention-transformer's causal form is here to be complete: in
                     it a token does not see its own bucket
    favor            256 positive features: `FavorAttention`, and performer-pytorch, whose
                     causal form on a CPU is left out beyond 2,048 tokens, where it takes GiB

The peers need an environment of their own, with PyTorch, linear-attention-transformer,
performer-pytorch and pytorch-fast-transformers; --peers names its interpreter.

On AMD processors the MKL of stock PyTorch does not use AVX-512, while TensorFlow and JAX do.
Ratios to PyTorch are fair there only with a preloaded library (LD_PRELOAD) that defines
`int mkl_serv_intel_cpu_true(void) { return 1; }`.

XLA takes the memory of a whole call at once, and glibc maps blocks of more than 32 MiB anew at
each allocation: from n = 8,192 on, page faults are a part of our times. Without them:
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=10000000000 MALLOC_TOP_PAD_=268435456.
"""

import argparse
import resource
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from measure import cpu_ms, pin_to_one_core, report, take_turns

HEADS, SIZE, FEATURES = 4, 64, 256
LENGTHS = (512, 2048, 8192)
OURS = {"TF graph": "tensorflow", "TF XLA": "tensorflow", "JAX": "jax"}
KINDS = ("softmax", "softmax causal", "efficient", "causal", "favor", "favor causal")
# Kind -> the peers that compute the same, of which the first is the one to compare with.
PEERS = {
    "softmax": ["torch"],
    "softmax causal": ["torch"],
    "efficient": ["linear-attention-transformer"],
    "causal": ["fast-transformers", "linear-attention-transformer"],
    "favor": ["performer-pytorch"],
    "favor causal": ["performer-pytorch"],
}
TOO_LONG = {("performer-pytorch", "favor causal"): 2048}
DECODED = ("softmax causal", "causal", "favor causal")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--peers", metavar="PYTHON", help="interpreter of their environment")
    add("--lengths", type=int, nargs="+", default=LENGTHS, help="n")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, help="which to measure")
    add("--turns", type=int, default=3, help="how often each case runs")
    arguments = parser.parse_args()
    cases = {}
    for kind in arguments.kinds:
        others = PEERS[kind] if arguments.peers else []
        for length in sorted(arguments.lengths):
            for who in (*OURS, *others):
                if length <= TOO_LONG.get((who, kind), length):
                    python = None if who in OURS else arguments.peers
                    case = ["case", who, kind, str(length)]
                    cases[kind, length, who] = (python, OURS.get(who, "torch"), case)
    figures = take_turns(__file__, cases, arguments.turns)
    for kernels in sorted({case["kernels"] for case in figures.values() if case}):
        print(kernels)
    for kind in arguments.kinds:
        print_table(kind, {k[1:]: case for k, case in figures.items() if k[0] == kind})
    decoded = [kind for kind in DECODED if kind in arguments.kinds]
    cases = {
        (kind, who, length): (None, OURS[who], ["decode", who, kind, str(length)])
        for kind in decoded
        for who in ("TF XLA", "JAX")
        for length in sorted(arguments.lengths)
    }
    print("\none token of a decoder, microseconds, after", *sorted(arguments.lengths), "tokens")
    figures = take_turns(__file__, cases, arguments.turns)
    for kind in decoded:
        for who in ("TF XLA", "JAX"):
            row = (f"{1e3 * f['ms']:8.0f}" for k, f in figures.items() if k[:2] == (kind, who))
            print(f"{kind:16}{who:10}", *row)


def print_table(kind: str, figures: dict) -> None:
    print(f"\n{kind:30}{'n':>6}{'forward':>10}{'+ backward':>12}{'MiB':>8}")
    lengths = sorted({length for length, _ in figures})
    for (length, who), case in figures.items():
        least = figures[lengths[0], who]
        if case and least:
            print(f"{who:30}{length:6}{case['forward']:10.2f}{case['backward']:12.2f}", end="")
            print(f"{case['peak'] - least['peak']:8.0f}")
    for length in lengths:
        for peer in PEERS[kind]:
            other = figures.get((length, peer))
            ratios = (
                f"{who} {figures[length, who]['forward'] / other['forward']:.2f}, "
                f"{figures[length, who]['backward'] / other['backward']:.2f}"
                for who in OURS
                if other and figures[length, who]
            )
            if text := "; ".join(ratios):
                print(f"ours / {peer} at {length}: {text}")


def run_case(who: str, kind: str, length: int) -> None:
    pin_to_one_core()
    random = np.random.default_rng(0)
    arrays = random.normal(size=(4, 1, length, HEADS, SIZE)).astype("float32")
    make = {"TF graph": tensorflow, "TF XLA": tensorflow, "JAX": jax}.get(who, pytorch)
    forward, both, kernels = make(who, kind, *arrays)
    repeats = 7 if length > 2048 else 15
    times = {"forward": cpu_ms(forward, repeats), "backward": cpu_ms(both, repeats)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report(**times, peak=peak, kernels=kernels)


def our_layer(kind: str):
    from keras_ext import layers

    causal = "causal" in kind
    if "softmax" in kind:
        return layers.MultiHeadAttention(HEADS, SIZE, causal=causal)
    if "favor" in kind:
        return layers.FavorAttention(HEADS, SIZE, num_features=FEATURES, causal=causal, seed=0)
    feature_map = "elu" if causal else "softmax"
    return layers.LinearAttention(HEADS, SIZE, feature_map=feature_map, causal=causal)


def our_attention(kind: str) -> Callable:
    layer = our_layer(kind)
    width = (1, None, HEADS * SIZE)
    layer.build(width, width)
    causal = "causal" in kind
    return lambda *heads: layer.attend(*heads, None, None, None, causal=causal, training=False)


def tensorflow(who: str, kind: str, *arrays: np.ndarray) -> tuple[Callable, Callable, str]:
    import tensorflow as tf

    *inputs, factor = map(tf.constant, arrays)
    attention, jit = our_attention(kind), who == "TF XLA"

    @tf.function(jit_compile=jit)
    def gradients(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = tf.reduce_sum(attention(*inputs) * factor)
        return tape.gradient(loss, inputs)

    forward = tf.function(attention, jit_compile=jit)
    kernels = "XLA, its own and Eigen" if jit else "Eigen, oneDNN"
    return (
        lambda: forward(*inputs).numpy(),
        lambda: [g.numpy() for g in gradients(*inputs)],
        f"{who}: TensorFlow {tf.__version__}, {kernels}",
    )


def jax(who: str, kind: str, *arrays: np.ndarray) -> tuple[Callable, Callable, str]:
    import jax

    *inputs, factor = map(jax.numpy.asarray, arrays)
    attention = our_attention(kind)
    forward = jax.jit(attention)
    loss = lambda *inputs: jax.numpy.sum(attention(*inputs) * factor)  # noqa: E731
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    return (
        lambda: jax.block_until_ready(forward(*inputs)),
        lambda: jax.block_until_ready(gradients(*inputs)),
        f"{who}: JAX {jax.__version__}, XLA, its own and Eigen",
    )


def pytorch(who: str, kind: str, *arrays: np.ndarray) -> tuple[Callable, Callable, str]:
    import os

    import torch

    *inputs, factor = (torch.from_numpy(x).requires_grad_(i < 3) for i, x in enumerate(arrays))
    attention = peer_attention(who, kind)
    if who != "fast-transformers":  # which has the heads where we have them
        core = attention

        def attention(*inputs):
            return core(*(x.transpose(1, 2) for x in inputs)).transpose(1, 2).contiguous()

    def forward():
        with torch.no_grad():
            attention(*inputs)

    def both():
        for x in inputs:
            x.grad = None
        (attention(*inputs) * factor).sum().backward()

    preloaded = ", preloaded library" if os.environ.get("LD_PRELOAD") else ""
    capability = torch.backends.cpu.get_cpu_capability()
    return forward, both, f"peers: PyTorch {torch.__version__}, MKL, {capability}{preloaded}"


def peer_attention(who: str, kind: str) -> Callable:
    import torch

    causal = "causal" in kind
    if who == "torch":
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return lambda q, k, v: sdpa(q, k, v, is_causal=causal)
    if who == "linear-attention-transformer":
        from linear_attention_transformer import linear_attention_transformer as peer

        return peer.causal_linear_attn if causal else peer.linear_attn
    if who == "performer-pytorch":
        from performer_pytorch import FastAttention

        torch.manual_seed(0)
        return FastAttention(SIZE, nb_features=FEATURES, causal=causal)
    from fast_transformers.attention.causal_linear_attention import causal_linear

    def attention(q, k, v):
        q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
        # What its `CausalLinearAttention` does, but for the masks.
        total = torch.einsum("nlhi,nlhi->nlh", q, k.cumsum(1)) + 1e-6
        return causal_linear(q, k, v) / total[..., None]

    return attention


def decode(who: str, kind: str, length: int) -> None:
    """One more token; what came before are `length` tokens of zeros, which cost the same."""
    pin_to_one_core()
    import keras

    layer, width = our_layer(kind), HEADS * SIZE
    layer.build((1, None, width), (1, None, width))
    x = keras.random.normal((1, 1, width), seed=0)
    sizes = {"max_length": length} if "softmax" in kind else {}
    state = layer.initial_state(1, **sizes)
    if keras.backend.backend() == "jax":
        import jax

        # The cache is updated in place, as a decoder does.
        step, wait = jax.jit(layer.step, donate_argnums=1), jax.block_until_ready
    else:
        import tensorflow as tf

        step = tf.function(layer.step, jit_compile=True)
        wait = lambda results: results[0].numpy()  # noqa: E731

    def one():
        nonlocal state
        output, state = step(x, state)
        wait((output, state))

    def hundred():
        for _ in range(100):
            one()

    report(ms=cpu_ms(hundred, repeats=7, warmup=1) / 100)


if __name__ == "__main__":
    if sys.argv[1:2] in (["case"], ["decode"]):
        run = run_case if sys.argv[1] == "case" else decode
        run(*sys.argv[2:4], int(sys.argv[4]))
    else:
        main()
