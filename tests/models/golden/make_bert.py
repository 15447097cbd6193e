"""Make `bert.npz` with `transformers`, or compare with it live.

    python tests/models/golden/make_bert.py              # write bert.npz beside this file
    python tests/models/golden/make_bert.py --compare    # print our largest differences

The file holds the weights of a small random BertForPreTraining under their Hugging Face names,
inputs with padding and segments, and the outputs of `transformers`. It needs `torch`,
`transformers` and `safetensors`; the tests that read the file need none of them.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForPreTraining, BertModel

GOLDEN = Path(__file__).with_name("bert.npz")

SMALL = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "max_position_embeddings": 12,
}
MEDIUM = {
    "vocab_size": 2000,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 64,
}


def random_model(sizes: dict[str, int]) -> BertForPreTraining:
    """A model in which every weight matters: also biases and norms are random."""
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig(**sizes, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.2 if weight.ndim == 1 else weight.shape[-1] ** -0.5
            weight.normal_(std=scale).add_(1.0 if "LayerNorm.weight" in name else 0.0)
    return model


def random_inputs(sizes: dict[str, int], batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and segments with rows of all lengths, down to one token."""
    rng = np.random.default_rng(0)
    length = sizes["max_position_embeddings"]
    lengths = np.linspace(1, length, batch).astype(int)[:, None]
    positions = np.arange(length)
    ids = rng.integers(1, sizes["vocab_size"], (batch, length))
    token_ids = np.where(positions < lengths, ids, 0).astype("int32")
    segment_ids = ((positions >= lengths // 2) & (positions < lengths)).astype("int32")
    return token_ids, segment_ids


def run(model: BertForPreTraining, token_ids: np.ndarray, segment_ids: np.ndarray) -> dict:
    ids, segments = torch.tensor(token_ids).long(), torch.tensor(segment_ids).long()
    inputs = {"attention_mask": (ids != 0).long(), "token_type_ids": segments}
    with torch.no_grad():
        hidden, pooled = model.bert(ids, **inputs, return_dict=False)
        mlm, nsp = model(ids, **inputs, return_dict=False)
    outputs = {"hidden": hidden, "mlm": mlm, "nsp": nsp, "pooled": pooled}
    return {name: output.numpy() for name, output in outputs.items()}


def make() -> None:
    model = random_model(SMALL)
    token_ids, segment_ids = random_inputs(SMALL, batch=4)
    tied = set(model.all_tied_weights_keys)
    weights = {k: v.numpy() for k, v in model.state_dict().items() if k not in tied}
    np.savez_compressed(
        GOLDEN,
        token_ids=token_ids,
        segment_ids=segment_ids,
        **{f"config/{name}": size for name, size in SMALL.items()},
        **{f"weights/{name}": value for name, value in weights.items()},
        **{f"outputs/{k}": v for k, v in run(model, token_ids, segment_ids).items()},
    )
    print(f"{GOLDEN}: {GOLDEN.stat().st_size / 1024:.0f} KiB")


def compare() -> None:
    from keras_ext.models import build_transformer_model, save_transformer_model

    for sizes in (SMALL, MEDIUM):
        model = random_model(sizes)
        token_ids, segment_ids = random_inputs(sizes, batch=8)
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            ours = build_transformer_model(
                directory, directory, with_mlm=True, with_nsp=True, with_pool=True
            )
        print(ours.checkpoint_report)
        outputs = ours.predict([token_ids, segment_ids], verbose=0)
        for (name, theirs), our in zip(
            run(model, token_ids, segment_ids).items(), outputs, strict=True
        ):
            print(f"  {name}: largest difference {np.abs(our - theirs).max():.1e}")
        with tempfile.TemporaryDirectory() as directory:
            save_transformer_model(ours, directory)
            again = BertForPreTraining.from_pretrained(directory, attn_implementation="eager")
            bare = BertModel.from_pretrained(directory, attn_implementation="eager")
        state = model.state_dict()
        equal = all(
            torch.equal(state[name], value) for name, value in again.state_dict().items()
        )
        equal &= all(torch.equal(state[f"bert.{n}"], v) for n, v in bare.state_dict().items())
        print(f"  saved by us and read by transformers: {'equal' if equal else 'DIFFERENT'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compare", action="store_true", help="compare live, write nothing")
    compare() if parser.parse_args().compare else make()
