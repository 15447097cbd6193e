"""Low-rank training inside the optimizer: small moments for large matrices, any model.

The inner optimizer never sees a chosen matrix W (n, m), only a few coordinates of it,
whose gradients follow from G = dLoss/dW:

    lora       W = W0 + s A B            s G B', s A' G              s = alpha / r
    additive   W = W0 + tile A + tile B  sums of G over blocks       r = 1: row, column sums
    random     fresh A, B ~ N(0, 1/r)    G B', A' G                  dW = (dA B + A dB) / 2
    galore     P of the SVD of G         G P, or P' G                dW = scale * dR P', P dR

with A (n, r), B (r, m). After the inner step, W moves by what the coordinates moved.

Exact: "lora" is the LoRA layer (same A, B, same trajectory to rounding), since
dLoss/dA = s G B' whoever computes it. One step of SGD moves W by

    A+ B+ - A B = -lr (G B'B + A A' G) + lr^2 G B'A' G

so LoRA is gradient descent on a projected gradient, and with fresh random A and B, scaled as
above, the projection is right on average: E[dW] = -lr G ("random"; the article's update is
twice that). "galore" takes the projection from the gradient itself, every `update_gap`
updates, as GaLore does; at full rank under SGD it is SGD.

Cost: with Adam r (n + m) factors and 2 r (n + m) moments in place of 2 n m moments, and 4 n m r
multiplications per update. Of "galore", with n >= m: steps, moments and projector, r (3 n + m)
numbers, and the SVD every `update_gap` updates. The gradient G itself is still computed and
stored: only optimizer state is saved, where LoRA layers save the gradient as well.

Source: kexue.fm/archives/9590; arXiv 2106.09685 (LoRA), 2403.03507 (GaLore).
"""

import re
from collections.abc import Sequence

import keras
from keras import ops

from keras_ext import backend
from keras_ext.optimizers.low_rank_projection import PROJECTIONS
from keras_ext.optimizers.patterns import as_patterns
from keras_ext.optimizers.wrapper import FOLLOWERS, OptimizerWrapper


