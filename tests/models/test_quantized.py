"""Models after `model.quantize`: what is kept, and what is refused."""

import keras
import numpy as np
import pytest
from families import SIZES, random_model, run

from keras_ext.layers import GlobalPointer
from keras_ext.layers.every import every_layer
from keras_ext.models import (
    add_lora,
    load_checkpoint,
    merge_lora,
    save_transformer_model,
    select_blocks,
)

ONE_BLOCK = {**SIZES, "num_hidden_layers": 1}


def quantized(model):
    """Layers that have nothing to quantise are warned about by Keras."""
    with pytest.warns(UserWarning, match="does not have a `quantize"):
        model.quantize("int8")
    return model


@pytest.mark.parametrize("family", ["bert", "modernbert", "gau_alpha"])
def test_a_quantised_model_is_saved_and_loaded(family, tmp_path):
    model = random_model(family, sizes=ONE_BLOCK, with_mlm=True)
    if family == "bert":
        spans = GlobalPointer(heads=2, head_size=4)(model.outputs[0])
        model = keras.Model(model.inputs, [*model.outputs, spans])
    before = run(model)
    quantized(model)
    modes = [getattr(x, "quantization_mode", None) for x in every_layer(model)]
    expected = run(model)
    assert max(np.abs(x - y).max() for x, y in zip(before, expected, strict=True)) > 1e-3
    for _ in range(2):  # what was loaded, too
        model.save(tmp_path / "model.keras")
        model = keras.models.load_model(tmp_path / "model.keras")
        found = [getattr(x, "quantization_mode", None) for x in every_layer(model)]
        assert found == modes
        for x, y in zip(run(model), expected, strict=True):
            np.testing.assert_array_equal(x, y)


def test_codes_are_not_taken_for_weights(tmp_path):
    pytest.importorskip("safetensors")
    model = random_model("bert", sizes=ONE_BLOCK)
    save_transformer_model(model, tmp_path / "whole")
    add_lora(model, 2)
    quantized(model)
    expected = run(model)
    for change in (
        lambda model: save_transformer_model(model, tmp_path / "saved"),
        lambda model: load_checkpoint(model, tmp_path / "whole"),
        lambda model: select_blocks(model, [0]),
        merge_lora,
    ):
        with pytest.raises(ValueError, match=r"dense is quantised \(int8\)\. Do it before"):
            change(model)
    assert not (tmp_path / "saved").exists()
    np.testing.assert_array_equal(run(model), expected)
