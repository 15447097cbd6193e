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
# # A GAN with one loss: what `stop_gradient` can do
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/keras-ext/keras-ext/blob/main/notebooks/gan_one_loss.ipynb)
#
# **摘要**：GAN 有两个损失，通常交替训练，需要自己写训练循环。
# 借助 `stop_gradient` 可以把两者合成一个标量损失
# （[6387](https://kexue.fm/archives/6387)）：第二项的值恒为零，梯度却只流向生成器。
# 于是 `compile`、`fit` 就够了。本文验证：两个网络的梯度与双损失逐位或到舍入误差一致；
# 判别器含 Dropout 时原文写法会泄漏梯度，而“判别器只前向一次、反向两次”的写法不会；
# 在 Adam 下给生成器损失加权毫无作用，要调的是学习率；
# 同时更新与交替更新的动力学并不相同。每一节的论断都有 `assert` 检验。
#
# A GAN has two losses, so it is trained by a loop of one's own. It does not have to be: one
# scalar can carry both gradients ([6387](https://kexue.fm/archives/6387)), and then `compile`
# and `fit` are enough. Sections 1 and 2 show that the gradients are right, and what they cost,
# section 3 what sets the pace of the two networks, section 4 what is *not* the same as
# alternating training, and section 5 trains one. Every section asserts what it claims. A CPU is
# enough.

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
import warnings

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import layers, ops

from keras_ext.layers import gradient_only
from keras_ext.losses import Hinge
from keras_ext.optimizers import MultiplierOptimizer
from keras_ext.training import SingleLossGAN

