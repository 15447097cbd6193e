"""Change a built Transformer: other layers in the place of some, with all weights that fit.

    replace_attention    another attention in the blocks
    select_tokens        another vocabulary: tokens of the old one, and means of them
    select_blocks        some of the blocks, such as the first, or every other
    share_blocks         blocks that share their weights
    extend_positions     learnt positions for longer texts
    condition_norms      layer norms that depend on a further input
    rename_layers        other names, for two models side by side

The models made here are copies: nothing done to one of them changes another. They can be used
one after the other, on models of `build_transformer_model` and on functional models on their
outputs, such as `keras.Model(bert.inputs, Dense(2)(bert.output[:, 0]))`. What `family_of` tells
of them stays true, so that they can be saved; where no family has such a model, it says why.
Adapters (`add_lora`) go along, and what is frozen stays so; those of a table whose rows change
are merged into it, and start anew.

Sources: kexue.fm/archives/7661 (another attention), 8739 (tokens), 7947 (positions), 7124
(condition).
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np

from keras_ext.layers.blocks import Side
from keras_ext.layers.norms import ConditionalLayerNormalization
from keras_ext.layers.transformer import TransformerBlock, serialize_unbuilt
from keras_ext.models.adapter import adapt_like, merged_weights
from keras_ext.models.rebuild import blocks_of, carry, carry_fitting, copy_layer, rebuild
from keras_ext.models.record import restate, with_blocks, with_groups


def replace_attention(
    model: keras.Model,
    attention: Callable[[keras.layers.Layer], keras.layers.Layer],
    blocks: Iterable[int] | None = None,
    side: Side | None = None,
) -> keras.Model:
    """The model with another attention in its blocks.

    Weights of the new attention get the values of those of the old one that have the same name
    and shape, as the four projections of all attention layers of `keras_ext` have; the others
    are fresh.

    Args:
        model: of `build_transformer_model`, or a functional model on its outputs, such as
            `keras.Model(bert.inputs, Dense(2)(bert.output[:, 0]))`.
        attention: the layer of a block -> the one in its place, a new one for each block.
        blocks: numbers of the blocks to change, on a side or both. Default: all.
        side: "encoder" or "decoder" (of which the attention to the encoder stays). Default:
            both.

    Returns:
        A `keras.Model` with inputs and outputs of `model`, not compiled.

    Raises:
        ValueError: the model has no blocks `encoder_0` ..., or not those asked for.

    Example:
        >>> bert = build_transformer_model("bert_config.json")
        >>> with_dropout = replace_attention(
        ...     bert, lambda old: MultiHeadAttention(old.num_heads, old.key_dim, dropout=0.1)
        ... )
    """
    found = [block.name for block in blocks_of(model, side)]
    wanted = {*found}
    if blocks is not None:
        numbers = [*blocks]
        sides = sorted({name.partition("_")[0] for name in found})
        wanted = {f"{side}_{i}" for side in sides for i in numbers}
        if not wanted <= {*found}:
            raise ValueError(f"blocks must be numbers of {', '.join(found)}, got {numbers}.")
    pairs: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []
    made: dict[str, keras.layers.Layer] = {}
    attentions: dict[str, Any] = {}

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if layer.name not in wanted:
            return None
        if layer.name not in made:
            new = serialize_unbuilt(attention(layer.attention))
            new["config"]["name"] = layer.attention.name  # which checkpoints know
            attentions[layer.name] = new
            made[layer.name] = copy_layer(layer, attention=new)
            pairs.append((layer, made[layer.name]))
        return made[layer.name](*args, **kwargs)

    changed = rebuild(model, call)
    for old, new in pairs:
        carry_fitting(old, new)
    return restate(changed, model, lambda sizes: sizes.with_attention(attentions))


def select_tokens(model: keras.Model, tokens: Sequence[int | Sequence[int]]) -> keras.Model:
    """The model with another vocabulary: some of its tokens, and new ones made of several.

        E'[i] = mean of E[j] for j in tokens[i],    and so the bias of the MLM head, and a head
                                                    with a matrix of its own

    A pruned vocabulary makes a smaller model with the same outputs for the tokens it keeps. The
    mean of its characters is a good start for a word. An id can be named more than once, so
    that it weighs more.

    Args:
        model: with a layer `token_embedding`, and perhaps `mlm_bias` or `lm_head`.
        tokens: for each id of the new vocabulary one old id, or several. Where the model masks
            padding, it is among them; as the first, if it is 0, and where it was, if positions
            are counted from it, as in RoBERTa.

    Returns:
        A `keras.Model` with inputs and outputs of `model`, not compiled.

    Raises:
        ValueError: `tokens` is empty, or has an id that there is not, or another padding; the
            model has a further Dense layer of as many units as tokens.

    Example:
        >>> small = select_tokens(bert, [0, 100, 101, 102, 103, *range(670, 7992)])
        >>> larger = select_tokens(bert, [*range(21128), [872, 1962]])  # one for 你好

    Reference: kexue.fm/archives/8739.
    """
    embedding = model.get_layer("token_embedding")
    groups = [[token] if isinstance(token, (int, np.integer)) else [*token] for token in tokens]
    known = range(embedding.input_dim)
    for new, group in enumerate(groups):
        if not group or any(token not in known for token in group):
            raise ValueError(
                f"tokens[{new}] must be one or several ids from 0 to {len(known) - 1}, got "
                f"{tokens[new]}."
            )
    sizes: dict[str, Any] = {"vocab_size": len(groups)}
    changes = {"token_embedding": {"input_dim": len(groups)}, "mlm_bias": {}}
    padding = embedding.padding_id
    if embedding.mask_zero and padding and [padding] in groups:
        sizes["pad_token_id"] = groups.index([padding])
        changes["token_embedding"]["padding_id"] = sizes["pad_token_id"]
    elif embedding.mask_zero and padding:
        raise ValueError(f"tokens must have {padding}, the padding, got {list(tokens)}.")
    elif not groups or (embedding.mask_zero and groups[0] != [0]):
        raise ValueError(f"tokens[0] must be 0, the padding, got {list(tokens[:1])}.")
    changes["lm_head"] = {"units": len(groups)}
    moved = sizes.get("pad_token_id", padding) != padding
    for layer in model.layers:
        if moved and layer is not embedding and hasattr(layer, "padding_id"):
            raise ValueError(
                f"tokens[{padding}] must be {padding}, the padding, from whose id {layer.name} "
                f"counts, got tokens[{sizes['pad_token_id']}] = {padding}."
            )
        units = getattr(layer, "units", None)
        if units == len(known) and layer.name not in changes:
            raise ValueError(
                f"{layer.name} has {units} units, as many as there are tokens. Call it lm_head "
                "if they are the tokens; otherwise cut it off first."
            )

    def means(layer: keras.layers.Layer, weight: np.ndarray) -> np.ndarray:
        wide = np.asarray(weight, "float32")
        wide = wide.T if layer.name == "lm_head" else wide
        chosen = np.stack([wide[group].mean(axis=0) for group in groups])
        return chosen.T if layer.name == "lm_head" else chosen

    changed = _changed(model, lambda layer: changes.get(layer.name), means)
    return restate(changed, model, lambda old: dataclasses.replace(old, **sizes))


def select_blocks(
    model: keras.Model, blocks: Iterable[int], side: Side = "encoder"
) -> keras.Model:
    """The model with some of its blocks only, which are numbered anew.

    Args:
        model: with blocks `encoder_0` ...
        blocks: their numbers, in rising order: `range(6)` for the first six, `range(0, 12, 2)`
            for every other.
        side: "encoder" or "decoder", whose blocks. Default: "encoder".

    Returns:
        A `keras.Model` with inputs and outputs of `model`, not compiled.

    Raises:
        ValueError: there is no such block, or the order is not rising.

    Example:
        >>> first_half = select_blocks(bert, range(6))
    """
    numbers, found = list(blocks), blocks_of(model, side)
    if not numbers or numbers != sorted({*numbers} & {*range(len(found))}):
        raise ValueError(
            f"blocks must be rising numbers from 0 to {len(found) - 1}, got {numbers}."
        )
    names = {f"{side}_{old}": f"{side}_{new}" for new, old in enumerate(numbers)}
    dropped = {block.name for block in found} - names.keys()
    made = {
        block.name: copy_layer(block, name=names[block.name])
        for block in found
        if block.name in names
    }

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if layer.name in dropped:
            return args[0]
        return made[layer.name](*args, **kwargs) if layer.name in made else None

    copies = [(block, made[block.name]) for block in found if block.name in made]
    changed = rebuild(model, call, copies)
    return restate(changed, model, lambda sizes: with_blocks(sizes, side, numbers))


def share_blocks(
    model: keras.Model, num_groups: int = 1, side: Side = "encoder"
) -> keras.Model:
    """The model with blocks that share their weights, as those of an ALBERT do.

        block_i = block_g,    g = ⌊i G / N⌋    for N blocks and G groups

    A group has the weights of its first block.

    Args:
        model: with blocks `encoder_0` ...
        num_groups: G, from 1 to N. Default: 1, all blocks are the same one.
        side: "encoder" or "decoder", whose blocks. Default: "encoder".

    Returns:
        A `keras.Model` with inputs and outputs of `model`, not compiled.

    Raises:
        ValueError: there are fewer blocks than groups, or no group.

    Example:
        >>> shared = share_blocks(bert, num_groups=2)

    Reference: Lan et al. 2019, arXiv 1909.11942.
    """
    found = blocks_of(model, side)
    if not 1 <= num_groups <= len(found):
        raise ValueError(
            f"num_groups must be from 1 to {len(found)}, the number of blocks, got "
            f"{num_groups}."
        )
    group_of = {block.name: i * num_groups // len(found) for i, block in enumerate(found)}
    firsts = {group_of[block.name]: block for block in reversed(found)}
    made = {g: copy_layer(block, name=f"{side}_{g}") for g, block in firsts.items()}

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if layer.name not in group_of:
            return None
        return made[group_of[layer.name]](*args, **kwargs)

    changed = rebuild(model, call, [(firsts[g], made[g]) for g in made])
    return restate(changed, model, lambda sizes: with_groups(sizes, side, num_groups))


def extend_positions(model: keras.Model, max_length: int, alpha: float = 0.4) -> keras.Model:
    """The model with learnt positions for texts of up to n² tokens, where it has n.

        p'_(i n + j) = α u_i + (1 - α) u_j,    u_i = (p_i - α p_0) / (1 - α)

    The first n positions are what they were. The others are of the same kind, and so a good
    start for training on longer texts.

    Args:
        model: with a layer `position_embedding`.
        max_length: tokens of the longest texts of the new model, from n to n².
        alpha: α, in (0, 1) and not 1/2, which would make (i, j) and (j, i) the same. Default:
            0.4.

    Returns:
        A `keras.Model` with inputs and outputs of `model`, not compiled.

    Raises:
        ValueError: `max_length` or `alpha` is out of range.

    Example:
        >>> longer = extend_positions(bert, max_length=1024)

    Reference: kexue.fm/archives/7947.
    """
    position = model.get_layer("position_embedding")
    first = getattr(position, "padding_id", -1) + 1  # RoBERTa's rows before are of no place
    size = position.max_length - first
    if not size <= max_length <= size**2:
        raise ValueError(f"max_length must be from {size} to {size**2}, got {max_length}.")
    if not 0 < alpha < 1 or alpha == 0.5:
        raise ValueError(f"alpha must be between 0 and 1, and not 0.5, got {alpha}.")

    def change(layer: keras.layers.Layer) -> dict[str, Any] | None:
        return {"position_embedding": {"max_length": first + max_length}}.get(layer.name)

    def extended(_: keras.layers.Layer, rows: np.ndarray) -> np.ndarray:
        before, rows = np.split(np.asarray(rows, "float64"), [first])
        u = (rows - alpha * rows[0]) / (1 - alpha)
        i, j = np.divmod(np.arange(max_length), size)
        return np.concatenate([before, alpha * u[i] + (1 - alpha) * u[j]])

    return restate(
        _changed(model, change, extended),
        model,
        lambda sizes: dataclasses.replace(sizes, max_position_embeddings=first + max_length),
    )


def condition_norms(model: keras.Model, size: int) -> keras.Model:
    """The model with a further input, `condition`, that its layer norms depend on.

    At first it makes no difference: see `ConditionalLayerNormalization`. The norms are those of
    the blocks and of the layers around them.

    Args:
        model: with `LayerNormalization` layers, in `TransformerBlock`s or alone.
        size: features of the condition.

    Returns:
        A `keras.Model` of the inputs of `model` and then the condition (batch, size), with the
        outputs of `model`, not compiled.

    Raises:
        ValueError: `size` is not positive, or the model has no such norm.

    Example:
        >>> conditional = condition_norms(bert, size=16)
        >>> label = keras.Input((), dtype="int32")
        >>> inputs = [*bert.inputs, keras.layers.Embedding(3, 16)(label)]
        >>> model = keras.Model([*bert.inputs, label], conditional(inputs))

    Reference: kexue.fm/archives/7124.
    """
    if size < 1:
        raise ValueError(f"size must be positive, got {size}.")
    condition = keras.Input((size,), name="condition")
    pairs: dict[str, tuple[keras.layers.Layer, keras.layers.Layer]] = {}

    def conditional(layer: keras.layers.Layer) -> keras.layers.Layer | None:
        if isinstance(layer, keras.layers.LayerNormalization):
            return ConditionalLayerNormalization(layer.epsilon, name=layer.name)
        norm = getattr(layer, "attention_norm", None)
        if isinstance(layer, TransformerBlock) and isinstance(
            norm, keras.layers.LayerNormalization
        ):
            norm = ConditionalLayerNormalization(norm.epsilon)
            return copy_layer(layer, norm=serialize_unbuilt(norm))
        return None

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if layer.name not in pairs:
            made = conditional(layer)
            if made is None:
                return None
            pairs[layer.name] = layer, made
        return pairs[layer.name][1](*args, **kwargs, condition=condition)

    changed = rebuild(model, call, further=[condition])
    if not pairs:
        raise ValueError(f"{model.name} has no LayerNormalization that could be conditioned.")
    for old, new in pairs.values():
        carry_fitting(old, new)
    return restate(changed, model, lambda _: "its norms depend on a condition")


def rename_layers(model: keras.Model, prefix: str) -> keras.Model:
    """The model with a prefix to the names of its layers and its own.

    A Keras model cannot have two layers of one name: rename one of two Transformers to put both
    into one model. Checkpoints are loaded before.

    Args:
        model: a functional model.
        prefix: such as "query_".

    Returns:
        A `keras.Model` with inputs and outputs of `model`, not compiled.

    Example:
        >>> other = rename_layers(bert, "other_")
        >>> both = keras.Model([*bert.inputs, *other.inputs], [bert.output, other.output])
    """
    inputs = [
        keras.Input(batch_shape=x.shape, dtype=x.dtype, name=prefix + x.name)
        for x in model.inputs
    ]
    renamed = _changed(
        model,
        lambda layer: {"name": prefix + layer.name},
        inputs=inputs,
        name=prefix + model.name,
    )
    return restate(renamed, model, lambda _: f"its layers were renamed with {prefix!r}")


def _changed(
    model: keras.Model,
    change: Callable[[keras.layers.Layer], dict[str, Any] | None],
    values: Callable[[keras.layers.Layer, np.ndarray], np.ndarray] | None = None,
    **options: Any,
) -> keras.Model:
    """The model with layers of another configuration, and weights made of the old ones.

    Args:
        change: layer -> what of its configuration changes, None for a layer that stays.
        values: layer, its weight -> the weight of the changed layer. An adapter is merged
            into it, and another one starts. Default: the same weights.
        **options: of `rebuild`.
    """
    made: dict[str, tuple[Any, Any]] = {}

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        changes = change(layer)
        if changes is None:
            return None
        if layer.name not in made:  # a tied layer is called twice
            made[layer.name] = layer, copy_layer(layer, **changes)
        return made[layer.name][1](*args, **kwargs)

    changed = rebuild(model, call, **options)
    for old, new in made.values():
        if not isinstance(old, keras.layers.Layer):  # but an operation
            continue
        if values is None:
            carry(old, new)
            continue
        adapt_like(old, new)
        known = merged_weights(old)
        for (weight, _), (start, value) in zip(merged_weights(new), known, strict=True):
            weight.assign(values(old, value()))
            weight.trainable = start.trainable
    return changed
