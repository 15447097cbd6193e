"""What a built model knows of itself: through copies, files and surgery, saved by it alone."""

import json
from typing import ClassVar

import keras
import numpy as np
import pytest
from families import HEADS, OWN, SEGMENTS, SIZES, TARGETS, TOKENS, random_model, run
from families import values_of as values
from keras import ops

from keras_ext.layers import LinearAttention, blocks
from keras_ext.models import (
    BERT,
    FAMILIES,
    build_transformer_model,
    condition_norms,
    extend_positions,
    family_of,
    load_checkpoint,
    rename_layers,
    replace_attention,
    save_transformer_model,
    select_blocks,
    select_tokens,
    share_blocks,
)
from keras_ext.optimizers import MultiplierOptimizer, layerwise_decay
from keras_ext.training import FGM, build_theseus_model, extract_successor, with_objective

pytest.importorskip("safetensors")

ALL = ["bert", *HEADS]
ALL_HEADS = {"bert": ("mlm", "nsp", "pool"), **HEADS}
POSITION_IDS = np.array([[0, 1, 2, 3, 4, 5], [3, 4, 5, 0, 1, 2], [6, 0, 0, 0, 0, 0]], "int32")


def every(family):
    """All its heads."""
    return {f"with_{head}": True for head in ALL_HEADS[family]}


def outputs_of(model):
    """Of any model here: all outputs, flat."""
    known = {"token_ids": TOKENS, "segment_ids": SEGMENTS, "decoder_token_ids": TARGETS}
    known |= {"position_ids": POSITION_IDS, "memory_mask": TOKENS != 0}
    known["memory"] = np.random.default_rng(3).normal(size=(3, 6, 8)).astype("float32")
    inputs = [known[x.name] for x in model.inputs]
    found = model(inputs if len(inputs) > 1 else inputs[0])
    return [ops.convert_to_numpy(x) for x in keras.tree.flatten(found)]


def saved_and_built(model, directory, **heads):
    save_transformer_model(model, directory)
    again = build_transformer_model(directory, **heads)
    assert not again.checkpoint_report.fresh
    assert not again.checkpoint_report.ignored
    assert family_of(again) == family_of(model)
    return again


def same(one, other):
    for x, y in zip(outputs_of(one), outputs_of(other), strict=True):
        np.testing.assert_array_equal(x, y)


# ------------------------------------------------------------------ round trips


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("heads", [True, False], ids=["heads", "bare"])
def test_round_trip(family, heads, tmp_path):
    heads = every(family) if heads else {}
    model = random_model(family, **heads)
    sizes = FAMILIES[family].from_config({**SIZES, **OWN.get(family, {})})
    assert family_of(model) == sizes
    same(model, saved_and_built(model, tmp_path, **heads))


APPLICATIONS = [
    (family, application) for family in ALL for application in FAMILIES[family].applications[1:]
]


@pytest.mark.parametrize(("family", "application"), APPLICATIONS)
def test_round_trip_of_an_application(family, application, tmp_path):
    heads = {} if application == "encoder" else {"with_mlm": "mlm" in ALL_HEADS[family]}
    model = random_model(family, application=application, **heads)
    same(model, saved_and_built(model, tmp_path, **heads))
    config = json.loads((tmp_path / "config.json").read_text())
    if (family, application) in (("t5", "encoder"), ("mt5", "encoder")):
        assert config["architectures"] == ["T5EncoderModel"]  # which transformers knows
    else:
        assert config["model_type"] == f"keras_ext_{family}"


OTHER = {
    "heads": {"num_attention_heads": 4},
    "activation": {"hidden_act": "relu"},
    "epsilon": {"layer_norm_eps": 1e-3},
    "positions": {"custom_position_ids": True},
}


@pytest.mark.parametrize("other", OTHER)
def test_round_trip_of_other_sizes(other, tmp_path):
    """What no shape tells."""
    model = random_model("bert", sizes={**SIZES, **OTHER[other]})
    assert outputs_of(model)[0].std() > 0.1
    same(model, saved_and_built(model, tmp_path))


def half(old):
    """Another attention with weights of the same shapes."""
    config = old.get_config()
    return type(old).from_config({**config, "name": None, "scale": 0.1})


