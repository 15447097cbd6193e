"""Make `albert.npz`, `electra.npz`, `electra_generator.npz`, `roformer.npz`.

    python tests/models/golden/make_relatives.py               # write them beside this file
    python tests/models/golden/make_relatives.py --compare     # what transformers reads of ours

Each holds a configuration as `transformers` writes it, random weights under their Hugging Face
names, inputs with padding and segments, and the outputs. With `--compare` we load and save the
same, and `transformers` computes its outputs with the files saved. It needs `torch`,
`transformers` and `safetensors`, `--compare` a backend of Keras also.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from make_bert import random_inputs

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 40,
    "embedding_size": 8,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "max_position_embeddings": 12,
}
# Family -> configuration, and by head the class of transformers and its output.
FAMILIES = {
    "albert": (
        transformers.AlbertConfig(**SIZES, num_hidden_groups=2),
        {
            "mlm": (transformers.AlbertForPreTraining, "prediction_logits"),
            "nsp": (transformers.AlbertForPreTraining, "sop_logits"),
            "pool": (transformers.AlbertModel, "pooler_output"),
        },
    ),
    "electra": (
        transformers.ElectraConfig(**SIZES),
        {"discriminator": (transformers.ElectraForPreTraining, "logits")},
    ),
    "electra_generator": (
        transformers.ElectraConfig(**SIZES),
        {"mlm": (transformers.ElectraForMaskedLM, "logits")},
    ),
    "roformer": (
        transformers.RoFormerConfig(**SIZES),
        {"mlm": (transformers.RoFormerForMaskedLM, "logits")},
    ),
}


def randomize(model: torch.nn.Module) -> None:
    """Also biases and norms are to matter."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.requires_grad:  # RoFormer's table of sinusoids
                continue
            scale = 0.2 if weight.ndim == 1 else weight.shape[-1] ** -0.5
            norm = "orm.weight" in name
            weight.normal_(std=scale).add_(1.0 if norm else 0.0)


def outputs(directory: str, heads: dict, token_ids, segment_ids) -> dict[str, np.ndarray]:
    """The hidden states and those of every head, of the model in a directory."""
    ids, segments = torch.tensor(token_ids).long(), torch.tensor(segment_ids).long()
    inputs = {"attention_mask": (ids != 0).long(), "token_type_ids": segments}
    found = {}
    for head, (kind, name) in heads.items():
        model = kind.from_pretrained(directory, attn_implementation="eager").eval()
        with torch.no_grad():
            found[head] = getattr(model(ids, **inputs), name).numpy()
            trunk = model.base_model(ids, **inputs)
        found["hidden"] = trunk.last_hidden_state.numpy()
    return found


def make(family: str) -> None:
    config, heads = FAMILIES[family]
    torch.manual_seed(0)
    model = next(iter(heads.values()))[0](config).eval()
    randomize(model)
    token_ids, segment_ids = random_inputs(SIZES, batch=4)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        found = outputs(directory, heads, token_ids, segment_ids)
    tied = set(model.all_tied_weights_keys)
    weights = {k: v.numpy() for k, v in model.state_dict().items() if k not in tied}
    np.savez_compressed(
        HERE / f"{family}.npz",
        config=json.dumps(config.to_diff_dict()),
        token_ids=token_ids,
        segment_ids=segment_ids,
        **{f"weights/{name}": value for name, value in weights.items()},
        **{f"outputs/{name}": value for name, value in found.items()},
    )
    print(f"{family}.npz: {len(weights)} weights, outputs {', '.join(found)}")


def compare(family: str) -> None:
    from safetensors.numpy import save_file

    from keras_ext.models import build_transformer_model, save_transformer_model

    golden = np.load(HERE / f"{family}.npz")
    _, heads = FAMILIES[family]
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        Path(first, "config.json").write_text(str(golden["config"]))
        weights = {
            k.removeprefix("weights/"): golden[k] for k in golden if k.startswith("weights/")
        }
        save_file(weights, Path(first, "model.safetensors"))
        flags = {f"with_{head}": True for head in heads}
        ours = build_transformer_model(first, model=family, **flags)
        save_transformer_model(ours, second)
        found = outputs(second, heads, golden["token_ids"], golden["segment_ids"])
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
