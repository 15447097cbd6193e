"""Exported models run where Keras is not, and give what it gives, at any number of texts and
tokens; on JAX at a fixed number of tokens."""

import keras
import numpy as np
import pytest
from families import SEGMENTS, SIZES, TOKENS, random_model, run
from keras import ops

from keras_ext.layers import gelu_erf

BACKEND = keras.backend.backend()
on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="exports on TensorFlow")
SHAPES = [(3, 6), (2, 4)]  # both have a padded row
FAMILIES = {
    "bert": {"with_mlm": True, "with_nsp": True},
    "unilm": {"application": "unilm"},
    "gpt2": {"with_mlm": True},
    "modernbert": {},
}


def build(name):
    sizes = {**SIZES, "num_hidden_layers": 2}
    return random_model("bert" if name == "unilm" else name, sizes=sizes, **FAMILIES[name])


def test_gelu_is_that_of_keras():
    x = np.linspace(-12, 12, 4001, dtype="float32")
    found, expected = gelu_erf(x), keras.activations.gelu(x, approximate=False)
    np.testing.assert_allclose(*map(ops.convert_to_numpy, (found, expected)), atol=1e-6, rtol=0)
    assert keras.activations.get(keras.activations.serialize(gelu_erf)) is gelu_erf


@on_tensorflow
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_no_operation_that_a_runtime_lacks(name):
    import tensorflow as tf

    model = build(name)
    inputs = [tf.TensorSpec((None, None), "int32") for _ in model.inputs]
    function = tf.function(lambda *x: model(list(x) if len(x) > 1 else x[0]))
    operations = function.get_concrete_function(*inputs).graph.get_operations()
    assert any(operation.type == "Softmax" for operation in operations)
    for operation in operations:
        assert operation.type != "Erfc"
        if operation.type == "StridedSlice":
            assert operation.inputs[0].dtype != tf.bool
        if operation.type == "Reshape" and "/attention_" in operation.name:
            assert operation.inputs[0].op.type != "Reshape"


def saved_model(path):
    import tensorflow as tf

    loaded = tf.saved_model.load(path)
    return lambda model, inputs: tf.nest.flatten(
        loaded.serve(inputs if len(inputs) > 1 else inputs[0])
    )


def onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [x.name for x in session.get_inputs()]

    def call(model, inputs):
        known = dict(zip([x.name for x in model.inputs], inputs, strict=True))
        return session.run(None, {name: known[name] for name in names})

    return call


def litert(path):
    import tensorflow as tf

    with pytest.warns(UserWarning, match="LiteRT interpreter"):
        runner = tf.lite.Interpreter(path).get_signature_runner("serving_default")

    def call(model, inputs):
        known = dict(zip([x.name for x in model.inputs], inputs, strict=True))
        names = {
            name: name.removeprefix("serving_default_") for name in runner.get_input_details()
        }
        outputs = runner(**{name: known[ours] for name, ours in names.items()})
        return [outputs[name] for name in sorted(outputs)]

    return call


def check(model, call, shapes):
    for texts, tokens in shapes:
        inputs = [x[:texts, :tokens] for x in (TOKENS, SEGMENTS)]
        expected = keras.tree.flatten(run(model, *inputs))
        found = call(model, inputs[: len(model.inputs)])
        for ours, theirs in zip(expected, found, strict=True):
            np.testing.assert_allclose(theirs, ours, atol=1e-5)


@pytest.mark.thorough
@on_tensorflow
@pytest.mark.filterwarnings("ignore")  # those of the exporters
@pytest.mark.parametrize(
    ("name", "format", "suffix"),
    [
        ("bert", "tf_saved_model", ""),
        *((name, "onnx", ".onnx") for name in ("bert", "gpt2", "modernbert")),
        *((name, "litert", ".tflite") for name in ("bert", "gpt2", "unilm")),
    ],
)
def test_runs_elsewhere(name, format, suffix, tmp_path):
    model, path = build(name), str(tmp_path / f"model{suffix}")
    run(model)  # an uncalled model Keras does not export
    model.export(path, format=format, verbose=False)
    load = {"tf_saved_model": saved_model, "onnx": onnx, "litert": litert}[format]
    check(model, load(path), SHAPES)


@pytest.mark.thorough
@pytest.mark.skipif(BACKEND != "jax", reason="exports on JAX")
@pytest.mark.filterwarnings("ignore")
def test_saved_model_of_one_length(tmp_path):
    pytest.importorskip("tensorflow")
    model, path = build("bert"), str(tmp_path / "model")
    run(model)
    signature = [[keras.InputSpec(shape=(None, 6), dtype="int32") for _ in model.inputs]]
    model.export(path, format="tf_saved_model", input_signature=signature, verbose=False)
    check(model, saved_model(path), [(3, 6), (2, 6)])
