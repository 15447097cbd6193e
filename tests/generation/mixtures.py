"""GPT-2s of three blocks with other attentions, one of them of one's own, and conditions."""

import keras
from families import SIZES, random_model, randomize
from keras import ops

from keras_ext.layers import (
    ConditionalLayerNormalization,
    FavorAttention,
    LinearAttention,
    MultiHeadAttention,
    PolynomialAttention,
    RotaryPosition,
    hwfa_layers,
)
from keras_ext.models import condition_norms, replace_attention
from keras_ext.models.rebuild import copy_layer, rebuild


@keras.saving.register_keras_serializable(package="tests")
class RunningMean(keras.layers.Layer):
    """All tokens before weigh the same. It has what the interface asks for, and no more."""

    def call(self, x, memory):
        return ops.cumsum(x, 1) / ops.cumsum(ops.ones_like(x), 1)

    def initial_state(self, batch_size, max_length):
        return ops.zeros((batch_size, 1, 8)), ops.zeros((batch_size, 1, 1))

    def step(self, x, state, valid):
        one = ops.cast(valid, x.dtype)[..., None]
        sums = state[0] + ops.cumsum(one * x, 1)
        numbers = state[1] + ops.cumsum(one, 1)
        return sums / ops.maximum(numbers, 1), (sums[:, -1:], numbers[:, -1:])


@keras.saving.register_keras_serializable(package="tests")
def cubed(x):
    return ops.abs(x) ** 3


def linear(feature_map="elu"):
    return LinearAttention(2, 4, feature_map=feature_map, causal=True)


def window(size=3):
    return MultiHeadAttention(2, 4, causal=True, window=size, position=RotaryPosition())


# The attentions of the blocks; None is that of GPT-2.
MIXTURES = {
    **{f"linear {f}": lambda f=f: [linear(f) for _ in "012"] for f in ("elu", "exp", "taylor")},
    "linear, a function": lambda: [linear(cubed) for _ in "012"],
    "polynomial": lambda: [PolynomialAttention(2, 4, causal=True) for _ in "012"],
    "favor": lambda: [FavorAttention(2, 4, num_features=16, causal=True) for _ in "012"],
    "window": lambda: [window() for _ in "012"],
    "hwfa": lambda: [MultiHeadAttention(2, 4, **kind) for kind in hwfa_layers(3, 8)],
    "linear, softmax, window": lambda: [linear(), None, window()],
    "own, own, softmax": lambda: [RunningMean(), RunningMean(), None],
}


def mixed(name, seed=0):
    keras.utils.set_random_seed(seed)
    sizes = {**SIZES, "max_position_embeddings": 24}
    model = random_model("gpt2", seed, sizes, with_mlm=True)
    for number, attention in enumerate(MIXTURES[name]()):
        if attention is not None:
            model = replace_attention(model, lambda old, new=attention: new, [number])
    return model


def conditional(family, size=3, sides=("encoder", "decoder")):
    """A language model whose norms depend on a condition; of a T5 those of some sides do."""
    sizes = {**SIZES, "max_position_embeddings": 24, "num_hidden_layers": 2}
    if family != "t5":
        model = random_model(family, 0, sizes, with_mlm=True, application="lm")
        model = condition_norms(model, size)
    else:
        condition = keras.Input((size,), name="condition")
        norm = keras.saving.serialize_keras_object(ConditionalLayerNormalization())

        def call(layer, *args, **kwargs):
            if not layer.name.startswith(tuple(f"{side}_{i}" for side in sides for i in "01")):
                return None
            return copy_layer(layer, norm=norm)(*args, **kwargs, condition=condition)

        model = random_model(family, 0, sizes, with_mlm=True)
        model = rebuild(model, call, further=[condition])
    return randomize(model)
