"""Small models of every family, and inputs for them."""

import keras
import numpy as np
from keras import ops

from keras_ext.models import FAMILIES, build_transformer_model

# Those of the package, with the names of their heads; BERT has tests of its own.
HEADS = {
    name: tuple(head.removeprefix("with_") for head in family.heads)
    for name, family in FAMILIES.items()
    if family.__module__.startswith("keras_ext.") and name != "bert"
}
TOKENS = np.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 0, 0, 0], [7, 0, 0, 0, 0, 0]], "int32")
SEGMENTS = np.array([[0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]], "int32")
TARGETS = np.array([[0, 8, 3, 5], [0, 2, 2, 7], [0, 1, 9, 4]], "int32")
SIZES = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 7,
}
T5_SIZES = {
    "head_size": 3,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 5,
}
OWN = {
    "albert": {"embedding_size": 4, "num_hidden_groups": 2},
    "electra": {"embedding_size": 4},
    "electra_generator": {"embedding_size": 4},
    "roformer": {"embedding_size": 4},
    "nezha": {"max_relative_position": 2},
    "gau_alpha": {"attention_key_size": 6, "num_attention_heads": 1, "hidden_act": "swish"},
    "modernbert": {"local_attention": 2, "pad_token_id": 0},
    "roberta": {"max_position_embeddings": 8, "pad_token_id": 0},
    "xlm-roberta": {"max_position_embeddings": 8, "pad_token_id": 0},
    "camembert": {"max_position_embeddings": 8, "pad_token_id": 0},
    "t5": T5_SIZES,
    "mt5": T5_SIZES,
}


def flags(family):
    return {f"with_{head}": True for head in HEADS[family]}


def random_model(family, seed=0, sizes=SIZES, **options):
    """A model in which every weight matters: also biases and norms are random."""
    config = {**sizes, **OWN.get(family, {})}
    return randomize(build_transformer_model(config, model=family, **options), seed)


def randomize(model, seed=0):
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        scale = 0.2 if len(weight.shape) == 1 else weight.shape[0] ** -0.5
        weight.assign(rng.normal(size=weight.shape) * scale + weight.path.endswith("gamma"))
    return model


def run(model, tokens=TOKENS, segments=SEGMENTS, targets=TARGETS):
    """The outputs of a model for those of the inputs that it has."""
    known = {"token_ids": tokens, "segment_ids": segments, "decoder_token_ids": targets}
    inputs = [known[x.name] for x in model.inputs]
    outputs = model(inputs if len(inputs) > 1 else inputs[0])
    return keras.tree.map_structure(ops.convert_to_numpy, outputs)


def values_of(model):
    return {weight.path: ops.convert_to_numpy(weight) for weight in model.weights}
