"""Initial values of every family and layer against their definition, written here once more.

The tables below say how each weight starts; they are not read from the code. A weight without a
row, with two, or a row without a weight is an error.
"""

import math
import re
from typing import NamedTuple

import keras
import numpy as np
import pytest
from families import HEADS, TOKENS, flags, values_of
from keras import ops

from keras_ext import layers
from keras_ext.models import build_transformer_model


class Draw(NamedTuple):
    """A symmetric distribution: its standard deviation, and what its values do not exceed."""

    deviation: float
    bound: float


# Share of the deviation that is left of a normal distribution cut off at two deviations:
# 1 - 4 φ(2) / (2 Φ(2) - 1) of its variance.
LEFT = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))


def normal(deviation):
    return Draw(deviation, math.inf)


def cut_normal(deviation):
    """The normal distribution of this deviation, cut off at two of them, as BERT draws."""
    return Draw(LEFT * deviation, 2 * deviation)


def keeps(share, width):
    """Kernels whose products have this share of the variance of their inputs."""
    return cut_normal(math.sqrt(share / width) / LEFT)


def uniform(bound):
    return Draw(bound / math.sqrt(3), bound)


def glorot(rows, columns):
    return uniform(math.sqrt(6 / (rows + columns)))


def agrees(values, expected):
    """Whether values are those of a number, or look drawn from a distribution."""
    if not isinstance(expected, Draw):
        return (values == expected).all()
    beyond = 3 * expected.deviation  # what a thousand draws reach where nothing is cut off
    noise = 1 / math.sqrt(values.size)  # times 0.7 and less is the error of the deviation
    return (
        abs(values.mean()) < 5 * noise * expected.deviation
        and abs(values.std() / expected.deviation - 1) < 3 * noise
        # On PyTorch Keras leaves one value in 200,000 beyond the cut.
        and np.mean(np.abs(values) > expected.bound * (1 + 1e-6)) < 1e-3
        and (values.size < 1000 or np.abs(values).max() > 0.9 * min(expected.bound, beyond))
    )


def check(values, table):
    """Every weight has one row and agrees with it, every row has a weight, no two are alike."""
    unused, signs = set(table), set()
    for path, value in values.items():
        rows = [row for row in table if re.fullmatch(row, path)]
        assert len(rows) == 1, f"{path} has the rows {rows}"
        expected = table[rows[0]]
        unused -= {*rows}
        mean, deviation = value.mean(), value.std()
        assert agrees(value, expected), f"{path}: {mean} ± {deviation} instead of {expected}"
        if isinstance(expected, Draw):
            # A second draw from one seed, on any scale, would have the same signs.
            signs_here = (value.ravel()[:48] > 0).tobytes()
            assert signs_here not in signs, f"{path} was drawn as another weight was"
            signs.add(signs_here)
    assert not unused


# ------------------------------------------------------------------ families

ZEROS, ONES = 0.0, 1.0
IN_RANGE = "cut normal of initializer_range"

WIDTH, NARROW, INNER, BLOCKS = 64, 32, 96, 3
SIZES = {
    "vocab_size": 200,
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": INNER,
    "max_position_embeddings": 40,
    "type_vocab_size": 16,
}
T5_SIZES = {"head_size": 8, "num_decoder_layers": 2, "relative_attention_num_buckets": 8}
OWN = {
    "albert": {"embedding_size": NARROW, "num_hidden_groups": 2},
    "electra": {"embedding_size": NARROW},
    "electra_generator": {"embedding_size": NARROW},
    "roformer": {"embedding_size": NARROW},
    "gau_alpha": {"attention_key_size": 32, "num_attention_heads": 1},
    "t5": T5_SIZES,
    "mt5": T5_SIZES,
}


def dense(name):
    return {f"{name}/kernel": IN_RANGE, f"{name}/bias": ZEROS}


