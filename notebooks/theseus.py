# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # BERT-of-Theseus: compress a model by replacing its parts
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/keras-ext/keras-ext/blob/main/notebooks/theseus.ipynb)
#
# **摘要**：把训练好的 Transformer 每两层看成一个“前任”模块，配一个只有一层的“后继”模块；
# 训练时每个模块、每个批次以概率 $p$ 随机用后继替换前任，只训练后继，损失只有任务本身的损失；
# $p$ 逐渐升到 1，最后只剩后继，层数减半
# （[2002.02925](https://arxiv.org/abs/2002.02925)，[7575](https://kexue.fm/archives/7575)）。
# `build_theseus_model`、`LinearReplacement`、`extract_successor` 三步完成；
# 没有抽中的分支不会被计算。文中的数字都是当场算出来的，每一节的论断都有 `assert` 检验。
#
# Replace the planks of a ship one after the other, and it stays the ship. Here the planks are
# the blocks of a trained Transformer. Each pair of them, the *predecessor*, may give way to one
# new block, the *successor*; only the successors are trained, with the loss of the task and no
# other. In the end they are all that is left: half of the blocks.
# ([2002.02925](https://arxiv.org/abs/2002.02925), [7575](https://kexue.fm/archives/7575).)
# Every number is computed here, and every section asserts what it claims. A CPU is enough.

# %%
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("keras_ext") is None:  # in Colab, for instance
    package = "keras-ext[tensorflow] @ git+https://github.com/keras-ext/keras-ext"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

# %%
import keras
import matplotlib.pyplot as plt
import numpy as np

from keras_ext.layers import TheseusModule
from keras_ext.models import build_transformer_model
from keras_ext.training import (
    ConstantReplacement,
    LinearReplacement,
    build_theseus_model,
    extract_successor,
)

GREY, BLUE, RED, GREEN = "#BBBBBB", "#0072B2", "#D55E00", "#009E73"
plt.rcParams.update({"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3})
keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
print(f"Keras {keras.__version__}, {keras.backend.backend()}")

# %% [markdown]
# ## 1. One draw for a module and a batch
#
# $$y=\begin{cases}\mathrm{scc}(x)&r=1\\ \mathrm{prd}(x)&r=0\end{cases}\qquad
# r\sim\mathrm{Bernoulli}(p)$$
#
# The whole batch goes one way, each module draws for itself, and in inference $r=1$. Below, a
# predecessor that gives 0 and a successor that gives 1 show the draws.


# %%
def constant(value):
    initializer = keras.initializers.Constant(value)
    return keras.layers.Dense(1, use_bias=False, kernel_initializer=initializer)


ones = np.ones((4, 1), "float32")
module = TheseusModule(predecessor=constant(0.0), successor=constant(1.0), seed=0)


def draw(p, training=True):
    y = keras.ops.convert_to_numpy(module(ones, replacement_rate=p, training=training))
    assert np.all(y == y[0])  # one draw for the batch
    return y[0, 0]


DRAWS = 300
for p in (0.0, 0.3, 0.7, 1.0):
    share = np.mean([draw(p) for _ in range(DRAWS)])
    print(f"p = {p}: the successor in {share:5.1%} of {DRAWS} batches")
    assert abs(share - p) <= 4 * np.sqrt(p * (1 - p) / DRAWS)
assert all(draw(0.0, training=False) == 1 for _ in range(5))

# %% [markdown]
# The other branch is not multiplied by zero, it is not computed: neither its time nor its NaN
# comes through.

# %%
broken = TheseusModule(predecessor=constant(0.0), successor=constant(np.nan))
y = broken(ones, replacement_rate=0.0, training=True)
assert np.all(keras.ops.convert_to_numpy(y) == 0)

# %% [markdown]
# ## 2. A trained model, and what is left of it without half of its blocks
#
# A sequence of 16 tokens of six kinds. The label: how often does the first token occur again,
# at most once, two times, three, or more often? A BERT of four small blocks learns it from
# scratch. Its first two blocks alone, with its embeddings and its classifier, do not know how
# to work together.

# %%
KINDS, LENGTH, CLASSES = 6, 16, 4


def examples(count):
    ids = rng.integers(1, KINDS + 1, size=(count, LENGTH)).astype("int32")
    again = (ids[:, 1:] == ids[:, :1]).sum(1)
    return [ids, np.zeros_like(ids)], np.clip(again, 1, CLASSES) - 1


x, y = examples(8192)
x_test, y_test = examples(1000)
bert = build_transformer_model(
    {
        "vocab_size": KINDS + 1,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": LENGTH,
        "initializer_range": 0.1,
    },
    dropout=0.0,
    attention_dropout=0.0,
)
full = keras.Model(bert.inputs, keras.layers.Dense(CLASSES)(bert.output[:, 0]))
BATCH = 64
UPDATES = len(y) // BATCH  # in an epoch


def train(model, epochs, rate, *callbacks):
    """Accuracy by epoch, on training batches and on test."""
    fall = keras.optimizers.schedules.PolynomialDecay(rate, epochs * UPDATES, rate / 10)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(fall), loss, metrics=["accuracy"], jit_compile=False)
    history = model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=epochs,
        validation_data=(x_test, y_test),
        validation_batch_size=500,
        callbacks=list(callbacks),
        verbose=0,
    ).history
    return np.array([history["accuracy"], history["val_accuracy"]])


