"""build_theseus_model, its schedules, extract_successor."""

import keras
import numpy as np
import pytest
from keras import ops
from models.small_bert import SIZES

from keras_ext.layers.theseus import ReplacementRate, TheseusModule
from keras_ext.models import build_transformer_model
from keras_ext.optimizers import AccumOptimizer
from keras_ext.training import RDrop, with_objective
from keras_ext.training.theseus import (
    ConstantReplacement,
    LinearReplacement,
    ReplacementSchedule,
    TheseusModel,
    build_theseus_model,
    extract_successor,
)

JIT = keras.backend.backend() != "torch"  # there it means torch.compile, which needs minutes

rng = np.random.default_rng(0)
IDS = rng.integers(1, 11, size=(8, 5)).astype("int32")
IDS[4:, 3:] = 0  # padding
X = [IDS, np.zeros_like(IDS)]
Y = rng.integers(0, 3, size=8)


def teacher(layers=4, **options):
    """A BERT with a head on it by the functional API; also with a tied and a slicing layer."""
    keras.utils.set_random_seed(0)
    sizes = {**SIZES, "num_hidden_layers": layers, "initializer_range": 0.5}
    bert = build_transformer_model(sizes, with_mlm=True, **options)
    hidden, logits = bert.outputs
    outputs = [keras.layers.Dense(3, name="head")(hidden[:, 0]), logits]
    return keras.Model(bert.inputs, outputs, name="teacher")


def run(model, training=False):
    return [ops.convert_to_numpy(y) for y in model(X, training=training)]


def set_rate(model, rate):
    model.get_layer("replacement_rate").rate.assign(rate)


def equal(a, b, **tolerance):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, **{"rtol": 1e-5, "atol": 1e-5, **tolerance})


def classifier(layers=2, dropout=0.0):
    model = teacher(layers, dropout=dropout, attention_dropout=dropout)
    return keras.Model(model.inputs, model.outputs[0])


def compiled(model, optimizer, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, **options)
    return model


def test_rates_0_and_1_are_the_teacher_and_its_first_blocks():
    model = teacher(dropout=0.0, attention_dropout=0.0)
    student = build_theseus_model(model)
    set_rate(student, 0.0)
    equal(run(student, training=True), run(model))
    first = keras.Model(model.inputs, model.get_layer("encoder_1").output)  # two of four blocks
    hidden = first(X)
    table = model.get_layer("token_embedding")
    mlm = model.get_layer("mlm_norm")(model.get_layer("mlm_dense")(hidden))
    mlm = model.get_layer("mlm_bias")(table(mlm, reverse=True))
    expected = [ops.convert_to_numpy(y) for y in (model.get_layer("head")(hidden[:, 0]), mlm)]
    assert np.abs(expected[0] - run(model)[0]).max() > 0.1
    set_rate(student, 1.0)
    equal(run(student, training=True), expected)
    equal(run(student), expected)
    set_rate(student, 0.0)
    equal(run(student), expected)  # inference does not know the rate
    small = extract_successor(student)
    equal(run(small), expected)
    names = [layer.name for layer in small.layers]
    assert [n for n in names if "encoder" in n] == ["encoder_0", "encoder_1"]
    assert not any(isinstance(layer, TheseusModule) for layer in small.layers)
    assert small.get_layer("encoder_1").weights[0].path.startswith("encoder_1/")


def test_equal_modules_make_the_draws_irrelevant():
    model = teacher(2, dropout=0.0, attention_dropout=0.0)
    student = build_theseus_model(model, groups=1)
    for _ in range(3):
        equal(run(student, training=True), run(model))


def test_dropout_in_the_predecessors_is_an_option():
    model = teacher(2, dropout=0.0, attention_dropout=0.5)
    for dropped in (False, True):
        student = build_theseus_model(model, rate=0.0, predecessor_dropout=dropped)
        same = np.allclose(run(student, training=True)[0], run(model)[0], atol=1e-5)
        assert same != dropped


