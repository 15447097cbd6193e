"""Linear chains of tags: the sum over all paths, the best path, probabilities of tags.

    s(y) = start[y_1] + Σ_t e_t[y_t] + Σ_t A[y_{t-1}, y_t] + end[y_n]
    p(y) = exp(s(y)) / Z,    Z = Σ_y exp(s(y)) over all tags^n paths

e are the emissions of a network, A the transitions, learnt with it. Exact: Z by the forward
algorithm, the best path by Viterbi's, and both are one recursion,

    α_t[j] = e_t[j] + ⊕_i (α_{t-1}[i] + A[i, j]),    ⊕ = logsumexp for log Z, max for Viterbi

which starts at α_1 = start + e_1. Each α_t is kept relative to ⊕α_t, and the sum of what was
taken off is the result, so sums over long sequences do not swallow small differences.

The loss -log p(y) is no difference of log Z and s(y), which would cancel: it is log(1 + e^R),
where e^R is the sum over all paths but y, relative to y. The recursion of R carries the paths
that have left y,

    ρ_t[j] = log Σ exp(s(y'_1..t) - s(y_1..t))    over y'_1..t ≠ y_1..t that end in j

and they leave from y_{t-1} to all j but y_t. So value and gradient are exact to rounding,
however small they are. ρ, and the 0 of y beside it, are kept relative to the sum over all paths
so far. Everything is in float32 at least.

Masks: positions that are not kept are left out as if they were not in the sequence, wherever
they are: padding on either side, or the further pieces of a word whose first piece has its tag.
An empty sequence has one path, of score 0: log Z, loss and gradient are 0.

Cost: length · tags² for each sequence, in a loop over the length. Backpropagation is such a
loop too, which keeps α only and computes the products of a step again.

Source: Lafferty, McCallum and Pereira 2001, ICML; Collobert et al. 2011, arXiv 1103.0398
(on top of a network); kexue.fm/archives/5542.
"""

from typing import Any

from keras import ops

from keras_ext.backend import value_and_grad
from keras_ext.labels import check_shape, class_numbers, nan_unless
from keras_ext.numerics import LOG_ZERO, at_least_float32


def crf_log_partition(
    emissions: Any, transitions: Any, start: Any, end: Any, mask: Any = None
) -> Any:
    """log Z, the logarithm of the sum of exp(score) over all paths.

    Args:
        emissions: (batch, length, tags).
        transitions: (tags, tags), A[from, to].
        start: (tags,), added at the first position that is kept.
        end: (tags,), added at the last one.
        mask: booleans (batch, length), True where a position is kept. Default: everywhere.

    Returns: (batch,), in float32 at least.

    Example:
        >>> log_z = crf_log_partition(np.zeros((1, 3, 2)), np.zeros((2, 2)), *np.zeros((2, 2)))
        >>> round(float(log_z[0]), 4)  # log 2³
        2.0794
    """
    return _log_partition(*_standardize(emissions, transitions, start, end, mask))


def crf_path_score(
    emissions: Any, tags: Any, transitions: Any, start: Any, end: Any, mask: Any = None
) -> Any:
    """s(y) of the path `tags`, (batch,).

    Args:
        tags: integers (batch, length) below the number of tags; any value at padding.
        emissions, transitions, start, end, mask: as for `crf_log_partition`.

    Example:
        >>> move, none = np.array([[0.0, 2.0], [0.0, 0.0]]), np.zeros(2)
        >>> float(crf_path_score(np.ones((1, 2, 2)), np.array([[0, 1]]), move, none, none)[0])
        4.0
    """
    emissions, transitions, kind = _standardize(emissions, transitions, start, end, mask)
    tags, valid = _path(tags, emissions, kind)
    scores = ops.take_along_axis(emissions, ops.expand_dims(tags, -1), axis=-1)[..., 0]
    moves = _moves(_before(tags, kind), tags, transitions)
    scores = ops.where(kind > SKIPPED, scores, 0) + ops.where(kind == LATER, moves, 0)
    return nan_unless(valid, ops.sum(scores, axis=1))


