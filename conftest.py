"""Two virtual devices for the distribution tests, and what tests and docstrings share."""

import dataclasses
import json
import os
from pathlib import Path

# Before any backend starts: afterwards its number of devices is fixed.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)

import keras
import numpy as np
import pytest

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 2
    )

ROOT = Path(__file__).resolve().parent

# Each imports its own backend, of which one is sure to be installed.
collect_ignore = [
    path.relative_to(ROOT).as_posix()
    for name in ("tensorflow", "jax", "torch")
    for path in ROOT.glob(f"keras_ext/backend/{name}*.py")
    if name != keras.backend.backend()
]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout; tests that need it are skipped without."""
    folder = Path(os.environ.get("KERAS_EXT_SHARED", ROOT / ".." / "shared"))
    if not folder.is_dir():
        pytest.skip("real data is not beside this checkout")
    return folder.resolve()


@pytest.fixture(scope="session")  # TensorFlow mixes up the collectives of two strategies
def mirrored():
    """The two devices of TensorFlow as replicas."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture(scope="session")
def docstring_files(tmp_path_factory) -> Path:
    """What the examples in docstrings read: a BERT of one small layer in both formats."""
    from models.bundle import write_bundle
    from models.torch_file import write_torch
    from safetensors.numpy import save_file

    from keras_ext.models import BERT, build_transformer_model

    config = {"vocab_size": 9, "hidden_size": 768, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 12, "intermediate_size": 4}
    model = build_transformer_model(config, with_pool=True)
    folder = tmp_path_factory.mktemp("docstrings")
    for format, directory in (
        ("tensorflow", "."),
        ("tensorflow", "chinese_L-12_H-768_A-12"),
        ("huggingface", "bert-base-chinese"),
    ):
        (folder / directory).mkdir(exist_ok=True)
        (folder / directory / "bert_config.json").write_text(json.dumps(config))
        variables = {}
        for weight in model.weights:
            source = BERT.names[format].source(weight.path)
            name, transposed = source.name, source.transposed
            values = keras.ops.convert_to_numpy(weight)
            variables[name] = np.ascontiguousarray(values.T if transposed else values)
        if format == "tensorflow":
            write_bundle(folder / directory / "bert_model.ckpt", variables)
        else:
            save_file(variables, folder / directory / "model.safetensors")
            write_torch(folder / directory / "pytorch_model.bin", variables)
    return folder


@pytest.fixture(scope="session")
def docstring_bert() -> keras.Model:
    """The `bert` of examples: twelve blocks and the vocabulary of a Chinese BERT, no width."""
    from keras_ext.models import build_transformer_model

    config = {"vocab_size": 21128, "hidden_size": 4, "num_hidden_layers": 12}
    return build_transformer_model({**config, "num_attention_heads": 2, "intermediate_size": 4})


@pytest.fixture(autouse=True)
def docstring_names(request, doctest_namespace):
    """What the examples in docstrings take for granted: files, data, public names."""
    if not isinstance(request.node, pytest.DoctestItem):
        return
    import keras_ext

    request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("docstring_files"))
    keras.utils.set_random_seed(0)
    for part in map(keras_ext.__dict__.get, keras_ext.__all__):
        doctest_namespace.update({name: getattr(part, name) for name in part.__all__})
    if "bert" in request.node.dtest.docstring:
        doctest_namespace["bert"] = request.getfixturevalue("docstring_bert")
    inputs = keras.Input((4,))
    doctest_namespace.update(
        {module.__name__: module for module in (dataclasses, json, keras)},
        np=np,
        Path=Path,
        model=keras.Model(inputs, keras.layers.Dense(1)(inputs)),
        x=np.ones((32, 4), "float32"),
        y=np.ones((32, 1), "float32"),
        token_ids=np.array([[2, 5, 3]]),
        segment_ids=np.zeros((1, 3), "int32"),
    )
