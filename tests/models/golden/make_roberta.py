"""Make `roberta.npz`.

    python tests/models/golden/make_roberta.py              # write it beside this file
    python tests/models/golden/make_roberta.py --compare    # random models, both ways

It holds a configuration as `transformers` writes it, random weights under their Hugging Face
names, texts with padding before, within and behind, and the outputs. With `--compare` random
models of all three families and paddings are read by us, saved, and read by `transformers`
again. It needs `torch`, `transformers` and `safetensors`, `--compare` a backend of Keras also.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from make_relatives import randomize

GOLDEN = Path(__file__).with_name("roberta.npz")
KINDS = ("Roberta", "XLMRoberta", "Camembert")
SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "type_vocab_size": 1,
}


def random_texts(rng: np.random.Generator, length: int, pad: int, batch: int) -> np.ndarray:
    """Texts as long as may be, and such with padding anywhere, of at least one token."""
    ids = rng.choice(np.delete(np.arange(SIZES["vocab_size"]), pad), (batch, length))
    places = np.arange(length)
    for row in ids[1:]:
        start, end = sorted(rng.integers(0, length + 1, 2))
        padded = (places >= start) & (places < end) if rng.random() < 0.5 else places >= end
        padded[rng.integers(length)] = False
        row[padded] = pad
    return ids.astype("int32")


def outputs(directory: str, kind: str, token_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Hidden states and those of every head, of the model in a directory."""
    ids = torch.tensor(token_ids).long()
    found = {}
    for suffix, fields in {
        "Model": {"hidden": "last_hidden_state", "pool": "pooler_output"},
        "ForMaskedLM": {"mlm": "logits"},
    }.items():
        kinds = getattr(transformers, kind + suffix)
        model = kinds.from_pretrained(directory, attn_implementation="eager").eval()
        with torch.no_grad():
            result = model(ids, attention_mask=(ids != model.config.pad_token_id).long())
        found |= {name: getattr(result, field).numpy() for name, field in fields.items()}
    return found


def write(directory: str, kind: str, **given) -> transformers.PreTrainedConfig:
    """A random model with head and pooler."""
    config = getattr(transformers, kind + "Config")(**{**SIZES, **given})
    model = getattr(transformers, kind + "ForMaskedLM")(config)
    pooler = getattr(transformers, kind + "Model")(config).pooler
    model.base_model.pooler = pooler
    randomize(model)
    model.save_pretrained(directory)
    return config


def make() -> None:
    from safetensors.numpy import load_file

    torch.manual_seed(0)
    token_ids = random_texts(np.random.default_rng(0), 9, pad=1, batch=6)
    with tempfile.TemporaryDirectory() as directory:
        write(directory, "Roberta", max_position_embeddings=11, layer_norm_eps=1e-5)
        config = json.loads(Path(directory, "config.json").read_text())
        weights = load_file(Path(directory, "model.safetensors"))
        found = outputs(directory, "Roberta", token_ids)
    np.savez_compressed(
        GOLDEN,
        config=json.dumps(config),
        token_ids=token_ids,
        **{f"weights/{name}": value for name, value in weights.items()},
        **{f"outputs/{name}": value for name, value in found.items()},
    )
    print(f"{GOLDEN.name}: {len(weights)} weights, {GOLDEN.stat().st_size / 1024:.0f} KiB")


def compare(trials: int = 24) -> None:
    from keras import ops

    from keras_ext.models import build_transformer_model, save_transformer_model

    rng = np.random.default_rng(1)
    worst = {"ours": 0.0, "again": 0.0}
    for trial in range(trials):
        torch.manual_seed(trial)
        kind, pad, length = KINDS[trial % 3], trial % 4, int(rng.integers(1, 12))
        given = {
            "pad_token_id": pad,
            "max_position_embeddings": length + pad + 1,
            "hidden_act": ["gelu", "relu", "gelu_new"][trial % 5 % 3],
            "layer_norm_eps": float(rng.choice([1e-12, 1e-5, 1e-2])),
            "num_hidden_layers": int(rng.integers(1, 4)),
        }
        token_ids = random_texts(rng, length, pad, batch=5)
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            write(first, kind, **given)
            expected = outputs(first, kind, token_ids)
            ours = build_transformer_model(first, with_mlm=True, with_pool=True)
            report = ours.checkpoint_report
            assert (report.fresh, report.ignored) == ((), {}), report
            save_transformer_model(ours, second)
            again = outputs(second, kind, token_ids)
        names = ("hidden", "mlm", "pool")
        found = map(ops.convert_to_numpy, ours(token_ids))
        for name, value in zip(names, found, strict=True):
            off = {"ours": value, "again": again[name]}
            for key, x in off.items():
                worst[key] = max(worst[key], np.abs(x - expected[name]).max())
    print(
        f"{trials} models, greatest difference of transformers' outputs: to ours "
        f"{worst['ours']:.1e}, to its own on the files we saved {worst['again']:.1e}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compare", action="store_true")
    compare() if parser.parse_args().compare else make()