def crf_negative_log_likelihood(
    emissions: Any, tags: Any, transitions: Any, start: Any, end: Any, mask: Any = None
) -> Any:
    """log Z - s(y) = -log p(y) of the path `tags`, (batch,); arguments as `crf_path_score`.

    Example:
        >>> tags, none = np.array([[0, 1]]), np.zeros(2)
        >>> loss = crf_negative_log_likelihood(
        ...     np.zeros((1, 2, 2)), tags, np.zeros((2, 2)), none, none)
        >>> round(float(loss[0]), 4)  # log 2²
        1.3863
    """
    emissions, transitions, kind = _standardize(emissions, transitions, start, end, mask)
    tags, valid = _path(tags, emissions, kind)
    before = _before(tags, kind)
    numbers = ops.arange(emissions.shape[-1], dtype="int32")
    own, last = (ops.equal(ops.expand_dims(x, -1), numbers) for x in (tags, before))
    later = ops.expand_dims(kind, -1) == LATER
    # Scores less those of the path. Its own are 0, not by rounding, and not to the gradient.
    scores = ops.sum(ops.where(own, emissions, 0), axis=-1, keepdims=True)
    moves = ops.expand_dims(_moves(before, tags, transitions), -1)
    relative = ops.where(own, 0, emissions - scores - ops.where(later, moves, 0))
    # Where a path may leave the given one: to all tags but its own.
    leaving = ops.where(later, ops.take(transitions, before, axis=0), 0)
    leaving = ops.where(own, LOG_ZERO, leaving)
    joining = ops.take(ops.transpose(transitions), tags, axis=0) - moves
    joining = ops.where(last, 0, joining)
    rest = _others(relative, leaving, joining, transitions, tags, kind)
    return nan_unless(valid, ops.softplus(rest))


def crf_decode(emissions: Any, transitions: Any, start: Any, end: Any, mask: Any = None) -> Any:
    """The path of the highest score (Viterbi), int32 (batch, length).

    Tags are 0 where nothing is kept. Arguments as for `crf_log_partition`.

    Example:
        >>> emissions, stay = np.array([[[1.0, 0.0], [0.0, 0.5]]]), 3 * np.eye(2)
        >>> tags = crf_decode(emissions, stay, np.zeros(2), np.zeros(2))
        >>> keras.ops.convert_to_numpy(tags).tolist()
        [[0, 0]]
    """
    arguments = _standardize(emissions, transitions, start, end, mask)
    emissions, transitions, kind = map(ops.stop_gradient, arguments)
    _, alphas = _forward(ops.max, emissions, transitions, kind)
    # Row j: what the transition to tag j adds. The last row: nothing follows.
    arriving = ops.pad(ops.transpose(transitions), ((0, 1), (0, 0)))
    nothing = ops.full_like(kind[:, 0], emissions.shape[-1])

    def step(following, x):
        alpha, here = _unpack(x)  # (batch, tags), (batch, 1)
        best = ops.argmax(alpha + ops.take(arriving, following, axis=0), axis=-1)
        tag = ops.where(here[:, 0] > SKIPPED, ops.cast(best, "int32"), following)
        return tag, tag

    _, tags = ops.scan(step, nothing, _pack(alphas, kind), reverse=True)
    return ops.where(kind > SKIPPED, _swap(tags), 0)


def crf_marginals(
    emissions: Any, transitions: Any, start: Any, end: Any, mask: Any = None
) -> Any:
    """p(y_t = j), (batch, length, tags): the gradient of log Z with respect to the emissions.

    Zeros where nothing is kept. Arguments as for `crf_log_partition`.

    Example:
        >>> p = crf_marginals(np.zeros((1, 3, 2)), np.zeros((2, 2)), np.zeros(2), np.zeros(2))
        >>> float(keras.ops.convert_to_numpy(p)[0, 1, 0])
        0.5
    """

    def total(emissions):
        return ops.sum(crf_log_partition(emissions, transitions, start, end, mask))

    return value_and_grad(total)(emissions)[1]


# What a position is: left out, the first of its sequence, or one that follows another.
SKIPPED, FIRST, LATER = 0, 1, 2


def _standardize(
    emissions: Any, transitions: Any, start: Any, end: Any, mask: Any
) -> tuple[Any, Any, Any]:
    """Emissions that include start and end, transitions, and what each position is."""
    emissions = ops.convert_to_tensor(emissions)
    dtype = at_least_float32(emissions.dtype)
    arrays = (emissions, transitions, start, end)
    emissions, transitions, start, end = (ops.cast(x, dtype) for x in arrays)
    if mask is None:
        mask = ops.ones_like(emissions[..., 0], dtype="bool")
    mask = ops.cast(mask, "int32")
    count = ops.cumsum(mask, axis=1)
    kind = mask * ops.minimum(count, LATER)  # (batch, length)
    last = mask * ops.cast(ops.equal(count, count[:, -1:]), "int32")
    kind_, last_ = ops.expand_dims(kind, -1), ops.expand_dims(last, -1)
    # Whatever stands where nothing is kept, NaN included, ends here.
    emissions = ops.where(kind_ > SKIPPED, emissions, 0)
    emissions = emissions + ops.where(kind_ == FIRST, start, 0) + ops.where(last_ > 0, end, 0)
    return emissions, transitions, kind