SURGERY = {
    "tokens": lambda model: select_tokens(model, [0, *range(10, 1, -1)]),
    "blocks": lambda model: select_blocks(model, [0, 2]),
    "shared": share_blocks,
    "two groups": lambda model: share_blocks(model, 2),
    "attention": lambda model: replace_attention(model, half, [1]),
    "attention of some": lambda model: select_blocks(
        replace_attention(model, half, [0, 2]), [0, 2]
    ),
    "linear": lambda model: replace_attention(model, lambda old: LinearAttention(2, 4)),
    "all": lambda model: share_blocks(
        select_blocks(replace_attention(select_tokens(model, range(11)), half, [0, 2]), [1, 2])
    ),
}
CASES = [
    *(("bert", surgery) for surgery in SURGERY),
    *((family, "tokens") for family in HEADS),
    *((f, "blocks") for f in HEADS if f != "albert"),
    *((family, "shared") for family in ("gpt2", "gau_alpha", "t5", "tta")),
    *((family, "attention") for family in ("gpt2_ml", "nezha", "modernbert", "t5")),
]


@pytest.mark.parametrize(("family", "surgery"), CASES)
def test_round_trip_after_surgery(family, surgery, tmp_path):
    model = SURGERY[surgery](random_model(family, **every(family)))
    same(model, saved_and_built(model, tmp_path, **every(family)))
    if surgery not in ("tokens", "blocks"):
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["model_type"].startswith("keras_ext_")


def test_round_trip_with_more_positions(tmp_path):
    model = extend_positions(random_model("bert"), 20)
    assert family_of(model).max_position_embeddings == 20
    same(model, saved_and_built(model, tmp_path))


def test_both_sides_of_a_t5_are_changed(tmp_path):
    t5 = random_model("t5", with_mlm=True)
    model = replace_attention(t5, half)
    assert [b.attention.scale for b in blocks(model)] == [0.1] * 5
    assert [b.cross_attention.scale for b in blocks(model, "decoder")] == [1.0] * 2
    same(model, saved_and_built(model, tmp_path / "a", with_mlm=True))
    one = replace_attention(t5, half, [1], side="decoder")
    assert [b.attention.scale for b in blocks(one)] == [1.0] * 4 + [0.1]
    model = share_blocks(select_blocks(t5, [0, 1], "encoder"), 1, "decoder")
    assert [b.name for b in blocks(model)] == ["encoder_0", "encoder_1", "decoder_0"]
    same(model, saved_and_built(model, tmp_path / "b", with_mlm=True))


def test_the_successor_of_a_theseus_model(tmp_path):
    teacher = random_model("bert", sizes={**SIZES, "num_hidden_layers": 4})
    student = build_theseus_model(teacher)
    with pytest.raises(ValueError, match="its blocks are TheseusModules: take extract_success"):
        save_transformer_model(student, tmp_path)
    small = extract_successor(student)
    assert family_of(small).num_hidden_layers == 2
    same(small, saved_and_built(small, tmp_path))


# ------------------------------------------------------------------ where the graph keeps it


def through_file(model, tmp_path):
    model.save(tmp_path / "model.keras")
    return keras.models.load_model(tmp_path / "model.keras")


AROUND = {
    "head": lambda m, _: keras.Model(m.inputs, keras.layers.Dense(2)(m.output[:, 0])),
    "clone": lambda m, _: keras.models.clone_model(m),
    "file": through_file,
    "objective": lambda m, _: with_objective(m, [FGM("token_embedding")]),
    "nested": lambda m, _: keras.Model(m.inputs, m(m.inputs)),
}


@pytest.mark.parametrize("around", AROUND)
def test_the_family_stays_with_the_graph(around, tmp_path):
    bert = random_model("bert", sizes={**SIZES, "hidden_act": "relu"})
    assert family_of(AROUND[around](bert, tmp_path)) == family_of(bert)


@pytest.mark.parametrize("around", ["clone", "file", "objective"])
def test_copies_can_be_saved(around, tmp_path):
    model = AROUND[around](random_model("bert"), tmp_path)
    again = saved_and_built(model, tmp_path / "saved")
    for path, value in values(again).items():
        np.testing.assert_array_equal(values(model)[path], value)


def test_a_checkpoint_is_loaded_by_the_family_of_the_model(tmp_path):
    gpt = random_model("gpt2", with_mlm=True)
    save_transformer_model(gpt, tmp_path)
    other = random_model("gpt2", seed=1, with_mlm=True)
    head = keras.Model(other.inputs, keras.layers.Dense(2, name="own")(other.outputs[0]))
    with pytest.warns(UserWarning, match="keep their initial values: own/kernel, own/bias"):
        load_checkpoint(head, tmp_path)
    same(other, gpt)


