"""Adapters: against peft (golden arrays), and against models with W0 + s A B in NumPy."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from families import SEGMENTS, TOKENS, random_model, run, values_of
from keras import ops
from models.small_bert import SIZES

from keras_ext.generation.cached_model import CachedModel
from keras_ext.layers.every import every_layer
from keras_ext.models import (
    add_lora,
    build_transformer_model,
    condition_norms,
    extend_positions,
    load_checkpoint,
    load_lora,
    merge_lora,
    rename_layers,
    replace_attention,
    save_lora,
    save_transformer_model,
    select_blocks,
    select_tokens,
    share_blocks,
)
from keras_ext.optimizers import layerwise_decay

safetensors = pytest.importorskip("safetensors.numpy")

GOLDEN = Path(__file__).with_name("golden")
TARGETS = ["query_dense", "intermediate_dense", "mlm_dense", "token_embedding"]


def randomize_adapters(model, seed=1):
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if "lora" in weight.name:
            weight.assign(rng.normal(size=weight.shape) * 0.3)


def adapted(family, targets=("query_dense", "value_dense"), **options):
    """A model with adapters, and one without that has W0 + s A B."""
    model, merged = (random_model(family, **options) for _ in range(2))
    add_lora(model, 2, targets, alpha=3)
    randomize_adapters(model)
    weights = {weight.path: weight for weight in merged.weights}
    for layer in every_layer(model):
        for kind in ("kernel", "embeddings"):
            if getattr(layer, f"lora_{kind}_a", None) is not None:
                a, b = (ops.convert_to_numpy(getattr(layer, f"lora_{kind}_{x}")) for x in "ab")
                weight = weights[f"{layer.path}/{kind}"]
                weight.assign(ops.convert_to_numpy(weight) + 3 / 2 * a @ b)
    return model, merged


def close(found, expected, atol=1e-5):
    for x, y in zip(*map(keras.tree.flatten, (found, expected)), strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


@pytest.fixture(scope="module")
def bert():
    return adapted("bert", TARGETS, with_mlm=True)


# ------------------------------------------------------------------ the format of peft


def golden_model(family, directory):
    golden = np.load(GOLDEN / f"{family}.npz")
    (directory / "config.json").write_text(str(golden["config"]))
    weights = {
        k.removeprefix("weights/"): golden[k] for k in golden if k.startswith("weights/")
    }
    safetensors.save_file(weights, directory / "model.safetensors")
    return golden, build_transformer_model(directory, model=family, with_mlm=True)


def write_adapter(directory, config, tensors):
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    safetensors.save_file(tensors, directory / "adapter_model.safetensors")


@pytest.mark.parametrize("family", ["electra_generator", "gpt2", "t5"])
def test_equals_peft(family, tmp_path):
    golden, model = golden_model(family, tmp_path)
    lora = np.load(GOLDEN / "lora.npz")
    tensors = {
        k.rpartition("/")[2]: lora[k] for k in lora if k.startswith(f"{family}/tensors/")
    }
    # A model of transformers without heads has no prefix.
    given = {k.replace("model.electra.", "model."): v for k, v in tensors.items()}
    write_adapter(tmp_path / "peft", json.loads(str(lora[f"{family}/config"])), given)
    load_lora(model, tmp_path / "peft")
    logits = ops.convert_to_numpy(model([golden[x.name] for x in model.inputs])[-1])
    expected = lora[f"{family}/logits"]
    real = golden["token_ids"] != 0 if family != "t5" else np.ones(expected.shape[:2], bool)
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-5)

    save_lora(model, tmp_path / "ours")
    found = safetensors.load_file(tmp_path / "ours/adapter_model.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 5)
    assert config["fan_in_fan_out"] == (family == "gpt2")
    suffixes = tuple(json.loads(str(lora[f"{family}/config"]))["target_modules"])
    assert all(name.endswith(suffixes) for name in config["target_modules"])


@pytest.mark.parametrize("family", ["albert", "modernbert", "gpt2"])
def test_what_is_saved_is_loaded(family, tmp_path):
    """Also projections with A of their own that are one matrix elsewhere."""
    model, merged = adapted(family, with_mlm=True)
    save_lora(model, tmp_path)
    again = random_model(family, with_mlm=True)
    load_lora(again, tmp_path)
    close(run(again), run(merged))
    # Not more than what is trained of a model that was loaded, or has adapters.
    load_lora(again, tmp_path)
    paths = {weight.path for weight in again.trainable_weights}
    assert paths >= {weight.path for weight in model.trainable_weights}
    assert all("lora" in path for path in paths)


def test_files_that_do_not_fit_change_nothing(tmp_path):
    model = random_model("bert", with_mlm=True)
    add_lora(model, 2)
    save_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    first = next(iter(tensors))
    other = random_model("bert", with_mlm=True)
    before, trainable = run(other), len(other.trainable_weights)

    def refused(message, change=None, tensors=tensors, model=other):
        write_adapter(tmp_path / "wrong", {**config, **(change or {})}, tensors)
        with pytest.raises(ValueError, match=message):
            load_lora(model, tmp_path / "wrong")

    for change in (
        {"use_dora": True},
        {"use_rslora": True},
        {"rank_pattern": {"query": 4}},
        {"alpha_pattern": {"query": 4}},
        {"modules_to_save": ["classifier"]},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"of_the_future": 0.5},
    ):
        refused(f"not plain LoRA: {next(iter(change))}=", change)
    refused("peft_type='LOHA'", {"peft_type": "LOHA"})
    refused("r must be", {"r": None})
    refused("needs", {"r": 4})
    refused("1 are absent", tensors={k: v for k, v in tensors.items() if k != first})
    refused("1 tensors of 13 are of no", tensors={**tensors, "x.magnitude": tensors[first]})
    refused("do not fit", model=random_model("gpt2"))
    (tmp_path / "wrong/adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
        load_lora(other, tmp_path / "wrong")
    close(run(other), before, atol=0)
    assert len(other.trainable_weights) == trainable
    add_lora(other, 2, "key_dense")
    refused("has other adapters than", model=other)


# ------------------------------------------------------------------ training


def test_only_adapters_and_layers_of_ones_own_train():
    def trained(recompute):
        keras.utils.set_random_seed(0)
        sizes = {**SIZES, "initializer_range": 0.5}
        bert = build_transformer_model(sizes, dropout=0, recompute=recompute, with_pool=True)
        head = keras.layers.Dense(2, name="head")(bert.outputs[1])
        model = keras.Model(bert.inputs, head)
        add_lora(model, 2, alpha=4)
        randomize_adapters(model)
        before = values_of(model)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit([TOKENS, SEGMENTS], np.ones((3, 2)), verbose=0)
        after = values_of(model)
        return after, {path for path in after if np.any(after[path] != before[path])}

    after, changed = trained(recompute=False)
    layers = [f"encoder_{i}/attention/{x}_dense" for i in range(2) for x in ("query", "value")]
    factors = {f"{layer}/lora_kernel_{side}" for layer in layers for side in "ab"}
    assert changed == factors | {"head/kernel", "head/bias"}
    again, _ = trained(recompute=True)
    close([*again.values()], [*after.values()], atol=1e-6)


def test_rates_fall_from_block_to_block():
    model = random_model("bert")
    add_lora(model, 2)
    expected = {f"(^|/)encoder_{i}/": 0.5 ** (3 - i) for i in range(3)}
    assert layerwise_decay(model, 0.5) == expected


def test_arguments():
    model = random_model("bert")
    for options, message in (
        ({"rank": 0}, "rank must be"),
        ({"alpha": 0}, "alpha must be"),
        ({"targets": "query"}, None),
        ({"targets": ["key_dense", "q_proj"]}, "targets: 'q_proj' matches no variable"),
        ({}, "query_dense has an adapter already"),
    ):
        if message is None:
            add_lora(model, **{"rank": 2, **options})
            continue
        with pytest.raises(ValueError, match=message):
            add_lora(model, **{"rank": 2, **options})
    assert len(model.trainable_weights) == 2 * 3
    plain = random_model("bert")
    for change in (merge_lora, lambda model: save_lora(model, "nowhere")):
        with pytest.raises(ValueError, match="has no adapters"):
            change(plain)
    add_lora(plain, 2, "token_embedding")
    with pytest.raises(ValueError, match="adapter of token_embedding has no place"):
        save_lora(plain, "nowhere")
    assert not Path("nowhere").exists()


# ------------------------------------------------------------------ what is done with models


def test_a_merged_model_is_a_plain_one():
    model, merged = adapted("bert", TARGETS, with_mlm=True)
    around = keras.Model(model.inputs, model.outputs)
    before = around.predict([TOKENS, SEGMENTS], verbose=0)
    model.get_layer("encoder_1").attention.trainable = False
    merge_lora(model)
    assert [x.path for x in model.weights] == [x.path for x in merged.weights]
    trainable = [x.path for x in merged.weights if "encoder_1/attention/" not in x.path]
    assert [x.path for x in model.trainable_weights] == trainable
    close([*values_of(model).values()], [*values_of(merged).values()], atol=1e-6)
    close(run(model), run(merged))
    # What was compiled before is not wrong.
    close(around.predict([TOKENS, SEGMENTS], verbose=0), before)
    add_lora(model, 1, TARGETS)
    close(run(model), run(merged))


def test_files_have_merged_weights(bert, tmp_path):
    model, merged = bert
    save_transformer_model(model, tmp_path)
    again = build_transformer_model(tmp_path, with_mlm=True)
    assert not again.checkpoint_report.fresh
    close([*values_of(again).values()], [*values_of(merged).values()], atol=1e-6)
    model.save(tmp_path / "model.keras")
    close(run(keras.models.load_model(tmp_path / "model.keras")), run(merged))

    with pytest.raises(ValueError, match="has adapters that were trained on the weights it"):
        load_checkpoint(model, tmp_path)
    close(run(model), run(merged))
    fresh = random_model("bert", seed=3, with_mlm=True)
    add_lora(fresh, 2, TARGETS)
    assert not load_checkpoint(fresh, tmp_path).fresh
    close(run(fresh), run(merged))


def same_attention(old):
    return type(old).from_config(old.get_config())


SURGERY = {
    "replace_attention": lambda model: replace_attention(model, same_attention),
    "select_tokens": lambda model: select_tokens(model, [*range(10), [3, 4]]),
    "select_blocks": lambda model: select_blocks(model, [0, 2]),
    "share_blocks": lambda model: share_blocks(model, 2),
    "extend_positions": lambda model: extend_positions(model, 9),
    "condition_norms": lambda model: condition_norms(model, 2),
    "rename_layers": lambda model: rename_layers(model, "other_"),
}


@pytest.mark.parametrize("name", SURGERY)
def test_surgery_carries_adapters(name, bert):
    changed, expected = map(SURGERY[name], bert)
    inputs = [TOKENS, SEGMENTS, *[np.ones((3, 2), "float32")] * (len(changed.inputs) - 2)]
    close(*([*map(ops.convert_to_numpy, model(inputs))] for model in (changed, expected)))
    own = {weight.name for weight in changed.trainable_weights if "/lora_" not in weight.path}
    fresh = {"gamma_kernel", "beta_kernel"} if name == "condition_norms" else set()
    assert own == fresh
    # They were not merged.
    found = [x for x in every_layer(changed) if getattr(x, "lora_enabled", False)]
    assert {x.name.removeprefix("other_") for x in found} == {*TARGETS}
    assert {(x.lora_rank, x.lora_alpha) for x in found} == {(2, 3)}


def test_texts_are_generated_with_adapters():
    model, merged = adapted("gpt2", with_mlm=True)
    cached, valid = CachedModel(model), np.ones((3, 6), "bool")
    states = cached.initial_states(3, 6)
    tokens = TOKENS[:, :4]
    _, states = cached.step(tokens[:, :3], valid, states)
    logits, _ = cached.step(tokens[:, 3:], valid, states)
    expected = ops.convert_to_numpy(merged(tokens)[1])[:, -1]
    close(ops.convert_to_numpy(logits), expected)
