"""Loading by the table of names: every variable accounted for, errors before any assignment."""

import logging

import keras
import ml_dtypes
import numpy as np
import pytest
from bundle import write_bundle
from keras import ops
from small_bert import HEADS, SIZES

from keras_ext import backend
from keras_ext.models import BERT, load_checkpoint
from keras_ext.models.checkpoints import _aligned, open_checkpoint


def build(**options):
    return BERT(**SIZES).build(**options)


def stored(format, dtype="float32", **options):
    """Model weights with random values, and the same as a checkpoint holds them."""
    rng = np.random.default_rng(0)
    weights, variables = {}, {}
    for weight in build(**options).weights:
        value = rng.normal(size=weight.shape).astype(dtype)
        source = BERT.names[format].source(weight.path)
        name, transposed = source.name, source.transposed
        weights[weight.path] = value
        variables[name] = np.ascontiguousarray(value.T) if transposed else value
    return weights, variables


def write_tensorflow(directory, variables):
    write_bundle(directory / "bert_model.ckpt", variables)
    return directory / "bert_model.ckpt"


def write_huggingface(directory, variables):
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file(variables, directory / "model.safetensors")
    return directory


WRITERS = {"tensorflow": write_tensorflow, "huggingface": write_huggingface}


def values_of(model):
    return {w.path: ops.convert_to_numpy(w) for w in model.weights}


