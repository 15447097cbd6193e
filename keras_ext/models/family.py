"""What a family of Transformers is: sizes, names in checkpoints, blocks and heads.

A family is a dataclass in a file of its own. Its fields are the sizes, its class says the rest:

    class RBT(BERT, family="rbt"):            registered by this line, as `model="rbt"`
        names = {...}                         what its weights are called in checkpoints
        heads = {**BERT.heads, "with_tags": "tags"}

        def block(self, side, number): ...    one block
        def tags(self, trunk): ...            what the head makes of the hidden states

A built model carries its family and sizes; see `record.py`.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import keras

from keras_ext import layers
from keras_ext.models.bert4keras import (
    BERT4KERAS_ARGUMENTS,
    BERT4KERAS_FIELDS,
    BERT4KERAS_MODELS,
    WITHOUT,
)
from keras_ext.models.names import NameTable
from keras_ext.models.rebuild import copy_layer

# What `model` may be -> the sizes of such a model, and how it is built.
FAMILIES: dict[str, "type[Family]"] = {}

RARE = ("num_hidden_groups", "attention", "custom_position_ids", "gated")

OURS = "keras_ext_"  # before the `model_type` of what transformers would build as another model

ACTIVATIONS = {
    "gelu": layers.gelu_erf,
    "gelu_new": layers.gelu_tanh,
    "gelu_pytorch_tanh": layers.gelu_tanh,
    "relu": keras.activations.relu,
    "silu": keras.activations.silu,
    "swish": keras.activations.silu,
}

Sizes = TypeVar("Sizes", bound="Family")


@dataclasses.dataclass
class Trunk:
    """A model without heads.

    Attributes:
        inputs: of the model.
        token_embedding: its layer, which heads use a second time.
        hidden: the last hidden states, (batch, length, hidden_size).

    Example:
        >>> sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 2}
        >>> sizes |= {"num_attention_heads": 2, "intermediate_size": 16}
        >>> BERT(**sizes).trunk().hidden.shape
        (None, None, 8)
    """

    inputs: list[keras.KerasTensor]
    token_embedding: layers.TokenEmbedding
    hidden: Any
    _made: dict[str, Any] = dataclasses.field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What several heads use, made by the first of them."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family(abc.ABC):
    """The sizes that all Transformers have, and how a model is built from them.

    A subclass registers itself: `class BERT(Family, family="bert")`, by default under the name
    of the class; with `abstract=True` it does not. What a subclass may override is listed at
    the head of this file.

    Args:
        application: what its tokens see, one of `applications`.
        num_hidden_groups: blocks with weights of their own: the i-th of N blocks is the
            ⌊i G / N⌋-th of G. Default: all N.
        attention: name of a block -> the attention in it, serialised by Keras, where
            `replace_attention` put another one. Default: none.
        custom_position_ids: a further input `position_ids` says where tokens stand. Default:
            False.
        gated: feed-forward layers multiply by a second product of their input. Configurations
            may say so by `"hidden_act": ["gelu", "linear"]`. Default: False.

    Raises:
        ValueError: the activation or the application is unknown, a number is out of range, or
            the family cannot take position ids or gates.

    Example:
        >>> class Tagger(BERT):
        ...     heads = {**BERT.heads, "with_tags": "tags"}
        ...
        ...     def tags(self, trunk):
        ...         return self.dense(5, "tagger")(trunk.hidden)
        >>> sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 2}
        >>> sizes |= {"num_attention_heads": 2, "intermediate_size": 16}
        >>> tagger = build_transformer_model(sizes, model=Tagger, with_tags=True)
        >>> tagger.outputs[1].shape
        (None, None, 5)
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    application: str = "encoder"
    num_hidden_groups: int | None = None
    attention: Mapping[str, Any] | None = None
    custom_position_ids: bool = False
    gated: bool = False

    family: ClassVar[str]
    # `model_type` and `architectures` of its configurations at Hugging Face. Default: `family`.
    model_type: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]] = ()
    # Field -> its name in configurations, and further names that are read.
    fields: ClassVar[Mapping[str, str]] = {}
    aliases: ClassVar[Mapping[str, str]] = {}
    activations: ClassVar[Mapping[str, str]] = {}  # what configurations call ours otherwise
    # Fields of configurations that it does not have, with the only values that fit it.
    implied: ClassVar[Mapping[str, Any]] = {}
    names: ClassVar[Mapping[str, NameTable]] = {}
    # Argument of `build` -> the method that makes an output of a `Trunk`.
    heads: ClassVar[Mapping[str, str]] = {}
    # Argument of `build` -> the field that is the activation of the head; others give logits.
    head_activations: ClassVar[Mapping[str, str]] = {}
    applications: ClassVar[tuple[str, ...]] = ("encoder",)
    use_bias: ClassVar[bool] = True  # in the blocks
    pre_norm: ClassVar[bool] = False  # in the blocks
    learned_positions: ClassVar[bool] = True  # or the attentions know where tokens stand
    takes_positions: ClassVar[bool] = True  # custom ones
    takes_gates: ClassVar[bool] = False
    counts_from_padding: ClassVar[bool] = False  # its positions

    def __init_subclass__(
        cls, family: str | None = None, abstract: bool = False, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if abstract:
            return
        cls.family = family or cls.__name__
        if "model_type" not in vars(cls):
            cls.model_type = cls.family
        known = FAMILIES.get(cls.family)
        if known and (known.__module__, known.__name__) != (cls.__module__, cls.__name__):
            raise ValueError(
                f"family={cls.family!r} is {known.__module__}.{known.__name__} already. Give "
                f"{cls.__name__} another name."
            )
        FAMILIES[cls.family] = cls

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {self.hidden_act!r}."
            )
        if self.application not in self.applications:
            raise ValueError(
                f"application must be one of {', '.join(self.applications)} for {kind}, got "
                f"{self.application!r}."
            )
        if self.heads_divide_width and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of "
                f"num_attention_heads={self.num_attention_heads}."
            )
        for side, number in self.sides.items():
            if not 1 <= self.groups(side) <= max(number, 1):
                raise ValueError(
                    f"{self.group_field(side)} must be from 1 to {number}, the number of "
                    f"blocks of the {side}, got {self.groups(side)}."
                )
        if self.gated and not self.takes_gates:
            raise ValueError(
                f"hidden_act must be one activation for {kind}, got a gate, or gated=True."
            )
        if self.custom_position_ids and not self.takes_positions:
            raise ValueError(
                f"custom_position_ids must be False for {kind}, which knows distances only, "
                "got True."
            )

    # ------------------------------------------------------------------ configurations

    @classmethod
    def from_config(cls: type[Sizes], config: Mapping[str, Any]) -> Sizes:
        """Read a configuration file; fields such as `directionality` say nothing about the
        model and are passed over.

        Raises:
            ValueError: a required field is missing, or a field asks for another architecture.
        """
        theirs = {theirs: name for name, theirs in cls.fields.items()}
        aliases = {**BERT4KERAS_FIELDS, **theirs, **cls.aliases}
        # What has two names in a file, such as type_vocab_size, is what the alias says.
        config = {key: value for key, value in config.items() if key not in aliases} | {
            aliases[key]: value for key, value in config.items() if key in aliases
        }
        if isinstance(config.get("hidden_act"), (list, tuple)):
            activation, *gate = config["hidden_act"]
            if gate not in ([], ["linear"]):
                raise ValueError(
                    'hidden_act must be like "gelu" or, with a gate, ["gelu", "linear"], got '
                    f"{config['hidden_act']!r}."
                )
            config |= {"hidden_act": activation, "gated": bool(gate)}
        if config.get("model_type") in (cls.family, OURS + cls.family):
            del config["model_type"]
        fields = dataclasses.fields(cls)
        width, heads = config.get("hidden_size"), config.get("num_attention_heads")
        size = width // heads if width and heads else None
        fit = {"embedding_size": width, "model_type": cls.model_type}
        fit |= {"attention_head_size": size, "attention_key_size": size}
        for key, value in {**WITHOUT, **fit, **cls.implied}.items():
            if key in {field.name for field in fields}:
                continue
            if config.get(key, value) not in (value, None):
                raise ValueError(
                    f"{key} must be {value!r} for {cls.__name__}, got {config[key]!r}."
                )
        if config.get("hidden_act") in cls.activations:
            config["hidden_act"] = cls.activations[config["hidden_act"]]
        for field in fields:
            if field.default is dataclasses.MISSING and field.name not in config:
                raise ValueError(f"The configuration lacks {field.name!r}. Add it.")
        return cls(**{f.name: config[f.name] for f in fields if f.name in config})

    @classmethod
    def for_architectures(cls, architectures: Iterable[str]) -> "type[Family]":
        """The family of the same `model_type` that has one of these architectures, or this."""
        for family in FAMILIES.values():
            if family.model_type == cls.model_type and {*family.architectures} & {
                *architectures
            }:
                return family
        return cls

    def to_config(self) -> dict[str, Any]:
        """What `from_config` reads, in the fields of Hugging Face where it has them."""
        theirs = {ours: activation for activation, ours in self.activations.items()}
        config = {"model_type": self.model_type, **self._changed()}
        if not self.is_known_elsewhere:
            config["model_type"] = OURS + self.family
        elif self.architectures:
            config["architectures"] = list(self.architectures)
        config["hidden_act"] = theirs.get(self.hidden_act, self.hidden_act)
        return {self.fields.get(key, key): value for key, value in config.items()}

    def _changed(self) -> dict[str, Any]:
        """Its fields, without those of `Family` alone that no surgery has set."""
        fields = dataclasses.fields(Family)
        rare = {field.name: field.default for field in fields if field.name in RARE}
        rare["application"] = self.applications[0]
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in rare or getattr(self, field.name) != rare[field.name]
        }

    @property
    def is_known_elsewhere(self) -> bool:
        """Whether the configuration means the same model to transformers."""
        return (
            self.application == self.applications[0]
            and self.num_hidden_groups is None
            and self.attention is None
        )

    # ------------------------------------------------------------------ the model

    def build(self, **heads: bool | str) -> keras.Model:
        """The functional model with fresh weights; see `build_transformer_model`.

        Args:
            **heads: which of `self.heads` it has, or the activation there. Default: none.

        Raises:
            TypeError: no family has such a head.
            ValueError: this one has no such head, or not with such an activation.
        """
        self._check_heads(heads)
        fields = self.head_activations
        given: dict[str, Any] = {
            fields[head]: value
            for head, value in heads.items()
            if head in fields and isinstance(value, str)
        }
        if any(getattr(self, field) != value for field, value in given.items()):
            return dataclasses.replace(self, **given).build(**heads)
        trunk = self.trunk()
        outputs = [trunk.hidden]
        for head, method in self.heads.items():  # in this order
            if heads.get(head):
                outputs.append(getattr(self, method)(trunk))
        inputs, outputs = (x if len(x) > 1 else x[0] for x in (trunk.inputs, outputs))
        return keras.Model(inputs, outputs, name=self.family)

    def _check_heads(self, heads: Mapping[str, bool | str]) -> None:
        kind = type(self).__name__
        for head in heads:
            if head in BERT4KERAS_ARGUMENTS:
                raise TypeError(
                    f"{head} is an argument of bert4keras; here: {BERT4KERAS_ARGUMENTS[head]}."
                )
            if not any(head in family.heads for family in FAMILIES.values()):
                raise TypeError(
                    f"build_transformer_model has no argument {head!r}. Heads of {kind}: "
                    f"{', '.join(self.heads) or 'none'}."
                )
            # Logits are linear, as bert4keras calls what it has by True with a softmax.
            linear = heads[head] == "linear" and head not in self.head_activations
            activation = head in self.head_activations and isinstance(heads[head], str)
            if not (isinstance(heads[head], bool) or linear or activation):
                raise ValueError(
                    f"{head} must be True or False, got {heads[head]!r}. It gives logits: what "
                    "is to be made of them, and any other head, is a layer on the outputs."
                )
            if head not in self.heads and heads[head]:
                raise ValueError(
                    f"{kind} has no head for {head}"
                    + (f" as {self.application!r}" if head in type(self).heads else "")
                    + f". It has: {', '.join(self.heads) or 'none'}."
                )

    @abc.abstractmethod
    def trunk(self) -> Trunk:
        """The model without heads, its blocks by `encode`."""

    def block(self, side: str, number: int) -> keras.layers.Layer:
        """One block, named f"{side}_{number}", its attention `block.attention`."""
        return layers.TransformerBlock(
            layers.MultiHeadAttention(
                self.num_attention_heads,
                *self.attention_sizes,
                dropout=self.attention_probs_dropout_prob,
                position=self.position(),
                causal=self.application == "lm",
                use_bias=self.use_bias,
                kernel_initializer=self.initializer(),
                name="attention",
            ),
            layers.FeedForward(
                self.intermediate_size,
                activation=self.activation,
                kernel_initializer=self.initializer(),
                use_bias=self.use_bias,
                gated=self.gated,
                name="feed_forward",
            ),
            dropout=self.hidden_dropout_prob,
            norm=self.norm(),
            pre_norm=self.pre_norm,
            name=f"{side}_{number}",
        )

    @property
    def heads_divide_width(self) -> bool:
        """Whether heads are parts of the width, and have no size of their own."""
        return True

    @property
    def attention_sizes(self) -> tuple[int, int]:
        """Width of the queries and keys of a head, and of its values."""
        size = self.hidden_size // self.num_attention_heads
        return size, size

    def position(self) -> Any:
        """What tells the attention of a block where tokens stand."""
        return None

    @property
    def sides(self) -> dict[str, int]:
        """Number of blocks of each side of the model."""
        return {"encoder": self.num_hidden_layers}

    @staticmethod
    def group_field(side: str) -> str:
        """The field that tells the number of groups of a side."""
        return {"encoder": "num_hidden_groups", "decoder": "num_decoder_groups"}[side]

    def groups(self, side: str) -> int:
        """Number of blocks of a side that have weights of their own."""
        number = getattr(self, self.group_field(side), None)
        return self.sides[side] if number is None else number

    def group_of(self, side: str) -> list[int]:
        """The group of each block of a side."""
        number, groups = self.sides[side], self.groups(side)
        return [i * groups // number for i in range(number)]

    def encode(self, hidden: Any, side: str = "encoder", **pattern: Any) -> Any:
        """All blocks of a side, called with `pattern`; those of a group are the same one."""
        blocks: dict[int, keras.layers.Layer] = {}
        for group in self.group_of(side):
            if group not in blocks:
                blocks[group] = self._with_attention(self.block(side, group))
            hidden = blocks[group](hidden, **pattern)
        return hidden

    def _with_attention(self, block: keras.layers.Layer) -> keras.layers.Layer:
        other = (self.attention or {}).get(block.name)
        return block if other is None else copy_layer(block, attention=other)

    # ------------------------------------------------------------------ parts of a model

    def token_embedding(self, **options: Any) -> layers.TokenEmbedding:
        """Its layer, of the width of the blocks unless `options` say otherwise; it carries what
        `family_of` reads."""
        options = {"output_dim": self.hidden_size, "mask_zero": True} | options
        return layers.TokenEmbedding(
            self.vocab_size,
            embeddings_initializer=self.table_initializer(),
            architecture=self.record(),
            name="token_embedding",
            **options,
        )

    def position_ids(self) -> list[keras.KerasTensor]:
        """The input of custom positions, if there is to be one."""
        if not self.custom_position_ids:
            return []
        return [keras.Input((None,), dtype="int32", name="position_ids")]

    def pattern(self, positions: list[Any]) -> dict[str, Any]:
        """What blocks are called with, where the custom positions are not learnt ones."""
        return {"positions": positions[0]} if positions and not self.learned_positions else {}

    def add_positions(self, hidden: Any, positions: list[Any], max_length: int) -> Any:
        """Hidden states with learnt positions."""
        return layers.PositionEmbedding(
            max_length,
            embeddings_initializer=self.table_initializer(),
            name="position_embedding",
        )(hidden, *positions)

    def dense(self, units: int, name: str, **options: Any) -> keras.layers.Dense:
        return keras.layers.Dense(
            units, kernel_initializer=self.initializer(), name=name, **options
        )

    def drop(self, hidden: Any, name: str = "embedding_dropout") -> Any:
        return keras.layers.Dropout(self.hidden_dropout_prob, name=name)(hidden)

    def norm(self, name: str | None = None) -> keras.layers.Layer:
        return keras.layers.LayerNormalization(epsilon=self.layer_norm_eps, name=name)

    @property
    def activation(self) -> Callable[[Any], Any]:
        return ACTIVATIONS[self.hidden_act]

    @abc.abstractmethod
    def initializer(self) -> keras.initializers.Initializer:
        """Of a kernel: one for each layer, as it would draw the same numbers a second time."""

    def table_initializer(self) -> keras.initializers.Initializer:
        """Of an embedding."""
        return self.initializer()

    # ------------------------------------------------------------------ after surgery

    def record(self) -> dict[str, Any]:
        """What `family_of` reads."""
        return {"family": self.family, "sizes": dataclasses.asdict(self)}

    def of_blocks(self, side: str, numbers: Iterable[int]) -> dict[str, Any]:
        """Fields that say how blocks differ, for these of them.

        Raises:
            ValueError: no fields could.
        """
        return {}

    def with_attention(self: Sizes, attention: Mapping[str, Any]) -> Sizes:
        """The sizes with another attention in some blocks: name of the block -> serialised."""
        return dataclasses.replace(self, attention={**(self.attention or {}), **attention})


def known_family(name: str) -> type[Family]:
    if name in BERT4KERAS_MODELS and name not in FAMILIES:
        raise ValueError(
            f"{name!r} is the name of a model in bert4keras; here: {BERT4KERAS_MODELS[name]}."
        )
    if name not in FAMILIES:
        raise ValueError(
            f"Unknown family {name!r}. Known: {', '.join(sorted(FAMILIES))}. A family of your "
            "own is known once the module of its class is imported."
        )
    return FAMILIES[name]