def test_only_successors_are_trained_and_nothing_reaches_the_teacher():
    model = compiled(classifier(), "sgd")
    before, count = model.get_weights(), len(model.trainable_variables)
    student = compiled(build_theseus_model(model), keras.optimizers.SGD(0.1))
    new = student.get_layer("theseus_0").successor
    assert student.trainable_variables == new[0].trainable_variables
    set_rate(student, 1.0)
    initial = [ops.convert_to_numpy(v).copy() for v in student.variables]
    student.train_on_batch(X, Y)
    changed = {
        v.path
        for v, value in zip(student.variables, initial, strict=True)
        if np.any(ops.convert_to_numpy(v) != value) and "seed" not in v.path
    }
    key_bias = {"theseus_0/encoder_0/attention/key_dense/bias"}  # its gradient is zero
    assert changed | key_bias == {v.path for v in student.trainable_variables}
    small = extract_successor(student)
    assert len(small.trainable_variables) == count - len(new[0].weights)
    small.set_weights([0 * w for w in small.get_weights()])
    assert np.any(ops.convert_to_numpy(student.trainable_variables[0]) != 0)
    equal(model.get_weights(), before, rtol=0, atol=0)
    assert len(model.trainable_variables) == count


def toy():
    """One module without a Transformer: dense for dense."""
    x = keras.Input((3,))
    rate = ReplacementRate(name="replacement_rate")(x)
    return keras.Model(x, TheseusModule(keras.layers.Dense(1), keras.layers.Dense(1))(x, rate))


class Watch(keras.callbacks.Callback):
    """The rate of every batch, and whether it changed the successor."""

    def __init__(self):
        super().__init__()
        self.rates, self.changed, self.kernel = [], [], None

    def on_train_batch_end(self, batch, logs=None):
        self.rates.append(float(self.model.get_layer("replacement_rate").rate))
        kernel = ops.convert_to_numpy(self.model.trainable_variables[0])
        self.changed.append(self.kernel is not None and bool(np.any(kernel != self.kernel)))
        self.kernel = kernel


def fit(model, steps, *callbacks):
    x = np.ones((2 * steps, 3), "float32")
    model.fit(x, x[:, :1], batch_size=2, verbose=0, callbacks=callbacks)


@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (lambda: LinearReplacement(slope=0.3, start=0.2), [0.2, 0.5, 0.8, 1, 1, 1]),
        (lambda: ConstantReplacement(rate=0.7, steps=4), [0.7, 0.7, 0.7, 0.7, 1, 1]),
    ],
    ids=["linear", "constant"],
)
def test_the_schedule_counts_updates(schedule, expected, accum, tmp_path):
    """Two calls of `fit`, with a save and load between them."""
    optimizer = keras.optimizers.SGD(1e-3)
    model = toy()
    model.compile(AccumOptimizer(optimizer, accum) if accum > 1 else optimizer, "mse")
    watch = Watch()
    fit(model, 3 * accum, schedule(), watch)
    model.save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    fit(model, 3 * accum, schedule(), watch)
    np.testing.assert_allclose(watch.rates, np.repeat(expected, accum), rtol=1e-6)


def test_the_schedule_finds_the_rate_of_a_model_within_a_model():
    inner, x = toy(), keras.Input((3,))
    model = keras.Model(x, inner(x))
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    fit(model, 3, LinearReplacement(slope=0.3, start=0.2))
    assert float(inner.get_layer("replacement_rate").rate) == pytest.approx(0.8)


def test_a_compiled_step_sees_the_rate_of_the_schedule():
    class OnlyInTheThird(ReplacementSchedule):
        def rate_at(self, step):
            return 0.99999 if step == 2 else 0.0  # 1 would stay

    model, watch = toy(), Watch()
    model.compile(keras.optimizers.SGD(1e-3), "mse", jit_compile=JIT)
    fit(model, 4, OnlyInTheThird(), watch)
    assert watch.changed == [False, False, True, False]


def test_at_rate_1_the_predecessor_leaves_the_step():
    """For that `fit` alone; what is trained is the same."""
    traced = []

    class Predecessor(keras.layers.Dense):
        def call(self, x):
            traced.append(x)
            return super().call(x)

    def model():
        keras.utils.set_random_seed(0)
        x = keras.Input((3,))
        rate = ReplacementRate(1.0, name="replacement_rate")(x)
        module = TheseusModule(Predecessor(1), keras.layers.Dense(1))
        model = keras.Model(x, module(x, rate))
        model.compile(keras.optimizers.Adam(0.1), "mse", jit_compile=JIT)
        traced.clear()
        return model

    unsettled, settled = model(), model()
    fit(settled, 3, ConstantReplacement(steps=0))
    assert traced == []
    fit(unsettled, 3)
    equal(settled.trainable_variables, unsettled.trainable_variables)
    traced.clear()
    fit(settled, 1)
    assert bool(traced) == (keras.backend.backend() != "torch")  # where nothing is traced


