"""Transformers and their checkpoints."""

from keras_ext.models.bert import BERT
from keras_ext.models.build import build_transformer_model, load_checkpoint
from keras_ext.models.checkpoints import CheckpointReport

__all__ = ["BERT", "CheckpointReport", "build_transformer_model", "load_checkpoint"]
