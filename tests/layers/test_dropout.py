"""Dropout of every layer and model family: where it acts, how often and at which rate.

In these tests it drops by known masks, and each reference in NumPy float64 drops by the same
ones, where the definition has it. So outputs agree only if every dropout is in its place, and
the lists of what was dropped only if none is there twice or anywhere else.
"""

import inspect
import math

import keras
import numpy as np
import pytest
from families import (
    HEADS,
    SEGMENTS,
    SIZES,
    TARGETS,
    TOKENS,
    flags,
    random_model,
    values_of,
)
from keras import ops

from keras_ext import layers
from keras_ext.layers import (
    FeedForward,
    GatedAttentionBlock,
    GatedAttentionUnit,
    MultiHeadAttention,
    RelativePosition,
    RMSNorm,
    TransformerBlock,
)
from keras_ext.models import FAMILIES, build_transformer_model
from keras_ext.models.gpt2_ml import GroverBlock

X = np.random.default_rng(0).normal(size=(2, 5, 8)).astype("float32")
MEMORY = np.random.default_rng(1).normal(size=(2, 3, 8)).astype("float32")


class Drops:
    """Dropout by masks that depend on rate and shape alone, in layers and in references."""

    def __init__(self):
        self.drawn, self.expected = [], []

    @staticmethod
    def factors(rate, shape):
        rng = np.random.default_rng([round(100 * rate), *shape])
        return (rng.random(shape) >= rate) / (1 - rate)

    def __call__(self, x, rate):
        """What a reference drops."""
        if rate == 0:
            return x
        self.expected.append((rate, x.shape))
        return x * self.factors(rate, x.shape)

    def check(self):
        """What the layers dropped is what the references did."""
        assert sorted(self.drawn) == sorted(self.expected)


@pytest.fixture
def drops(monkeypatch):
    drops = Drops()

    def call(self, inputs, training=False):
        if not training or self.rate == 0:
            return inputs
        shape = tuple(inputs.shape)
        drops.drawn.append((self.rate, shape))
        return inputs * ops.convert_to_tensor(drops.factors(self.rate, shape), inputs.dtype)

    monkeypatch.setattr(keras.layers.Dropout, "call", call)
    return drops


def called(layer, *inputs, **options):
    """Outputs of a layer; its weights become random ones, biases and gammas too."""
    layer(*inputs, **{k: v for k, v in options.items() if k != "training"})
    rng = np.random.default_rng(2)
    for weight in layer.weights:
        weight.assign(rng.normal(size=weight.shape) / 2 + weight.path.endswith("gamma"))
    return ops.convert_to_numpy(layer(*inputs, **options))


def close(outputs, expected):
    np.testing.assert_allclose(outputs, expected, atol=2e-5)


# ------------------------------------------------------------------ references


def gelu(x):
    return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def softmax(scores, keep=True):
    scores = np.where(keep, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    return scores / scores.sum(-1, keepdims=True)


def array(weight):
    return ops.convert_to_numpy(weight).astype("float64")


def dense(x, layer):
    y = x @ array(layer.kernel)
    return y if layer.bias is None else y + array(layer.bias)


def normed(x, gamma=1.0, beta=0.0):
    x = x - x.mean(-1, keepdims=True)
    return rms(x) * gamma + beta


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)


def norm(x, layer):
    return normed(x, array(layer.gamma), array(layer.beta))


def split(x, heads):
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)  # (batch, heads, length, size)


