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
# # Gradient accumulation is not just summing gradients
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/keras-ext/keras-ext/blob/main/notebooks/accumulation.ipynb)
#
# **摘要**：把 $k$ 个大小为 $b$ 的小批次的梯度累积起来、更新一次，
# 理应等于批大小为 $kb$ 的一次更新（[6794](https://kexue.fm/archives/6794)）。
# 但这不只是“把梯度加起来”：学习率计划要按真正的更新次数推进；
# 在 TensorFlow 上，Embedding 中重复 token 的梯度要先合并、再平方；
# 小批次大小不等时要按样本数加权。`AccumOptimizer` 与 `with_objective` 做到了这几点，
# 与大批次只差舍入误差。对比学习则不然：小批次里负样本更少，
# 累积得到的是另一个损失的梯度，补救办法是梯度缓存（[8471](https://kexue.fm/archives/8471)）。
# 文中的数字都是当场算出来的，每一节的论断都有 `assert` 检验。
#
# Take $k$ micro-batches of $b$ examples, add up their gradients, update once: this should be
# one step on a batch of $kb$ ([6794](https://kexue.fm/archives/6794)). It is, if whatever an
# update does is done once a cycle, and to the right mean. Sections 2 to 4 show where that goes
# wrong; section 5 shows a loss for which no accumulation can be right. Every number is computed
# here, and every section asserts what it claims. A CPU is enough.

# %%
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("keras_ext") is None:  # in Colab, for instance
    package = "keras-ext[tensorflow] @ git+https://github.com/keras-ext/keras-ext"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)
os.environ["KERAS_BACKEND"] = "tensorflow"  # section 3 is about TensorFlow
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

# %%
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from keras.layers import Dense, Embedding, GlobalAveragePooling1D
from keras.optimizers import SGD, Adam, AdamW, RMSprop

from keras_ext.optimizers import AccumOptimizer
from keras_ext.training import with_objective

tf.config.set_visible_devices([], "GPU")  # the models are tiny; GPUs may multiply in TF32
GREY, BLACK, BLUE, RED, GREEN = "#BBBBBB", "#000000", "#0072B2", "#D55E00", "#009E73"
plt.rcParams.update({"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3})
print(f"Keras {keras.__version__}, TensorFlow {tf.__version__}")

# %% [markdown]
# ## 1. The claim
#
# Let $g_i$ be the gradient of the mean loss over micro-batch $B_i$, all taken at the same
# weights:
#
# $$g_i = \nabla\,\frac1b\sum_{x\in B_i}\ell(x)\quad\Longrightarrow\quad
# \bar g=\frac1k\sum_{i=1}^k g_i=\nabla\,\frac1{kb}\sum_{x\in B_1\cup\dots\cup B_k}\ell(x)$$
#
# The optimizer steps once, with $\bar g$. To get that, wrap it:

# %%
K, MICRO, UPDATES = 4, 16, 60
BATCH = K * MICRO
rng = np.random.default_rng(0)
x = rng.normal(size=(UPDATES * BATCH, 8)).astype("float32")
y = np.sin(x @ rng.normal(size=(8, 1))).astype("float32")


def network():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((8,)), Dense(16, activation="tanh"), Dense(1)])


accumulated = network()
accumulated.compile(AccumOptimizer(Adam(1e-3), K), loss="mse")
accumulated.fit(x, y, batch_size=MICRO, shuffle=False, verbose=0)

large, small = network(), network()
for model, batch_size in ((large, BATCH), (small, MICRO)):
    model.compile(Adam(1e-3), loss="mse")
    model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)


def distance(model, other):
    """The largest difference of a weight."""
    pairs = zip(model.get_weights(), other.get_weights(), strict=True)
    return max(np.abs(a - b).max() for a, b in pairs)


print(f"Distance to batch {BATCH} after {UPDATES} updates of it:")
print(f"  {K} x {MICRO}, accumulated  {distance(accumulated, large):.1e}")
print(f"  batch {MICRO}             {distance(small, large):.1e}")
assert distance(accumulated, large) < 1e-6
assert distance(small, large) > 1e-2
assert int(accumulated.optimizer.iterations) == UPDATES

