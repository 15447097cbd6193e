"""Transformers and their checkpoints."""

from keras_ext.models.bert import BERT
from keras_ext.models.build import (
    build_transformer_model,
    load_checkpoint,
    save_transformer_model,
)
from keras_ext.models.checkpoints import CheckpointReport
from keras_ext.models.hwfa import hwfa_layers
from keras_ext.models.surgery import replace_attention
from keras_ext.models.tta import TTA

__all__ = [
    "BERT",
    "TTA",
    "CheckpointReport",
    "build_transformer_model",
    "hwfa_layers",
    "load_checkpoint",
    "replace_attention",
    "save_transformer_model",
]