def attention(layer, x, memory, drop, keep=True):
    """drop: what becomes of the weights, (batch, heads, targets, sources)."""
    projections = (layer.query_dense, x), (layer.key_dense, memory), (layer.value_dense, memory)
    numbers = layer.num_heads, layer.num_kv_heads, layer.num_kv_heads
    q, k, v = (split(dense(y, d), n) for (d, y), n in zip(projections, numbers, strict=True))
    k, v = (np.repeat(y, layer.num_heads // layer.num_kv_heads, axis=1) for y in (k, v))
    scores, table = q @ k.swapaxes(2, 3), layer.position
    if table is not None:
        distances = np.arange(k.shape[2]) - np.arange(q.shape[2])[:, None]
        rows = np.clip(distances, -table.max_distance, table.max_distance) + table.max_distance
        scores = scores + np.einsum("bhtd,tsd->bhts", q, array(table.key_table)[rows])
    weights = drop(softmax(scores / math.sqrt(layer.key_dim), keep))
    heads = weights @ v
    if table is not None:
        heads = heads + np.einsum("bhts,tsd->bhtd", weights, array(table.value_table)[rows])
    return dense(heads.swapaxes(1, 2).reshape(*x.shape[:2], -1), layer.output_dense)


def feed_forward(layer, x, drop):
    inner = gelu(dense(x, layer.intermediate_dense))
    if layer.gated:
        inner = inner * dense(x, layer.linear_dense)
    return dense(drop(inner), layer.output_dense)


def gated_unit(layer, x, drop):
    rows = dense(x, layer.input_dense)
    u, v, z = np.split(rows / (1 + np.exp(-rows)), [layer.units, 2 * layer.units], axis=-1)
    q, k = z * array(layer.query_gamma), z * array(layer.key_gamma)
    scale = math.log(16) / math.log(512) / math.sqrt(layer.key_dim)
    weights = drop(softmax(q @ k.swapaxes(1, 2) * scale)[:, None])
    return dense(u * (weights[:, 0] @ v), layer.output_dense)


# ------------------------------------------------------------------ layers


def test_every_layer_with_dropout_is_here():
    public = [getattr(layers, name) for name in layers.__all__]
    classes = [c for c in public if isinstance(c, type)]
    dropping = {c for c in classes if "dropout" in inspect.signature(c).parameters}
    here = {FeedForward, MultiHeadAttention, GatedAttentionUnit}
    assert dropping == here | {TransformerBlock, GatedAttentionBlock}


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("options", [{}, {"gated": True}, {"use_bias": False}])
def test_feed_forward_drops_before_its_second_layer(drops, rate, options):
    layer = FeedForward(12, dropout=rate, **options)
    outputs = called(layer, X, training=True)
    close(outputs, feed_forward(layer, X, lambda inner: drops(inner, rate)))
    drops.check()


CAUSAL = np.tri(5, dtype=bool)


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize(
    ("options", "keep"),
    [
        ({}, True),
        ({"num_kv_heads": 1}, True),
        ({"value_dim": 3, "use_bias": False}, True),
        ({"causal": True}, CAUSAL),
        ({"position": RelativePosition(2)}, True),
    ],
    ids=["plain", "grouped", "value_dim", "causal", "relative"],
)
def test_attention_drops_its_weights(drops, rate, options, keep):
    """After the softmax, so that what is left does not sum to one, and nothing else."""
    position = options.get("position")
    if position is not None:  # a layer of its own in each test
        options = {**options, "position": position.from_config(position.get_config())}
    layer = MultiHeadAttention(2, 4, dropout=rate, **options)
    outputs = called(layer, X, X, training=True)
    close(outputs, attention(layer, X, X, lambda weights: drops(weights, rate), keep))
    drops.check()


def test_attention_to_a_memory_with_masks_drops_its_weights(drops):
    layer = MultiHeadAttention(2, 4, dropout=0.5)
    padding = np.array([[True, True, False], [True, True, True]])
    pattern = np.random.default_rng(3).random((2, 5, 3)) < 0.5
    pattern[..., 0] = True
    masks = {"value_mask": padding, "attention_mask": pattern}
    masks = {name: ops.convert_to_tensor(mask) for name, mask in masks.items()}
    outputs = called(layer, X, MEMORY, **masks, training=True)
    keep = (padding[:, None] & pattern)[:, None]
    close(outputs, attention(layer, X, MEMORY, lambda weights: drops(weights, 0.5), keep))
    drops.check()


def test_a_window_drops_its_weights(drops):
    """It has a block of 32 queries, with two keys before the text: the window is 3 wide."""
    layer = MultiHeadAttention(2, 4, dropout=0.5, window=3, causal=True)
    outputs = called(layer, X, X, training=True)
    shape = (2, 2, 32, 34)
    factors = drops.factors(0.5, shape)[:, :, :5, 2:7]
    keep = CAUSAL & ~np.tri(5, k=-3, dtype=bool)
    close(outputs, attention(layer, X, X, lambda weights: weights * factors, keep))
    assert drops.drawn == [(0.5, shape)]


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_gated_unit_drops_its_weights(drops, rate):
    layer = GatedAttentionUnit(12, 6, dropout=rate)
    outputs = called(layer, X, training=True)
    close(outputs, gated_unit(layer, X, lambda weights: drops(weights, rate)))
    drops.check()


# Of attention weights, within the feed-forward layer, after the sublayers.
RATES = [(0.5, 0.3, 0.2), (0.5, 0.0, 0.0), (0.0, 0.3, 0.0), (0.0, 0.0, 0.2), (0.0, 0.0, 0.0)]
of_rates = pytest.mark.parametrize("rates", RATES, ids=str)


def block_of(rates, kind=TransformerBlock, crossed=False, **options):
    def attend(name):
        return MultiHeadAttention(2, 4, dropout=rates[0], name=name)

    return kind(
        attend("attention"),
        FeedForward(12, dropout=rates[1]),
        dropout=rates[2],
        cross_attention=attend("cross_attention") if crossed else None,
        **options,
    )


def sublayers_of(block, rates, drops, memory=None):
    """Attention to x or, without a cross attention, to the memory; feed-forward."""

    def attends(layer, to):
        def call(x):
            to_what = x if to is None else to
            return attention(layer, x, to_what, lambda w: drops(w, rates[0]))

        return call

    def feeds(x):
        return feed_forward(block.feed_forward, x, lambda inner: drops(inner, rates[1]))

    if block.cross_attention is None:
        return [
            (attends(block.attention, memory), block.attention_norm),
            (feeds, block.feed_forward_norm),
        ]
    return [
        (attends(block.attention, None), block.attention_norm),
        (attends(block.cross_attention, memory), block.cross_attention_norm),
        (feeds, block.feed_forward_norm),
    ]


def post_norm(x, sublayer, layer, drop):
    return norm(x + drop(sublayer(x)), layer)


def pre_norm(x, sublayer, layer, drop):
    return x + drop(sublayer(norm(x, layer)))


@of_rates
@pytest.mark.parametrize("reference", [post_norm, pre_norm])
@pytest.mark.parametrize("others", ["itself", "memory", "cross_attention"])
def test_a_block_drops_what_each_sublayer_gives_to_the_sum(drops, rates, reference, others):
    crossed = others == "cross_attention"
    block = block_of(rates, crossed=crossed, pre_norm=reference is pre_norm)
    memory = None if others == "itself" else MEMORY
    outputs = called(block, X, memory=memory, training=True)
    y = X
    for sublayer, layer in sublayers_of(block, rates, drops, memory):
        y = reference(
            y, sublayer, layer, lambda sublayer_output: drops(sublayer_output, rates[2])
        )
    close(outputs, y)
    drops.check()


@of_rates
def test_a_grover_block_drops_what_each_sublayer_gives_to_the_sum(drops, rates):
    block = block_of(rates, GroverBlock)
    outputs = called(block, X, training=True)
    (attend, first), (feed, second) = sublayers_of(block, rates, drops)
    h = X + drops(attend(X), rates[2])
    close(outputs, norm(h + drops(feed(norm(h, first)), rates[2]), second))
    drops.check()


@pytest.mark.parametrize("rates", [(0.5, 0.2), (0.5, 0.0), (0.0, 0.2), (0.0, 0.0)], ids=str)
def test_a_gated_block_drops_what_its_unit_gives_to_the_sum(drops, rates):
    unit = GatedAttentionUnit(12, 6, dropout=rates[0])
    block = GatedAttentionBlock(unit, dropout=rates[1], norm=RMSNorm(1e-12, scale=False))
    outputs = called(block, X, training=True)
    given = drops(gated_unit(unit, X, lambda weights: drops(weights, rates[0])), rates[1])
    close(outputs, rms(X + given))
    drops.check()


@pytest.mark.parametrize("training", [False, None])
@pytest.mark.parametrize(
    "make",
    [
        lambda: block_of((0.5, 0.5, 0.5)),
        lambda: block_of((0.5, 0.5, 0.5), pre_norm=True),
        lambda: block_of((0.5, 0.5, 0.5), GroverBlock),
        lambda: GatedAttentionBlock(GatedAttentionUnit(12, 6, dropout=0.5), dropout=0.5),
    ],
    ids=["post_norm", "pre_norm", "grover", "gated"],
)
def test_inference_drops_nothing(drops, make, training):
    called(make(), X, training=training)
    assert not drops.drawn


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: block_of((0.5, 0.3, 0.2), **options),
        lambda **options: GatedAttentionBlock(
            GatedAttentionUnit(12, 6, dropout=0.5), dropout=0.2, **options
        ),
    ],
    ids=["transformer", "gated"],
)
def test_recomputed_blocks_drop_the_same(drops, make):
    plain = called(make(), X, training=True)
    number, drawn = len(drops.drawn), drops.drawn
    close(called(make(recompute=True), X, training=True), plain)
    assert drawn[number : 2 * number] == drawn[:number]


