"""Learning rates of their own for some variables, whatever the optimizer.

    w <- w + m (w' - w),    w' = where the inner optimizer goes from w

Multiplying a loss or a gradient does nothing under Adam, which divides by the size of the
gradient; so the multiplier m of a variable acts on its update. Where an update is proportional
to the learning rate, that equals the inner optimizer with the rate m lr for this variable.
(Adafactor bounds its rate by 1/sqrt(t) first; Ftrl and ScheduleFreeAdamW, whose state follows
the weights, are refused.) Decoupled weight decay is lr wd w and scales along. Clipping,
also of the global norm, acts before and sees all gradients.

Exact: m = 1 is the inner optimizer (on TensorFlow, with the gradients of repeated tokens
summed) and m = 0 the old weight, bit for bit; otherwise equality is up to the rounding of w'
and w. A constraint acts on w' and again on the result, which is
new to it only for m > 1 if it is convex. Cost: a copy of the weights with m != 1, and three
elementary operations on each.

`keras.optimizers.MultiOptimizer` (absent from older Keras) does the same with one optimizer
per learning rate. Each of them clips the norm of its own variables only and has a schedule of
its own; there is no `learning_rate`, so callbacks that set it fail; and `.keras` files hold the
state twice.

Layer-wise decay (`layerwise_decay`) is such a choice of multipliers to fine-tune a Transformer:
decay^(n - i) for block i = 0 .. n - 1, decay^(n + 1) for the embeddings.

Source: kexue.fm/archives/6418; bert4keras `extend_with_parameter_wise_lr`; Howard and Ruder
2018, arXiv 1801.06146 (discriminative fine-tuning).
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_ext import arguments
from keras_ext.layers.blocks import BELOW, blocks
from keras_ext.optimizers.selection import Selectable, Selection, shown
from keras_ext.optimizers.update_wrapper import UpdateWrapper


@keras.saving.register_keras_serializable(package="keras_ext")
class MultiplierOptimizer(UpdateWrapper):
    """Multiply the learning rate of chosen variables, under any optimizer.

        w <- w + m (w' - w),    w' = where the inner optimizer goes from w

    Args:
        optimizer: the `keras.optimizers.Optimizer` to wrap, or its name.
        multipliers: a dictionary of multipliers 0 <= m < inf. A key is a regular expression
            that is searched in `variable.path`, such as "classifier/" or r"bias$", or a layer
            (or model), which stands for all its variables. Also a list of pairs (key,
            multiplier), in which a key may be a variable, or a list of all these. Other
            variables have m = 1. m = 0 freezes, bit for bit; the state of the inner optimizer
            moves on all the same.
        name: name of the wrapper.

    Attributes:
        multipliers: the same as pairs (regular expressions, multiplier), as it is saved.

    A variable that two keys match is an error: "encoder_1" also matches encoder_10. Write
    "encoder_1/". To multiply multipliers, wrap twice. (bert4keras multiplies.)

    Raises:
        ValueError: a key chooses no variables, or a multiplier is out of range; when built, a
            key matches no variable or two keys match one, or a variable outside a layer has the
            path of one inside.

    Example:
        >>> optimizer = MultiplierOptimizer(keras.optimizers.Adam(1e-3), {"kernel": 0.1})
        >>> model.compile(optimizer, loss="mse")
        >>> history = model.fit(x, y, verbose=0)  # the bias learns ten times faster

    Reference: Howard and Ruder 2018, arXiv 1801.06146.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        multipliers: Mapping[Any, float] | Sequence[tuple[Any, float]],
        name: str | None = None,
    ):
        super().__init__(optimizer, name=name)
        if isinstance(multipliers, Mapping):
            multipliers = list(multipliers.items())
        if not isinstance(multipliers, (list, tuple)) or not all(map(_is_pair, multipliers)):
            raise ValueError(
                "multipliers must be a dictionary {regular expression or layer: multiplier}, "
                f"or a list of such pairs, got {multipliers!r}."
            )
        # A layer has no paths before it is built, so layers stay in the selections. (A tuple,
        # as Keras would take variables in a list for the state of the optimizer.)
        self._items = tuple(
            (Selection("keys of multipliers", key), _multiplier(key, m))
            for key, m in multipliers
        )

    @property
    def multipliers(self) -> list[list]:
        return [[selection.config(), multiplier] for selection, multiplier in self._items]

    def build(self, variables: list) -> None:
        factors = [1.0] * len(variables)
        owner: dict[int, list] = {}
        for selection, multiplier in self._items:
            for i in selection.indices(variables):
                if i in owner:
                    raise ValueError(
                        f"multipliers: {shown(owner[i])} and {shown(selection.parts)} both "
                        f"match {variables[i].path}. Make them disjoint, or wrap twice to "
                        "multiply."
                    )
                factors[i], owner[i] = multiplier, selection.parts
        self._factors = factors
        super().build(variables)

    def rewrites(self, index: int) -> bool:
        return self._factors[index] != 1

    def constrains(self, index: int) -> bool:
        return self._factors[index] != 0  # frozen bit for bit

    def rewrite(self, index: int, old: Any, new: Any, grad: Any, before: Any) -> Any:
        multiplier = self._factors[index]
        return old + multiplier * (new - old) if multiplier else old

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"multipliers": self.multipliers}