warnings.filterwarnings("ignore", message="Gradients do not exist")  # of L_D to G: so it is
BLACK, BLUE, RED = "#000000", "#0072B2", "#D55E00"
plt.rcParams.update({"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3})
print(f"Keras {keras.__version__}, {keras.backend.backend()}")

# %% [markdown]
# ## 1. Two losses, one scalar
#
# The discriminator $D$, high on real images, and the generator $G$ minimise
#
# $$L_D=\mathbb E\,[1-D(x)]_+ + \mathbb E\,[1+D(G(z))]_+,\qquad L_G=-\mathbb E\,D(G(z))$$
#
# Their sum is no use: $L_G$ would push $D$ the wrong way. Write $\bar x=\mathrm{sg}[G(z)]$ for
# the image without its gradient. Then
#
# $$L=L_D\big(D(x),D(\bar x)\big)+\underbrace{L_G\big(D(G(z))\big)-L_G\big(D(\bar x)\big)}
# _{\text{value }0,\ \text{gradient to }G\text{ alone}}$$
#
# does it. The first term does not know $G$. In the bracket the gradients to $D$ cancel, because
# $D$ is live in both of its terms, and what is left is the gradient to the image.

# %%
BATCH = 256
rng = np.random.default_rng(0)


def mixture(count):
    """Eight narrow Gaussians on a circle."""
    angles = 2 * np.pi * rng.integers(8, size=count) / 8
    centers = 0.7 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return (centers + 0.02 * rng.normal(size=(count, 2))).astype("float32")


def networks(dropout=0.0, norm=False):
    keras.utils.set_random_seed(0)
    generator = [keras.Input((4,))]
    discriminator = [keras.Input((2,))]
    for _ in range(2):
        generator += [
            layers.Dense(64),
            layers.BatchNormalization() if norm else layers.Identity(),
        ]
        generator += [layers.ReLU()]
        discriminator += [layers.Dense(64), layers.LeakyReLU(0.2), layers.Dropout(dropout)]
    generator += [layers.Dense(2)]
    discriminator += [layers.Dense(1)]
    return keras.Sequential(generator), keras.Sequential(discriminator)


x, z = mixture(BATCH), rng.normal(size=(BATCH, 4)).astype("float32")
hinge = Hinge()


def loss_d(g, d):
    return hinge.discriminator(d(x, training=True), d(stop(g(z, training=True)), training=True))


def loss_g(g, d):
    return hinge.generator(None, d(g(z, training=True), training=True))


def naive_sum(g, d):
    return loss_d(g, d) + loss_g(g, d)


def of_the_article(g, d):
    images = g(z, training=True)
    real = d(x, training=True)
    live, fake = (d(i, training=True) for i in (images, stop(images)))
    zero = hinge.generator(real, live) - hinge.generator(real, fake)
    return hinge.discriminator(real, fake) + zero


stop = ops.stop_gradient
values = [float(ops.convert_to_numpy(f(*networks()))) for f in (of_the_article, loss_d)]
print("L:", values[0], " L_D:", values[1])
assert values[0] == values[1]

# %% [markdown]
# ## 2. Once forward, twice backward
#
# That evaluates $D$ twice at the same image, and what cancels has to be exactly the same twice.
# With dropout it is not: the two terms draw different masks, and a part of $L_G$ leaks into
# $D$. Better to take the gradient $g=\partial L_G/\partial G(z)$ on the spot, from the one
# forward pass that $L_D$ needs anyway, and to write
#
# $$L=L_D\big(D(x),D(\bar x)\big)+\big\langle\mathrm{sg}[g],\,G(z)-\bar x\big\rangle$$
#
# The bracket is still zero in value, its gradient to $G(z)$ is $g$ by construction, and there
# is nothing in it that could leak. `gradient_only` is this bracket:


# %%
def one_forward_pass(g, d):
    images = g(z, training=True)
    real = d(x, training=True)

    def generator_loss(images):
        fake = d(images, training=True)
        return hinge.generator(real, fake), fake

    zero, (_, fake) = gradient_only(generator_loss, images, has_aux=True)
    assert float(ops.convert_to_numpy(stop(zero))) == 0
    return hinge.discriminator(real, fake) + zero


class Trained(keras.Model):
    """Both networks with any loss, so that one step of SGD(1) subtracts its gradient."""

    def __init__(self, generator, discriminator, loss):
        super().__init__()
        self.generator, self.discriminator, self.gan_loss = generator, discriminator, loss

    def call(self, inputs):
        return inputs

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return self.gan_loss(self.generator, self.discriminator)


def gradient(loss, wrt, dropout=0.0):
    """The gradient of a loss to generator (0) or discriminator (1), as one vector."""
    pair = networks(dropout, norm=not dropout)
    model = Trained(*pair, loss)
    model.compile(keras.optimizers.SGD(1.0), run_eagerly=True)
    before = [ops.convert_to_numpy(w) for w in pair[wrt].trainable_weights]
    model.train_on_batch(x)
    after = [ops.convert_to_numpy(w) for w in pair[wrt].trainable_weights]
    return np.concatenate([(a - b).ravel() for a, b in zip(before, after, strict=True)])


def error(loss, wrt, dropout=0.0):
    exact = gradient((loss_g, loss_d)[wrt], wrt, dropout)
    return np.linalg.norm(gradient(loss, wrt, dropout) - exact) / np.linalg.norm(exact)


losses = {
    "L_D + L_G": naive_sum,
    "of the article": of_the_article,
    "one forward pass": one_forward_pass,
}
print(f"{'error of the gradient':22}{'to G':>10}{'to D':>10}")
errors = {name: (error(loss, 0), error(loss, 1)) for name, loss in losses.items()}
for name, (to_g, to_d) in errors.items():
    print(f"{name:22}{to_g:10.0e}{to_d:10.0e}")
assert errors["L_D + L_G"][1] > 0.1
assert max(errors["of the article"] + errors["one forward pass"]) < 1e-5

# %% [markdown]
# Both ways are right, with batch normalisation in $G$. Now with dropout in $D$. There is no
# gradient to compare with, as every evaluation draws anew. But whatever the draws are, the
# gradient to $D$ must be the same with $10\,L_G$ as without $L_G$.


# %%
class Louder(Hinge):
    """A generator's loss times a factor."""

    factor = 1.0

    def generator(self, real, fake):
        return self.factor * super().generator(real, fake)


hinge = Louder()
leaks = {}
for name in ("of the article", "one forward pass"):
    found = []
    for factor in (0.0, 10.0):
        hinge.factor = factor
        found.append(gradient(losses[name], 1, dropout=0.5))
    leaks[name] = np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0])
    print(f"{name:18} changes the gradient to D by {leaks[name]:.0%}")
hinge.factor = 1.0
assert leaks["of the article"] > 0.1
assert leaks["one forward pass"] < 1e-6

# %% [markdown]
# ## The bill
#
# In units of one forward pass $F_G$ or $F_D$ (a backward pass to weights and inputs is two, to
# one of them one):
#
# | | $F_G$ | $F_D$ | at $F_G=F_D$ |
# |---|---|---|---|
# | alternating: new images and new scores for the generator | 4 | 8 | 12 |
# | the article's loss, evaluated as written | 3 | 9 | 12 |
# | one forward pass, twice backward | 3 | 7 | 10 |
#
# [benchmarks/gan.py](https://github.com/keras-ext/keras-ext/tree/main/benchmarks) measures it.
#
# ## 3. What sets the pace
#
# How fast should $G$ learn, compared with $D$? With SGD a factor on $L_G$ would decide. Adam
# divides by the size of the gradient, and the factor with it. So `SingleLossGAN` has no such
# factor; multiply the learning rate.

# %%
data = mixture(20 * BATCH)


