"""Transformers and their checkpoints."""

from keras_ext.models.albert import ALBERT
from keras_ext.models.bert import BERT
from keras_ext.models.build import (
    build_transformer_model,
    load_checkpoint,
    save_transformer_model,
)
from keras_ext.models.checkpoints import CheckpointReport
from keras_ext.models.electra import ELECTRA, ELECTRAGenerator
from keras_ext.models.family import FAMILIES, Family, Trunk
from keras_ext.models.gau_alpha import GAUAlpha
from keras_ext.models.gpt import GPT
from keras_ext.models.gpt2 import GPT2
from keras_ext.models.gpt2_ml import GPT2ML
from keras_ext.models.hub import download_model
from keras_ext.models.lora import add_lora, load_lora, merge_lora, save_lora
from keras_ext.models.modernbert import ModernBERT
from keras_ext.models.nezha import NEZHA
from keras_ext.models.record import family_of
from keras_ext.models.roberta import CamemBERT, RoBERTa, XLMRoBERTa
from keras_ext.models.roformer import RoFormer
from keras_ext.models.roformer_v2 import RoFormerV2
from keras_ext.models.surgery import (
    condition_norms,
    extend_positions,
    rename_layers,
    replace_attention,
    select_blocks,
    select_tokens,
    share_blocks,
)
from keras_ext.models.t5 import MT5, T5
from keras_ext.models.tta import TTA, pseudo_log_likelihoods

__all__ = [
    "ALBERT",
    "BERT",
    "ELECTRA",
    "FAMILIES",
    "GPT",
    "GPT2",
    "GPT2ML",
    "MT5",
    "NEZHA",
    "T5",
    "TTA",
    "CamemBERT",
    "CheckpointReport",
    "ELECTRAGenerator",
    "Family",
    "GAUAlpha",
    "ModernBERT",
    "RoBERTa",
    "RoFormer",
    "RoFormerV2",
    "Trunk",
    "XLMRoBERTa",
    "add_lora",
    "build_transformer_model",
    "condition_norms",
    "download_model",
    "extend_positions",
    "family_of",
    "load_checkpoint",
    "load_lora",
    "merge_lora",
    "pseudo_log_likelihoods",
    "rename_layers",
    "replace_attention",
    "save_lora",
    "save_transformer_model",
    "select_blocks",
    "select_tokens",
    "share_blocks",
]