@pytest.mark.parametrize("other", ["heads", "activation", "epsilon"])
def test_weights_that_would_compute_something_else_are_refused(other, tmp_path):
    save_transformer_model(random_model("bert"), tmp_path)
    model = random_model("bert", seed=1, sizes={**SIZES, **OTHER[other]})
    before = values(model)
    with pytest.raises(ValueError, match=f"is of a model with {next(iter(OTHER[other]))}="):
        load_checkpoint(model, tmp_path)
    for path, value in values(model).items():
        np.testing.assert_array_equal(value, before[path])


# ------------------------------------------------------------------ what no family can express


def test_surgery_that_leaves_the_family(tmp_path):
    bert = random_model("bert")
    for model, reason in (
        (condition_norms(bert, 3), "its norms depend on a condition"),
        (rename_layers(bert, "a_"), "its layers were renamed with 'a_'"),
        (select_tokens(condition_norms(bert, 3), range(11)), "its norms depend on a condition"),
    ):
        message = f"{model.name} is no BERT of any sizes: {reason}"
        for refused in (
            lambda model: save_transformer_model(model, tmp_path),
            lambda model: load_checkpoint(model, tmp_path),
            family_of,
        ):
            with pytest.raises(ValueError, match=message):
                refused(model)
    modern = random_model("modernbert")
    six = random_model("bert", sizes={**SIZES, "num_hidden_layers": 6})
    of_groups = share_blocks(six, 4)  # blocks of the groups 0, 0, 1, 2, 2, 3
    for model, reason in (
        (select_blocks(modern, [1, 2]), "its first block has a norm before the attention"),
        (share_blocks(modern), "num_hidden_groups must be None for ModernBERT, whose blocks"),
        (select_blocks(of_groups, [1, 2]), r"groups \[0, 1, 1\], where sizes mean \[0, 0, 1\]"),
    ):
        with pytest.raises(ValueError, match=reason):
            save_transformer_model(model, tmp_path)
    albert = random_model("albert", sizes={**SIZES, "num_hidden_layers": 4})
    uneven = share_blocks(share_blocks(random_model("bert"), 2), 2)
    assert family_of(uneven).num_hidden_groups == 2
    assert family_of(select_blocks(albert, [1])).num_hidden_layers == 2
    assert not [*tmp_path.iterdir()]


def test_several_and_none(tmp_path):
    one, two = (rename_layers(random_model("bert"), prefix) for prefix in ("a_", "b_"))
    both = keras.Model([*one.inputs, *two.inputs], [one.output, two.output])
    with pytest.raises(
        ValueError, match=r"several Transformers, .* a_token_embedding, b_token"
    ):
        family_of(both)
    inputs = keras.Input((4,))
    with pytest.raises(ValueError, match="must be built by build_transformer_model"):
        save_transformer_model(keras.Model(inputs, keras.layers.Dense(2)(inputs)), tmp_path)


def scaled(model):
    """A layer between two blocks."""
    hidden = keras.layers.Rescaling(2.0)(blocks(model)[0].output)
    for block in blocks(model)[1:]:
        hidden = block(hidden)
    return keras.Model(model.inputs, hidden)


def with_scale(model):
    blocks(model)[0].attention.scale = 0.3
    return model


def with_epsilon(model):
    model.get_layer("embedding_norm").epsilon = 0.1
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_scale, "encoder_0: attention.scale is 0.3, not None"),
        (with_epsilon, "embedding_norm: epsilon is 0.1, not 1e-12"),
        (scaled, "encoder_1: it is called on .*rescaling"),
        (lambda m: keras.Model(m.inputs, blocks(m)[0].output), "encoder_1: it is absent"),
    ],
)
def test_what_was_changed_by_hand_is_refused(change, message, tmp_path):
    model = change(random_model("bert"))
    with pytest.raises(ValueError, match=f"is not the BERT of its sizes.*{message}"):
        save_transformer_model(model, tmp_path)
    assert not [*tmp_path.iterdir()]


# ------------------------------------------------------------------ what is given alone


def test_weights_beside_the_configuration_are_loaded(tmp_path):
    model = random_model("bert")
    save_transformer_model(model, tmp_path)
    same(build_transformer_model(tmp_path), model)
    for fresh in (
        build_transformer_model(tmp_path, checkpoint=None),
        build_transformer_model(tmp_path / "config.json"),
        build_transformer_model(json.loads((tmp_path / "config.json").read_text())),
    ):
        assert np.abs(outputs_of(fresh)[0] - outputs_of(model)[0]).max() > 0.1
        assert not hasattr(fresh, "checkpoint_report")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors"):
        build_transformer_model(tmp_path)


# ------------------------------------------------------------------ families of users