def assert_equal_weights(model, weights):
    for path, value in values_of(model).items():
        np.testing.assert_array_equal(value, weights[path].astype("float32"), err_msg=path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("format", WRITERS)
def test_every_weight_is_loaded(format, dtype, tmp_path):
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    weights, variables = stored(format, dtype, **HEADS)
    model = build(**HEADS)
    report = load_checkpoint(model, WRITERS[format](tmp_path, variables))
    assert_equal_weights(model, weights)
    assert sorted(report.loaded) == sorted(weights)
    assert sorted(report.loaded.values()) == sorted(variables)
    assert not report.ignored
    assert not report.fresh


@pytest.mark.parametrize("format", WRITERS)
def test_what_the_model_does_not_have_is_ignored_with_its_reason(format, tmp_path):
    weights, variables = stored(format, **HEADS)
    extra = {
        "tensorflow": {
            "bert/pooler/dense/bias/adam_m": "optimizer slot",
            "bert/pooler/dense/bias/adam_v": "optimizer slot",
            "global_step": "step counter",
            "classifier/kernel": "unknown",
        },
        "huggingface": {
            "bert.embeddings.position_ids": "constant",
            "cls.predictions.decoder.weight": "not in the model",
            "cls.predictions.decoder.bias": "not in the model",
            "classifier.weight": "unknown",
        },
    }[format]
    variables |= {name: np.zeros(3, "float32") for name in extra}
    model = build()
    report = load_checkpoint(model, WRITERS[format](tmp_path, variables))
    assert_equal_weights(model, weights)
    heads = {n for n in variables if n.startswith("cls") or "pooler" in n} - set(extra)
    assert len(heads) == 9
    assert report.ignored == extra | dict.fromkeys(heads, "not in the model")
    # Each variable once, and only once.
    assert sorted([*report.loaded.values(), *report.ignored]) == sorted(variables)


def test_what_the_checkpoint_does_not_have_is_fresh_and_warned_about(tmp_path):
    weights, variables = stored("tensorflow")
    model = build(with_pool=True)
    before = values_of(model)
    with pytest.warns(UserWarning, match=r"2 weights of 'bert' are not in .*: pooler/kernel, "):
        report = load_checkpoint(model, write_tensorflow(tmp_path, variables))
    assert report.fresh == ("pooler/kernel", "pooler/bias")
    assert sorted([*report.loaded, *report.fresh]) == sorted(before)
    fresh = {path: before[path] for path in report.fresh}
    assert_equal_weights(model, weights | fresh)


def test_a_model_around_the_encoder_is_loaded_by_layer_names(tmp_path):
    weights, variables = stored("tensorflow")
    bert = build()
    outputs = keras.layers.Dense(3, name="classifier")(bert.output[:, 0])
    model = keras.Model(bert.inputs, outputs)
    with pytest.warns(UserWarning, match="classifier/kernel, classifier/bias"):
        load_checkpoint(model, write_tensorflow(tmp_path, variables))
    assert_equal_weights(bert, weights)


def test_fewer_blocks_than_the_checkpoint_has(tmp_path):
    weights, variables = stored("tensorflow")
    model = BERT(**{**SIZES, "num_hidden_layers": 1}).build()
    report = load_checkpoint(model, write_tensorflow(tmp_path, variables))
    assert_equal_weights(model, weights)
    assert all(name.startswith("bert/encoder/layer_1/") for name in report.ignored)
    assert set(report.ignored.values()) == {"not in the model"}


def test_the_report_reads_well_and_is_logged(tmp_path, caplog):
    _, variables = stored("tensorflow", with_pool=True)
    prefix = write_tensorflow(tmp_path, variables | {"global_step": np.array(1)})
    with caplog.at_level(logging.INFO, "keras_ext"), pytest.warns(match="mlm_bias"):
        report = load_checkpoint(build(with_mlm=True), prefix)
    assert str(report).splitlines() == [
        f"{prefix}: 37 weights loaded, 3 variables ignored, 5 weights fresh",
        "  ignored 2: not in the model",
        "  ignored 1: step counter",
        *(f"  fresh: {path}" for path in report.fresh),
    ]
    assert caplog.messages == [str(report)]


@pytest.mark.parametrize("format", WRITERS)
def test_mismatches_name_both_sides_and_change_nothing(format, tmp_path):
    _, variables = stored(format, **HEADS)
    position = BERT.names[format].source("position_embedding/embeddings").name
    nsp = BERT.names[format].source("nsp/kernel").name
    variables[position] = np.zeros((9, 8), "float32")
    variables[nsp] = np.zeros((8, 2), "float32")
    model = build(**HEADS)
    before = values_of(model)
    with pytest.raises(ValueError, match="no weight was changed") as error:
        load_checkpoint(model, WRITERS[format](tmp_path, variables))
    assert str(error.value).splitlines()[1:] == [
        f"  position_embedding/embeddings (7, 8) <- {position} (9, 8)",
        f"  nsp/kernel (8, 2) <- {nsp} (8, 2) transposed",
    ]
    assert_equal_weights(model, before)


def test_nothing_in_common_is_an_error(tmp_path):
    prefix = write_tensorflow(tmp_path, {"electra/a": np.zeros(3, "float32")})
    with pytest.raises(
        ValueError, match=r"shares no variable .*: it holds electra/a, the model "
    ):
        load_checkpoint(build(), prefix)


def test_old_and_bare_hugging_face_names(tmp_path):
    weights, variables = stored("huggingface", **HEADS)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, name in old.items():
        variables = {k.replace(new, name): v for k, v in variables.items()}
    variables = {k.removeprefix("bert."): v for k, v in variables.items()}
    model = build(**HEADS)
    report = load_checkpoint(model, write_huggingface(tmp_path, variables))
    assert_equal_weights(model, weights)
    assert report.loaded["embedding_norm/gamma"] == "embeddings.LayerNorm.gamma"
    assert not report.ignored


def test_two_spellings_of_one_name_are_an_error(tmp_path):
    _, variables = stored("huggingface")
    variables["embeddings.LayerNorm.gamma"] = variables["bert.embeddings.LayerNorm.weight"]
    with pytest.raises(
        ValueError, match=r"both .*gamma and .*weight|both .*weight and .*gamma"
    ):
        load_checkpoint(build(), write_huggingface(tmp_path, variables))


def test_weights_do_not_depend_on_the_file_afterwards(tmp_path):
    weights, variables = stored("tensorflow")
    model = build()
    load_checkpoint(model, write_tensorflow(tmp_path, variables))
    data = next(tmp_path.glob("*.data-*"))
    with data.open("r+b") as file:  # in place: a mapping would see it
        file.write(bytes(data.stat().st_size))
    assert_equal_weights(model, weights)


# ------------------------------------------------------------------ finding the checkpoint


def test_an_aligned_array_is_not_copied():
    """A model loaded on a CPU takes the memory of its weights, not twice that."""
    for shape in ((3, 5), ()):
        array = _aligned(shape, np.dtype("float32"))
        array[...] = 1
        with keras.device("cpu"):
            tensor = backend.wrap_array(array)
        array[...] = 2
        np.testing.assert_array_equal(ops.convert_to_numpy(tensor), array)


def test_directories(tmp_path):
    _, variables = stored("tensorflow")
    prefix = write_tensorflow(tmp_path, variables)
    assert open_checkpoint(tmp_path).prefix == str(prefix)
    write_bundle(tmp_path / "other.ckpt", variables)
    with pytest.raises(
        ValueError, match=r"several checkpoints \(bert_model\.ckpt, other\.ckpt\)"
    ):
        open_checkpoint(tmp_path)
    write_huggingface(tmp_path, variables)
    assert open_checkpoint(tmp_path).format == "huggingface"


def test_absent_checkpoints(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"neither model\.safetensors, nor pytorch_model\.bin, nor .* \*\.index",
    ):
        open_checkpoint(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"nothing: it is no directory, and .* is absent"
    ):
        open_checkpoint(tmp_path / "nothing")


def test_files_by_their_names(tmp_path):
    _, variables = stored("huggingface")
    write_huggingface(tmp_path, variables)
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    assert checkpoint.shapes.keys() == variables.keys()
    for name in ("tf_model.h5", "model.keras"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=f"{name} is in a format that is not read"):
            open_checkpoint(tmp_path / name)
