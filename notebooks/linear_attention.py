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
# # Attention in linear time, and when it pays
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/keras-ext/keras-ext/blob/main/notebooks/linear_attention.ipynb)
#
# **摘要**：把 $e^{q\cdot k}$ 换成特征的内积 $\phi(q)\cdot\phi(k)$，
# 就可以先算 $\phi(K)^\top V$，复杂度从 $n^2$ 降到 $n$（[7546](https://kexue.fm/archives/7546)）。
# 单向时它是一个状态大小固定的 RNN；训练时按块计算，结果不变。
# 代价是注意力矩阵的秩不超过特征数，权重更“平”；
# 而且在 BERT-base 的尺寸下，序列长于 1536 以后注意力才比前馈层更贵
# （[8610](https://kexue.fm/archives/8610)）。FAVOR+ 用随机特征无偏地估计 softmax，
# 但误差随 $|q+k|^2$ 指数增长（[7921](https://kexue.fm/archives/7921)）。
# 文中的数字都是当场算出来的，每一节的论断都有 `assert` 检验。
#
# Replace $e^{q\cdot k}$ by a product of features and attention takes linear time
# ([7546](https://kexue.fm/archives/7546)). Section 1 shows why, section 2 how that works in one
# direction, section 3 from which length on it is cheaper, section 4 what is lost, section 5 how
# random features get softmax itself back, and section 6 puts it into a BERT. Every number is
# computed here, and every section asserts what it claims. A CPU is enough.

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
import time

import keras
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from keras import ops

from keras_ext.analysis import attention_rank, crossover, plot_flops, transformer_flops
from keras_ext.layers import (
    FavorAttention,
    LinearAttention,
    MultiHeadAttention,
    dot_product_attention,
    linear_attention,
    orthogonal_projection,
    random_features,
)
from keras_ext.models import build_transformer_model, replace_attention

