"""One way to say which variables, for every argument that chooses some."""

import keras
import pytest

from keras_ext import optimizers
from keras_ext.optimizers.selection import Selection


def layer(name):
    dense = keras.layers.Dense(2, name=name)
    dense.build((None, 3))
    return dense


@pytest.fixture
def layers():
    return [layer("a"), layer("b")]


@pytest.fixture
def variables(layers):
    return [v for dense in layers for v in dense.trainable_variables]


def test_regular_expressions_layers_variables_and_lists(layers, variables):
    a, b = layers
    for chosen, indices in (
        (None, []),
        ([], []),
        ("kernel", [0, 2]),
        (r"^a/", [0, 1]),
        (a, [0, 1]),
        (variables[3], [3]),
        (["a/bias", b], [1, 2, 3]),
        ((b, variables[2], "b/kernel"), [2, 3]),
    ):
        selection = Selection("exclude", chosen)
        assert selection.indices(variables) == indices
        assert Selection("exclude", selection.config()).indices(variables) == indices


@pytest.mark.parametrize("chosen", [3, ["a", 3], "(", ["a", "("], b"a", {"a": 1}])
def test_what_chooses_nothing_is_refused_at_once(chosen):
    with pytest.raises(ValueError, match="include must be regular expressions, layers or"):
        Selection("include", chosen)


def test_what_matches_nothing_is_an_error(variables):
    for chosen, shown in (
        ("gamma", "'gamma'"),
        (["kernel", "gamma"], "'gamma'"),
        (layer("c"), "layer 'c'"),
        (layer("c").kernel, "variable 'kernel'"),
    ):
        with pytest.raises(ValueError, match=f"include: {shown} matches no variable.*a/kernel"):
            Selection("include", chosen).indices(variables)
    with pytest.raises(ValueError, match="layer 'new' has no weights yet"):
        Selection("include", keras.layers.Dense(2, name="new")).indices(variables)


def test_equal_paths_cannot_be_told_apart(variables):
    for chosen in (layer("a"), layer("a").kernel):
        given = [*variables, *layer("a").trainable_variables]
        mine = [chosen] if isinstance(chosen, keras.Variable) else chosen.trainable_variables
        with pytest.raises(ValueError, match="two variables have the path a/kernel"):
            Selection("slow", chosen).indices([*given, *mine])


MAKE = {
    "clip": lambda s: optimizers.ClipOptimizer("sgd", 1.0, "adaptive", exclude=s),
    "layer adaptive": lambda s: optimizers.LayerAdaptiveOptimizer("sgd", exclude=s),
    "lazy": lambda s: optimizers.LazyOptimizer("sgd", include=s),
    "lora": lambda s: optimizers.LoRAOptimizer("sgd", 1, include=s),
    "galore": lambda s: optimizers.GaLoreOptimizer("sgd", 1, include=s),
    "random": lambda s: optimizers.RandomProjectionOptimizer("sgd", 1, include=s),
    "additive": lambda s: optimizers.AdditiveLowRankOptimizer("sgd", 1, include=s),
    "periodic": lambda s: optimizers.PeriodicOptimizer("sgd", "adam", slow=s),
    "multiplier": lambda s: optimizers.MultiplierOptimizer("sgd", [(s, 0.5)]),
    "adafactor": lambda s: optimizers.RelativeAdafactor(exclude_from_parameter_scale=s),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_every_optimizer_takes_the_same(make, layers, variables):
    for chosen in ("^b/", layers[1], [layers[1].kernel, "b/bias"], [layers[1], "b/bias"]):
        optimizer = make(chosen)
        optimizer.build(variables)
        config = optimizer.get_config()
        again = type(optimizer).from_config(config)
        again.build(variables)
        assert again.get_config() == config
        # No weight of the model has become state of the optimizer.
        assert not {id(v) for v in variables} & {id(v) for v in optimizer.variables}
    with pytest.raises(ValueError, match="matches no variable"):
        make("no_such_layer").build(variables)
    with pytest.raises(ValueError, match="regular expressions, layers or variables, got 3"):
        make([3])


def test_a_model_is_a_layer(layers):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers[0](inputs))
    chosen = Selection("slow", model).indices(
        [*layers[1].trainable_variables, *layers[0].trainable_variables]
    )
    assert chosen == [2, 3]
