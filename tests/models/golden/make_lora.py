"""Make `lora.npz` with `peft`, or compare with it live.

    python tests/models/golden/make_lora.py               # write lora.npz beside this file
    python tests/models/golden/make_lora.py --compare     # print our largest differences

The file holds random adapters as peft writes them, for the models of the other files here, and
the logits of peft for the inputs there. With `--compare`, for more models: ours with adapters
of peft, peft with adapters of ours, of the same projections as there and of some of them, and
transformers on the merged weights that we saved. It needs `peft`, `torch`, `transformers` and
`safetensors`, `--compare` a backend of Keras also.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
ATTENTION = ["query_dense", "value_dense"]
# File -> class of transformers, the layers of it with adapters, the same in ours.
FAMILIES = {
    "electra_generator": (
        transformers.ElectraForMaskedLM,
        ["query", "value"],
        ATTENTION,
    ),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        ["c_attn", "c_fc"],
        [*ATTENTION, "key_dense", "intermediate_dense"],
    ),
    "t5": (transformers.T5ForConditionalGeneration, ["q", "v"], ATTENTION),
}
FURTHER = {
    "albert": (
        transformers.AlbertForMaskedLM,
        ["query", "value", "ffn"],
        [*ATTENTION, "intermediate_dense"],
    ),
    "modernbert": (
        transformers.ModernBertForMaskedLM,
        ["Wqkv", "Wi", "Wo"],
        ["attention/", "feed_forward/"],
    ),
    "openai-gpt": (transformers.OpenAIGPTLMHeadModel, ["c_attn"], [*ATTENTION, "key_dense"]),
    "roformer": (transformers.RoFormerForMaskedLM, ["query", "value"], ATTENTION),
}


def write_base(family: str, directory: str) -> dict[str, np.ndarray]:
    """A directory with the model of another file, and its inputs."""
    golden = np.load(HERE / f"{family}.npz")
    Path(directory, "config.json").write_text(str(golden["config"]))
    weights = {
        k.removeprefix("weights/"): golden[k] for k in golden if k.startswith("weights/")
    }
    save_file(weights, Path(directory, "model.safetensors"), metadata={"format": "pt"})
    return {k: golden[k] for k in golden if k.endswith("_ids")}


def logits(model: torch.nn.Module, inputs: dict[str, np.ndarray]) -> np.ndarray:
    names = {"token_ids": "input_ids", "segment_ids": "token_type_ids"}
    if model.config.is_encoder_decoder:
        names["decoder_token_ids"] = "decoder_input_ids"
    given = {
        name: torch.tensor(inputs[key]).long() for key, name in names.items() if key in inputs
    }
    given["attention_mask"] = (given["input_ids"] != (model.config.pad_token_id or 0)).long()
    with torch.no_grad():
        return model.eval()(**given).logits.float().numpy()


def make_adapters(family: str, base: str, directory: str) -> torch.nn.Module:
    """The model of peft with random adapters, which are written."""
    kind, targets, _ = {**FAMILIES, **FURTHER}[family]
    model = kind.from_pretrained(base, attn_implementation="eager")
    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.1, target_modules=targets)
    adapted = get_peft_model(model, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.3)
    adapted.save_pretrained(directory)
    return adapted


def make() -> None:
    arrays: dict[str, np.ndarray | str] = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as base, tempfile.TemporaryDirectory() as adapter:
            inputs = write_base(family, base)
            model = make_adapters(family, base, adapter)
            config = json.loads(Path(adapter, "adapter_config.json").read_text())
            tensors = load_file(Path(adapter, "adapter_model.safetensors"))
            arrays[f"{family}/logits"] = logits(model, inputs)
        config["base_model_name_or_path"] = None
        arrays[f"{family}/config"] = json.dumps(config)
        arrays |= {f"{family}/tensors/{name}": value for name, value in tensors.items()}
    golden = HERE / "lora.npz"
    np.savez_compressed(golden, **arrays)
    print(f"{golden.name}: {golden.stat().st_size / 1024:.0f} KiB")


def ours(family: str, base: str) -> tuple:
    """Our model, and what computes its logits."""
    import keras

    from keras_ext.models import build_transformer_model

    model = build_transformer_model(base, model=family, with_mlm=True)

    def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
        return keras.ops.convert_to_numpy(model([inputs[x.name] for x in model.inputs])[-1])

    return model, run


def compare(family: str) -> Iterator[tuple[str, float]]:
    from keras_ext.models import add_lora, load_lora, save_lora, save_transformer_model

    kind, _, targets = {**FAMILIES, **FURTHER}[family]
    with tempfile.TemporaryDirectory() as root:
        base, theirs, again = (str(Path(root, name)) for name in ("base", "theirs", "again"))
        Path(base).mkdir()
        inputs = write_base(family, base)
        expected = logits(make_adapters(family, base, theirs), inputs)
        pad = json.loads(Path(base, "config.json").read_text()).get("pad_token_id") or 0
        real = inputs["token_ids"] != pad
        if expected.shape[:2] != real.shape:  # a decoder has no padding
            real = np.ones(expected.shape[:2], bool)

        def off(found: np.ndarray, expected: np.ndarray) -> float:
            return float(np.abs(found - expected)[real].max())

        def with_peft(directory: str) -> np.ndarray:
            model = kind.from_pretrained(base, attn_implementation="eager")
            return logits(PeftModel.from_pretrained(model, directory), inputs)

        model, run = ours(family, base)
        yield "base", off(run(inputs), expected)
        load_lora(model, theirs)
        yield "ours with adapters of peft", off(run(inputs), expected)
        save_lora(model, again)
        rank = json.loads(Path(again, "adapter_config.json").read_text())["r"]
        yield f"peft with them saved by us, of rank {rank}", off(with_peft(again), expected)

        for chosen in targets, targets[:1]:
            model, run = ours(family, base)
            add_lora(model, 2, chosen, alpha=3)
            rng = np.random.default_rng(0)
            for weight in model.weights:
                if "lora" in weight.name:
                    weight.assign(rng.normal(size=weight.shape) * 0.3)
            mine, merged = (
                str(Path(root, f"{name}{len(chosen)}")) for name in ("mine", "merged")
            )
            save_lora(model, mine)
            rank = json.loads(Path(mine, "adapter_config.json").read_text())["r"]
            yield (
                f"peft with ours in {chosen}, of rank {rank}",
                off(with_peft(mine), run(inputs)),
            )
            save_transformer_model(model, merged)
            whole = kind.from_pretrained(merged, attn_implementation="eager")
            yield "transformers on what we merged", off(logits(whole, inputs), run(inputs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compare", action="store_true")
    if parser.parse_args().compare:
        for family in (*FAMILIES, *FURTHER):
            for what, difference in compare(family):
                print(f"{family}, {what}: {difference:.1e}")
    else:
        make()