def norm(name):
    return {f"{name}/gamma": ONES, f"{name}/beta": ZEROS}


TOKEN_TABLE = {"token_embedding/embeddings": IN_RANGE}
SEGMENTS = {"segment_embedding/embeddings": IN_RANGE}
POSITIONS = {"position_embedding/embeddings": IN_RANGE}
BLOCK = {
    **dense(r"encoder_\d/attention/(query|key|value|output)_dense"),
    **dense(r"encoder_\d/feed_forward/(intermediate|output)_dense"),
    **norm(r"encoder_\d/(attention|feed_forward)_norm"),
}
TRUNK = {**TOKEN_TABLE, **SEGMENTS, **norm("embedding_norm"), **BLOCK}
MLM = {**dense("mlm_dense"), **norm("mlm_norm"), "mlm_bias/bias": ZEROS}
POOLED = {**dense("pooler"), **dense("nsp")}
ROBERTA_WEIGHTS = {**TRUNK, **POSITIONS, **MLM, **dense("pooler")}
PROJECTION = dense("embedding_projection")
DISCRIMINATOR = dense("discriminator_(dense|prediction)")

# RoFormerV2: a block adds 1/N of the variance, for N blocks; GAU-alpha: N^(-2/3).
V2_KERNELS = {
    "(token|segment)_embedding/embeddings": keeps(1 / BLOCKS, WIDTH),
    r"encoder_\d/attention/\w+_dense/kernel": keeps(1 / BLOCKS, WIDTH),
    r"encoder_\d/feed_forward/intermediate_dense/kernel": keeps(1 / BLOCKS, WIDTH),
    r"encoder_\d/feed_forward/output_dense/kernel": keeps(1 / BLOCKS, INNER),
}
GAU_SHARE = BLOCKS ** (-2 / 3)
GAU_WEIGHTS = {
    "(token|segment)_embedding/embeddings": keeps(GAU_SHARE, WIDTH),
    r"encoder_\d/attention/input_dense/kernel": keeps(GAU_SHARE, WIDTH),
    r"encoder_\d/attention/output_dense/kernel": keeps(GAU_SHARE, INNER),
    r"encoder_\d/attention/(query|key)_gamma": ONES,
}
# T5 does not divide scores by √d: its queries are d^(-1/2) times as large instead.
T5_ATTENTION = r"(encoder|decoder)_\d/(cross_)?attention"
T5_WEIGHTS = {
    "token_embedding/embeddings": normal(1.0),
    f"{T5_ATTENTION}/query_dense/kernel": keeps(1 / 8, WIDTH),
    f"{T5_ATTENTION}/(key|value)_dense/kernel": keeps(1, WIDTH),
    f"{T5_ATTENTION}/output_dense/kernel": keeps(1, 4 * 8),
    r"(encoder|decoder)_\d/feed_forward/intermediate_dense/kernel": keeps(1, WIDTH),
    r"(encoder|decoder)_\d/feed_forward/output_dense/kernel": keeps(1, INNER),
    r"(encoder|decoder)_(\d/\w+_)?norm/gamma": ONES,
    "(encoder|decoder)_position/embeddings": ZEROS,
}
GATED = {r"(encoder|decoder)_\d/feed_forward/linear_dense/kernel": keeps(1, WIDTH)}
OWN_HEAD = {"lm_head/kernel": keeps(1, WIDTH)}

# What ends a sublayer is smaller, as sums of 2 N sublayers grow.
ENDS = "cut normal of initializer_range / √(2 N)"
MODERN_WEIGHTS = {
    **TOKEN_TABLE,
    r"encoder_\d/attention/(query|key|value)_dense/kernel": IN_RANGE,
    r"encoder_\d/feed_forward/(intermediate|linear)_dense/kernel": IN_RANGE,
    r"encoder_\d/(attention|feed_forward)/output_dense/kernel": ENDS,
    r"encoder_\d/(attention|feed_forward)_norm/gamma": ONES,
    "(embedding|output|mlm)_norm/gamma": ONES,
    "mlm_dense/kernel": ENDS,
    "mlm_bias/bias": ZEROS,
}

