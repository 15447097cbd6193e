"""What users of bert4keras write, and what it is here."""

from collections.abc import Mapping
from typing import Any

# Argument of its `build_transformer_model` -> the way here.
BERT4KERAS_ARGUMENTS: Mapping[str, str] = {
    "config_path": "the first argument, `config`",
    "checkpoint_path": "the second argument, `checkpoint`",
    "return_keras_model": "the model is always a Keras model; leave it out",
    "dropout_rate": "`dropout`",
    "attention_dropout_rate": "`attention_dropout`",
    "with_lm": "`with_mlm=True`, whose logits are those of the next token",
    "final_activation": "`with_mlm=True` gives logits; put keras.layers.Softmax on them",
    "keep_tokens": "`models.select_tokens(model, ids)` on the built model",
    "compound_tokens": "`models.select_tokens(model, ids)`, whose ids may be lists to average",
    "layer_norm_cond": "`models.condition_norms(model, size)`, which adds the input",
    "layer_norm_cond_hidden_size": "a Dense layer before the input of `condition_norms`",
    "layer_norm_cond_hidden_act": "a Dense layer before the input of `condition_norms`",
    "additional_input_layers": "`models.condition_norms(model, size)`, which adds the input",
    "hierarchical_position": "`models.extend_positions(model, length)` on the built model",
    "residual_attention_scores": "no way: attentions do not add up their scores (RealFormer)",
    "shared_segment_embeddings": "no way: segments have a table of their own",
    "ignore_invalid_weights": "what does not fit is an error, what is absent a warning",
    "autoresize_weights": "no way: a checkpoint of other sizes is an error",
    "sequence_length": "models take any length; give keras.Model an Input of one",
    "max_position": "`max_position_embeddings` of the configuration",
    "segment_vocab_size": "`type_vocab_size` of the configuration, 0 without segments",
    "hidden_act": "`hidden_act` of the configuration",
    "num_hidden_layers": "`models.select_blocks(model, numbers)`, or the configuration",
    "layers": "the layers of a model, which another one may call again",
    "prefix": "`models.rename_layers(model, prefix)` on the built model",
    "name": "`model.name`, after it was built",
}

# Name of a model there -> the way here.
BERT4KERAS_MODELS: Mapping[str, str] = {
    "gpt": "model='openai-gpt'",
    "albert_unshared": "model='albert' with num_hidden_groups = num_hidden_layers in the "
    "configuration",
    "t5.1.0": "model='t5'",
    "t5.1.1": "model='t5' with feed_forward_proj='gated-gelu' and tie_word_embeddings=False in "
    "the configuration",
    "mt5.1.1": "model='mt5'",
    "t5_encoder": "model='t5', application='encoder'",
    "t5_decoder": "model='t5', application='decoder'",
}

# Its fields of configurations that we call otherwise.
BERT4KERAS_FIELDS: Mapping[str, str] = {
    "segment_vocab_size": "type_vocab_size",
    "max_position": "max_position_embeddings",
    "dropout_rate": "hidden_dropout_prob",
    "attention_dropout_rate": "attention_probs_dropout_prob",
}

# Fields that would change the model, with the values that mean no change, if no family has
# the field.
WITHOUT: Mapping[str, Any] = {
    "residual_attention_scores": False,
    "shared_segment_embeddings": False,
    "hierarchical_position": False,
    "keep_tokens": None,
    "compound_tokens": None,
    "layer_norm_cond": None,
    "add_cross_attention": False,
    "pruned_heads": {},
}