# ------------------------------------------------------------------ models

TEXTS, LENGTH = TOKENS.shape
TARGET_LENGTH = TARGETS.shape[1]
WIDTH, INNER, HEADS_OF_BLOCK, BLOCKS = 8, 12, 2, 3
HIDDEN, TARGET = (TEXTS, LENGTH, WIDTH), (TEXTS, TARGET_LENGTH, WIDTH)


def scores(targets=LENGTH, sources=LENGTH, heads=HEADS_OF_BLOCK):
    return (TEXTS, heads, targets, sources)


def encoder(hidden, weights, width=WIDTH):
    """After embeddings of a width; on the weights and after both sublayers of all blocks."""
    block = [(weights, scores()), (hidden, HIDDEN), (hidden, HIDDEN)]
    return [(hidden, (*HIDDEN[:2], width)), *block * BLOCKS]


def narrow_encoder(hidden, weights):
    """Before the embeddings are widened."""
    return encoder(hidden, weights, width=4)


def gau_encoder(hidden, weights):
    block = [(weights, scores(heads=1)), (hidden, HIDDEN)]
    return [(hidden, HIDDEN), *block * BLOCKS]


def t5_sides(hidden, weights):
    """Also within the feed-forward layers and after each side."""

    def side(shape, blocks, *attentions):
        attended = [x for pair in attentions for x in ((weights, pair), (hidden, shape))]
        fed = [(hidden, (*shape[:2], INNER)), (hidden, shape)]
        return [(hidden, shape), *[*attended, *fed] * blocks, (hidden, shape)]

    of_targets = scores(TARGET_LENGTH, TARGET_LENGTH), scores(TARGET_LENGTH)
    return side(HIDDEN, BLOCKS, scores()) + side(TARGET, 2, *of_targets)