BLUE, RED, GREEN = "#0072B2", "#D55E00", "#009E73"
# %matplotlib inline
plt.rcParams.update({"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3})
keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
print(f"Keras {keras.__version__} on {keras.backend.backend()}")

# %% [markdown]
# ## 1. The same product in another order
#
# Attention is a mean of the values with weights that come from products of queries and keys:
#
# $$o_i=\frac{\sum_j s(q_i,k_j)\,v_j}{\sum_j s(q_i,k_j)},\qquad s(q,k)=e^{q\cdot k}
# \ \text{ or }\ \phi(q)\cdot\phi(k)$$
#
# With features $\phi$ the sum over $j$ does not depend on $i$ any more:
# $\sum_j(\phi(q_i)^\top\phi(k_j))v_j=\phi(q_i)^\top\sum_j\phi(k_j)v_j^\top$. The matrix of
# $n^2$ weights is never made. Below $\phi(x)=\mathrm{elu}(x)+1$, both ways:

# %%
N, HEADS, SIZE = 300, 2, 16
q, k, v = rng.normal(size=(3, 1, N, HEADS, SIZE)).astype("float32")


def phi(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def with_weights(weights, v):
    """Means of the values; weights (batch, heads, targets, sources), not normalised."""
    weights = weights / weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshd->bthd", weights, v)


weights = np.einsum("bthm,bshm->bhts", phi(q), phi(k))
expected = with_weights(weights, v)
fast = ops.convert_to_numpy(linear_attention(phi(q), phi(k), v))
print(f"n x n weights against m x d sums: difference {np.abs(fast - expected).max():.0e}")
assert np.abs(fast - expected).max() < 1e-5

# %% [markdown]
# ## 2. In one direction it is a recurrent network
#
# Where a token sees only those before it, the sum $S_i=\sum_{j\le i}\phi(k_j)v_j^\top$ grows by
# one product with each token. So a decoder keeps a state of fixed size, where softmax attention
# keeps all keys and values. For training, one state for each token would be too much memory:
# take the sums over chunks of 128 tokens, and the square within a chunk. The size of the chunk
# changes nothing but the speed.

# %%
causal = LinearAttention(HEADS, SIZE, causal=True)
x = rng.normal(size=(1, N, 32)).astype("float32")
at_once = ops.convert_to_numpy(causal(x, x))

state, tokens = causal.initial_state(1), []
for i in range(N):
    output, state = causal.step(x[:, i : i + 1], state)
    tokens.append(ops.convert_to_numpy(output))
difference = np.abs(np.concatenate(tokens, axis=1) - at_once).max()
size = sum(np.size(part) for part in state.values())
print(f"token by token against chunks: difference {difference:.0e}")
print(f"state: {size} numbers, at every length; keys and values: {N * 2 * HEADS * SIZE}")
assert difference < 1e-5

for chunk_size in (1, 7, 64, 1000):
    other = ops.convert_to_numpy(
        linear_attention(phi(q), phi(k), v, causal=True, chunk_size=chunk_size)
    )
    expected = with_weights(weights * np.tri(N), v)
    assert np.abs(other - expected).max() < 1e-5

# %% [markdown]
# ## 3. When it pays
#
# A layer of width $D$ does $4nD^2$ multiplications in its projections, $8nD^2$ in its
# feed-forward layers, and $2n^2D$ in softmax attention. So the square is not what costs until
# texts are long ([8610](https://kexue.fm/archives/8610)):

# %%
lengths = crossover(768, num_heads=12)
print("BERT-base: attention, projections included, costs more than feed-forward layers")
print(f"from n = {lengths['attention_over_feed_forward']} on; its square costs more than")
print(f"all else from n = {lengths['square_over_rest']} on.")
assert (lengths["attention_over_feed_forward"], lengths["square_over_rest"]) == (1536, 4608)

base = {"hidden_size": 768, "num_heads": 12, "num_layers": 12}
for n in (512, 4096, 32768):
    softmax, linear = (
        transformer_flops(n, **base, attention=kind)["total"] for kind in ("softmax", "linear")
    )
    print(f"n = {n:6}: linear attention saves {1 - linear / softmax:4.0%} of the FLOPs")
display(plot_flops(np.geomspace(128, 65536, 50), **base))

# %% [markdown]
# Time is another matter than FLOPs: softmax is bound by memory. Measured on this machine, for
# the attention alone, 4 heads of 64:

# %%
measured, times = (256, 512, 1024, 2048, 4096), {"softmax": [], "linear": []}
for n in measured:
    heads = [ops.convert_to_tensor(a) for a in rng.random((3, 1, n, 4, 64), "float32")]
    for name, attend in (("softmax", dot_product_attention), ("linear", linear_attention)):
        attend(*heads)
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            ops.convert_to_numpy(attend(*heads))
            seconds.append(time.perf_counter() - start)
        times[name].append(1e3 * np.median(seconds))
for name, color in (("softmax", RED), ("linear", BLUE)):
    plt.loglog(measured, times[name], "o-", color=color, label=name)
plt.xticks(measured, measured)
plt.minorticks_off()
plt.xlabel("length")
plt.ylabel("ms")
plt.legend()
plt.show()
ratios = np.array(times["softmax"]) / times["linear"]
assert ratios[-1] > 2 * ratios[0]

# %% [markdown]
# ## 4. What is lost
#
# The matrix of weights is a product of $n\times m$ and $m\times n$: its rank is at most the
# number of features. It averages; a weight near 1 on a single token is out of its reach. Here
# each of 128 queries looks for the one key that is like it:

# %%
n = 128
keys = rng.normal(size=(n, SIZE))
keys *= 4 / np.linalg.norm(keys, axis=1, keepdims=True)
exponentials = np.exp(keys @ keys.T)
products = phi(keys) @ phi(keys).T
for name, table in (("softmax", exponentials), ("linear", products)):
    table = table / table.sum(1, keepdims=True)
    rank = attention_rank(table)
    print(f"{name:8} rank {int(rank.numeric):3}, effective {rank.effective:5.1f};", end=" ")
    print(f"weight of the right token {np.diagonal(table).mean():.3f}")
    assert (rank.numeric <= SIZE) == (name == "linear")

# %% [markdown]
# In one direction the matrix is triangular, and of full rank in both cases, which is one reason
# why linear attention does better in decoders.

# %%
table = products * np.tri(n)
assert attention_rank(table / table.sum(1, keepdims=True)).numeric == n

# %% [markdown]
# ## 5. Softmax from random features
#
# $e^{q\cdot k}$ is an expectation over $\omega\sim N(0,I)$ of
# $e^{\omega\cdot q-|q|^2/2}\,e^{\omega\cdot k-|k|^2/2}$, so these are features, positive ones
# ([7921](https://kexue.fm/archives/7921)). The estimate is unbiased. But its error grows as
# $e^{|q+k|^2}$: what is easy for short queries is out of reach for long ones.

# %%
counts, draws = (16, 64, 256, 1024), 200
for length, color in ((0.5, GREEN), (1.0, BLUE), (2.0, RED)):
    a = np.zeros((1, SIZE), "float32")
    a[0, 0] = length
    exact, errors = np.exp(length**2), []
    for count in counts:
        estimates = np.array(
            [
                np.sum(np.square(random_features(a, orthogonal_projection(count, SIZE, seed))))
                for seed in range(draws)
            ]
        )
        errors.append(np.sqrt(np.mean((estimates / exact - 1) ** 2)))
        if length < 2:
            assert abs(estimates.mean() / exact - 1) < 4 * errors[-1] / draws**0.5
    plt.loglog(counts, errors, "o-", color=color, label=f"|q| = |k| = {length}")
    assert errors[-1] < errors[0] / 2
plt.xlabel("random features")
plt.ylabel("relative error")
plt.legend()
plt.show()

# %% [markdown]
# ## 6. In a BERT
#
# One call puts another attention into any encoder of this library, with the projections it has.
# Here they are fresh, and those of queries and keys made larger, as training would: FAVOR+ is
# near softmax attention, linear attention another function. Either has to be fine-tuned.

# %%
bert = build_transformer_model(
    {
        "vocab_size": 100,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
)
for i in range(2):
    attention = bert.get_layer(f"encoder_{i}").attention
    for dense in (attention.query_dense, attention.key_dense):
        dense.kernel.assign(4 * dense.kernel)
linear = replace_attention(bert, lambda old: LinearAttention(old.num_heads, old.key_dim))
favor = replace_attention(bert, lambda old: FavorAttention(old.num_heads, old.key_dim, seed=0))
token_ids = rng.integers(1, 100, (2, 50))
inputs = [token_ids, np.zeros_like(token_ids)]
softmax_outputs = bert.predict(inputs, verbose=0)
distance = {}
for name, model in (("linear", linear), ("favor", favor)):
    difference = model.predict(inputs, verbose=0) - softmax_outputs
    distance[name] = np.sqrt(np.mean(difference**2) / np.mean(softmax_outputs**2))
    print(f"{name:7} differs from softmax attention by {distance[name]:.2%}")
assert distance["favor"] < distance["linear"]
block = linear.get_layer("encoder_0")
assert isinstance(block.attention, LinearAttention)
assert isinstance(bert.get_layer("encoder_0").attention, MultiHeadAttention)  # as it was

# %% [markdown]
# **中文小结**：线性注意力改变的是计算的次序，而不是近似 softmax；它的秩受特征数限制，
# 适合单向、长序列的场景。序列不长时，先看第 3 节的交叉点。
#
# To use it: `--attention linear` in [examples/clue](../examples/clue); how all of it compares
# with its peers in time and memory: [benchmarks](../benchmarks/README.md).