@pytest.fixture
def tagger():
    """A head of its own, and other blocks."""

    class Tagger(BERT):
        heads: ClassVar = {**BERT.heads, "with_tags": "tags"}

        def tags(self, trunk):
            return self.dense(5, "tagger")(trunk.hidden)

        def block(self, side, number):
            block = super().block(side, number)
            block.pre_norm = True
            return block

    yield Tagger
    del FAMILIES["Tagger"]


def test_a_family_of_the_users_own(tagger, tmp_path):
    model = build_transformer_model(SIZES, model=tagger, with_tags=True, with_pool=True)
    assert [x.shape[1:] for x in model.outputs] == [(None, 8), (8,), (None, 5)]
    assert type(family_of(model)) is tagger is FAMILIES["Tagger"]
    with pytest.raises(ValueError, match="no name for: tagger/kernel"):
        save_transformer_model(model, tmp_path)
    trunk = keras.Model(model.inputs, model.outputs[0])
    same(trunk, saved_and_built(trunk, tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "Tagger"
    with pytest.raises(TypeError, match=r"no argument 'with_crf'\. Heads of BERT: with_mlm"):
        build_transformer_model(SIZES, with_crf=True)
    with pytest.raises(ValueError, match="with_tags must be True or False, got 'softmax'"):
        build_transformer_model(SIZES, model=tagger, with_tags="softmax")
    with pytest.raises(ValueError, match="BERT has no head for with_tags"):
        build_transformer_model(SIZES, with_tags=True)
    with pytest.raises(TypeError, match="name or a subclass of Family, got <class 'dict'>"):
        build_transformer_model(SIZES, model=dict)


def test_a_name_belongs_to_one_family():
    with pytest.raises(ValueError, match=r"family='bert' is keras_ext\.models\.bert\.BERT"):

        class Other(BERT, family="bert"):
            pass

    with pytest.raises(ValueError, match=r"Unknown family 'other'\. Known: .* module of its"):
        build_transformer_model(SIZES, model="other")


# ------------------------------------------------------------------ every block


@pytest.mark.parametrize("family", ALL)
def test_layerwise_decay_knows_every_weight_below_the_head(family):
    model = random_model(family, **every(family))
    optimizer = MultiplierOptimizer("sgd", layerwise_decay(model, 0.5))
    optimizer.build(model.trainable_variables)
    trunk = {w.path for w in keras.Model(model.inputs, model.outputs[0]).weights}
    sizes = family_of(model)
    for weight, factor in zip(model.trainable_variables, optimizer._factors, strict=True):
        layer = weight.path.split("/")[0]
        side, _, number = layer.partition("_")
        if number.isdigit():
            depth = sizes.groups(side)
            assert factor == 0.5 ** (depth - int(number)), weight.path
        elif weight.path in trunk and not layer.endswith(("output_norm", "coder_norm")):
            assert factor == 0.5 ** (max(map(sizes.groups, sizes.sides)) + 1), weight.path
        else:
            assert factor == 1, weight.path


@pytest.mark.parametrize("family", ALL)
def test_recompute_is_set_in_every_block(family):
    model = random_model(family, recompute=True)
    assert all(block.recompute for block in blocks(model))
    assert len(blocks(model)) == sum(map(family_of(model).groups, family_of(model).sides))


# ------------------------------------------------------------------ custom positions


@pytest.mark.parametrize("family", ALL)
def test_custom_positions(family):
    if not FAMILIES[family].takes_positions:
        with pytest.raises(ValueError, match="custom_position_ids must be False for"):
            random_model(family, custom_position_ids=True)
        return
    model, plain = random_model(family, custom_position_ids=True), random_model(family)
    assert model.inputs[-1].name == "position_ids"
    texts = [TOKENS, SEGMENTS][: len(plain.inputs)]
    ordinary = np.broadcast_to(np.arange(6), TOKENS.shape)
    found = ops.convert_to_numpy(model([*texts, ordinary]))
    np.testing.assert_allclose(found[TOKENS != 0], run(plain)[TOKENS != 0], atol=1e-5)
    if FAMILIES[family].applications[0] != "lm":  # an order of its own for the same places
        order = np.array([2, 0, 5, 1, 4, 3])
        if family != "modernbert":  # whose windows are of places
            turned = ops.convert_to_numpy(
                model([*(x[:1, order] for x in texts), ordinary[:1, order]])
            )
            np.testing.assert_allclose(turned, found[:1, order], atol=1e-5)
    other = ops.convert_to_numpy(model([*texts, POSITION_IDS]))  # of row 1 three places on
    moved = np.abs(other[1, :3] - found[1, :3]).max()
    assert (moved > 1e-3) if FAMILIES[family].learned_positions else (moved < 1e-5)
