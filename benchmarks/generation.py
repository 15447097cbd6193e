"""Generated tokens per second: ours and `transformers.generate`, on the same random model.

    python benchmarks/generation.py --transformers hf/bin/python

The option names an interpreter with torch and transformers, which writes the models and is
the peer. GPT-2 of 12 blocks of 768 and T5 of 6 and 6 blocks of 512, both with 21,128 tokens;
prompts and sources of 32 tokens, 64 new tokens, no end. Prints for each search and batch size,
on one core: tokens per CPU second of ours on TensorFlow's graph, with XLA and on JAX, those of
the peer, and the ratios of our times to the peer's; then how many of the greedy texts are
equal. Compiling is not counted: every case generates twice before.

On AMD processors see `bert_step.py` for what to preload for PyTorch.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from measure import cpu_ms, pin_to_one_core, report, take_turns

PROMPT, NEW, VOCABULARY = 32, 64, 21128
MODELS = ("gpt2", "t5")
SEARCHES = {
    "greedy": {},
    "beam 4": {"num_beams": 4},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
}
MODES = {
    "TF graph": ("tensorflow", False),
    "TF XLA": ("tensorflow", True),
    "JAX": ("jax", True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transformers", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--turns", type=int, default=1, help="how often each case runs")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        write = [arguments.transformers, __file__, "write", directory]
        subprocess.run(write, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name in arguments.models:
            for size in arguments.batch_sizes:
                compare(name, size, directory, arguments)


def compare(name: str, size: int, directory: str, arguments: argparse.Namespace) -> None:
    model = os.path.join(directory, name)
    cases = {
        mode: (None, backend, ["ours", model, str(size), str(int(jit))])
        for mode, (backend, jit) in MODES.items()
    }
    cases["transformers"] = (arguments.transformers, "torch", ["peer", model, str(size)])
    figures = take_turns(__file__, cases, arguments.turns)
    peer = figures.pop("transformers")
    print(f"\n{name}, batch {size}: tokens per CPU second (our time / the peer's)")
    for search in SEARCHES:
        columns = [f"{size * NEW / peer[search] * 1e3:7.1f} transformers"]
        for mode, ours in figures.items():
            rate, ratio = size * NEW / ours[search] * 1e3, ours[search] / peer[search]
            columns.append(f"{rate:7.1f} {mode} ({ratio:.2f})")
        print(f"  {search:20}" + ", ".join(columns))
    theirs = json.loads(peer["texts"])
    for mode, ours in figures.items():
        same = sum(a == b for a, b in zip(json.loads(ours["texts"]), theirs, strict=True))
        print(f"  {mode}: {same} of {size} greedy texts equal the peer's", flush=True)


def prompts(size: int) -> list[list[int]]:
    """Of one length: padding would cost the peer more."""
    return np.random.default_rng(0).integers(1, VOCABULARY, (size, PROMPT)).tolist()


def ours(directory: str, size: str, jit_compile: str) -> None:
    pin_to_one_core()
    from keras_ext.generation import Generator
    from keras_ext.models import build_transformer_model

    model = build_transformer_model(directory, with_mlm=True)
    generator = Generator(model, seed=0, jit_compile=jit_compile == "1")
    texts = prompts(int(size))
    figures = {
        name: cpu_ms(lambda s=search: generator.generate(texts, NEW, **s), repeats=3)
        for name, search in SEARCHES.items()
    }
    report(**figures, texts=json.dumps(generator.generate(texts, NEW)))


def peer(directory: str, size: str) -> None:
    pin_to_one_core()
    import torch
    import transformers

    torch.manual_seed(0)
    source = "T5ForConditionalGeneration" if directory.endswith("t5") else "GPT2LMHeadModel"
    model = getattr(transformers, source).from_pretrained(directory).eval()
    inputs = torch.tensor(prompts(int(size)))

    def generate(search: dict) -> list[list[int]]:
        sampled = {"do_sample": True} if "top_k" in search else {"do_sample": False}
        outputs = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=[0] if source.startswith("T5") else None,  # as ours
            **sampled,
            **search,
        )
        return outputs[:, -NEW:].tolist()

    figures = {
        name: cpu_ms(lambda s=search: generate(s), repeats=3)
        for name, search in SEARCHES.items()
    }
    report(**figures, texts=json.dumps(generate({})))


def write(directory: str) -> None:
    """The two models, by the peer's own initialisers."""
    import torch
    import transformers

    torch.manual_seed(0)
    gpt2 = transformers.GPT2Config(
        vocab_size=VOCABULARY, eos_token_id=None, bos_token_id=None, initializer_range=0.05
    )
    t5 = transformers.T5Config(
        vocab_size=VOCABULARY, eos_token_id=None, decoder_start_token_id=0
    )
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(os.path.join(directory, "gpt2"))
    transformers.T5ForConditionalGeneration(t5).save_pretrained(os.path.join(directory, "t5"))


if __name__ == "__main__":
    kinds = {"ours": ours, "peer": peer, "write": write}
    if len(sys.argv) > 1 and sys.argv[1] in kinds:
        kinds[sys.argv[1]](*sys.argv[2:])
    else:
        main()
