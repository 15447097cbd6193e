"""Relatives of BERT against transformers (golden arrays), or float64 NumPy if it has none."""

import json
import math
from pathlib import Path

import keras
import numpy as np
import pytest
from bundle import write_bundle
from families import HEADS, OWN, SEGMENTS, SIZES, TOKENS, flags, random_model, run, values_of
from keras import ops

from keras_ext import models
from keras_ext.models import (
    FAMILIES,
    build_transformer_model,
    replace_attention,
    save_transformer_model,
)

safetensors = pytest.importorskip("safetensors.numpy")

HERE = Path(__file__).parent
IN_TRANSFORMERS = [
    "albert",
    "electra",
    "electra_generator",
    "modernbert",
    "roberta",
    "roformer",
]
WITH_TENSORFLOW = [f for f in HEADS if "tensorflow" in FAMILIES[f].names]


# ------------------------------------------------------------------ transformers


@pytest.mark.parametrize("family", IN_TRANSFORMERS)
def test_equals_transformers(family, tmp_path):
    golden = np.load(HERE / "golden" / f"{family}.npz")
    (tmp_path / "config.json").write_text(str(golden["config"]))
    weights = {
        k.removeprefix("weights/"): golden[k] for k in golden if k.startswith("weights/")
    }
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    heads = [head for head in HEADS[family] if f"outputs/{head}" in golden]
    flags = {f"with_{head}": True for head in heads}
    model = build_transformer_model(tmp_path, model=family, **flags)
    report = model.checkpoint_report
    assert not report.fresh
    reasons = set(report.ignored.values())
    assert all(reason == "constant" or reason.startswith("tied to ") for reason in reasons)
    segment_ids = golden.get("segment_ids")
    outputs = run(model, golden["token_ids"], segment_ids)
    for name, output in zip(("hidden", *heads), outputs, strict=True):
        np.testing.assert_allclose(output, golden[f"outputs/{name}"], atol=1e-5, err_msg=name)


# ------------------------------------------------------------------ float64 references


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)


def norm(x, gamma, beta):
    return rms(x - x.mean(-1, keepdims=True)) * gamma + beta


def gelu(x):
    return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(scores, keep):
    scores = np.exp(scores - scores.max(-1, keepdims=True)) * keep
    return scores / scores.sum(-1, keepdims=True)


def turned(x):
    """Rotary positions of (length, size), component by component."""
    result = np.empty_like(x)
    for t, row in enumerate(x):
        for k in range(0, x.shape[-1], 2):
            angle = t * 10_000 ** (-k / x.shape[-1])
            u, v = row[k : k + 2]
            result[t, k] = u * math.cos(angle) - v * math.sin(angle)
            result[t, k + 1] = v * math.cos(angle) + u * math.sin(angle)
    return result


def distance_vector(distance, size, reach):
    """NEZHA's sinusoids of a clipped distance."""
    place = min(max(distance, -reach), reach) + reach
    parts = [place * 10_000 ** (-(k - k % 2) / size) for k in range(size)]
    return np.array([math.cos(p) if k % 2 else math.sin(p) for k, p in enumerate(parts)])


class Weights:
    """The weights of a model in float64; dense layers may lack a bias."""

    def __init__(self, model):
        self.values = {
            path: value.astype("float64") for path, value in values_of(model).items()
        }

    def __getitem__(self, path):
        return self.values[path]

    def dense(self, x, name):
        return x @ self[f"{name}/kernel"] + self.values.get(f"{name}/bias", 0)

    def norm(self, x, name):
        return norm(x, self[f"{name}/gamma"], self[f"{name}/beta"])


def heads_of(x, count=2):
    return np.split(x, count, axis=-1)


def nezha(weights, ids, segments):
    table = weights["token_embedding/embeddings"]
    h = weights.norm(
        table[ids] + weights["segment_embedding/embeddings"][segments], "embedding_norm"
    )
    keep, length = ids != 0, len(ids)
    for i in range(3):
        at = f"encoder_{i}/attention"
        projected = [
            heads_of(weights.dense(h, f"{at}/{p}_dense")) for p in ("query", "key", "value")
        ]
        attended = []
        for q, k, v in zip(*projected, strict=True):
            size = q.shape[-1]
            vectors = np.array(
                [
                    [distance_vector(t - s, size, 2) for t in range(length)]
                    for s in range(length)
                ]
            )
            scores = (q @ k.T + np.einsum("sd,std->st", q, vectors)) / math.sqrt(size)
            p = softmax(scores, keep)
            attended.append(p @ v + np.einsum("st,std->sd", p, vectors))
        attended = weights.dense(np.concatenate(attended, -1), f"{at}/output_dense")
        h = weights.norm(h + attended, f"encoder_{i}/attention_norm")
        inner = gelu(weights.dense(h, f"encoder_{i}/feed_forward/intermediate_dense"))
        inner = weights.dense(inner, f"encoder_{i}/feed_forward/output_dense")
        h = weights.norm(h + inner, f"encoder_{i}/feed_forward_norm")
    mlm = weights.norm(gelu(weights.dense(h, "mlm_dense")), "mlm_norm") @ table.T
    pooled = np.tanh(weights.dense(h[0], "pooler"))
    return h, mlm + weights["mlm_bias/bias"], weights.dense(pooled, "nsp"), pooled