# %% [markdown]
# ## 2. The schedule must count updates
#
# Keras can accumulate by itself: `Adam(..., gradient_accumulation_steps=4)`. Its mean gradient
# is right. But it evaluates a learning-rate schedule $s$ at the micro-step, not at the update:
# $s(3), s(7), s(11), \dots$ instead of $s(0), s(1), s(2), \dots$ Warm-up and decay run $k$
# times too fast. To see the rates really used, give SGD a weight whose gradient is always 1:
# the weight moves by the rate.

# %%
schedule = keras.optimizers.schedules.CosineDecay(
    0.0, decay_steps=UPDATES - 12, warmup_target=0.02, warmup_steps=12
)
ways = {  # how to wrap an optimizer, and the batch size
    f"batch {BATCH}": (lambda make: make(schedule), BATCH),
    "Keras built-in": (lambda make: make(schedule, gradient_accumulation_steps=K), MICRO),
    "AccumOptimizer": (lambda make: AccumOptimizer(make(schedule), K), MICRO),
}


def rates_used(optimizer, k):
    weight, moves = keras.Variable(0.0), []
    for _ in range(UPDATES * k):
        weight.assign(0.0)
        optimizer.apply([tf.constant(1.0)], [weight])
        moves.append(-float(weight))
    moves = np.reshape(moves, (UPDATES, k))
    assert not moves[:, :-1].any()  # inside a cycle nothing moves
    return moves[:, -1]


def train(model, optimizer, x, y, batch_size, observe):
    """Train, and return what `observe(model)` says after each of the UPDATES updates."""
    model.compile(optimizer, loss="mse")
    seen = []
    for stop in range(batch_size, len(x) + 1, batch_size):
        rows = slice(stop - batch_size, stop)
        model.train_on_batch(x[rows], y[rows])
        if stop % BATCH == 0:
            seen.append(observe(model))
    return np.array(seen)


def loss_on_all(model):
    return np.mean((model(x) - y) ** 2)