def accuracy(model):
    return np.mean(model.predict(x_test, batch_size=500, verbose=0).argmax(1) == y_test)


train(full, 5, 2e-3)
student = build_theseus_model(full, groups=2)
half = extract_successor(student)
before = accuracy(half)
for name, model in {"four blocks": full, "the first two": half}.items():
    print(f"{name:14} {model.count_params():7,} weights  test accuracy {accuracy(model):.1%}")
assert accuracy(full) > 0.95
assert before < 0.6

# %% [markdown]
# `build_theseus_model` made copies of all layers, put a successor beside every two blocks (at
# first a copy of block $i$), and froze the rest. Trained are the successors alone:

# %%
print(f"{len(student.trainable_variables)} of {len(student.weights)} weights are trained:")
print({v.path.split("/attention")[0].split("/feed")[0] for v in student.trainable_variables})
assert all(v.path.split("/")[1].startswith("encoder") for v in student.trainable_variables)
student.get_layer("replacement_rate").rate.assign(0.0)  # p = 0: the model as it was
old, new = (model(x_test, training=True) for model in (full, student))
np.testing.assert_allclose(*map(keras.ops.convert_to_numpy, (old, new)), atol=1e-4)

# %% [markdown]
# ## 3. The replacement rate rises
#
# A constant rate, then 1, or $p=\min(1, kt+b)$ after $t$ updates. A successor has a gradient
# only when it is drawn, so of $n$ modules $np$ are trained in a batch: as $p$ rises, the
# expected step does too, a warm-up of the learning rate. The schedules count updates of the
# optimizer, not micro-batches of an accumulated one.

# %%
EPOCHS = 2
linear = LinearReplacement(slope=0.7 / (EPOCHS * UPDATES), start=0.3)
steady = ConstantReplacement(rate=0.5, steps=EPOCHS * UPDATES // 2)
t = np.arange(EPOCHS * UPDATES + 40)
figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
axes.plot(t, [linear.rate_at(step) for step in t], color=BLUE, label="LinearReplacement")
axes.plot(t, [steady.rate_at(step) for step in t], "--", color=RED, label="ConstantReplacement")
axes.set(xlabel="updates", ylabel="p")
axes.legend()
plt.show()
expected = np.minimum(1, 0.7 / (EPOCHS * UPDATES) * t + 0.3)
np.testing.assert_allclose([linear.rate_at(step) for step in t], expected, rtol=1e-12)

# %% [markdown]
# ## 4. Replace, then train the successor alone
#
# Both ways begin with the same two blocks and see the data equally often: *fine-tuned* trains
# them (and embeddings and classifier) for three epochs; *Theseus* for two in the place of the
# four blocks and for one alone. Validation is inference, so during the replacing its accuracy
# is that of the successors, which the batches of training mix with the predecessors.

# %%
replacing = train(student, EPOCHS, 1e-3, linear)
assert float(student.get_layer("replacement_rate").rate) > 0.99
successor = extract_successor(student)
np.testing.assert_allclose(accuracy(student), accuracy(successor), atol=1e-3)
alone = train(successor, 1, 1e-3)
tuned = train(half, EPOCHS + 1, 1e-3)
for name, model in {"full": full, "fine-tuned": half, "Theseus": successor}.items():
    print(f"{name:11} {model.count_params():7,} weights  test accuracy {accuracy(model):.1%}")
assert accuracy(successor) > accuracy(full) - 0.05
assert successor.count_params() < 0.7 * full.count_params()

# %%
epoch = np.arange(EPOCHS + 2)
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.axhline(accuracy(full), color=GREY, label="full model")
lines = {"Theseus": np.concatenate([replacing[1], alone[1]]), "fine-tuned": tuned[1]}
for (name, line), style in zip(lines.items(), ("o-", "s--"), strict=True):
    color = BLUE if name == "Theseus" else RED
    axes.plot(epoch, [before, *line], style, color=color, label=name)
axes.axvspan(0, EPOCHS, color=GREEN, alpha=0.1, label="replacing")
axes.set(xlabel="epochs", ylabel="test accuracy, two blocks alone", xticks=epoch)
axes.legend()
plt.show()

# %% [markdown]
# This task is easy enough for fine-tuning as well; on GLUE, with BERT, the article has 81.2 for
# Theseus and 77.2 for the first six blocks fine-tuned (82.5 for all twelve, macro average of
# dev). [examples/theseus.py](https://github.com/keras-ext/keras-ext/blob/main/examples/theseus.py)
# compares both, and distillation, on news titles; what a step costs is measured in
# [benchmarks](https://github.com/keras-ext/keras-ext/tree/main/benchmarks).