def roformer_v2(weights, ids, segments):
    table = weights["token_embedding/embeddings"]
    h = rms(table[ids] + weights["segment_embedding/embeddings"][segments])
    for i in range(3):
        at = f"encoder_{i}/attention"
        projected = [
            heads_of(weights.dense(h, f"{at}/{p}_dense")) for p in ("query", "key", "value")
        ]
        attended = [
            softmax(turned(q) @ turned(k).T / math.sqrt(q.shape[-1]), ids != 0) @ v
            for q, k, v in zip(*projected, strict=True)
        ]
        h = rms(h + weights.dense(np.concatenate(attended, -1), f"{at}/output_dense"))
        inner = gelu(weights.dense(h, f"encoder_{i}/feed_forward/intermediate_dense"))
        h = rms(h + weights.dense(inner, f"encoder_{i}/feed_forward/output_dense"))
    return h, h @ table.T


def gau_alpha(weights, ids, segments):
    table = weights["token_embedding/embeddings"]
    h = rms(table[ids] + weights["segment_embedding/embeddings"][segments])
    scale = math.log(max((ids != 0).sum(), 16)) / math.log(512)
    for i in range(3):
        at = f"encoder_{i}/attention"
        u, v, z = np.split(silu(weights.dense(h, f"{at}/input_dense")), [12, 24], axis=-1)
        q, k = (turned(z * weights[f"{at}/{name}_gamma"]) for name in ("query", "key"))
        p = softmax(q @ k.T / math.sqrt(6) * scale, ids != 0)
        h = rms(h + weights.dense(u * (p @ v), f"{at}/output_dense"))
    return h, h @ table.T


@pytest.mark.parametrize("reference", [nezha, roformer_v2, gau_alpha])
def test_equals_the_float64_reference(reference):
    family = reference.__name__
    model = random_model(family, **flags(family))
    weights = Weights(model)
    texts = [
        (TOKENS[0], SEGMENTS[0]),
        (TOKENS[1], SEGMENTS[1]),
        # Long enough for the log-n scaling of a GAU to differ from its least.
        (np.r_[np.arange(40) % 10 + 1, 0, 0], np.r_[np.arange(40) % 2, 0, 0]),
    ]
    for ids, segments in texts:
        expected = reference(weights, ids, segments)
        for output, right in zip(run(model, ids[None], segments[None]), expected, strict=True):
            np.testing.assert_allclose(output[0], right, atol=1e-5)


# ------------------------------------------------------------------ every family


@pytest.mark.parametrize("family", HEADS)
def test_saved_and_built_again(family, tmp_path):
    model = random_model(family, **flags(family))
    save_transformer_model(model, tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())["model_type"]
    assert told == FAMILIES[family].model_type
    again = build_transformer_model(tmp_path, **flags(family))
    assert not again.checkpoint_report.ignored
    before, after = values_of(model), values_of(again)
    assert before.keys() == after.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)


