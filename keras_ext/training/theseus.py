"""BERT-of-Theseus: compress a fine-tuned Transformer by replacing its blocks bit by bit.

    prd_i = blocks g i ... g i + g - 1 of the model, frozen     scc_i = a copy of block i

    1. build_theseus_model    scc_i for prd_i with probability p, at random; train the scc_i
    2. extract_successor      the scc_i alone, with embeddings and head; train on (p = 1)

p is constant and then 1, or rises linearly, p = min(1, k t + b) after t updates. As n p of the
n modules have a gradient, the rise is also a warm-up of the learning rate. With g = 2 the
successor has half of the blocks. In the article (GLUE dev, macro average) BERT has 82.5, six
blocks made this way 81.2, the first six blocks fine-tuned 77.2.

The models made here are copies: nothing done to one of them changes another.

    student = build_theseus_model(teacher)
    student.compile(optimizer, loss)
    student.fit(x, y, callbacks=[LinearReplacement(slope=6e-4, start=0.3)])
    small = extract_successor(student)
    small.compile(optimizer, loss)
    small.fit(x, y)

Source: Xu et al. 2020, arXiv 2002.02925; kexue.fm/archives/7575;
github.com/JetRunner/BERT-of-Theseus.
"""

from typing import Any

import keras
from keras import ops

from keras_ext.layers.every import every_layer
from keras_ext.layers.theseus import ReplacementRate, TheseusModule
from keras_ext.models.rebuild import blocks_of, copy_layer, rebuild
from keras_ext.models.record import restate, with_blocks
from keras_ext.training.objective_model import ObjectiveMixin

IN_TRAINING = "its blocks are TheseusModules: take extract_successor"


