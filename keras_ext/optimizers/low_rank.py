"""Low-rank training inside the optimizer: small moments for large matrices, any model.

The inner optimizer never sees a chosen matrix W (n, m), only a few coordinates of it,
whose gradients follow from G = dLoss/dW:

    LoRA       W = W0 + s A B            s G B', s A' G          s = alpha / r
    additive   W = W0 + tile A + tile B  sums of G over blocks   r = 1: row, column sums
    random     fresh A, B ~ N(0, 1/r)    G B', A' G              dW = (dA B + A dB) / 2
    GaLore     P of the SVD of G         G P, or P' G            dW = scale * dR P', P dR

with A (n, r), B (r, m). After the inner step, W moves by what the coordinates moved.

Where W is W0 plus a function of the factors ("keeps factors"), weight decay acts on the
factors, never on W0, and half-precision weights would lose small steps. Where the coordinates
start every step from zero, weight decay acts on W itself.

Cost: the gradient G is still computed and stored: only optimizer state is saved, where LoRA
layers save the gradient as well.

Source: kexue.fm/archives/9590; arXiv 2106.09685 (LoRA), 2403.03507 (GaLore).
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ext import arguments
from keras_ext.numerics import at_least_float32
from keras_ext.optimizers import nesting
from keras_ext.optimizers.selection import Selectable, Selection
from keras_ext.optimizers.wrapper import OptimizerWrapper, had_gradient, in_doubt


class Projection:
    """A matrix seen through few numbers, the `coordinates`. An update asks in this order

    basis      what the update starts from, as plain tensors
    gradients  one per coordinate
    step       the change of W, once the inner optimizer has moved the coordinates
    """

    coordinates: Sequence[keras.Variable]
    factors: Sequence[keras.Variable] | None = None

    def __init__(self, owner: Any, variable: keras.Variable, seed: int | None = None):
        self.owner = owner
        self.variable = variable
        self.seed = seed
        self.rank = owner.rank
        self.dtype = at_least_float32(variable.dtype)
        self.check()
        self.build(*variable.shape)

    def check(self) -> None:
        variable, kind = self.variable, type(self.owner).__name__
        if min(variable.shape) < self.rank:
            raise ValueError(
                f"include chooses {variable.path}, whose shape {variable.shape} is too small "
                f"for rank={self.rank}. Lower the rank, or let include leave it out."
            )
        if not self.owner.keeps_factors:
            return
        if variable.dtype in ("bfloat16", "float16"):
            raise ValueError(
                f"{kind} needs float32 weights, got {variable.dtype} for {variable.path}: "
                "small steps would be lost in rounding. Use the dtype policy "
                '"mixed_bfloat16" or "mixed_float16".'
            )
        if variable.constraint is not None:
            raise ValueError(
                f"{variable.path} has a constraint, which would break the low-rank form of "
                f"{kind}. Remove it, or leave the variable out by include."
            )

    def build(self, n: int, m: int) -> None:
        """Set `coordinates`, and `factors` if there is something to export."""
        raise NotImplementedError

    def basis(self, grad: Any) -> list:
        raise NotImplementedError

    def gradients(self, basis: list, grad: Any) -> list:
        raise NotImplementedError

    def step(self, basis: list) -> Any:
        raise NotImplementedError

    def add(self, shape: tuple, name: str, initializer: Any = "zeros") -> keras.Variable:
        name = f"{self.variable.path.replace('/', '_')}_{name}"
        return self.owner.add_variable(shape, initializer, dtype=self.dtype, name=name)

    def restart(self) -> None:
        for coordinate in self.coordinates:
            coordinate.assign(ops.zeros(coordinate.shape, coordinate.dtype))


class LowRankOptimizer(OptimizerWrapper):
    """Base of optimizers that train matrices through few numbers, and any model as it is.

    The inner optimizer trains coordinates in the place of the chosen matrices, and all other
    variables as ever. Clipping inside sees the gradients of the coordinates. A subclass names
    its `projection`.

    Args:
        optimizer: the `keras.optimizers.Optimizer` to wrap, or its name.
        rank: integer r >= 1.
        include: which variables: regular expressions searched in `variable.path`, layers,
            variables, or a list of these; default, all with both sides above `rank`. Of these,
            matrices are taken: kernels of more axes (`EinsumDense`, convolutions) train as
            ever, and by default a bias (heads, size) of an attention may be a matrix, too.
        name: name of the wrapper.

    Raises:
        ValueError: no matrix is chosen, the rank does not fit, or something inside averages
            the weights or accumulates while the basis changes.
    """

    follows_weights = True
    projection: type[Projection]
    # Whether the coordinates are factors of W - W0; otherwise they start every step from zero.
    keeps_factors = False

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        rank: int,
        include: Selectable | Sequence[Selectable] | None = None,
        name: str | None = None,
    ):
        super().__init__(optimizer, name=name)
        self.rank = arguments.integer("rank", rank)
        self.include = None if include is None else Selection("include", include)
        self._excluded: Any = None  # the arguments of exclude_from_weight_decay
        nesting.refuse(
            self,
            lambda inner: inner.use_ema or getattr(inner, "follows_weights", False),
            "{kind} of {name!r} would follow the coordinates, not the weights. Put it outside "
            "(for use_ema, EMAOptimizer).",
        )
        if not self.keeps_factors:
            nesting.refuse(
                self,
                nesting.accumulates,
                "{wrapper} changes the basis while {name!r} accumulates gradients. Accumulate "
                "outside: AccumOptimizer({wrapper}(...), k).",
            )
            nesting.refuse(
                self,
                lambda inner: nesting.follows_weights(inner) or not nesting.has_one_rate(inner),
                "{wrapper} shows {kind} {name!r} steps from zero only, but {kind} needs the "
                "weights, or has several rates of decay for them. Use another inner optimizer.",
            )

    def build(self, variables: list) -> None:
        chosen = self._chosen(variables)
        self.projections = [
            self.projection(self, v, self._seed_of(i)) if i in chosen else None
            for i, v in enumerate(variables)
        ]
        if not chosen:
            raise ValueError(
                f"no matrix is left for rank={self.rank}, "
                f"include={self.include and self.include.config()}. 2-D variables: "
                f"{[(v.path, v.shape) for v in variables if len(v.shape) == 2]}."
            )
        if self._excluded is not None:
            self._exclude_coordinates()
        super().build(variables)

    def _chosen(self, variables: list) -> set[int]:
        matrices = {i for i, v in enumerate(variables) if len(v.shape) == 2}
        if self.include is None:
            return {i for i in matrices if min(variables[i].shape) > self.rank}
        return matrices & set(self.include.indices(variables))

    def _seed_of(self, index: int) -> int | None:
        return None

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Exclude variables from weight decay; of a chosen matrix, its factors."""
        # In a selection, as Keras would take variables in a list for the optimizer's state.
        self._excluded = (Selection("var_list", var_list), var_names)
        super().exclude_from_weight_decay(var_list, var_names)
        if self.built:
            self._exclude_coordinates()

    def _exclude_coordinates(self) -> None:
        selection, var_names = self._excluded
        excluded = {id(v) for v in selection.parts}
        parts = [p for p in self.projections if p is not None and id(p.variable) in excluded]
        coordinates = [c for part in parts for c in part.coordinates]
        super().exclude_from_weight_decay([*selection.parts, *coordinates], var_names)

    @property
    def inner_variables(self) -> list:
        """The variables of the inner optimizer: coordinates in place of chosen matrices."""
        listed: list = []
        for variable, part in zip(self.model_variables, self.projections, strict=True):
            listed += [variable] if part is None else part.coordinates
        return listed

    def factors(self, variable: keras.Variable) -> tuple:
        """What is kept for a chosen matrix, as variables: see the class."""
        if not self.built:
            raise ValueError("The factors do not exist yet. Call build or fit first.")
        for v, part in zip(self.model_variables, self.projections, strict=True):
            if v is variable and part is not None and part.factors is not None:
                return tuple(part.factors)
        raise ValueError(
            f"{getattr(variable, 'path', variable)} has no factors: {type(self).__name__}, "
            f"rank={self.rank}, include={self.include and self.include.config()}."
        )

    def update(self, grads: list) -> None:
        small, moved = [], []
        doubtful: dict[int, Any] = {}
        # What accumulates inside may move factors without a gradient in this step.
        waits = any(map(nesting.accumulates, nesting.chain(self.inner_optimizer)))
        for part, grad in zip(self.projections, grads, strict=True):
            if part is None:
                small.append(grad)
            elif grad is None:
                small += [None] * len(part.coordinates)
                if waits:
                    moved.append((part, part.basis(None), None))
            else:
                grad = ops.cast(grad, part.dtype)
                basis = part.basis(grad)
                small += part.gradients(basis, grad)
                had = in_doubt(part.variable)
                if had is not None:
                    doubtful |= {id(c): had for c in part.coordinates}
                moved.append((part, basis, self._decay(part, had)))
        read = keras.tree.flatten([(basis, decay) for _, basis, decay in moved])
        with had_gradient(doubtful):
            updated = self.step_inner(small, after=[t for t in read if t is not None])
        # A LossScaleOptimizer inside skips the update after an overflow: then no decay either.
        self._follow(moved, updated)

    def _decay(self, part: Projection, had: Any) -> Any:
        """1 - lr * weight_decay for W itself, where its coordinates start from zero."""
        if self.keeps_factors:
            return None
        *_, inner = nesting.chain(self)
        if not inner.weight_decay or not self.decays(part.variable):
            return None
        decay = 1.0 - ops.cast(self.learning_rate, part.dtype) * inner.weight_decay
        return decay if had is None else ops.where(had, decay, 1.0)

    def _follow(self, moved: list, updated: Any = True) -> None:
        """Move each matrix by what its coordinates moved since `basis`."""
        for part, basis, decay in moved:
            variable = part.variable
            value = ops.cast(variable.value, part.dtype)
            if decay is not None:
                value = value * ops.where(updated, decay, 1.0)
            variable.assign(ops.cast(value + part.step(basis), variable.dtype))
            if variable.constraint is not None:
                variable.assign(variable.constraint(variable))

    def end_of_fit(self, finish_inner: Any) -> None:
        """Follow what an AccumOptimizer inside still does to the factors."""
        kept = [p for p in self.projections if p is not None] if self.keeps_factors else []
        moved = [(part, part.basis(None), None) for part in kept]
        finish_inner()
        self._follow(moved)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "rank": self.rank,
            "include": None if self.include is None else self.include.config(),
        }
