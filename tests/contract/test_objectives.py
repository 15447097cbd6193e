"""One contract for all objectives; a new one adds a row, and a test of its mathematics."""

import copy
import functools

import keras
import numpy as np
import pytest
from keras import ops

from keras_ext import training
from keras_ext.models import rename_layers
from keras_ext.optimizers import AccumOptimizer
from keras_ext.training import (
    FGM,
    VAT,
    GradientPenalty,
    Objective,
    ObjectiveMixin,
    RDrop,
    with_objective,
)

BACKEND = keras.backend.backend()
X = np.random.default_rng(0).integers(0, 7, (10, 5)).astype("int32")
Y = X[:, 0] % 3
LOSS = "sparse_categorical_crossentropy"

ROWS = {
    "FGM": lambda: [FGM("embedding", 0.3, on="output")],
    "GradientPenalty": lambda: [GradientPenalty("embedding", 0.3)],
    "VAT": lambda: [VAT("embedding", 0.3, on="output", seed=3)],
    "FGM of RDrop": lambda: [FGM("embedding", 0.3), RDrop(2.0)],
}


class Penalised(keras.layers.Layer):
    """Adds a loss."""

    def call(self, x):
        self.add_loss(0.1 * ops.mean(ops.square(x)))
        return x


def network(penalised=False, **kwargs):
    keras.utils.set_random_seed(1)
    tokens = keras.Input((5,), dtype="int32", name="tokens")
    regularizer = {"activity_regularizer": keras.regularizers.L2(0.1)} if penalised else {}
    x = keras.layers.Embedding(7, 4, name="embedding", **regularizer)(tokens)
    x = Penalised()(x) if penalised else x
    x = keras.layers.Flatten(name="flat")(x)
    x = keras.layers.Dropout(0.3, seed=2, name="dropout")(x)
    dense = keras.layers.Dense(3, "softmax", kernel_regularizer="l2", name="head")
    return keras.Model(tokens, dense(x), name="network")


def compiled(objectives, optimizer=None, **kwargs):
    model = with_objective(network(**kwargs), objectives)
    model.compile(optimizer or keras.optimizers.SGD(0.1), LOSS, metrics=["accuracy"])
    return model


def fit(model, **kwargs):
    return model.fit(X, Y, batch_size=4, shuffle=False, verbose=0, **kwargs).history


def test_rows_are_all_objectives():
    public = (getattr(training, name) for name in training.__all__)
    classes = {c for c in public if isinstance(c, type) and issubclass(c, Objective)}
    rows = {type(o) for make in ROWS.values() for o in make()}
    assert classes - {Objective} == rows


@pytest.mark.parametrize("name", ROWS)
def test_config(name):
    for objective in ROWS[name]():
        config = keras.saving.serialize_keras_object(objective)
        again = keras.saving.deserialize_keras_object(config)
        assert again.get_config() == objective.get_config()
        with pytest.raises(TypeError, match="unexpected keyword"):
            type(objective)(**objective.get_config(), unknown=1)