@pytest.mark.parametrize("family", WITH_TENSORFLOW)
def test_tensorflow_checkpoint_has_every_weight_under_a_name_of_its_own(family, tmp_path):
    model = random_model(family, **flags(family))
    config = {**SIZES, **OWN.get(family, {})}
    table, variables = FAMILIES[family].from_config(config).names["tensorflow"], {}
    for path, value in values_of(model).items():
        source = table.source(path)
        name, transposed = source.name, source.transposed
        assert name not in variables
        variables[name] = np.ascontiguousarray(value.T if transposed else value)
    write_bundle(tmp_path / "model.ckpt", variables)
    again = build_transformer_model(config, tmp_path, family, **flags(family))
    assert not again.checkpoint_report.fresh
    assert not again.checkpoint_report.ignored
    for one, other in zip(run(again), run(model), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("family", HEADS)
def test_keras_file_and_padding(family, tmp_path):
    model = random_model(family, **flags(family))
    outputs = run(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [w.path for w in loaded.weights] == [w.path for w in model.weights]
    for one, other in zip(run(loaded), outputs, strict=True):
        np.testing.assert_array_equal(one, other)
    padded = [np.pad(x, ((0, 0), (0, 1))) for x in (TOKENS, SEGMENTS)]
    length = outputs[0].shape[1]
    np.testing.assert_allclose(run(model, *padded)[0][:, :length], outputs[0], atol=1e-5)
    assert np.isfinite(run(model, 0 * TOKENS)[0]).all()


# Of the others every part is a part of these, too.
DIFFERENT = ["albert", "nezha", "gau_alpha"]


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch.compile takes minutes")
@pytest.mark.parametrize("family", DIFFERENT)
def test_compiled_equals_eager(family):
    model = random_model(family, **flags(family))
    model.compile(jit_compile=True)
    compiled = model.predict([TOKENS, SEGMENTS], verbose=0)
    for one, other in zip(compiled, run(model), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("family", [*DIFFERENT, "gpt2", "t5"])
@pytest.mark.parametrize(("name", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_half_precisions_are_near_float32(family, name, tolerance):
    exact = run(random_model(family))
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(f"mixed_{name}")
    try:
        model = random_model(family)
    finally:
        keras.config.set_dtype_policy(policy)
    assert keras.backend.standardize_dtype(model.output.dtype) == name
    widened = keras.Model(model.inputs, ops.cast(model.output, "float32"))
    difference = np.abs(run(widened) - exact)
    real = TOKENS != 0 if family != "t5" else slice(None)
    assert 0 < difference[real].max() < tolerance


@pytest.mark.parametrize("family", ["albert", "roformer"])
def test_another_attention(family):
    """With the same projections, and for ALBERT one for all layers of a group."""
    from keras_ext.layers import MultiHeadAttention

    model = random_model(family)
    changed = replace_attention(
        model, lambda old: MultiHeadAttention(old.num_heads, old.key_dim)
    )
    assert values_of(changed).keys() == values_of(model).keys()
    same = np.allclose(run(changed), run(model), atol=1e-5)
    assert same == (family == "albert")  # the other loses its positions


def test_blocks_of_a_group_are_one():
    model = random_model("albert")
    blocks = [layer.name for layer in model.layers if layer.name.startswith("encoder_")]
    assert blocks == ["encoder_0", "encoder_1"]
    config = {**SIZES, **OWN["albert"], "num_hidden_groups": 4}
    with pytest.raises(ValueError, match=r"num_hidden_groups must be from 1 to 3, .*, got 4"):
        build_transformer_model(config, model="albert")


@pytest.mark.parametrize("format_", ["tensorflow", "huggingface"])
def test_an_unshared_albert_starts_from_the_shared_one(format_, tmp_path):
    config = {**SIZES, **OWN["albert"], "num_hidden_groups": 1}
    shared = build_transformer_model(config, model="albert")
    if format_ == "huggingface":
        save_transformer_model(shared, tmp_path)
    else:
        table = FAMILIES["albert"].names["tensorflow"]
        values = values_of(shared)
        variables = {table.source(path).name: value for path, value in values.items()}
        write_bundle(tmp_path / "model.ckpt", variables)
    apart = build_transformer_model({**config, "num_hidden_groups": 3}, tmp_path, "albert")
    assert not apart.checkpoint_report.fresh
    assert not apart.checkpoint_report.ignored
    assert len(apart.weights) - len(shared.weights) == 2 * 16
    np.testing.assert_allclose(run(apart), run(shared), atol=1e-6)


def test_the_generator_reads_the_embeddings_of_the_discriminator():
    names = FAMILIES["electra_generator"].names["tensorflow"]
    table = names.source("token_embedding/embeddings").name
    assert table == "electra/embeddings/word_embeddings"
    kernel = names.source("encoder_2/attention/query_dense/kernel").name
    assert kernel == "generator/encoder/layer_2/attention/self/query/kernel"
    bias = names.source("mlm_bias/bias").name
    assert bias == "generator_predictions/output_bias"


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        (
            "roformer",
            {"rotary_value": True},
            "rotary_value must be False for RoFormer, got True",
        ),
        ("nezha", {"use_relative_position": False}, "use_relative_position must be True"),
        (
            "bert",
            {"use_relative_position": True},
            "use_relative_position must be False for BERT",
        ),
        ("albert", {"inner_group_num": 2}, "inner_group_num must be 1 for ALBERT, got 2"),
        (
            "electra",
            {"model_type": "bert"},
            "model_type must be 'electra' for ELECTRA, got 'bert'",
        ),
        ("bert", {"embedding_size": 4}, "embedding_size must be hidden_size=8 for BERT, got 4"),
        (
            "roformer_v2",
            {"embedding_size": 4},
            "embedding_size must be 8 for RoFormerV2, got 4",
        ),
        (None, {"model_type": "llama"}, "Unknown family 'llama'. Known: albert, bert"),
    ],
)
def test_configurations_of_other_models_are_refused(family, config, message):
    with pytest.raises(ValueError, match=message):
        build_transformer_model({**SIZES, **config}, model=family)


def test_heads_that_a_family_has_not_are_refused():
    with pytest.raises(
        ValueError, match=r"ELECTRA has no head for with_mlm\. It has: with_discr"
    ):
        build_transformer_model(SIZES, model="electra", with_mlm=True)
    with pytest.raises(ValueError, match="RoFormerV2 has no head for with_pool"):
        build_transformer_model(SIZES, model="roformer_v2", with_pool=True)


@pytest.mark.parametrize(("family", "power"), [("roformer_v2", -1), ("gau_alpha", -2 / 3)])
def test_initial_deviations(family, power):
    sizes = {**SIZES, "hidden_size": 256, "vocab_size": 1000, "num_hidden_layers": 2}
    model = build_transformer_model(sizes, model=family)
    values = values_of(model)
    name = "feed_forward/intermediate_dense" if power == -1 else "attention/input_dense"
    for path in ("token_embedding/embeddings", f"encoder_1/{name}/kernel"):
        expected = math.sqrt(2**power / 256)  # of both: the width is 256
        assert values[path].std() == pytest.approx(expected, rel=0.03)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("file", "family"),
    [
        ("nezha/NEZHA-TensorFlow.json", "nezha"),
        ("nezha/NEZHA-PyTorch.json", "nezha"),
        ("albert_zh/albert_config_tiny_google.json", "albert"),
        ("albert_zh/albert_config_base_google_fast.json", "albert"),
        ("chinese_electra/base_discriminator_config.json", "electra"),
        ("chinese_electra/small_generator_config.json", "electra_generator"),
        ("rbt3.json", "bert"),
    ],
)
def test_published_configurations_are_read(shared, file, family):
    config = json.loads((shared / "configs" / file).read_text(encoding="utf-8"))
    sizes = FAMILIES[family].from_config(config)
    assert sizes.vocab_size == config["vocab_size"]
    assert sizes.embedding_size == config.get("embedding_size", config["hidden_size"])


# ------------------------------------------------------------------ applications


def changes(model, tokens, place, segments):
    """Which outputs change with the token at a place, (batch, length)."""
    other = tokens.copy()
    other[:, place] = tokens[:, place] % 9 + 1
    one, two = (run(model, x, segments) for x in (tokens, other))
    return np.abs(one - two).max(-1) > 1e-4


@pytest.mark.parametrize("family", DIFFERENT)
def test_language_model(family):
    model = random_model(family, application="lm")
    tokens = np.array([[3, 1, 4, 1, 5, 9, 0]], "int32")
    for place in range(6):
        changed = changes(model, tokens, place, 0 * tokens)
        np.testing.assert_array_equal(changed[0, :6], np.arange(6) >= place)


@pytest.mark.parametrize("family", DIFFERENT)
def test_unilm(family):
    """Places 0 to 2 are the first text, 3 to 5 the second, 6 is padding of segment 0."""
    model = random_model(family, application="unilm")
    tokens = np.array([[3, 1, 4, 1, 5, 9, 0]], "int32")
    segments = np.array([[0, 0, 0, 1, 1, 1, 0]], "int32")
    for place in range(6):
        sees = np.arange(6) >= (0 if place < 3 else place)
        np.testing.assert_array_equal(changes(model, tokens, place, segments)[0, :6], sees)
    encoder, lm = (random_model(family, application=kind) for kind in ("encoder", "lm"))
    for other, segment in ((encoder, 0), (lm, 1)):
        same = np.full_like(tokens, segment)
        one, two = run(model, tokens, same), run(other, tokens, same)
        np.testing.assert_allclose(one[:, :6], two[:, :6], atol=1e-5)


def test_applications_are_saved_and_wrong_ones_refused(tmp_path):
    config = {**SIZES, "application": "unilm"}
    save_transformer_model(build_transformer_model(config), tmp_path)
    names = [layer.name for layer in build_transformer_model(tmp_path).layers]
    assert "prefix_mask" in names
    with pytest.raises(ValueError, match="must be one of encoder, lm, unilm for BERT, got"):
        build_transformer_model(SIZES, application="seq2seq")


def test_all_families_are_public():
    assert all(getattr(models, family.__name__) is family for family in FAMILIES.values())