def test_a_saved_training_model_is_the_same(tmp_path):
    student = build_theseus_model(classifier(), rate=0.4)
    student.save(tmp_path / "student.keras")
    loaded = keras.models.load_model(tmp_path / "student.keras")
    equal([student.predict(X, verbose=0)], [loaded.predict(X, verbose=0)], rtol=0)
    paths = [v.path for v in student.trainable_variables]
    assert [v.path for v in loaded.trainable_variables] == paths
    small = extract_successor(loaded)
    equal([student.predict(X, verbose=0)], [small.predict(X, verbose=0)])


def fitted(path, jit_compile):
    """A step through the predecessor and one through the successor, after loading."""
    student = build_theseus_model(classifier(1, 0.0), groups=1)
    student.get_layer("embedding_norm").trainable = True  # gets its gradient through them
    compiled(student, keras.optimizers.SGD(0.1), jit_compile=jit_compile).save(path)
    before, student = student.get_weights(), keras.models.load_model(path)
    schedule = LinearReplacement(slope=1, start=0)
    options = {
        "epochs": 2,
        "shuffle": False,
        "callbacks": [schedule],
        "verbose": 0,
    }
    loss = student.fit(X, Y, **options).history["loss"]
    assert student.get_layer("theseus_0").recompute == jit_compile
    after = student.get_weights()
    assert any(np.any(a != b) for a, b in zip(after, before, strict=True))
    return [loss, *after]


@pytest.mark.thorough
@pytest.mark.skipif(not JIT, reason="compilation by PyTorch needs minutes")
def test_xla_trains_what_the_graph_does(tmp_path):
    equal(*(fitted(tmp_path / "model.keras", jit_compile=jit) for jit in (False, True)))


@pytest.mark.parametrize("whole", [True, False])
def test_it_takes_part_in_objectives(whole):
    """Also a head of one's own on the model; micro-batches of 3, 3, 2 weigh by their rows."""
    student = build_theseus_model(classifier(2, 0.1))
    if not whole:
        logits = keras.layers.Dense(3)(student.output)
        student = keras.Model(student.inputs, logits)
    model = with_objective(student, [RDrop(1.0, from_logits=True)])
    assert isinstance(model, TheseusModel) == whole
    jit = JIT and whole  # one compilation is enough
    compiled(model, AccumOptimizer(keras.optimizers.SGD(0.1), 3), jit_compile=jit)
    assert len(model.trainable_variables) == len(student.trainable_variables) + 1
    before = [np.array(ops.convert_to_numpy(v)) for v in student.trainable_variables]
    options = {"batch_size": 3, "shuffle": False, "verbose": 0}
    history = model.fit(X, Y, callbacks=[ConstantReplacement(0.5, 1)], **options).history
    assert history.keys() == {"loss", "divergence"}
    assert model.get_layer("theseus_0").recompute == jit
    assert any(
        (a != ops.convert_to_numpy(b)).any()
        for a, b in zip(before, student.trainable_variables, strict=True)
    )
    assert extract_successor(model).count_params() < model.count_params()


def test_bad_models():
    for groups in (0, 3):
        with pytest.raises(ValueError, match=f"divide the number of blocks, 2, got {groups}"):
            build_theseus_model(classifier(), groups=groups)
    inner = classifier()
    nested = keras.Model(inner.inputs, inner(inner.inputs), name="nested")
    with pytest.raises(
        ValueError, match=r"encoder_0 is a layer of a model within nested.*Model\(bert.inputs"
    ):
        build_theseus_model(nested)
    both = [inner.get_layer(name).output for name in ("encoder_0", "encoder_1")]
    peeking = keras.Model(inner.inputs, keras.layers.Add(name="peek")(both))
    with pytest.raises(ValueError, match=r"peek takes the output of encoder_0"):
        build_theseus_model(peeking)
    build_theseus_model(peeking, groups=1)
    with pytest.raises(ValueError, match="has no TheseusModule"):
        extract_successor(inner)
    with pytest.raises(ValueError, match=r"LinearReplacement needs a model.*ReplacementRate"):
        compiled(inner, "sgd").fit(X, Y, verbose=0, callbacks=[LinearReplacement(0.1)])


def test_bad_schedules():
    with pytest.raises(ValueError, match=r"rate must be in \(0, 1\], got 0"):
        ConstantReplacement(rate=0)
    with pytest.raises(ValueError, match="steps must not be negative, got -1"):
        ConstantReplacement(steps=-1)
    with pytest.raises(ValueError, match="slope must be positive, got 0"):
        LinearReplacement(slope=0)
    with pytest.raises(ValueError, match=r"start must be in \[0, 1\], got 1.5"):
        LinearReplacement(slope=1, start=1.5)