def _path(tags: Any, emissions: Any, kind: Any) -> tuple[Any, Any]:
    """Tags int32 (batch, length), 0 where nothing is kept, and which rows have valid ones."""
    tags = ops.convert_to_tensor(tags)
    check_shape("tags", tags, emissions.shape[:2])
    fix = " Leave positions out by the mask."
    tags, valid = class_numbers("tags", tags, emissions.shape[-1], kind > SKIPPED, fix)
    kept = ops.logical_and(kind > SKIPPED, tags >= 0)
    return ops.where(kept, tags, 0), ops.all(valid, axis=1)


def _before(tags: Any, kind: Any) -> Any:
    """The tag of the position that was kept last before each one, (batch, length); or any."""
    kept = ops.cast(kind > SKIPPED, "int32")
    number = ops.cumsum(kept, axis=1)
    place = ops.cumsum(ops.ones_like(kept), axis=1)
    kept_first = ops.argsort(place - ops.shape(kept)[1] * kept, axis=1)
    kept_tags = ops.take_along_axis(tags, kept_first, axis=1)
    return ops.take_along_axis(kept_tags, ops.maximum(number - 1 - kept, 0), axis=1)


def _moves(before: Any, tags: Any, transitions: Any) -> Any:
    """The score of each transition, (batch, length)."""
    return ops.take(ops.reshape(transitions, (-1,)), transitions.shape[0] * before + tags)


def _forward(reduce: Any, emissions: Any, transitions: Any, kind: Any) -> tuple:
    """⊕ of all paths, (batch,), and α relative to it, (length, batch, tags)."""

    def step(carry, x):
        alpha, total = carry  # (batch, tags), (batch,)
        emission, here = _unpack(x)  # (batch, tags), (batch, 1)
        paths = ops.expand_dims(alpha, -1) + transitions  # (batch, from, to)
        new = emission + ops.where(here == LATER, reduce(paths, axis=1), 0)
        level = reduce(new, axis=-1, keepdims=True)
        alpha = ops.where(here > SKIPPED, new - level, alpha)
        carry = (alpha, total + ops.where(here > SKIPPED, level, 0)[:, 0])
        return carry, carry

    carry = (ops.zeros_like(emissions[:, 0]), ops.zeros_like(emissions[:, 0, 0]))
    (_, total), (alphas, _) = ops.scan(step, carry, _pack(_swap(emissions), kind))
    return total, alphas


def _log_partition(emissions: Any, transitions: Any, kind: Any) -> Any:
    """log Z (batch,), with its gradient.

    XLA cannot differentiate the scan of Keras on TensorFlow. The gradient walks back along the
    chain: what arrives at tag j of a position goes on to the tags i before it in the shares
    softmax_i(α[i] + A[i, j]), which are probabilities.
    """

    @ops.custom_gradient
    def log_partition(emissions, transitions, kind):
        total, alphas = _forward(ops.logsumexp, emissions, transitions, kind)

        def gradient(*args, upstream=None):
            if upstream is None:
                return _backward(*args, alphas, transitions, kind)
            again = alphas  # PyTorch from here
            if (args[0] + 0).requires_grad:  # second derivatives: α, as a function of `args`
                _, again = _forward(ops.logsumexp, *args)
            return _backward(upstream, again, *args[1:])

        return total, gradient

    # `kind` is an argument, for JAX refuses what a function to differentiate closes over.
    return log_partition(emissions, transitions, ops.cast(kind, emissions.dtype))


def _backward(upstream: Any, alphas: Any, transitions: Any, kind: Any) -> tuple:
    """Gradients of log Z with respect to emissions, transitions and (none) `kind`."""
    before = ops.concatenate([ops.zeros_like(alphas[:1]), alphas[:-1]])

    def step(carry, x):
        arriving, total = carry  # (batch, tags), (tags, tags)
        alpha, here = _unpack(x)
        shares = ops.softmax(ops.expand_dims(alpha, -1) + transitions, axis=1)
        pairs = arriving[:, None] * shares  # (batch, from, to)
        pairs = ops.where(here[..., None] == LATER, pairs, 0)
        leaving = ops.where(here == LATER, ops.sum(pairs, axis=-1), arriving)
        return (leaving, total + ops.sum(pairs, axis=0)), (arriving, total)

    carry = (upstream[:, None] * ops.exp(alphas[-1]), ops.zeros_like(transitions))
    (_, by_transitions), (by_emissions, _) = ops.scan(
        step, carry, _pack(before, kind), reverse=True
    )
    by_emissions = ops.where(ops.expand_dims(kind > SKIPPED, -1), _swap(by_emissions), 0)
    return by_emissions, by_transitions, ops.zeros_like(kind)


