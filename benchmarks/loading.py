"""Load a checkpoint of BERT-base: ours and that of transformers.

    python benchmarks/loading.py --transformers hf/bin/python

The option names an interpreter with torch and transformers, which writes the checkpoint (random
weights, safetensors, 400 MB) and is the peer. Both build the encoder with its pooled output,
load it and sum each weight, so that all are really read, in a process of its own. Prints CPU
seconds of that on one core, the peak of the memory above what the imports took, and the ratios
of ours to the peer's.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import options, pin_to_one_core, report, take_turns


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--transformers", default=sys.executable, metavar="PYTHON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        write = [arguments.transformers, __file__, "write", directory]
        subprocess.run(write, check=True, capture_output=True)
        cases = {name: (None, name, ["ours", directory]) for name in ("tensorflow", "jax")} | {
            "transformers": (arguments.transformers, "torch", ["peer", directory])
        }
        figures = take_turns(__file__, cases, arguments.turns)
    peer = figures["transformers"]
    for name, case in figures.items():
        seconds, megabytes = case["seconds"] / peer["seconds"], case["mb"] / peer["mb"]
        print(
            f"{name:14}{case['seconds']:6.2f} s ({seconds:.2f}){case['mb']:8.0f} MB "
            f"({megabytes:.2f})"
        )


def measured(load) -> None:
    """Report what a function takes."""
    before, start = peak(), time.process_time()
    load()
    report(seconds=time.process_time() - start, mb=peak() - before)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(directory: str) -> None:
    pin_to_one_core()
    import keras

    from keras_ext.models import build_transformer_model

    # What is imported at the first model is no loading.
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    build_transformer_model({"vocab_size": 9, "intermediate_size": 4, **sizes})

    def load() -> None:
        model = build_transformer_model(directory, with_pool=True)
        for weight in model.weights:
            keras.ops.sum(weight)

    measured(load)


def peer(directory: str) -> None:
    pin_to_one_core()
    import torch
    import transformers

    torch.zeros((2, 2)) + 1
    kind = transformers.BertModel  # imported here, not while it is measured

    def load() -> None:
        for weight in kind.from_pretrained(directory).parameters():
            weight.detach().numpy().sum()

    measured(load)


def write(directory: str) -> None:
    import transformers

    config = transformers.BertConfig(vocab_size=21128)
    transformers.BertModel(config).save_pretrained(directory)


if __name__ == "__main__":
    kinds = {"ours": ours, "peer": peer, "write": write}
    if len(sys.argv) > 1 and sys.argv[1] in kinds:
        kinds[sys.argv[1]](*sys.argv[2:])
    else:
        main()