def layerwise_decay(model: keras.Model, decay: float) -> dict[str, float]:
    """Multipliers that fall from the head of a Transformer to its embeddings.

        1               the head, and everything else that is not named below
        decay^(n - i)   block i of n, layer `encoder_i`: decay for the top one
        decay^(n + 1)   what makes the input of the blocks: token, segment and position
                        embeddings, their norm, their projection, a `T5Bias`

    The blocks of a decoder, `decoder_i`, fall in the same way from its head; n is the greater
    of both numbers for what is below them. That is the rule of BEiT and MAE. ELECTRA's code has
    one level more between head and top block (n + 1 - i and n + 2); to have it, multiply the
    rate of the head by 1 / decay and the learning rate by decay. ULMFiT divides by 2.6 a layer.

    Args:
        model: built by `keras_ext.models.build_transformer_model`, or a model around such a
            one. Frozen layers have no entry.
        decay: factor per layer, 0 < decay <= 1; usual are 0.65 to 0.95.

    Returns:
        The dictionary for `MultiplierOptimizer`; further keys may be added.

    Raises:
        ValueError: decay is out of range, or the model has no blocks.

    Example:
        >>> bert = build_transformer_model("bert_config.json", with_pool=True)
        >>> multipliers = layerwise_decay(bert, 0.9) | {"pooler/": 2.0}
        >>> optimizer = MultiplierOptimizer(keras.optimizers.Adam(2e-5), multipliers)

    Reference: Bao et al. 2021 (BEiT), arXiv 2106.08254; Clark et al. 2020 (ELECTRA),
    arXiv 2003.10555.
    """
    decay = arguments.number("decay", decay, "(0, 1]")
    sides = Counter(block.name.partition("_")[0] for block in blocks(model))
    multipliers = {}
    for block in blocks(model):
        side, _, number = block.name.partition("_")
        multipliers[rf"(^|/){block.name}/"] = decay ** (sides[side] - int(number))
    multipliers[rf"(^|/)({'|'.join(BELOW)})/"] = decay ** (max(sides.values()) + 1)
    trainable = [w.path for w in model.trainable_weights]
    return {
        pattern: multiplier
        for pattern, multiplier in multipliers.items()
        if any(re.search(pattern, path) for path in trainable)
    }


def _is_pair(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and len(item) == 2


def _multiplier(key: Selectable, multiplier: float) -> float:
    return arguments.number(f"the multiplier of {shown(key)}", multiplier, "[0, inf)")
