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
# # Transformer surgery
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/keras-ext/keras-ext/blob/main/notebooks/transformer_surgery.ipynb)
#
# **摘要**：加载好的 BERT 是一个普通的函数式 Keras 模型，可以拆开再装上：
# 精简词表、用字向量的均值初始化新词、隔层抽取、把位置延长到 512 以外、
# 替换注意力、给 LayerNorm 加条件、把两个模型放进一个模型，或者换一种掩码当语言模型用。
# 每一节都用 `assert` 检验它说的话：手术前后该相等的相等，该不同的不同。
#
# A BERT built by `build_transformer_model` is a functional Keras model of named layers. Here
# it is taken apart and put together again: another vocabulary, fewer blocks, longer
# positions, other attention, norms under a condition, two models in one, a language model.
# Every section asserts what should have stayed equal, and what should not. A CPU is enough:
# the weights are random, so that nothing has to be downloaded. With a real checkpoint only
# the first cell changes: `build_transformer_model("hfl/rbt3", with_mlm=True)`.

# %%
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("keras_ext") is None:  # in Colab, for instance
    package = "keras-ext[tensorflow,nlp] @ git+https://github.com/keras-ext/keras-ext"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

# %%
import tempfile

import keras
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from keras import ops

from keras_ext.layers import LinearAttention
from keras_ext.models import (
    FAMILIES,
    build_transformer_model,
    condition_norms,
    extend_positions,
    rename_layers,
    replace_attention,
    save_transformer_model,
    select_blocks,
    select_tokens,
    share_blocks,
)

keras.utils.set_random_seed(0)
config = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,  # so that the random model does something
}
bert = build_transformer_model(config, with_mlm=True)
rng = np.random.default_rng(0)
token_ids = rng.integers(10, 1000, (2, 12)).astype("int32")
token_ids[1, 9:] = 0  # padding
segment_ids = np.zeros_like(token_ids)
hidden, logits = map(ops.convert_to_numpy, bert([token_ids, segment_ids]))
print(", ".join(layer.name for layer in bert.layers))


# %% [markdown]
# ## 1. Families
#
# The `model_type` of the configuration, or `model=`, chooses the family. Each is one file of
# `keras_ext/models`: what
# is read from the configuration, of what a block is made, and a table of names in
# checkpoints.

# %%
known = {"token_ids": token_ids, "segment_ids": segment_ids, "decoder_token_ids": token_ids}
sizes = {**config}
del sizes["initializer_range"]  # some families have a spread of their own, and refuse another
for family in FAMILIES:
    model = build_transformer_model(sizes, model=family)
    given = [known[x.name] for x in model.inputs]
    assert np.isfinite(model(given if len(given) > 1 else given[0])).all()
    print(f"{family:18}{model.count_params():>9,} weights")

# %% [markdown]
# ## 2. 词表 Another vocabulary
#
# `select_tokens` takes for each id of the new vocabulary one old id, or several, of which it
# becomes the mean ([8739](https://kexue.fm/archives/8739)). The first 500 tokens that we keep
# have the outputs they had; the last one starts as the mean of two.

# %%
kept = [0, *sorted(set(token_ids.flat) - {0})]
kept += [token for token in range(1, 1000) if token not in kept][: 500 - len(kept)]
small = select_tokens(bert, [*kept, [20, 30]])
new_ids = np.vectorize({old: new for new, old in enumerate(kept)}.get)(token_ids)
new_hidden, new_logits = map(ops.convert_to_numpy, small([new_ids, segment_ids]))
assert np.allclose(new_hidden, hidden, atol=1e-4)
assert np.allclose(new_logits[..., :500], logits[..., kept], atol=1e-3)
table = small.get_layer("token_embedding").get_weights()[0]
old_table = bert.get_layer("token_embedding").get_weights()[0]
assert np.allclose(table[500], old_table[[20, 30]].mean(0))
print(f"{bert.count_params():,} weights, with half of the vocabulary {small.count_params():,}")

# %% [markdown]
# The model knows its family and its new sizes, and is saved as an ordinary checkpoint.

# %%
with tempfile.TemporaryDirectory() as directory:
    save_transformer_model(small, directory)
    again = build_transformer_model(directory, with_mlm=True)
    print(str(again.checkpoint_report).replace(directory, "directory"))
assert np.array_equal(again([new_ids, segment_ids])[0], small([new_ids, segment_ids])[0])

# %% [markdown]
# ## 3. 层 Fewer blocks
#
# The first three of six blocks, or every other. The former compute what the whole model has
# after its third. `share_blocks` gives all blocks of a group the weights of its first, as an
# ALBERT has them.

# %%
first_half, every_other = (select_blocks(bert, blocks) for blocks in (range(3), range(0, 6, 2)))
third = keras.Model(bert.inputs, bert.get_layer("encoder_2").output)
inputs = [token_ids, segment_ids]
assert np.allclose(first_half(inputs)[0], third(inputs), atol=1e-5)
assert not np.allclose(every_other(inputs)[0], third(inputs), atol=0.1)
print([layer.name for layer in every_other.layers if layer.name.startswith("encoder")])
shared = share_blocks(bert, num_groups=2)
print(f"{bert.count_params():,} weights, shared {shared.count_params():,}")