def modern_encoder(hidden, weights):
    """The attention's output at the rate of its weights; `mlp_dropout` is another rate."""
    window = (TEXTS, HEADS_OF_BLOCK, 32, 34)  # of one block of places
    full, local = ([(weights, shape), (weights, HIDDEN)] for shape in (scores(), window))
    return [(hidden, HIDDEN), *full, *local * (BLOCKS - 1)]


def two_streams(hidden, weights):
    """Keys and values, then queries."""
    return [(hidden, HIDDEN), *encoder(hidden, weights)]


DRAWN = {
    "bert": encoder,
    "albert": narrow_encoder,
    "electra": narrow_encoder,
    "electra_generator": narrow_encoder,
    "roformer": narrow_encoder,
    "nezha": encoder,
    "roformer_v2": encoder,
    "gau_alpha": gau_encoder,
    "openai-gpt": encoder,
    "gpt2": encoder,
    "gpt2_ml": encoder,
    "modernbert": modern_encoder,
    "roberta": encoder,
    "xlm-roberta": encoder,
    "camembert": encoder,
    "t5": t5_sides,
    "mt5": t5_sides,
    "tta": two_streams,
}
ALL_HEADS = {"bert": {"with_mlm": True, "with_nsp": True, "with_pool": True}}
ALL_HEADS |= {family: flags(family) for family in HEADS}
INPUTS = {"token_ids": TOKENS, "segment_ids": SEGMENTS, "decoder_token_ids": TARGETS}


def run(model, **options):
    inputs = [INPUTS[x.name] for x in model.inputs]
    outputs = model(inputs if len(inputs) > 1 else inputs[0], **options)
    return keras.tree.map_structure(ops.convert_to_numpy, outputs)


def test_every_family_is_here():
    assert DRAWN.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", DRAWN)
