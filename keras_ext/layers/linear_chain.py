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

so both value and gradient are exact to rounding however small they are. For j ≠ y_t what has
not left before leaves now, log(1 + e^ρ) instead of ρ at y_{t-1}. Everything is in float32 at
least.

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
from keras_ext.numerics import at_least_float32


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
    own = ops.equal(ops.expand_dims(tags, -1), ops.arange(emissions.shape[-1], dtype="int32"))
    before = _before(tags, kind)
    moves = _moves(before, tags, transitions)
    # Scores relative to those of the path, whose own are zero: not by rounding, and not to
    # the gradient either.
    steps = ops.sum(ops.where(own, emissions, 0), axis=-1) + ops.where(kind == LATER, moves, 0)
    relative = emissions - ops.expand_dims(steps, -1)
    at_path = ops.where(ops.expand_dims(kind, -1) == FIRST, NOTHING, ops.zeros_like(relative))
    relative = ops.where(own, at_path, relative)
    arriving = ops.take(ops.transpose(transitions), tags, axis=0) - ops.expand_dims(moves, -1)
    stays = ops.equal(
        ops.expand_dims(before, -1), ops.arange(emissions.shape[-1], dtype="int32")
    )
    arriving = ops.where(stays, 0, arriving)
    rest = _others(relative, arriving, transitions, tags, before, kind)
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
        >>> float(p[0, 1, 0])
        0.5
    """

    def total(emissions):
        return ops.sum(crf_log_partition(emissions, transitions, start, end, mask))

    return value_and_grad(total)(emissions)[1]


NOTHING = -1e30  # log 0 that is finite: differences of it are no NaN

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
    relative: Any, arriving: Any, transitions: Any, tags: Any, before: Any, kind: Any
) -> Any:
    """R (batch,), the sum over all paths but one relative to that one, with its gradient.

    Args:
        relative: (batch, length, tags), scores of the emissions less those of the path and of
            its transition. At the path nothing has left at its start, and 0 is to be added
            later.
        arriving: (batch, length, tags), scores of the transitions to the tag of the path, less
            that of the path; 0 for its own.
        transitions: (tags, tags).
        tags, before: int32 (batch, length), the path, and the tag before.
        kind: what each position is.
    """
    number = relative.shape[-1]

    def unpack(x):  # of one step, as `pack` joins them
        relative, arriving = x[:, :number], x[:, number : 2 * number]
        # Within, for JAX refuses what a function to differentiate closes over.
        numbers = ops.arange(number, dtype=x.dtype)
        own, last = (ops.equal(x[:, i : i + 1], numbers) for i in (-3, -2))
        return relative, arriving, own, last, x[:, -1:]

    def pack(relative, arriving, path):
        return _swap(ops.concatenate([relative, arriving, path], axis=-1))

    def forward(relative, arriving, transitions, path):
        def step(rho, x):
            relative, arriving, own, last, here = unpack(x)
            leaving = ops.where(last, ops.softplus(rho), rho)
            left = ops.logsumexp(ops.expand_dims(leaving, -1) + transitions, axis=1)
            back = ops.logsumexp(rho + arriving, axis=-1, keepdims=True)
            later = ops.where(own, back, left + relative)
            rho = ops.where(here == SKIPPED, rho, ops.where(here == LATER, later, relative))
            return rho, rho

        nothing = ops.full_like(relative[:, 0], NOTHING)
        return ops.scan(step, nothing, pack(relative, arriving, path))

    def backward(upstream, rhos, relative, arriving, transitions, path):
        nothing = ops.full_like(rhos[:1], NOTHING)
        previous = ops.concatenate([nothing, rhos[:-1]])
        steps = ops.concatenate([previous, pack(relative, arriving, path)], axis=-1)

        def step(carry, x):
            by_rho, _, total = carry  # (batch, tags) twice, (tags, tags)
            rho = x[:, :number]
            _, arriving, own, last, here = unpack(x[:, number:])
            leaving = ops.where(last, ops.softplus(rho), rho)
            shares = ops.softmax(ops.expand_dims(leaving, -1) + transitions, axis=1)
            pairs = ops.where(own, 0, by_rho)[:, None] * shares  # (batch, from, to)
            pairs = ops.where(here[..., None] == LATER, pairs, 0)
            back = ops.sum(ops.where(own, by_rho, 0), axis=-1, keepdims=True)
            back = ops.where(here == LATER, back * ops.softmax(rho + arriving, axis=-1), 0)
            by_leaving = ops.sum(pairs, axis=-1)
            by_leaving = ops.where(last, by_leaving * ops.sigmoid(rho), by_leaving)
            before = ops.where(here == LATER, by_leaving + back, by_rho)
            # Of the structure of the carry: TensorFlow's scan takes no other outputs.
            outputs = by_rho, back, total
            return (before, back, total + ops.sum(pairs, axis=0)), outputs

        by_rho = upstream[:, None] * ops.softmax(rhos[-1], axis=-1)
        carry = by_rho, ops.zeros_like(by_rho), ops.zeros_like(transitions)
        (_, _, by_transitions), outputs = ops.scan(step, carry, steps, reverse=True)
        by_relative, by_arriving = map(_swap, outputs[:2])
        by_relative = ops.where(path[..., -1:] > SKIPPED, by_relative, 0)
        return by_relative, by_arriving, by_transitions, ops.zeros_like(path)

    @ops.custom_gradient
    def others(relative, arriving, transitions, path):
        rho, rhos = forward(relative, arriving, transitions, path)

        def gradient(*args, upstream=None):
            if upstream is None:
                return backward(*args, rhos, relative, arriving, transitions, path)
            again = rhos  # PyTorch from here
            if (args[0] + 0).requires_grad:  # second derivatives: ρ, as a function of `args`
                _, again = forward(*args)
            return backward(upstream, again, *args)

        return ops.logsumexp(rho, axis=-1), gradient

    path = ops.cast(ops.stack([tags, before, kind], axis=-1), relative.dtype)
    return others(relative, arriving, transitions, path)


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