def build_theseus_model(
    model: keras.Model,
    groups: int = 2,
    rate: float = 0.5,
    predecessor_dropout: bool = False,
) -> keras.Model:
    """The model in which every `groups` blocks may be replaced by one, which is trained.

    The successor of group i starts as a copy of block i. Everything else (predecessors,
    embeddings, heads) is frozen, so compile the result as it is. Layers are called `theseus_0`
    and so on instead of `encoder_0`, and the rate is that of the layer `replacement_rate`.

    Args:
        model: a trained model of `build_transformer_model`, or a functional model on its
            outputs, such as `keras.Model(bert.inputs, Dense(2)(bert.output[:, 0]))`.
        groups: blocks that one successor replaces; divides their number. Default: 2.
        rate: p, unless a schedule sets it. Default: 0.5.
        predecessor_dropout: see `TheseusModule`. Default: False.

    Returns:
        A `keras.Model` with inputs and outputs of `model`, not compiled. With XLA on
        TensorFlow it runs a branch twice (`TheseusModule`); graph mode need not.

    Raises:
        ValueError: the model has no blocks `encoder_0` ..., `groups` does not divide their
            number, or something takes the output of a block within a group.

    Example:
        >>> bert = build_transformer_model("bert_config.json")
        >>> build_theseus_model(bert, groups=1).get_layer("theseus_0").name
        'theseus_0'

    Reference: Xu et al. 2020, arXiv 2002.02925.
    """
    blocks = blocks_of(model, "encoder")
    if groups < 1 or len(blocks) % groups:
        raise ValueError(
            f"groups must be positive and divide the number of blocks, {len(blocks)}, "
            f"got {groups}."
        )
    copies: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []
    modules = []
    for i, start in enumerate(range(0, len(blocks), groups)):
        group = blocks[start : start + groups]
        old = [copy_layer(b, name=f"predecessor_{start + j}") for j, b in enumerate(group)]
        new = copy_layer(blocks[i])
        copies += [*zip(group, old, strict=True), (blocks[i], new)]
        options = {"predecessor_dropout": predecessor_dropout, "dtype": blocks[i].dtype_policy}
        modules.append(TheseusModule(old, new, name=f"theseus_{i}", **options))
    rate_layer = ReplacementRate(rate, name="replacement_rate")
    rate_tensor: list[keras.KerasTensor] = []
    number = {block.name: i for i, block in enumerate(blocks)}
    within: dict[int, tuple] = {}  # stand-in for the output of a block within a group

    def replace(block: keras.layers.Layer, x: Any) -> Any:
        i = number[block.name]
        _, last, start = within.get(id(x), (None, i - 1 if i % groups == 0 else None, x))
        if last != i - 1:
            raise ValueError(f"{block.name} must be called on the output of the block before.")
        if (i + 1) % groups:
            stand_in = keras.Input(batch_shape=x.shape, dtype=x.dtype)
            within[id(stand_in)] = stand_in, i, start
            return stand_in
        if not rate_tensor:
            rate_tensor.append(rate_layer(start))
        return modules[i // groups](start, rate_tensor[0])

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if layer.name in number:
            return replace(layer, *args, **kwargs)
        for x in keras.tree.flatten((args, kwargs)):
            if id(x) in within:
                raise ValueError(
                    f"{layer.name} takes the output of {blocks[within[id(x)][1]].name}, which "
                    f"has no counterpart with groups={groups}. Take that of another block."
                )
        return None

    training_model = rebuild(model, call, copies)
    for layer in training_model.layers:
        if not isinstance(layer, TheseusModule):
            layer.trainable = False
    result = TheseusModel(training_model.input, training_model.output, name=model.name)
    result.set_objectives([])
    return restate(result, model, lambda _: IN_TRAINING)


@keras.saving.register_keras_serializable(package="keras_ext")
class TheseusModel(ObjectiveMixin, keras.Model):
    """A functional model whose modules know before training whether XLA compiles them.

    It takes part in `with_objective`, and carries the weights of micro-batches.
    """

    def make_train_function(self, force: bool = False) -> Any:
        for layer in self.layers:
            if isinstance(layer, TheseusModule):
                layer.recompute = bool(self.jit_compile)
        return super().make_train_function(force)


def extract_successor(model: keras.Model) -> keras.Model:
    """The compressed model: what `model` computes in inference, without the predecessors.

    Its blocks are called `encoder_0` and so on, and all of it can be trained.

    Args:
        model: the model of `build_theseus_model`.

    Returns:
        A `keras.Model` with weights of its own, not compiled.

    Raises:
        ValueError: the model has no `TheseusModule`.

    Example:
        >>> student = build_theseus_model(build_transformer_model("bert_config.json"), 1)
        >>> extract_successor(student).get_layer("encoder_0").trainable
        True

    Reference: Xu et al. 2020, arXiv 2002.02925.
    """
    if not any(isinstance(layer, TheseusModule) for layer in model.layers):
        raise ValueError(
            f"{model.name} has no TheseusModule. Give the model of build_theseus_model."
        )
    copies: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []

    def call(layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(layer, ReplacementRate):
            return x  # nothing takes it
        if not isinstance(layer, TheseusModule):
            return None
        for block in layer.successor:
            copies.append((block, copy_layer(block)))
            x = copies[-1][1](x)
        return x

    successor = rebuild(model, call, copies)
    for layer in successor.layers:  # not at once: the model itself counts as trainable
        layer.trainable = True
    numbers = range(sum(isinstance(layer, TheseusModule) for layer in model.layers))
    return restate(
        successor, model, lambda sizes: with_blocks(sizes, "encoder", numbers), IN_TRAINING
    )


class ReplacementSchedule(keras.callbacks.Callback):
    """Base of the schedules: sets the replacement rate before every batch, until it is 1.

    A subclass says what it is after `step` updates, by `rate_at(step)`. Updates are those of
    the optimizer, `optimizer.iterations`: a micro-batch of `AccumOptimizer` is none, and a run
    that was saved and loaded goes on at its rate. With `steps_per_execution` the rate changes
    once an execution.

    Once p is 1 it stays 1 until `fit` ends: the step is compiled again, without the
    predecessors, and costs what a step of the successors alone does.

    Raises:
        ValueError: when `fit` begins, if the model has no `ReplacementRate`.
    """

    def rate_at(self, step: int) -> float:
        """p after `step` updates."""
        raise NotImplementedError

    def on_train_begin(self, logs: Any = None) -> None:
        layers = [x for x in every_layer(self.model) if isinstance(x, ReplacementRate)]
        if not layers:
            raise ValueError(
                f"{type(self).__name__} needs a model with a ReplacementRate, got "
                f"{self.model.name}. Fit the model of build_theseus_model."
            )
        self._variables = [layer.rate for layer in layers]
        for layer in every_layer(self.model):
            if isinstance(layer, TheseusModule):  # also in models built on a TheseusModel
                layer.recompute = bool(self.model.jit_compile)
        self._settle(False)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._settled:
            return
        # On JAX `self.model` brings the variables up to date; without it an assignment is lost.
        step = int(ops.convert_to_numpy(self.model.optimizer.iterations))
        rate = self.rate_at(step)
        for variable in self._variables:
            variable.assign(rate)
        if rate >= 1:
            self._settle(True)

    def on_train_end(self, logs: Any = None) -> None:
        self._settle(False)  # whoever trains next may set another rate

    def _settle(self, settled: bool) -> None:
        self._settled = settled
        modules = [x for x in every_layer(self.model) if isinstance(x, TheseusModule)]
        if any(module.settled != settled for module in modules):
            for module in modules:
                module.settled = settled
            self.model.make_train_function(force=True)


class ConstantReplacement(ReplacementSchedule):
    """A constant replacement rate, then 1.

        p = rate for the first `steps` updates, 1 after them

    Args:
        rate: in (0, 1]; 0.5 to 0.7 did well in the article. Default: 0.5.
        steps: updates with this rate. Default: 2500.

    Raises:
        ValueError: `rate` is not in (0, 1], or `steps` is negative.

    Example:
        >>> callbacks = [ConstantReplacement(rate=0.5, steps=2500)]

    Reference: Xu et al. 2020, arXiv 2002.02925.
    """

    def __init__(self, rate: float = 0.5, steps: int = 2500) -> None:
        super().__init__()
        if not 0 < rate <= 1:
            raise ValueError(f"rate must be in (0, 1], got {rate}.")
        if steps < 0:
            raise ValueError(f"steps must not be negative, got {steps}.")
        self.rate, self.steps = rate, steps

    def rate_at(self, step: int) -> float:
        return self.rate if step < self.steps else 1.0


class LinearReplacement(ReplacementSchedule):
    """A replacement rate that rises to 1: the curriculum of the article.

        p = min(1, slope t + start) after t updates

    The original code counts the update in progress, so that its rates are higher by `slope`.

    Args:
        slope: k > 0, a rise per update; p is 1 from update (1 - start) / slope on.
        start: b in [0, 1]. Default: 0.3.

    Raises:
        ValueError: `slope` is not positive, or `start` is not in [0, 1].

    Example:
        >>> callbacks = [LinearReplacement(slope=0.7 / 1000, start=0.3)]  # 1 after 1,000

    Reference: Xu et al. 2020, arXiv 2002.02925.
    """

    def __init__(self, slope: float, start: float = 0.3) -> None:
        super().__init__()
        if not slope > 0:
            raise ValueError(f"slope must be positive, got {slope}.")
        if not 0 <= start <= 1:
            raise ValueError(f"start must be in [0, 1], got {start}.")
        self.slope, self.start = slope, start

    def rate_at(self, step: int) -> float:
        return min(1.0, self.slope * step + self.start)
