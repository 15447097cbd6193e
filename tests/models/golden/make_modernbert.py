"""Make `modernbert.npz`.

    python tests/models/golden/make_modernbert.py              # write it beside this file
    python tests/models/golden/make_modernbert.py --compare    # what transformers reads of ours

It holds a configuration as `transformers` writes it, random weights under their Hugging Face
names, texts with padding, whose id is not 0, and the outputs, computed in float64 but for the
rotary positions. With `--compare` we load and save the same, and `transformers` computes its
outputs with the files saved. It needs `torch`, `transformers` and `safetensors`, `--compare` a
backend of Keras also.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from make_relatives import randomize
from safetensors.numpy import load_file, save_file
from transformers import ModernBertConfig, ModernBertForMaskedLM

GOLDEN = Path(__file__).with_name("modernbert.npz")
LENGTH, PAD = 11, 3
# Blocks 0 and 3 see all, the others the two tokens on either side.
CONFIG = ModernBertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=5,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=12,
    local_attention=4,
    pad_token_id=PAD,
    bos_token_id=1,
    cls_token_id=1,
    eos_token_id=2,
    sep_token_id=2,
)


def random_inputs() -> np.ndarray:
    """Texts with padding, down to one token."""
    rng = np.random.default_rng(0)
    ids = rng.choice(np.delete(np.arange(CONFIG.vocab_size), PAD), (4, LENGTH))
    ids[:, 0] = 0  # a token like others
    lengths = np.linspace(1, LENGTH, 4).astype(int)[:, None]
    return np.where(np.arange(LENGTH) < lengths, ids, PAD).astype("int32")


def outputs(directory: str, token_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Hidden states and logits of the model in a directory."""
    options = {"attn_implementation": "sdpa", "dtype": torch.float64}
    model = ModernBertForMaskedLM.from_pretrained(directory, **options).eval()
    ids = torch.tensor(token_ids).long()
    with torch.no_grad():
        mask = (ids != PAD).long()
        hidden = model.model(ids, attention_mask=mask).last_hidden_state
        logits = model(ids, attention_mask=mask).logits
    return {name: x.float().numpy() for name, x in (("hidden", hidden), ("mlm", logits))}


def make() -> None:
    torch.manual_seed(0)
    model = ModernBertForMaskedLM(CONFIG).eval()
    randomize(model)
    token_ids = random_inputs()
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        config = json.loads(Path(directory, "config.json").read_text())
        weights = load_file(Path(directory, "model.safetensors"))
        found = outputs(directory, token_ids)
    np.savez_compressed(
        GOLDEN,
        config=json.dumps(config),
        token_ids=token_ids,
        **{f"weights/{name}": value for name, value in weights.items()},
        **{f"outputs/{name}": value for name, value in found.items()},
    )
    print(f"{GOLDEN.name}: {len(weights)} weights, {GOLDEN.stat().st_size / 1024:.0f} KiB")


def compare() -> None:
    from keras_ext.models import build_transformer_model, save_transformer_model

    golden = np.load(GOLDEN)
    real = golden["token_ids"] != PAD
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        Path(first, "config.json").write_text(str(golden["config"]))
        weights = {
            k.removeprefix("weights/"): golden[k] for k in golden if k.startswith("weights/")
        }
        save_file(weights, Path(first, "model.safetensors"))
        ours = build_transformer_model(first, with_mlm=True)
        save_transformer_model(ours, second)
        found = outputs(second, golden["token_ids"])
    for name, value in found.items():
        difference = np.abs(value - golden[f"outputs/{name}"])[real].max()
        print(f"{name}: transformers on the files we saved, off by {difference:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compare", action="store_true")
    compare() if parser.parse_args().compare else make()
