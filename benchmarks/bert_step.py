"""A fine-tune step of a small BERT: ours, keras-hub's and that of transformers.

    python benchmarks/bert_step.py
    python benchmarks/bert_step.py --keras-hub hub/bin/python --transformers hf/bin/python

The options name interpreters with keras-hub and with transformers, which may need environments
of their own; default: the one that runs this. A peer that does not import is not measured.

4 layers, hidden 256, 4 heads, feed-forward 1024, 21,128 tokens; batches of 16 full sequences
of 128. A step is forward with dropout 0.1 on hidden states and attention weights, cross-entropy
of 15 classes on the pooled first token, backward, and AdamW (fused in PyTorch). Forward alone
is without dropout. Keras models run by `train_on_batch` and `predict_on_batch` on tensors.

keras-hub's GELU is the tanh form. Ours is measured with it as well, in keras-hub's environment,
so on the same Keras, TensorFlow and JAX; the ratios to keras-hub are of that pair.

Prints for each case, on one core: CPU milliseconds of forward and step; GFLOP/s of the step;
CPU seconds that the first step took beyond a later one, to trace and compile; parameters;
kernels and versions. Then the ratios of our times to the peers'. Operations are counted as

    6 · weights of the blocks' matrices · tokens + 12 · layers · hidden · length · tokens,

that is 2 for a multiply-add and twice the forward for the backward; embeddings, heads and
everything elementwise are left out.

On AMD processors the MKL of stock PyTorch does not use AVX-512, while TensorFlow and JAX do.
Ratios to PyTorch are fair there only with a preloaded library (LD_PRELOAD) that defines
`int mkl_serv_intel_cpu_true(void) { return 1; }`.
"""

import importlib
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from measure import cpu_ms, options, pin_to_one_core, report, take_turns

LAYERS, HIDDEN, HEADS, FEED_FORWARD, VOCABULARY = 4, 256, 4, 1024, 21128
BATCH, LENGTH, CLASSES, DROPOUT = 16, 128, 15, 0.1
LEARNING_RATE, WEIGHT_DECAY = 2e-5, 0.01

CONFIG = {  # as ours and transformers read it
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": FEED_FORWARD,
    "hidden_dropout_prob": DROPOUT,
    "attention_probs_dropout_prob": DROPOUT,
}

# Keras backend and jit_compile, whose default "auto" means TF graph on a CPU, and JAX.
MODES = {"TF graph": ("tensorflow", ""), "TF XLA": ("tensorflow", "jit"), "JAX": ("jax", "jit")}
ATTENTIONS = ("eager", "sdpa")


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--keras-hub", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--transformers", default=sys.executable, metavar="PYTHON")
    arguments = parser.parse_args()
    hub, transformers = arguments.keras_hub, arguments.transformers

    cases = {}
    for mode, (backend, jit) in MODES.items():
        cases[f"ours, erf, {mode}"] = (None, backend, ["case", "ours", "gelu", jit])
        cases[f"ours, tanh, {mode}"] = (hub, backend, ["case", "ours", "gelu_new", jit])
        cases[f"keras-hub, tanh, {mode}"] = (hub, backend, ["case", "keras-hub", "", jit])
    for attention in ATTENTIONS:
        peer = ["case", "transformers", attention, ""]
        cases[f"transformers, erf, {attention}"] = (transformers, "torch", peer)

    needs = {
        "keras-hub": (hub, ["keras_hub"]),
        "transformers": (transformers, ["torch", "transformers"]),
    }
    absent = [peer for peer, (python, names) in needs.items() if not imports(python, names)]
    cases = {name: case for name, case in cases.items() if case[2][1] not in absent}
    medians = take_turns(__file__, cases, arguments.turns)
    figures = {name: case for name, case in medians.items() if case}  # of a failed one, none
    print(processor())
    print_table(figures)
    print_ratios(figures)
    for peer in absent:
        print(f"{peer} not installed: pip install {' '.join(needs[peer][1])}")


def imports(python: str, modules: list[str]) -> bool:
    done = subprocess.run([python, "-c", f"import {', '.join(modules)}"], capture_output=True)
    return done.returncode == 0


def processor() -> str:
    text = Path("/proc/cpuinfo").read_text()
    model, vendor = (
        re.search(rf"^{field}\s*: (.+)$", text, re.MULTILINE)[1]
        for field in ("model name", "vendor_id")
    )
    return f"{model} ({vendor}), {'with' if 'avx512f' in text else 'without'} AVX-512"


def print_table(figures: dict) -> None:
    tokens = BATCH * LENGTH
    weights = LAYERS * (4 * HIDDEN**2 + 2 * HIDDEN * FEED_FORWARD)
    gflop = (6 * weights + 12 * LAYERS * HIDDEN * LENGTH) * tokens / 1e9
    print(
        f"{'case':26}{'forward ms':>11}{'step ms':>9}{'GFLOP/s':>9}{'compile s':>11}"
        f"{'parameters':>12}  kernels; versions"
    )
    for name, case in figures.items():
        print(
            f"{name:26}{case['forward_ms']:11.1f}{case['step_ms']:9.1f}"
            f"{1e3 * gflop / case['step_ms']:9.1f}{case['compile_s']:11.1f}"
            f"{case['parameters']:12,}  {case['kernels']}; {case['versions']}"
        )