@keras.saving.register_keras_serializable(package="keras_ext")
class LowRankOptimizer(OptimizerWrapper):
    """Train matrices through r columns and r rows, without touching the model.

        lora:      W = W0 + (alpha / r) A B
        additive:  W = W0 + tile(A) + tile(B)
        random:    dW = (dA B + A dB) / 2,  fresh A, B
        galore:    dW = scale * dR P',      P from the SVD of the gradient

    The inner optimizer trains A and B (or steps R) in place of the chosen matrices, and all
    other variables as ever. Clipping inside sees the gradients of A, B and R.

    Args:
        optimizer: the `keras.optimizers.Optimizer` to wrap, or its name.
        rank: integer r >= 1.
        mode: "lora" (default), "galore", "random" or "additive".
        target: regular expressions, one or several, searched in `variable.path`, that choose
            the matrices; default, all with both sides above `rank`. Only 2-D variables are
            ever chosen: kernels of more axes (`EinsumDense`, convolutions) train as ever,
            and by default a bias (heads, size) of an attention may be a matrix, too.
        alpha: "lora" only, alpha > 0 as `lora_alpha` of Keras; default r, that is s = 1.
        update_gap: "galore" only, updates from one SVD to the next; default 200. On a CPU
            use TensorFlow without XLA, whose SVD takes 20 seconds for 256 x 256 there.
        scale: "galore" only, factor > 0 of the steps; default 1 (GaLore's README has 0.25).
        seed: integer for the first A of "lora" and all draws of "random"; default, random.
        name: name of the wrapper.

    "lora", "additive": weight decay acts on A and B, never on W0. W is W0 + s A B to
    float32 rounding of every step (after 1,000 about 1e-6 of W). Half-precision weights
    would lose small steps and are refused: give them float32 (`mixed_bfloat16`), which
    is smaller than bfloat16 with a float32 copy. `AccumOptimizer` may stand inside, where it
    sums small gradients, or outside.

    "galore", "random": steps start from zero, so weight decay acts on W itself, as in GaLore.
    Inner rules that look at the weights see zero: `Lamb` is Adam, `Adafactor` takes its
    smallest step. Moments are carried from one basis into the next as they are (so in
    GaLore); "random" changes the basis at every update and is meant for plain SGD, where
    momentum averages over old bases. `AccumOptimizer` goes outside.

    Raises:
        ValueError: no matrix is chosen, the rank does not fit, or something inside averages
            the weights or accumulates while the basis changes.

    Example:
        >>> optimizer = LowRankOptimizer(keras.optimizers.AdamW(1e-3), rank=1, target="kernel")
        >>> model.compile(optimizer, loss="mse")
        >>> history = model.fit(x, y, verbose=0)
        >>> a, b = optimizer.factors(model.layers[-1].kernel)  # kernel = W0 + a b

    Reference: kexue.fm/archives/9590; Hu et al. 2021, arXiv 2106.09685; Zhao et al. 2024,
    arXiv 2403.03507.
    """

    tracks_weights = True

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        rank: int,
        mode: str = "lora",
        target: str | Sequence[str] | None = None,
        alpha: float | None = None,
        update_gap: int = 200,
        scale: float = 1.0,
        seed: int | None = None,
        name: str | None = None,
    ):
        super().__init__(optimizer, name=name)
        if mode not in PROJECTIONS:
            raise ValueError(f"mode must be one of {tuple(PROJECTIONS)}, got {mode!r}.")
        for key, value in (("rank", rank), ("update_gap", update_gap)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{key} must be an integer >= 1, got {value!r}.")
        for key, value in (("alpha", 1.0 if alpha is None else alpha), ("scale", scale)):
            if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ValueError(f"{key} must be a number > 0, got {value!r}.")
        if alpha is not None and mode != "lora":
            raise ValueError(f'alpha is an option of mode="lora", got mode={mode!r}.')
        if (update_gap, scale) != (200, 1.0) and mode != "galore":
            raise ValueError(
                f'update_gap and scale are options of mode="galore", got mode={mode!r}.'
            )
        self.rank = rank
        self.mode = mode
        self.target = None if target is None else as_patterns("target", target)
        self.alpha = alpha
        self.update_gap = update_gap
        self.scale = scale
        self.seed = seed
        self._check_inner()

    def _check_inner(self):
        for inner in self.inner_optimizers():
            if inner.use_ema or getattr(inner, "tracks_weights", False):
                what = "use_ema=True" if inner.use_ema else type(inner).__name__
                raise ValueError(
                    f"{what} of {inner.name!r} would follow the factors, not the weights. Put "
                    "it outside (for use_ema, EMAOptimizer)."
                )
            if PROJECTIONS[self.mode].keeps_factors:
                continue
            if getattr(inner, "accum_steps", None) or inner.gradient_accumulation_steps:
                raise ValueError(
                    f"mode={self.mode!r} changes the basis while {inner.name!r} accumulates "
                    "gradients. Accumulate outside: AccumOptimizer(LowRankOptimizer(...), k)."
                )
            if isinstance(inner, FOLLOWERS):
                raise ValueError(
                    f"{type(inner).__name__} computes the weights from its state, but "
                    f"mode={self.mode!r} shows it steps only. Use another inner optimizer."
                )

    def build(self, variables):
        if self.mode == "random":
            self.seed_generator = keras.random.SeedGenerator(self.seed)
        self.projections = [
            PROJECTIONS[self.mode](self, v, None if self.seed is None else self.seed + i)
            if self._is_chosen(v)
            else None
            for i, v in enumerate(variables)
        ]
        if not any(self.projections):
            raise ValueError(
                f"no matrix is left for rank={self.rank}, target={self.target!r}. 2-D "
                f"variables: {[(v.path, v.shape) for v in variables if len(v.shape) == 2]}."
            )
        super().build(variables)

    def _is_chosen(self, variable) -> bool:
        if len(variable.shape) != 2:
            return False
        if self.target is None:
            return min(variable.shape) > self.rank
        return any(re.search(pattern, variable.path) for pattern in self.target)

    @property
    def inner_variables(self):
        """The variables of the inner optimizer: coordinates in place of chosen matrices."""
        listed = []
        for variable, part in zip(self._trainable_variables, self.projections, strict=True):
            listed += [variable] if part is None else part.coordinates
        return listed

    @property
    def own_variables(self):
        random = self.built and self.mode == "random"
        return super().own_variables + ([self.seed_generator.state] if random else [])

    def factors(self, variable) -> tuple:
        """What is kept for a chosen matrix, as variables.

        Returns: (A, B) in the modes "lora" (W = W0 + (alpha / r) A B) and "additive", the
        projector (P,) in the mode "galore". Other values may be assigned before training
        as long as B = 0.
        """
        if not self.built:
            raise ValueError("The factors do not exist yet. Call build or fit first.")
        for v, part in zip(self._trainable_variables, self.projections, strict=True):
            if v is variable and part is not None and part.factors is not None:
                return tuple(part.factors)
        raise ValueError(
            f"{getattr(variable, 'path', variable)} has no factors: mode={self.mode!r}, "
            f"target={self.target!r}, rank={self.rank}."
        )

    def apply(self, grads, trainable_variables=None):
        backend.merge_replicas(self._apply, self.align(grads, trainable_variables))

    def _apply(self, grads):
        small, moved = [], []
        for part, grad in zip(self.projections, grads, strict=True):
            if part is None:
                small.append(grad)
            elif grad is None:
                small += [None] * len(part.coordinates)
            else:
                grad = ops.cast(backend.densify(grad), part.dtype)
                basis = part.basis(grad)
                small += part.gradients(basis, grad)
                moved.append((part, basis, self._decay(part)))
        updates = self.iterations + 0  # the number, not the variable
        read = [updates, *keras.tree.flatten([(basis, decay) for _, basis, decay in moved])]
        self.apply_inner(small, after=read)
        # A LossScaleOptimizer inside skips the update after an overflow: then no decay either.
        self._follow(moved, self.iterations > updates)

    def _decay(self, part):
        """1 - lr * weight_decay for W itself, where its coordinates start from zero."""
        inner = self.inner_optimizers()[-1]
        # Private: the one place that knows what exclude_from_weight_decay excluded.
        if part.keeps_factors or not (
            inner.weight_decay and inner._use_weight_decay(part.variable)
        ):
            return None
        return 1.0 - ops.cast(self.learning_rate, part.dtype) * inner.weight_decay

    def _follow(self, moved, updated=True):
        """Move each matrix by what its coordinates moved since `basis`."""
        for part, basis, decay in moved:
            variable = part.variable
            value = ops.cast(variable.value, part.dtype)
            if decay is not None:
                value = value * ops.where(updated, decay, 1.0)
            variable.assign(ops.cast(value + part.step(basis), variable.dtype))
            if variable.constraint is not None:
                variable.assign(variable.constraint(variable))

    def finalize_variable_values(self, var_list):
        """End of `fit`: follow what an AccumOptimizer inside still does to the factors."""
        if not self.built or not backend.has_value(self.own_variables[0]):
            return  # fit failed before or in its first step: let its own error be seen
        kept = [part for part in self.projections if part is not None and part.keeps_factors]
        moved = [(part, part.basis(), None) for part in kept]
        super().finalize_variable_values(var_list)
        self._follow(moved)

    def get_config(self):
        return super().get_config() | {
            "rank": self.rank,
            "mode": self.mode,
            "target": self.target,
            "alpha": self.alpha,
            "update_gap": self.update_gap,
            "scale": self.scale,
            "seed": self.seed,
        }