# Family -> how its weights start. A weight that is tied, as the MLM's kernel is, has no row.
FAMILIES = {
    "bert": {**TRUNK, **POSITIONS, **MLM, **POOLED},
    "albert": {**TRUNK, **POSITIONS, **PROJECTION, **MLM, **POOLED},
    "electra": {**TRUNK, **POSITIONS, **PROJECTION, **DISCRIMINATOR},
    "electra_generator": {**TRUNK, **POSITIONS, **PROJECTION, **MLM},
    "roformer": {**TRUNK, **PROJECTION, **MLM, **POOLED},
    "nezha": {**TRUNK, **MLM, **POOLED},
    "roformer_v2": V2_KERNELS,
    "gau_alpha": GAU_WEIGHTS,
    "openai-gpt": {**TOKEN_TABLE, **POSITIONS, **BLOCK},
    "gpt2": {**TOKEN_TABLE, **POSITIONS, **BLOCK, **norm("output_norm")},
    "gpt2_ml": {**TOKEN_TABLE, **POSITIONS, **norm("embedding_norm"), **BLOCK},
    "t5": T5_WEIGHTS,
    "mt5": {**T5_WEIGHTS, **GATED, **OWN_HEAD},
    "modernbert": MODERN_WEIGHTS,
    "roberta": ROBERTA_WEIGHTS,
    "xlm-roberta": ROBERTA_WEIGHTS,
    "camembert": ROBERTA_WEIGHTS,
    "tta": {
        **TOKEN_TABLE,
        **POSITIONS,
        **norm("token_norm"),
        **norm("position_norm"),
        **BLOCK,
        "mlm_bias/bias": ZEROS,
    },
}
ALL_HEADS = {"bert": {"with_mlm": True, "with_nsp": True, "with_pool": True}}
ALL_HEADS |= {family: flags(family) for family in HEADS}


def test_every_family_has_a_row():
    from keras_ext.models import FAMILIES as known

    assert FAMILIES.keys() == known.keys()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("told", "initializer_range"),
    [({}, 0.02), ({"initializer_range": 0.05}, 0.05)],
    ids=["default", "0.05"],
)
def test_fresh_weights_of_a_family(family, told, initializer_range):
    keras.utils.set_random_seed(0)
    config = {**SIZES, **OWN.get(family, {}), **told}
    if told and IN_RANGE not in FAMILIES[family].values():  # it has no effect
        with pytest.raises(ValueError, match=r"initializer_range must be 0\.02 for"):
            build_transformer_model(config, model=family)
        return
    model = build_transformer_model(config, model=family, **ALL_HEADS[family])
    drawn = {
        IN_RANGE: cut_normal(initializer_range),
        ENDS: cut_normal(initializer_range / math.sqrt(2 * BLOCKS)),
    }
    table = {k: drawn.get(v, v) for k, v in FAMILIES[family].items()}
    check(values_of(model), table)


@pytest.mark.parametrize("application", ["encoder", "decoder"])
def test_fresh_weights_of_a_side_of_t5(application):
    """They are those of the whole, as if the other side were not there."""
    keras.utils.set_random_seed(0)
    model = build_transformer_model({**SIZES, **T5_SIZES}, model="t5", application=application)
    check(values_of(model), {k: v for k, v in T5_WEIGHTS.items() if application in k or v != 0})


def test_t5_1_1_has_a_head_of_its_own():
    keras.utils.set_random_seed(0)
    kind = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    config = {**SIZES, **T5_SIZES, **kind}
    model = build_transformer_model(config, model="t5", with_mlm=True)
    check(values_of(model), FAMILIES["mt5"])