def path(factor=1.0, wrap=lambda gan, optimizer: optimizer):
    """How far the generator is from its start after 20 steps of Adam."""
    pair = networks()
    loss = Louder()
    loss.factor = factor
    gan = SingleLossGAN(*pair, loss, seed=0)
    start = [ops.convert_to_numpy(w) for w in gan.generator.weights]
    gan.compile(optimizer=wrap(gan, keras.optimizers.Adam(1e-4)))
    gan.fit(data, batch_size=BATCH, shuffle=False, verbose=0)
    end = [ops.convert_to_numpy(w) for w in gan.generator.weights]
    return np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(start, end, strict=True)))


distance = {
    "Adam": path(),
    "10 L_G": path(factor=10.0),
    "rate x 0.1": path(wrap=lambda gan, adam: MultiplierOptimizer(adam, {gan.generator: 0.1})),
}
for name, moved in distance.items():
    print(f"{name:12} G has moved by {moved:.4f}")
np.testing.assert_allclose(distance["10 L_G"], distance["Adam"], rtol=0.05)
np.testing.assert_allclose(distance["rate x 0.1"], 0.1 * distance["Adam"], rtol=0.1)

# %% [markdown]
# ## 4. What is not the same as alternating
#
# With one loss both networks move at once, from the same point; in alternating training each
# answers to the other's last move. The simplest game, $\min_a\max_b ab$ with gradient steps of
# size $h$, tells them apart: the norm of $(a,b)$ grows by $\sqrt{1+h^2}$ a step if both move at
# once, and stays bounded if they take turns. What holds a real GAN together is that its
# discriminator is bounded: by the hinge, weight decay, a penalty, normalisation.

# %%
H, STEPS = 0.1, 200
together, turns = [np.array([1.0, 1.0])], [np.array([1.0, 1.0])]
for _ in range(STEPS):
    a, b = together[-1]
    together.append(np.array([a - H * b, b + H * a]))
    a, b = turns[-1]
    a = a - H * b
    turns.append(np.array([a, b + H * a]))
together, turns = np.array(together), np.array(turns)
norms = [np.linalg.norm(p, axis=1) for p in (together, turns)]
np.testing.assert_allclose(norms[0][-1], np.sqrt(2) * (1 + H**2) ** (STEPS / 2))
assert norms[1].max() < 1.6

figure, axes = plt.subplots(figsize=(4, 4), layout="constrained")
axes.plot(*together.T, color=RED, label="at once")
axes.plot(*turns.T, color=BLUE, label="in turns")
axes.plot(1, 1, "o", color=BLACK)
axes.set(xlabel="a", ylabel="b", aspect="equal", title=f"Gradient steps of {H} on ab")
axes.legend()
plt.show()
print(f"after {STEPS} steps: at once {norms[0][-1]:.3f}, in turns {norms[1][-1]:.3f}")

# %% [markdown]
# ## 5. `compile`, `fit`
#
# Eight narrow Gaussians on a circle; generator and discriminator are small MLPs. The noise is
# standard normal in the shape of the generator's input.

# %%
data = mixture(400 * BATCH)
gan = SingleLossGAN(*networks(), loss="non_saturating", seed=0)
adam = keras.optimizers.Adam(1e-3, beta_1=0.5)
gan.compile(optimizer=MultiplierOptimizer(adam, {gan.generator: 0.5}))
pictures = {0: gan.generate(1000)}
for epoch in (1, 2, 3, 4, 5):
    logs = gan.fit(data, batch_size=BATCH, verbose=0).history
    pictures[epoch] = gan.generate(1000)
    print(epoch, {name: round(values[0], 3) for name, values in logs.items()})

# %%
shown = [0, 1, 2, 5]
figure, axes = plt.subplots(1, len(shown), figsize=(10, 2.7), layout="constrained")
for part, epoch in zip(axes, shown, strict=True):
    part.plot(*data[:500].T, "+", color=BLACK, markersize=3)
    part.plot(*pictures[epoch].T, ".", color=BLUE, markersize=2)
    part.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal", title=f"epoch {epoch}")
plt.show()

angles = 2 * np.pi * np.arange(8) / 8
centers = 0.7 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
near = np.linalg.norm(pictures[5][:, None] - centers, axis=-1) < 0.1
found = int((near.mean(0) > 0.02).sum())
print(f"modes found: {found} of 8; samples at a mode: {near.any(1).mean():.0%}")
assert found >= 6
assert near.any(1).mean() > 0.6

# %% [markdown]
# ## What to remember
#
# | question | answer |
# |---|---|
# | how can one loss train two networks? | `gradient_only`: value 0, gradient to the image |
# | dropout, noise in the discriminator? | one forward pass, so one draw |
# | generator too slow? | multiply its learning rate (`MultiplierOptimizer`), not its loss |
# | five steps of $D$ per step of $G$? | `PeriodicOptimizer`: weights and moments wait |
# | is it alternating training? | no: both move at once. Bound the discriminator |
#
# Digits, more losses and penalties, and a table of FIDs:
# [examples/gan.py](https://github.com/keras-ext/keras-ext/tree/main/examples).