rates, losses = {}, {}
for name, (wrap, size) in ways.items():
    rates[name] = rates_used(wrap(SGD), BATCH // size)
    losses[name] = train(network(), wrap(Adam), x, y, size, loss_on_all)
gap = {name: np.abs(loss - losses[f"batch {BATCH}"]).max() for name, loss in losses.items()}

s = np.array([float(schedule(step)) for step in range(UPDATES * K)])
np.testing.assert_allclose(rates[f"batch {BATCH}"], s[:UPDATES], rtol=1e-5, atol=1e-8)
np.testing.assert_allclose(rates["AccumOptimizer"], s[:UPDATES], rtol=1e-5, atol=1e-8)
np.testing.assert_allclose(rates["Keras built-in"], s[K - 1 :: K], rtol=1e-5, atol=1e-8)
assert gap["AccumOptimizer"] < 1e-6
assert gap["Keras built-in"] > 0.1

# %%
update = np.arange(1, UPDATES + 1)
styles = {
    f"batch {BATCH}": {"color": GREY, "linewidth": 7},
    "Keras built-in": {"color": RED, "linestyle": "--"},
    "AccumOptimizer": {"color": BLUE},
}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for name, style in styles.items():
    left.plot(update, rates[name], label=name, **style)
    right.plot(update, losses[name], label=name, **style)
left.set(xlabel="update", ylabel="learning rate used", title="Warm-up and cosine decay")
right.set(xlabel="update", ylabel="mean squared error", title="Adam with this schedule")
left.legend()
plt.show()

print(f"Largest distance to the loss with batch {BATCH}:")
for name in ("Keras built-in", "AccumOptimizer"):
    print(f"  {name}  {gap[name]:.1e}")
print(f"Keras built-in: rate 0 in the last {np.sum(rates['Keras built-in'] == 0)} updates")

# %% [markdown]
# ## 3. Repeated tokens must be merged before they are squared
#
# The gradient of an embedding lookup has one row per *occurrence* of a token. On TensorFlow it
# stays like that (`IndexedSlices`), and Keras squares the occurrences one by one and then adds:
# Adam's second moment gets $\sum_j g_j^2$ where $(\sum_j g_j)^2$ is meant. A token that occurs
# $n$ times with equal gradients $g$ makes a first step that is too long by the factor
#
# $$\frac{\left|\sum_j g_j\right|}{\sqrt{\sum_j g_j^2}}=\frac{n|g|}{\sqrt{n g^2}}=\sqrt n$$
#
# It is the same for whatever squares a gradient, clipping by its norm included. Plain SGD is
# linear and does not notice.

# %%
optimizers = {
    "SGD": SGD,
    "SGD, clipnorm=1": lambda: SGD(clipnorm=1.0),
    "RMSprop": RMSprop,
    "Adam": Adam,
    "AdamW": AdamW,
}
repeats = np.array([1, 4, 16, 64])


def step(optimizer, gradient):
    """How far the only row of an embedding moves."""
    table = keras.Variable(np.zeros((1, 1), "float32"))
    optimizer.apply([gradient], [table])
    return -float(table[0, 0])


print(f"First step, n occurrences / one row with their sum, for n = {repeats}")
for name, make in optimizers.items():
    plain, ours = [], []
    for n in repeats:
        merged = step(make(), tf.constant([[float(n)]]))
        slices = tf.IndexedSlices(tf.ones((n, 1)), tf.zeros(n, "int32"), tf.constant([1, 1]))
        plain.append(step(make(), slices) / merged)
        ours.append(step(AccumOptimizer(make(), 1), slices) / merged)
    print(f"  {name:16}", *(f"{ratio:6.3f}" for ratio in plain))
    np.testing.assert_allclose(plain, 1 if name == "SGD" else np.sqrt(repeats), rtol=1e-4)
    np.testing.assert_allclose(ours, 1, rtol=1e-4)
print("In AccumOptimizer(..., 1) all of them are 1.")

# %% [markdown]
# So on TensorFlow not even the large batch is the yardstick: float64 NumPy is. The model is the
# mean of one-dimensional embeddings, $p=\frac1L\sum_j e_{t_j}$: linear regression on the shares
# of the tokens. They are distributed as words are, a few frequent, many rare.

# %%
WORDS, LENGTH, RATE = 30, 12, 1e-2
frequency = 1 / np.arange(1, WORDS + 1)
tokens = rng.choice(WORDS, (UPDATES * BATCH, LENGTH), p=frequency / frequency.sum())
target = rng.normal(size=WORDS)[tokens].mean(1, keepdims=True).astype("float32")


def adam_in_float64():
    """The table after each update on a large batch, from the formulas."""
    share = (tokens[:, :, None] == np.arange(WORDS)).mean(1)  # (examples, WORDS)
    table, m, v, path = np.zeros((WORDS, 1)), 0.0, 0.0, []
    for t in range(1, UPDATES + 1):
        rows = slice((t - 1) * BATCH, t * BATCH)
        g = 2 * share[rows].T @ (share[rows] @ table - target[rows]) / BATCH
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        rate = RATE * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        table = table - rate * m / (np.sqrt(v) + 1e-7)
        path.append(table)
    return np.array(path)


def mean_of_embeddings():
    embedding = Embedding(WORDS, 1, embeddings_initializer="zeros")
    return keras.Sequential([keras.Input((LENGTH,)), embedding, GlobalAveragePooling1D()])


def table_of(model):
    return model.get_weights()[0]


contestants = {
    f"Adam, batch {BATCH}": (Adam(RATE), BATCH),
    f"Keras built-in, k = {K}": (Adam(RATE, gradient_accumulation_steps=K), MICRO),
    f"AccumOptimizer, k = {K}": (AccumOptimizer(Adam(RATE), K), MICRO),
    f"AccumOptimizer, k = 1, batch {BATCH}": (AccumOptimizer(Adam(RATE), 1), BATCH),
}
expected = adam_in_float64()
errors = {}
for name, (optimizer, size) in contestants.items():
    path = train(mean_of_embeddings(), optimizer, tokens, target, size, table_of)
    errors[name] = np.abs(path - expected).max((1, 2))
plain, *others = errors.values()
assert plain.max() > 0.1
assert np.max(others) < 1e-4

# %%
figure, axes = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
styles = (
    {"color": BLACK},
    {"color": RED, "linestyle": "--", "marker": "s", "markevery": 6},
    {"color": BLUE, "marker": "o", "markevery": (2, 6)},
    {"color": GREEN, "linestyle": ":", "marker": "^", "markevery": (4, 6)},
)
for (name, error), style in zip(errors.items(), styles, strict=True):
    axes.semilogy(update, error, label=name, **style)
axes.set(xlabel="update", ylabel="largest error of a weight", title="Distance to float64 Adam")
axes.legend(loc="center right")
plt.show()
for name, error in errors.items():
    print(f"{name:31} {error.max():.1e}")

# %% [markdown]
# Both accumulators are right here: an accumulator is dense, so adding to it merges the tokens.
# What is wrong is plain Adam on the large batch; `AccumOptimizer(Adam(...), 1)` repairs it.
#
# ## 4. Micro-batches of unequal size
#
# A mean of means is not the mean. If micro-batch $i$ has $n_i$ examples, the gradient of the
# mean over all of them is
#
# $$\bar g=\frac{\sum_i n_i g_i}{\sum_i n_i}\ne\frac1k\sum_i g_i$$
#
# The last batch of an epoch is smaller; and a loss that is a mean over tokens has another
# number of them in every batch. An optimizer in `fit` sees gradients only, so the model must
# tell it what a batch weighs: `with_objective(model, [])` does (for tokens, by `batch_weight`).

# %%
sizes = [16, 16, 16, 4]  # every epoch is one cycle
rows = sum(sizes)


def fit(optimizer, batch_size, weighted=False):
    trained = network()
    model = with_objective(trained, []) if weighted else trained
    model.compile(optimizer, loss="mse")
    model.fit(x[:rows], y[:rows], batch_size=batch_size, epochs=20, shuffle=False, verbose=0)
    return trained


large = fit(SGD(0.1), rows)
mean_of_means = fit(AccumOptimizer(SGD(0.1), K), MICRO)
weighted = fit(AccumOptimizer(SGD(0.1), K), MICRO, weighted=True)

print(f"An example of the last micro-batch counts {rows / (K * sizes[-1]):.2f} times.")
print(f"Distance to batch {rows}:")
print(f"  mean of means     {distance(mean_of_means, large):.1e}")
print(f"  with_objective    {distance(weighted, large):.1e}")
assert distance(mean_of_means, large) > 1e-2
assert distance(weighted, large) < 1e-5

# %% [markdown]
# ## 5. Contrastive losses: accumulation is not the large batch
#
# So far the loss was a mean over examples. InfoNCE is not: in a batch of $B$ pairs $(q_i, k_i)$
#
# $$\mathcal L_B=-\frac1B\sum_{i=1}^B
# \log\frac{e^{q_i\cdot k_i/\tau}}{\sum_{j=1}^B e^{q_i\cdot k_j/\tau}}$$
#
# the other $B-1$ keys are the negatives of $q_i$. In a micro-batch there are only $b-1$ of
# them. Accumulation then gives, exactly, the gradient of another loss, and no learning rate
# makes up for it. Below is the part of the large batch's gradient $G$ that the accumulated $g$
# misses after the best scaling, $\min_\alpha\|G-\alpha g\|/\|G\|$: for one partition into
# micro-batches, and for the mean of $g$ over many, where no noise is left.

# %%
PAIRS, WIDTH, TEMPERATURE = 64, 16, 0.1
content = rng.normal(size=(PAIRS, WIDTH))
queries, keys = (content + rng.normal(size=content.shape) for _ in range(2))
weights = tf.Variable(rng.normal(size=(WIDTH, 8)))  # float64


def encode(rows):
    return tf.math.l2_normalize(tf.tanh(rows @ weights), -1)


def info_nce(q, k):
    similarity = q @ tf.linalg.matrix_transpose(k) / TEMPERATURE  # (..., batch, batch)
    own = tf.linalg.diag_part(similarity)
    return tf.reduce_mean(tf.reduce_logsumexp(similarity, -1) - own)


def squared_distance(q, k):  # to compare with: a loss that is a mean over examples
    return tf.reduce_mean(tf.reduce_sum((q - k) ** 2, -1))


def gradient(loss, rows):  # rows: (batch,), or (batches, batch) for the mean over batches
    with tf.GradientTape() as tape:
        value = loss(encode(queries[rows]), encode(keys[rows]))
    return tape.gradient(value, weights).numpy()


def accumulate(loss, micro_batches):
    return np.mean([gradient(loss, rows) for rows in micro_batches], axis=0)


def missed(loss, g):
    """The part of the large batch's gradient that is missed by the best multiple of g."""
    full = gradient(loss, np.arange(PAIRS))
    best = np.sum(full * g) / np.sum(g * g)
    return np.linalg.norm(full - best * g) / np.linalg.norm(full)


# %% [markdown]
# The remedy is *gradient caching* ([2101.06983](https://arxiv.org/abs/2101.06983),
# [8471](https://kexue.fm/archives/8471)), a matter of the training step and not of the
# optimizer. The loss needs all representations $h$ at once, but these are small. So encode the
# batch in chunks without keeping activations and take $u=\partial\mathcal L/\partial h$; then
# encode each chunk again and back-propagate $\sum\langle h,u\rangle$. By the chain rule these
# gradients add up to that of the large batch. The price is a second forward pass, which with
# dropout must repeat the draws of the first. `keras_ext` does not have it; for this encoder it
# is short:


# %%
def cached(loss, micro_batches):
    q, k = encode(queries), encode(keys)  # in earnest also chunk by chunk
    with tf.GradientTape() as tape:
        tape.watch([q, k])
        value = loss(q, k)
    dq, dk = (u.numpy() for u in tape.gradient(value, [q, k]))
    total = 0.0
    for rows in micro_batches:
        with tf.GradientTape() as tape:
            surrogate = encode(queries[rows]) * dq[rows] + encode(keys[rows]) * dk[rows]
            surrogate = tf.reduce_sum(surrogate)
        total += tape.gradient(surrogate, weights).numpy()  # here we do just sum
    return total


sizes, PARTITIONS = [2, 4, 8, 16, 32], 1000
one, mean, caching, linear = [], [], [], []
full = gradient(info_nce, np.arange(PAIRS))
for size in sizes:
    many = [rng.permutation(PAIRS).reshape(-1, size) for _ in range(PARTITIONS)]
    first = many[0]
    one.append(missed(info_nce, accumulate(info_nce, first)))
    mean.append(missed(info_nce, gradient(info_nce, np.concatenate(many))))
    caching.append(missed(info_nce, cached(info_nce, first)))
    linear.append(missed(squared_distance, accumulate(squared_distance, first)))
    np.testing.assert_allclose(cached(info_nce, first), full, atol=1e-12)
assert mean == sorted(mean, reverse=True)
assert mean[-1] > 0.05
assert max(caching + linear) < 1e-12

# %%
hollow = {"marker": "^", "markersize": 12, "markerfacecolor": "none"}
lines = {
    "InfoNCE, one partition": (one, {"color": RED, "linestyle": "--", "marker": "s"}),
    f"InfoNCE, mean of {PARTITIONS} partitions": (mean, {"color": BLACK, "marker": "D"}),
    "InfoNCE, gradient caching": (caching, {"color": BLUE, "marker": "o"}),
    "a mean over examples": (linear, {"color": GREEN, "linestyle": ":", **hollow}),
}
figure, axes = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
for name, (part, style) in lines.items():
    axes.plot(part, label=name, **style)
axes.set_xticks(range(len(sizes)), [f"{PAIRS // size} x {size}" for size in sizes])
axes.set(
    ylim=(-0.1, 1.45),
    xlabel="micro-batches x pairs in each",
    ylabel="missed part of the gradient",
    title=f"Accumulated gradient against that of one batch of {PAIRS} pairs",
)
axes.legend()
plt.show()

print("Missed by         ", *(f"{PAIRS // size:3} x {size:2}" for size in sizes))
print("  one partition   ", *(f"{part:8.1%}" for part in one))
print(f"  mean of {PARTITIONS:4}    ", *(f"{part:8.1%}" for part in mean))
print("  gradient caching", *(f"{part:8.0e}" for part in caching))

# %% [markdown]
# ## What to remember
#
# | if the loss is | the large batch is had by |
# |---|---|
# | a mean over examples, in micro-batches of one size | `AccumOptimizer(optimizer, k)` |
# | the same, in sizes or token counts that differ | that and `with_objective(model, [])` |
# | contrastive, with in-batch negatives | gradient caching, not accumulation |
#
# What depends on the micro-batch inside the model, dropout draws and the statistics of batch
# normalization, stays different in any case. More cases, and other libraries:
# [benchmarks](https://github.com/keras-ext/keras-ext/tree/main/benchmarks).