@pytest.mark.parametrize("head_size", [4, 64])
def test_scores_of_a_fresh_t5_have_variance_1(head_size):
    """That is what the factor of its queries is for: no scores are divided by √d."""
    keras.utils.set_random_seed(0)
    config = {**SIZES, **T5_SIZES, "head_size": head_size, "num_attention_heads": 64}
    model = build_transformer_model(config, model="t5", application="encoder")
    attention = model.get_layer("encoder_0").attention
    x = np.random.default_rng(0).normal(size=(50, WIDTH))
    q, k = (
        (x @ ops.convert_to_numpy(d.kernel)).reshape(50, 64, head_size).transpose(1, 0, 2)
        for d in (attention.query_dense, attention.key_dense)
    )
    assert (q @ k.transpose(0, 2, 1)).std() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("family", ["bert", "electra_generator", "gpt2", "roformer_v2", "t5"])
def test_a_tied_head_is_the_token_table(family):
    """Both for fresh weights: the table is the only one, and serves both ways."""
    keras.utils.set_random_seed(0)
    config = {**SIZES, **OWN.get(family, {})}
    model = build_transformer_model(config, model=family, with_mlm=True)
    shapes = [tuple(w.shape) for w in model.weights]
    width = OWN.get(family, {}).get("embedding_size", WIDTH)
    assert sum(200 in shape and width in shape for shape in shapes) == 1
    table = model.get_layer("token_embedding")
    table.set_weights([np.zeros(table.embeddings.shape)])
    inputs = [TOKENS] * len(model.inputs)
    logits = model(inputs if len(inputs) > 1 else inputs[0])[1]
    assert not ops.convert_to_numpy(logits).any()


# ------------------------------------------------------------------ layers

ATTENTION = {
    r"\w+_dense/kernel": glorot(WIDTH, WIDTH),
    r"\w+_dense/bias": ZEROS,
}
IN_ATTENTION = {rf"\w*attention\w*/{row}": value for row, value in ATTENTION.items()}
FEED_FORWARD = {
    "(intermediate|output|linear)_dense/kernel": glorot(WIDTH, INNER),
    "(intermediate|linear|output)_dense/bias": ZEROS,
}
IN_FEED_FORWARD = {rf"feed_forward\w*/{row}": value for row, value in FEED_FORWARD.items()}
ATTENTION_AND_FEED_FORWARD = {**IN_ATTENTION, **IN_FEED_FORWARD}
GAU = {
    "input_dense/kernel": glorot(WIDTH, 2 * INNER + 32),
    "output_dense/kernel": glorot(INNER, WIDTH),
    "(query|key)_gamma": ONES,
}
HIDDEN = np.zeros((1, 3, WIDTH), "float32")
IDS = np.zeros((1, 3), "int32")


def attention(**options):
    return layers.MultiHeadAttention(4, 16, **options)