def print_ratios(figures: dict) -> None:
    print("ours / peer: step, forward")
    pairs = [(f"ours, tanh, {mode}", f"keras-hub, tanh, {mode}") for mode in MODES]
    pairs += [
        (f"ours, erf, {mode}", f"transformers, erf, {attention}")
        for mode in MODES
        for attention in ATTENTIONS
    ]
    for ours, peer in pairs:
        if {ours, peer} <= figures.keys():
            step, forward = (
                figures[ours][key] / figures[peer][key] for key in ("step_ms", "forward_ms")
            )
            print(f"{ours:20} / {peer:26}{step:6.2f}{forward:6.2f}")


def run_case(model: str, variant: str, jit: str) -> None:
    pin_to_one_core()
    if model == "transformers":
        step, forward, description = transformers_case(attention=variant)
    else:
        step, forward, description = keras_case(model, variant, bool(jit))
    start = time.process_time()
    step()
    first = time.process_time() - start
    step_ms = cpu_ms(step)
    report(
        step_ms=step_ms,
        forward_ms=cpu_ms(forward),
        compile_s=first - step_ms / 1e3,
        **description,
    )


def keras_case(
    library: str, activation: str, jit: bool
) -> tuple[Callable[[], object], Callable[[], object], dict]:
    """A step, a forward pass, and what the table says of them."""
    import keras

    encoder, pooled = our_encoder(activation) if library == "ours" else keras_hub_encoder()
    model = keras.Model(encoder.inputs, keras.layers.Dense(CLASSES)(pooled))
    model.compile(
        keras.optimizers.AdamW(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit,
    )
    token_ids, labels = map(keras.ops.convert_to_tensor, batch())
    inputs = {
        "token_ids": token_ids,
        "segment_ids": keras.ops.zeros_like(token_ids),
        "padding_mask": keras.ops.ones_like(token_ids),
    }
    x = [inputs[tensor.name] for tensor in encoder.inputs]
    modules = [keras.backend.backend(), "keras"]
    description = {
        "parameters": model.count_params(),
        "kernels": "XLA" if jit else tensorflow_kernels(),
        "versions": versions(*modules, *(["keras_hub"] if library == "keras-hub" else [])),
    }
    return (
        lambda: model.train_on_batch(x, labels),
        lambda: model.predict_on_batch(x),
        description,
    )


def our_encoder(activation: str) -> tuple:
    from keras_ext.models import build_transformer_model

    encoder = build_transformer_model(CONFIG | {"hidden_act": activation}, with_pool=True)
    return encoder, encoder.outputs[1]


def keras_hub_encoder() -> tuple:
    import keras_hub

    encoder = keras_hub.models.BertBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=LAYERS,
        num_heads=HEADS,
        hidden_dim=HIDDEN,
        intermediate_dim=FEED_FORWARD,
        dropout=DROPOUT,
    )
    return encoder, encoder.output["pooled_output"]


def tensorflow_kernels() -> str:
    from tensorflow.python.util import _pywrap_util_port

    return "oneDNN" if _pywrap_util_port.IsMklEnabled() else "Eigen"


def transformers_case(
    attention: str,
) -> tuple[Callable[[], object], Callable[[], object], dict]:
    """A step, a forward pass, and what the table says of them."""
    import torch
    from transformers import BertConfig, BertModel

    encoder = BertModel(BertConfig(**CONFIG, attn_implementation=attention))
    head = torch.nn.Linear(HIDDEN, CLASSES)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    token_ids, labels = map(torch.from_numpy, batch())
    inputs = {
        "input_ids": token_ids,
        "token_type_ids": torch.zeros_like(token_ids),
        "attention_mask": torch.ones_like(token_ids),
    }

    def step():
        encoder.train()
        logits = head(encoder(**inputs).pooler_output)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.inference_mode()
    def forward():
        encoder.eval()
        head(encoder(**inputs).pooler_output)

    description = {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "kernels": f"MKL, ATen with {torch.backends.cpu.get_cpu_capability()}",
        "versions": versions("torch", "transformers"),
    }
    return step, forward, description


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Random token ids without padding, id 0, and labels."""
    random = np.random.default_rng(0)
    token_ids = random.integers(1, VOCABULARY, (BATCH, LENGTH), "int32")
    return token_ids, random.integers(0, CLASSES, BATCH)


def versions(*modules: str) -> str:
    return ", ".join(f"{name} {importlib.import_module(name).__version__}" for name in modules)


if __name__ == "__main__":
    if sys.argv[1:2] == ["case"]:
        run_case(*sys.argv[2:])
    else:
        main()