def _others(
    relative: Any, leaving: Any, joining: Any, transitions: Any, tags: Any, kind: Any
) -> Any:
    """R (batch,), the sum over all paths but one relative to that one, with its gradient.

    Args:
        relative: (batch, length, tags), scores of the emissions less those of the path, its
            transitions included; 0 for its own.
        leaving: (batch, length, tags), scores of the transitions from the path to other tags.
        joining: (batch, length, tags), scores of the transitions to the tag of the path less
            that of the path; 0 for its own.
        transitions: (tags, tags).
        tags, kind: int32 (batch, length), the path, and what each position is.
    """
    number = relative.shape[-1]

    def is_own(x):  # within, for JAX refuses what a function to differentiate closes over
        return ops.equal(x[:, -2:-1], ops.arange(number, dtype=x.dtype))[:, None]

    def paths(state, leaving, joining, own, transitions):
        """Scores (batch, from, to), of the paths that have left, and of the path itself."""
        rho, path = ops.expand_dims(state[:, :number], -1), state[:, number:]
        left = rho + ops.where(own, ops.expand_dims(joining, -1), transitions)
        return ops.concatenate([left, (leaving + path)[:, None]], axis=1)

    def pack(*arrays):
        return _swap(ops.concatenate(arrays, axis=-1))

    def forward(relative, leaving, joining, transitions, path):
        def step(state, x):  # (batch, tags + 1): ρ, and 0 of the path, less their sum
            relative, leaving, joining = ops.split(x[:, :-2], 3, axis=-1)
            scores = paths(state, leaving, joining, is_own(x), transitions)
            new = relative + ops.logsumexp(scores, axis=1)
            new = ops.concatenate([new, state[:, number:]], axis=-1)
            new = new - ops.logsumexp(new, axis=-1, keepdims=True)
            state = ops.where(x[:, -1:] > SKIPPED, new, state)
            return state, state

        nothing = ops.full_like(relative[:, 0], LOG_ZERO)
        start = ops.concatenate([nothing, ops.zeros_like(nothing[:, :1])], axis=-1)
        _, states = ops.scan(step, start, pack(relative, leaving, joining, path))
        return ops.concatenate([start[None], states])

    def backward(upstream, states, relative, leaving, joining, transitions, path):
        def step(carry, x):
            arriving, _, _, total = carry  # (batch, tags) three times, (tags, tags)
            own, here = is_own(x), x[:, -1:] > SKIPPED
            leaving, joining = ops.split(x[:, number + 1 : -2], 2, axis=-1)
            scores = paths(x[:, : number + 1], leaving, joining, own, transitions)
            pairs = arriving[:, None] * ops.softmax(scores, axis=1)  # (batch, from, to)
            pairs = ops.where(here[..., None], pairs, 0)
            left = pairs[:, :number]
            joined = ops.sum(ops.where(own, left, 0), axis=-1)
            by_transitions = ops.sum(ops.where(own, 0, left), axis=0)
            before = ops.where(here, ops.sum(left, axis=-1), arriving)
            # Of the structure of the carry: TensorFlow's scan takes no other outputs.
            outputs = arriving, pairs[:, number], joined, total
            return (before, *outputs[1:3], total + by_transitions), outputs

        arriving = upstream[:, None] * ops.softmax(states[-1, :, :number], axis=-1)
        zeros = ops.zeros_like(arriving)
        carry = arriving, zeros, zeros, ops.zeros_like(transitions)
        steps = ops.concatenate([states[:-1], pack(leaving, joining, path)], axis=-1)
        (*_, by_transitions), outputs = ops.scan(step, carry, steps, reverse=True)
        by_relative, by_leaving, by_joining = map(_swap, outputs[:3])
        by_relative = ops.where(path[..., -1:] > SKIPPED, by_relative, 0)
        return by_relative, by_leaving, by_joining, by_transitions, ops.zeros_like(path)

    @ops.custom_gradient
    def others(relative, leaving, joining, transitions, path):
        states = forward(relative, leaving, joining, transitions, path)

        def gradient(*args, upstream=None):
            if upstream is None:
                known = (relative, leaving, joining, transitions, path)
                return backward(*args, states, *known)
            again = states  # PyTorch from here
            if (args[0] + 0).requires_grad:  # second derivatives: ρ, as a function of `args`
                again = forward(*args)
            return backward(upstream, again, *args)

        last = states[-1]
        return ops.logsumexp(last[:, :number], axis=-1) - last[:, number], gradient

    path = ops.cast(ops.stack([tags, kind], axis=-1), relative.dtype)
    return others(relative, leaving, joining, transitions, path)


def _swap(x: Any) -> Any:
    """(batch, length, ...) to (length, batch, ...), and back."""
    return ops.swapaxes(x, 0, 1)


def _pack(steps: Any, kind: Any) -> Any:
    """One array (length, batch, tags + 1): on TensorFlow Keras scans several arrays only if
    their length is known beforehand."""
    kind = ops.cast(_swap(kind), steps.dtype)
    return ops.concatenate([steps, ops.expand_dims(kind, -1)], axis=-1)


def _unpack(x: Any) -> tuple:
    return x[:, :-1], x[:, -1:]