# Layer -> how it is made, what it is called with, how its weights start by default.
LAYERS = {
    "Bias": (layers.Bias, (HIDDEN,), {"bias": ZEROS}),
    "CRF": (layers.CRF, (HIDDEN,), {"transitions|start|end": ZEROS}),
    "ConditionalLayerNormalization": (
        layers.ConditionalLayerNormalization,
        (HIDDEN, HIDDEN[:, 0]),
        {"gamma": ONES, "beta": ZEROS, "(gamma|beta)_kernel": ZEROS},
    ),
    "CosineDense": (
        lambda: layers.CosineDense(40),
        (HIDDEN,),
        {"kernel": glorot(WIDTH, 40)},
    ),
    "EfficientGlobalPointer": (
        lambda: layers.EfficientGlobalPointer(10, 16),
        (HIDDEN,),
        {
            "dense/kernel": keeps(1, WIDTH),
            "type_dense/kernel": keeps(1, 32),
            r"\w+/bias": ZEROS,
        },
    ),
    "FavorAttention": (
        lambda: layers.FavorAttention(4, 16, num_features=64),
        (HIDDEN, HIDDEN),
        {**ATTENTION, "projection": normal(1.0)},
    ),
    "FeedForward": (lambda: layers.FeedForward(INNER, gated=True), (HIDDEN,), FEED_FORWARD),
    "GatedAttentionBlock": (
        lambda: layers.GatedAttentionBlock(
            layers.GatedAttentionUnit(INNER, 32, name="attention")
        ),
        (HIDDEN,),
        {**{f"attention/{k}": v for k, v in GAU.items()}, **norm("attention_norm")},
    ),
    "GatedAttentionUnit": (lambda: layers.GatedAttentionUnit(INNER, 32), (HIDDEN,), GAU),
    "GlobalPointer": (
        lambda: layers.GlobalPointer(10, 16),
        (HIDDEN,),
        {"dense/kernel": keeps(1, WIDTH), "dense/bias": ZEROS},
    ),
    "LinearAttention": (lambda: layers.LinearAttention(4, 16), (HIDDEN, HIDDEN), ATTENTION),
    "MultiHeadAttention": (attention, (HIDDEN, HIDDEN), ATTENTION),
    "PolynomialAttention": (
        lambda: layers.PolynomialAttention(4, 16, order=2),
        (HIDDEN, HIDDEN),
        ATTENTION,
    ),
    "PositionEmbedding": (
        lambda: layers.PositionEmbedding(40),
        (HIDDEN,),
        {"embeddings": uniform(0.05)},
    ),
    "RMSNorm": (layers.RMSNorm, (HIDDEN,), {"gamma": ONES}),
    "RelativePosition": (
        lambda: attention(position=layers.RelativePosition(20)),
        (HIDDEN, HIDDEN),
        {**ATTENTION, r"relative_position/(key|value)_table": glorot(2 * 20 + 1, 16)},
    ),
    "SegmentEmbedding": (
        lambda: layers.SegmentEmbedding(16),
        (HIDDEN, IDS),
        {"embeddings": uniform(0.05)},
    ),
    "T5Bias": (
        lambda: attention(position=layers.T5Bias(4)),
        (HIDDEN, HIDDEN),
        {**ATTENTION, "t5_bias/embeddings": ZEROS},
    ),
    "TheseusModule": (
        lambda: layers.TheseusModule(layers.FeedForward(INNER), layers.FeedForward(INNER)),
        (HIDDEN,),
        IN_FEED_FORWARD,
    ),
    "TokenEmbedding": (
        lambda: layers.TokenEmbedding(200, WIDTH),
        (IDS,),
        {"embeddings": uniform(0.05)},
    ),
    "TransformerBlock": (
        lambda: layers.TransformerBlock(
            attention(name="attention"),
            layers.FeedForward(INNER),
            cross_attention=attention(name="cross_attention"),
        ),
        (HIDDEN, None, HIDDEN),
        {
            **ATTENTION_AND_FEED_FORWARD,
            **norm(r"(attention|cross_attention|feed_forward)_norm"),
        },
    ),
}
WITHOUT_WEIGHTS = {
    "GradientNormalized",  # those of the model around which it is
    "GradientReversal",
    "OtherTokens",
    "PrefixMask",
    "ReRoPE",
    "RotaryPosition",
    "WithMask",
}


def test_every_public_layer_is_in_the_table():
    public = {name for name in layers.__all__ if isinstance(getattr(layers, name), type)}
    assert public - WITHOUT_WEIGHTS == LAYERS.keys()


@pytest.mark.parametrize("name", LAYERS)
def test_fresh_weights_of_a_layer(name):
    make, inputs, table = LAYERS[name]
    keras.utils.set_random_seed(0)
    layer = make()
    layer(*inputs)
    values = {
        w.path.removeprefix(f"{layer.name}/"): ops.convert_to_numpy(w) for w in layer.weights
    }
    check(values, table)