@pytest.mark.parametrize("name", ROWS)
def test_saved_whole_it_goes_on(name, tmp_path):
    model = compiled(ROWS[name](), AccumOptimizer("adam", 3))
    model.fit(X[:4], Y[:4], batch_size=4, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(model)
    paths = [v.path for v in model.optimizer.variables]
    assert [v.path for v in loaded.optimizer.variables] == paths
    configs = [[o.get_config() for o in m.objectives] for m in (model, loaded)]
    assert configs[0] == configs[1]
    for m in (model, loaded):  # seeds start anew in a loaded model, of Keras's layers too
        for layer in m.layers:
            if hasattr(layer, "seed_generator"):
                layer.seed_generator.state.assign(np.array([0, 5], "uint32"))
        for o in m.objectives:
            for s in o.seed_generators:
                s.state.assign(np.array([0, 5], "uint32"))
    a, b = fit(model), fit(loaded)
    for key, values in a.items():
        np.testing.assert_allclose(values, b[key], rtol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", ROWS)
def test_weight_files_are_those_of_the_plain_model(name, tmp_path):
    model = compiled(ROWS[name](), AccumOptimizer("adam", 3))
    fit(
        model,
        callbacks=[
            keras.callbacks.ModelCheckpoint(tmp_path / "a.weights.h5", save_weights_only=True)
        ],
    )
    plain = network()
    plain.load_weights(tmp_path / "a.weights.h5")
    for a, b in zip(plain.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    plain.save_weights(tmp_path / "b.weights.h5")
    compiled(ROWS[name]()).load_weights(tmp_path / "b.weights.h5")
    assert [w.path for w in model.weights] == [w.path for w in plain.weights]
    assert model.count_params() == plain.count_params()
    assert [layer.name for layer in model.layers] == [layer.name for layer in plain.layers]


@pytest.mark.parametrize("name", ROWS)
def test_figures_are_those_of_the_plain_model(name):
    model, plain = compiled(ROWS[name]()), network()
    plain.compile("sgd", LOSS, metrics=["accuracy"])
    plain.set_weights(model.get_weights())
    a = model.evaluate(X, Y, verbose=0, return_dict=True)
    b = plain.evaluate(X, Y, verbose=0, return_dict=True)
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert float(value) == pytest.approx(float(b[key]), rel=1e-6)
    np.testing.assert_array_equal(model.predict(X, verbose=0), plain.predict(X, verbose=0))
    history = fit(model, validation_data=(X, Y))
    reported = {m.name for o in model.objectives for m in o.metrics}
    assert history.keys() == {"loss", "accuracy", "val_loss", "val_accuracy"} | reported


class Nothing(Objective):
    """The loss twice, from two passes on the same draws; half of it."""

    layers = ("embedding",)

    def loss(self, inner, step):
        loss, y_pred = inner()
        layer = step.layer("embedding")
        with step.replaced(layer, step.value(layer)):
            again, _ = inner()
        return (loss + again) / 2, y_pred


def test_added_losses_count_in_each_pass_and_do_not_grow():
    model, plain = compiled([Nothing()], penalised=True), network(penalised=True)
    plain.compile(keras.optimizers.SGD(0.1), LOSS, metrics=["accuracy"])
    a, b = fit(model, epochs=3), fit(plain, epochs=3)
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
    np.testing.assert_allclose(a["accuracy"], b["accuracy"], rtol=1e-6)
    assert len(model.losses) <= len(plain.losses)


@functools.cache
def losses_in_float32(name):
    return fit(compiled(ROWS[name]()))["loss"]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float64"])
@pytest.mark.parametrize("name", ROWS)
def test_precision(name, policy):
    """Near float32, also where gradients to float16 values would vanish."""
    losses_in_float32(name)
    if policy == "float64":
        keras.config.set_floatx("float64")
    else:
        keras.config.set_dtype_policy(policy)
    try:
        losses = fit(compiled(ROWS[name]()))["loss"]
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")
    np.testing.assert_allclose(losses, losses_in_float32(name), rtol=0.03)


@pytest.mark.parametrize("name", ROWS)
def test_frozen_and_compiled_again(name):
    model = compiled(ROWS[name]())
    fit(model)
    model.get_layer("embedding").trainable = False
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    before = [np.array(w) for w in model.get_weights()]
    fit(model)
    table, kernel, _ = model.get_weights()
    np.testing.assert_array_equal(table, before[0])
    assert (kernel != before[1]).any()


def test_copies():
    model = compiled([FGM("embedding", 0.3), RDrop(1.0)])
    clone = keras.models.clone_model(model)  # as a new one of the class, by Keras
    with pytest.raises(ValueError, match=r"no objectives yet \(clone_model does not copy"):
        fit(clone)
    clone.set_objectives(model.objectives)
    again = type(model).from_config(copy.deepcopy(model.get_config()))
    assert [type(o) for o in again.objectives] == [FGM, RDrop]
    again.compile("sgd", LOSS)
    for other in (clone, again):
        assert np.isfinite(fit(other)["loss"]).all()


def test_surgery_is_that_of_the_plain_model():
    model = compiled([FGM("embedding", 0.3)], AccumOptimizer("adam", 3))
    fit(model)
    renamed = rename_layers(model, "other_")
    assert type(renamed) is type(network())
    assert [layer.name for layer in renamed.layers][1] == "other_embedding"
    np.testing.assert_array_equal(renamed.predict(X, verbose=0), model.predict(X, verbose=0))


def test_nested_shared_embedding_and_dictionaries():
    tokens = keras.Input((5,), dtype="int32")
    encoder = keras.Model(tokens, keras.layers.Embedding(7, 4, name="inner")(tokens))
    a, b = (keras.Input((5,), dtype="int32", name=name) for name in "ab")
    both = keras.layers.Concatenate()([encoder(a), encoder(b)])
    out = keras.layers.Dense(3, "softmax", name="out")(keras.layers.Flatten()(both))
    plain = keras.Model({"a": a, "b": b}, out)
    objectives = [FGM("inner", 0.3, on="output"), VAT("inner", 0.3, on="output"), RDrop()]
    model = with_objective(plain, objectives)
    model.compile("sgd", LOSS)
    batch = {"a": X, "b": X[::-1]}
    assert np.isfinite(model.fit(batch, Y, batch_size=5, verbose=0).history["loss"]).all()
    assert model.input.keys() == {"a", "b"}


def test_sequential_and_one_objective_of_two_models():
    fgm = FGM("embedding", 0.3)
    for _ in range(2):
        plain = keras.Sequential(
            [
                keras.Input((5,), dtype="int32"),
                keras.layers.Embedding(7, 4, name="embedding"),
                keras.layers.Flatten(),
                keras.layers.Dense(3, "softmax"),
            ]
        )
        model = with_objective(plain, [fgm])
        model.compile("sgd", LOSS)
        before = [np.array(w) for w in plain.get_weights()]
        fit(model)
        assert all((a != b).any() for a, b in zip(before, plain.get_weights(), strict=True))


class Mine(keras.Model):
    """A subclass with a loss of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = keras.layers.Embedding(7, 4, name="embedding")
        self.head = keras.layers.Dense(3, "softmax")

    def call(self, x):
        return self.head(ops.mean(self.embedding(x), axis=1))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return 2 * super().compute_loss(x, y, y_pred, sample_weight, training)


class MineWithObjectives(ObjectiveMixin, Mine):
    pass


def test_a_subclass_by_the_mixin():
    model = MineWithObjectives()
    model(X)
    with pytest.raises(ValueError, match=r"must have a graph, but mine .*ObjectiveMixin"):
        with_objective(Mine(name="mine"), [])
    model.set_objectives([Nothing()])
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    own = Mine()
    own(X)
    own.set_weights(model.get_weights())
    own.compile(keras.optimizers.SGD(0.1), LOSS)
    np.testing.assert_allclose(fit(model)["loss"], fit(own)["loss"], rtol=1e-6)


class Doubled(keras.Model):
    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs)


def test_errors():
    plain = network()
    sigmoid = keras.Model(plain.input, keras.layers.Dense(1, "sigmoid")(plain.output))
    two = keras.Model(plain.input, [plain.output, plain.output])
    nested = keras.Model(plain.input, plain.output, name="nested")
    embedding = keras.layers.Embedding(7, 4, name="embedding")
    tokens = keras.Input((5,), dtype="int32")
    twice = keras.Model(tokens, [embedding(tokens), nested(tokens)])
    subclass = Doubled(plain.input, plain.output)
    for call, message in (
        (
            lambda: with_objective(plain, [FGM("embeding")]),
            "one of network, got 'embeding'. It has",
        ),
        (lambda: with_objective(plain, [FGM("head")]), "is for an Embedding, got layer='head'"),
        (lambda: with_objective(twice, [FGM("embedding")]), "several: give a path"),
        (lambda: with_objective(plain, ["fgm"]), r"must be Objectives.*got \['fgm'\]"),
        (lambda: with_objective("bert", []), "model must be a keras.Model, got 'bert'"),
        (
            lambda: with_objective(subclass, []),
            r"overrides \['compute_loss'\], which would be lost",
        ),
        (
            lambda: with_objective(with_objective(plain, [RDrop()]), []),
            "has objectives already",
        ),
        (lambda: with_objective(keras.Sequential(), []), "must be built"),
        (
            lambda: with_objective(plain, [], batch_weight=3),
            "batch_weight must be callable, got 3",
        ),
        (
            lambda: with_objective(sigmoid, [RDrop()]),
            "RDrop needs probabilities of all classes",
        ),
        (lambda: with_objective(two, [VAT("embedding")]), "VAT needs a model of one output"),
        (lambda: FGM("embedding", 0.0), "epsilon must be a number > 0, got 0.0"),
        (lambda: FGM("embedding", on="weights"), "on must be one of .* got 'weights'"),
        (lambda: FGM(embedding), "layer must be the name of a layer"),
        (lambda: VAT("embedding", xi=-1), "xi must be a number > 0, got -1"),
        (lambda: VAT("embedding", weight=0), "weight must be a number > 0, got 0"),
        (lambda: GradientPenalty("embedding", 0), "weight must be a number > 0, got 0"),
        (lambda: RDrop(0), "alpha must be a number > 0, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    model = compiled([RDrop()])
    with pytest.raises(ValueError, match="needs the pass of a training step"):
        model.compute_loss(X, Y, model(X))
    logits = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", logits)
    with pytest.raises(ValueError, match="from_logits=False, but the loss of compile has"):
        fit(model)


@pytest.mark.parametrize("activation", ["linear", "sigmoid"])
def test_what_are_no_probabilities_gives_no_plausible_number(activation):
    plain = network()
    plain.get_layer("head").activation = keras.activations.get(activation)
    model = with_objective(plain, [RDrop()])
    model.compile("sgd", LOSS)
    if BACKEND == "torch":
        with pytest.raises(
            ValueError, match=r"y_pred must be probabilities >= 0 .* from_logits"
        ):
            fit(model)
    else:
        assert np.isnan(fit(model)["loss"]).all()