# %% [markdown]
# ## 4. 位置 Longer texts
#
# `extend_positions` makes n² positions of n ([7947](https://kexue.fm/archives/7947)):
# position i n + j is a mean of i and j, and those below n stay.

# %%
longer = extend_positions(bert, 32 * 4)
assert np.allclose(longer(inputs)[0], hidden, atol=1e-4)
(positions,) = longer.get_layer("position_embedding").get_weights()
unit = positions / np.linalg.norm(positions, axis=1, keepdims=True)
figure, axes = plt.subplots(figsize=(2.6, 2.2), layout="constrained")
axes.imshow(unit @ unit.T)
axes.set(title="cosines of 128 positions", xlabel="position", ylabel="position")
display(figure)
plt.close(figure)
long_ids = rng.integers(10, 1000, (1, 100)).astype("int32")
print(longer([long_ids, 0 * long_ids])[0].shape)

# %% [markdown]
# ## 5. 注意力 Another attention
#
# The new attention keeps the projections that it has in common with the old one. With the
# weights of softmax attention a linear one computes something else, but not everything is
# lost: it is what fine-tuning starts from.

# %%
linear = replace_attention(bert, lambda old: LinearAttention(old.num_heads, old.key_dim))
assert [w.path for w in linear.weights] == [w.path for w in bert.weights]
real = token_ids != 0
fresh = build_transformer_model(config, with_mlm=True)
cosines = {}
for name, model in (("replaced", linear), ("another BERT", fresh)):
    one, other = ops.convert_to_numpy(model(inputs)[0])[real], hidden[real]
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    cosines[name] = float(((one * other).sum(1) / norms).mean())
assert cosines["replaced"] > cosines["another BERT"] + 0.3
print({name: round(cosine, 2) for name, cosine in cosines.items()})

# %% [markdown]
# ## 6. 条件 Norms under a condition
#
# `condition_norms` adds an input that the γ and β of all layer norms depend on
# ([7124](https://kexue.fm/archives/7124)). At first it makes no difference; a few steps of
# training teach a BERT to read a label from it.

# %%
trunk = keras.Model(first_half.inputs, first_half.outputs[0])  # without the MLM head
conditional = condition_norms(trunk, size=8)
condition = rng.normal(size=(2, 8)).astype("float32")
assert np.allclose(conditional([*inputs, condition]), trunk(inputs), atol=1e-5)

labels = rng.integers(0, 2, 256)
label = keras.Input((), dtype="int32")
vector = keras.layers.Embedding(2, 8)(label)
pooled = conditional([*trunk.inputs, vector])[:, 0]
model = keras.Model([*trunk.inputs, label], keras.layers.Dense(2)(pooled))
model.compile(
    keras.optimizers.Adam(3e-3),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
    jit_compile=False,
)
texts = rng.integers(10, 1000, (256, 12)).astype("int32")
history = model.fit([texts, 0 * texts, labels], labels, epochs=5, verbose=0).history
assert history["accuracy"][-1] > 0.95
print([round(accuracy, 3) for accuracy in history["accuracy"]])

# %% [markdown]
# ## 7. 两个模型 Two models side by side
#
# A Keras model has no two layers of one name. `rename_layers` gives one of them a prefix.

# %%
other = rename_layers(fresh, "other_")
both = keras.Model([*bert.inputs, *other.inputs], [bert.outputs[0], other.outputs[0]])
one, two = both([*inputs, *inputs])
assert np.allclose(one, hidden, atol=1e-4)
assert np.allclose(two, fresh(inputs)[0], atol=1e-4)
print([x.name for x in both.inputs])

# %% [markdown]
# ## 8. 掩码 A language model
#
# `application=` chooses who sees whom, with the same weights: "encoder" everyone, "lm" the
# tokens before, "unilm" in segment 1 the tokens before and in segment 0 all of it
# ([6933](https://kexue.fm/archives/6933)). The pictures show which outputs (rows) change with
# which tokens (columns), of a text of five tokens and one of seven.

# %%
ids = rng.integers(10, 1000, (1, 12)).astype("int32")
segments = np.repeat([[0, 1]], [5, 7], axis=1).astype("int32")
figure, axes = plt.subplots(1, 3, figsize=(8, 2.8), layout="constrained")
seen = {}
for panel, application in zip(axes, ("encoder", "lm", "unilm"), strict=True):
    model = build_transformer_model(config, application=application)
    model.set_weights(bert.get_weights()[: len(model.weights)])
    before = ops.convert_to_numpy(model([ids, segments]))[0]
    changed = np.repeat(ids, 12, axis=0)
    np.fill_diagonal(changed, ids % 999 + 1)  # row t has another token at t
    after = ops.convert_to_numpy(model([changed, np.repeat(segments, 12, axis=0)]))
    seen[application] = (np.abs(after - before).max(-1) > 1e-4).T
    panel.imshow(seen[application], cmap="Greys")
    panel.set(title=application, xlabel="token", ylabel="output")
display(figure)
plt.close(figure)
assert seen["encoder"].all()
assert np.array_equal(seen["lm"], np.tri(12, dtype=bool))
prefix = np.arange(12) < 5
assert np.array_equal(seen["unilm"], np.tri(12, dtype=bool) | (prefix & prefix[:, None]))
