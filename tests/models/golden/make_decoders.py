"""Make `gpt.npz`, `gpt2.npz`, `t5.npz`, `mt5.npz`.

    python tests/models/golden/make_decoders.py               # write them beside this file
    python tests/models/golden/make_decoders.py --compare     # what transformers reads of ours

Each holds a configuration as `transformers` writes it, random weights under their Hugging Face
names, inputs with padding, and the outputs. With `--compare` we load and save the same, and
`transformers` computes its outputs with the files saved. It needs `torch`, `transformers` and
`safetensors`, `--compare` a backend of Keras also.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from make_relatives import randomize
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
GPT_SIZES = {"vocab_size": 40, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 12}
T5_SIZES = {
    "vocab_size": 40,
    "d_model": 24,
    "d_kv": 6,  # 3 * 6 is not the width
    "d_ff": 40,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 9,
}
# Family -> configuration and model of transformers.
FAMILIES = {
    "openai-gpt": (
        transformers.OpenAIGPTConfig(**GPT_SIZES),
        transformers.OpenAIGPTLMHeadModel,
    ),
    "gpt2": (transformers.GPT2Config(**GPT_SIZES, n_inner=40), transformers.GPT2LMHeadModel),
    "t5": (transformers.T5Config(**T5_SIZES), transformers.T5ForConditionalGeneration),
    "mt5": (transformers.MT5Config(**T5_SIZES), transformers.MT5ForConditionalGeneration),
}


def random_inputs() -> tuple[np.ndarray, np.ndarray]:
    """Sources with padding, down to one token, and targets that start with 0."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(1, 12, 4).astype(int)[:, None]
    token_ids = rng.integers(1, 40, (4, 12)) * (np.arange(12) < lengths)
    decoder_token_ids = rng.integers(1, 40, (4, 9)) * (np.arange(9) > 0)
    return token_ids.astype("int32"), decoder_token_ids.astype("int32")


def outputs(directory: str, kind: type, token_ids, decoder_token_ids) -> dict[str, np.ndarray]:
    """Hidden states and logits of the model in a directory."""
    model = kind.from_pretrained(directory, attn_implementation="eager").eval()
    ids, targets = torch.tensor(token_ids).long(), torch.tensor(decoder_token_ids).long()
    given = {"attention_mask": (ids != 0).long(), "output_hidden_states": True}
    with torch.no_grad():
        if not model.config.is_encoder_decoder:
            found = model(ids, **given)
            return {
                "hidden": found.hidden_states[-1].numpy(),
                "mlm": found.logits.numpy(),
            }
        found = model(ids, decoder_input_ids=targets, **given)
    return {
        "encoder": found.encoder_last_hidden_state.numpy(),
        "hidden": found.decoder_hidden_states[-1].numpy(),
        "mlm": found.logits.numpy(),
    }


def make(family: str) -> None:
    config, kind = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config).eval()
    randomize(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # what randomize does not know as norms
            if "ln_" in name and name.endswith("weight"):
                weight.add_(1.0)
    token_ids, decoder_token_ids = random_inputs()
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        written = json.loads(Path(directory, "config.json").read_text())
        file = Path(directory, "model.safetensors")
        weights = load_file(file)
        if family == "mt5":  # a model made here has no head of its own, but the trained ones do
            head = np.random.default_rng(1).normal(size=(40, 24)) * 24**-0.5
            weights["lm_head.weight"] = head.astype("float32")
            save_file(weights, file, metadata={"format": "pt"})
        found = outputs(directory, kind, token_ids, decoder_token_ids)
    np.savez_compressed(
        HERE / f"{family}.npz",
        config=json.dumps({k: v for k, v in written.items() if k != "transformers_version"}),
        token_ids=token_ids,
        decoder_token_ids=decoder_token_ids,
        **{f"weights/{name}": value for name, value in weights.items()},
        **{f"outputs/{name}": value for name, value in found.items()},
    )
    print(f"{family}.npz: {len(weights)} weights, outputs {', '.join(found)}")


def compare(family: str) -> None:
    from keras_ext.models import build_transformer_model, save_transformer_model

    golden = np.load(HERE / f"{family}.npz")
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        Path(first, "config.json").write_text(str(golden["config"]))
        weights = {
            k.removeprefix("weights/"): golden[k] for k in golden if k.startswith("weights/")
        }
        save_file(weights, Path(first, "model.safetensors"))
        ours = build_transformer_model(first, with_mlm=True)
        save_transformer_model(ours, second)
        kind = FAMILIES[family][1]
        found = outputs(second, kind, golden["token_ids"], golden["decoder_token_ids"])
    for name, value in found.items():
        difference = np.abs(value - golden[f"outputs/{name}"]).max()
        print(f"{family}, {name}: transformers on the files we saved, off by {difference:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compare", action="store_true")
    work = compare if parser.parse_args().compare else make
    for name in FAMILIES:
        work(name)