@pytest.mark.parametrize(
    ("config", "options", "rates"),
    [
        ({}, {}, (0.1, 0.1)),
        ({"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}, {}, (0.3, 0.2)),
        ({}, {"dropout": 0.5, "attention_dropout": 0.0}, (0.5, 0.0)),
    ],
    ids=["default", "config", "arguments"],
)
def test_a_family_drops_what_it_is_said_to(drops, family, config, options, rates):
    if family == "modernbert" and not (config or options):
        rates = (0.0, 0.0)
    model = random_model(family, sizes={**SIZES, **config}, **options, **ALL_HEADS[family])
    run(model)
    assert not drops.drawn
    run(model, training=True)
    assert sorted(drops.drawn) == sorted(x for x in DRAWN[family](*rates) if x[0])


def test_the_rate_of_a_t5_is_that_of_its_attention_too(drops):
    run(random_model("t5", sizes={**SIZES, "dropout_rate": 0.3}), training=True)
    assert sorted(drops.drawn) == sorted(t5_sides(0.3, 0.3))


def bert_embeddings(weights, drop):
    """Dropped after the norm, and before they are widened."""
    x = weights["token_embedding/embeddings"][TOKENS]
    x = x + weights["segment_embedding/embeddings"][SEGMENTS]
    if "position_embedding/embeddings" in weights:
        x = x + weights["position_embedding/embeddings"][:LENGTH]
    x = normed(x, weights["embedding_norm/gamma"], weights["embedding_norm/beta"])
    x = drop(x)
    if "embedding_projection/kernel" not in weights:
        return x
    return x @ weights["embedding_projection/kernel"] + weights["embedding_projection/bias"]


def v2_embeddings(weights, drop):
    """Dropped before the norm."""
    x = weights["token_embedding/embeddings"][TOKENS]
    return rms(drop(x + weights["segment_embedding/embeddings"][SEGMENTS]))


def gpt_embeddings(weights, drop):
    x = weights["token_embedding/embeddings"][TOKENS]
    return drop(x + weights["position_embedding/embeddings"][:LENGTH])


def gpt2_ml_embeddings(weights, drop):
    x = weights["token_embedding/embeddings"][TOKENS]
    x = x + weights["position_embedding/embeddings"][:LENGTH]
    return drop(normed(x, weights["embedding_norm/gamma"], weights["embedding_norm/beta"]))


def t5_embeddings(weights, drop):
    return drop(weights["token_embedding/embeddings"][TOKENS])


def t5_target_embeddings(weights, drop):
    return drop(weights["token_embedding/embeddings"][TARGETS])


EMBEDDINGS = {
    "bert": ("encoder_0", bert_embeddings),
    "albert": ("encoder_0", bert_embeddings),
    "electra": ("encoder_0", bert_embeddings),
    "electra_generator": ("encoder_0", bert_embeddings),
    "roformer": ("encoder_0", bert_embeddings),
    "nezha": ("encoder_0", bert_embeddings),
    "roformer_v2": ("encoder_0", v2_embeddings),
    "gau_alpha": ("encoder_0", v2_embeddings),
    "openai-gpt": ("encoder_0", gpt_embeddings),
    "gpt2": ("encoder_0", gpt_embeddings),
    "gpt2_ml": ("encoder_0", gpt2_ml_embeddings),
    "t5": ("encoder_0", t5_embeddings),
    "mt5": ("decoder_0", t5_target_embeddings),
}


@pytest.mark.parametrize("family", EMBEDDINGS)
def test_where_a_family_drops_its_embeddings(drops, family, monkeypatch):
    """Before or after a norm or a projection: what the first block gets tells."""
    first, reference = EMBEDDINGS[family]
    model = random_model(family, sizes={**SIZES, "layer_norm_eps": 1e-12}, dropout=0.3)
    weights = {path: value.astype("float64") for path, value in values_of(model).items()}
    block, seen = model.get_layer(first), []
    call = block.call
    monkeypatch.setattr(block, "call", lambda x, **given: seen.append(x) or call(x, **given))
    run(model, training=True)
    close(ops.convert_to_numpy(seen[0]), reference(weights, lambda x: drops(x, 0.3)))


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_a_side_of_t5_drops_after_its_norm(drops, side):
    model = random_model("t5", dropout=0.3)
    last = {"encoder": "encoder_2", "decoder": "decoder_1"}[side]
    parts = [model.get_layer(name).output for name in (last, f"{side}_output_dropout")]
    hidden, outputs = run(keras.Model(model.inputs, parts), training=True)
    gamma = array(model.get_layer(f"{side}_norm").gamma)
    x = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-6)
    close(outputs, drops(x * gamma, 0.3))


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_a_tta_drops_tokens_positions_and_what_sublayers_give(drops, rate):
    sizes = {**SIZES, "num_hidden_layers": 1}
    rates = {"dropout": rate, "attention_dropout": 0.0}
    whole = build_transformer_model(sizes, model="tta", with_mlm=True, **rates)
    tta = keras.Model(whole.inputs, whole.outputs[1])
    logits = called(tta, TOKENS[:1], training=True)
    table, place = (
        array(tta.get_layer(f"{name}_embedding").embeddings) for name in ("token", "position")
    )
    memory = norm(table[TOKENS[:1]] + place[:LENGTH], tta.get_layer("token_norm"))
    hidden = norm(place[None, :LENGTH], tta.get_layer("position_norm"))
    memory, hidden = drops(memory, rate), drops(hidden, rate)
    block, others = tta.get_layer("encoder_0"), ~np.eye(LENGTH, dtype=bool)
    attended = attention(block.attention, hidden, memory, lambda weights: weights, others)
    h = norm(hidden + drops(attended, rate), block.attention_norm)
    fed = feed_forward(block.feed_forward, h, lambda inner: inner)
    h = norm(h + drops(fed, rate), block.feed_forward_norm)
    close(logits, h @ table.T + array(tta.get_layer("mlm_bias").bias))
    drops.check()
