"""Generate text: greedily, by beam search, or by sampling.

    greedy      the likeliest token at each step
    beam        the b best texts by Σ log p / n^α are kept; those that ended compete on
    sampling    see `sampling.py`

Everything runs as two programs of static shapes: one reads the prompts, the other adds tokens
in a loop until all texts have ended. They are compiled once for each batch size, length of the
prompts (rounded up) and search.

Source: beam search with length normalisation: Wu et al. 2016, arXiv 1609.08144, with n^α for
their penalty.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ext import backend
from keras_ext.generation.cached_model import CachedModel
from keras_ext.generation.sampling import sample_tokens
from keras_ext.numerics import LOG_ZERO

MULTIPLE = 32  # of prompt lengths and caches, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Search:
    """How the next tokens are chosen; see `Generator.generate`."""

    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_beams", 1), ("min_new_tokens", 0), ("top_k", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.samples and self.num_beams > 1:
            raise ValueError(
                "Beams are not sampled: give num_beams, or temperature, top_k, top_p."
            )

    @property
    def samples(self) -> bool:
        return any(x is not None for x in (self.temperature, self.top_k, self.top_p))


class Generator:
    """Continue prompts by a language model or UniLM, or answer them by encoder and decoder.

    Args:
        model: as of `CachedModel`.
        end_token: id that ends a text, or several. Default: none, texts have the full length.
        start_token: the first token of a decoder. Default: 0, as of T5.
        seed: of the draws. Default: at random.
        jit_compile: compile by XLA on TensorFlow (JAX always does, PyTorch never): True, False
            or "auto", which is True, as XLA keeps the caches in place. Default: "auto".

    Raises:
        ValueError: as of `CachedModel`.

    Example:
        >>> sizes = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4}
        >>> gpt2 = build_transformer_model(sizes, model="gpt2", with_mlm=True)
        >>> generator = Generator(gpt2, end_token=99)
        >>> texts = generator.generate([[5, 3, 8], [7]], max_new_tokens=10, top_p=0.9)
    """

    def __init__(
        self,
        model: keras.Model,
        end_token: int | Sequence[int] | None = None,
        start_token: int = 0,
        seed: int | None = None,
        jit_compile: bool | str = "auto",
    ) -> None:
        if jit_compile not in (True, False, "auto"):
            raise ValueError(f"jit_compile must be True, False or 'auto', got {jit_compile!r}.")
        self.cached = CachedModel(model)
        ends = [] if end_token is None else np.atleast_1d(end_token).tolist()
        for name, tokens in (("end_token", ends), ("start_token", [start_token])):
            for token in tokens:
                if token not in range(self.cached.vocab_size):
                    raise ValueError(
                        f"{name} must be from 0 to {self.cached.vocab_size - 1}, got {token}."
                    )
        self.ends = ends
        self.start_token = start_token
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.jit_compile = jit_compile is not False
        self._programs: dict[Search, tuple[Any, ...]] = {}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        min_new_tokens: int = 0,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        condition: Any = None,
    ) -> list[list[int]]:
        """Texts for a batch of prompts.

        Args:
            prompts: the tokens of each; of a sequence-to-sequence model those of the source.
            max_new_tokens: when to stop where no end comes.
            min_new_tokens: tokens before an end may come. Default: 0.
            num_beams: texts that beam search keeps. Default: 1, greedy.
            length_penalty: α of beam search; 0 sums the logarithms. Default: 1, their mean.
            temperature, top_k, top_p: of `sample_tokens`; with any of them tokens are drawn.
            condition: array (batch, features), a row for each prompt, of a model with such an
                input (`condition_norms`). Default: None, it has none.

        Returns: the new tokens of each, without the end.

        Raises:
            ValueError: a prompt is empty or too long for the model, an argument is out of
                range, or the condition is not what the model takes.
        """
        search = Search(min_new_tokens, num_beams, length_penalty, temperature, top_k, top_p)
        state, number = self._start(prompts, max_new_tokens, search, condition)
        state = self._compiled(search)[1](state, _integer(number))
        rows = ops.convert_to_numpy(state["moving"]["tokens"])[
            ::num_beams
        ]  # the best come first
        return [self._cut(row[:number].tolist()) for row in rows]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        min_new_tokens: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        condition: Any = None,
    ) -> Iterator[list[int | None]]:
        """The tokens of `generate` as they come: for each text the next, None after its end."""
        search = Search(min_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
        state, number = self._start(prompts, max_new_tokens, search, condition)
        over = [False] * len(prompts)
        for i in range(number):
            if i:
                state = self._compiled(search)[1](state, _integer(i + 1))
            tokens = ops.convert_to_numpy(state["moving"]["tokens"])[:, i].tolist()
            over = [o or t in self.ends for o, t in zip(over, tokens, strict=True)]
            if all(over):
                return
            yield [None if o else t for o, t in zip(over, tokens, strict=True)]

    def _cut(self, tokens: list[int]) -> list[int]:
        ends = [i for i, token in enumerate(tokens) if token in self.ends]
        return tokens[: ends[0]] if ends else tokens

    # ---------------------------------------------------------------- the two programs

    def _start(
        self, prompts: Sequence[Sequence[int]], number: int, search: Search, condition: Any
    ) -> tuple[dict[str, Any], int]:
        """The state after the first token, and how many tokens there are to be."""
        self._check(prompts, number)
        condition = self.cached.as_condition(condition, len(prompts))
        cached, longest = self.cached, max(map(len, prompts))
        length = -(-longest // MULTIPLE) * MULTIPLE
        texts = np.zeros((len(prompts), length), "int32")
        valid = np.zeros_like(texts, "bool")
        for row, prompt in enumerate(prompts):
            # Of a source the padding is behind, of a text to continue before.
            places = slice(0, len(prompt)) if cached.has_memory else slice(-len(prompt), None)
            texts[row, places], valid[row, places] = prompt, True
        inputs = {"texts": texts, "valid": valid}
        new = -(-number // MULTIPLE) * MULTIPLE
        inputs["tokens"] = np.zeros((len(prompts), new), "int32")
        if condition is not None:
            inputs["condition"] = condition
        if search.samples:
            inputs["uniforms"] = keras.random.uniform(
                inputs["tokens"].shape, seed=self.seed_generator
            )
        read, _ = self._compiled(search)
        return read(keras.tree.map_structure(ops.convert_to_tensor, inputs)), number

    def _check(self, prompts: Sequence[Sequence[int]], number: int) -> None:
        if not len(prompts) or not all(map(len, prompts)):
            raise ValueError(f"prompts must be texts of at least one token, got {prompts!r}.")
        if number < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {number}.")
        size = self.cached.vocab_size
        padding = self.cached.padding_id
        for prompt in prompts:
            for token in prompt:
                if not 0 <= token < size or token == padding:
                    but = "" if padding is None else f" and not {padding}, the padding"
                    raise ValueError(
                        f"Tokens of prompts must be from 0 to {size - 1}{but}, got {token}."
                    )
        most = self.cached.max_length
        longest = 0 if self.cached.has_memory else max(map(len, prompts))
        if most is not None and longest + number > most:
            raise ValueError(
                f"max_new_tokens must be at most {most - longest} after a prompt of {longest} "
                f"tokens, as the model has {most} positions, got {number}."
            )

    def _compiled(self, search: Search) -> tuple[Any, ...]:
        if search not in self._programs:
            variables = self.cached.model.variables
            self._programs[search] = tuple(
                backend.compile(
                    lambda *args, fn=fn: fn(search, *args), variables, self.jit_compile
                )
                for fn in (self._read, self._add)
            )
        return self._programs[search]

    def _read(self, search: Search, inputs: dict[str, Any]) -> dict[str, Any]:
        """Read the prompts and choose the first token.

        Returns: `moving`, what changes with each token, and `fixed`, what does not.
        """
        cached, tokens = self.cached, inputs["tokens"]
        texts, valid = inputs["texts"], inputs["valid"]
        rows, new = tokens.shape
        fixed = {name: inputs[name] for name in inputs if name == "condition"}
        if cached.has_memory:
            fixed |= {"memories": cached.encode(texts, **fixed), "memory_mask": valid}
            texts = ops.full((rows, 1), self.start_token, "int32")
            valid = ops.ones((rows, 1), "bool")
        fixed["valid"] = ops.concatenate([valid, ops.ones((rows, new), "bool")], axis=1)
        states = cached.initial_states(rows, fixed["valid"].shape[1])
        logits, states = cached.step(texts, states=states, **fixed)
        moving = {
            "states": states,
            "tokens": tokens,
            "count": _integer(0),
            "ended": ops.zeros((rows,), "bool"),
        }
        if search.samples:
            fixed["uniforms"] = inputs["uniforms"]
        if search.num_beams > 1:
            logits, moving, fixed = (
                keras.tree.map_structure(
                    lambda x: ops.repeat(x, search.num_beams, axis=0) if len(x.shape) else x, x
                )
                for x in (logits, moving, fixed)
            )
            # At first the beams of a text are the same one.
            first = [0.0] + [LOG_ZERO] * (search.num_beams - 1)
            moving["scores"] = ops.convert_to_tensor(first * rows, "float32")
            moving["lengths"] = ops.zeros((rows * search.num_beams,), "int32")
        return {"moving": self._choose(search, logits, moving, fixed), "fixed": fixed}

    def _add(self, search: Search, state: dict[str, Any], until: Any) -> dict[str, Any]:
        """Add tokens until there are so many, or all texts have ended."""
        fixed = state["fixed"]
        known = {name: value for name, value in fixed.items() if name != "uniforms"}

        def goes_on(moving: dict[str, Any]) -> Any:
            unfinished = ops.any(ops.logical_not(moving["ended"]))
            return ops.logical_and(moving["count"] < until, unfinished)

        def add(moving: dict[str, Any]) -> tuple[dict[str, Any]]:
            last = ops.take(moving["tokens"], moving["count"] - 1, axis=1)[:, None]
            segment_ids = ops.ones_like(last) if self.cached.has_prefix else None
            logits, states = self.cached.step(
                last, states=moving["states"], segment_ids=segment_ids, **known
            )
            return (self._choose(search, logits, {**moving, "states": states}, fixed),)

        (moving,) = ops.while_loop(goes_on, add, (state["moving"],))
        return {"moving": moving, "fixed": fixed}

    # ---------------------------------------------------------------- the choice

    def _choose(
        self, search: Search, logits: Any, moving: dict[str, Any], fixed: dict[str, Any]
    ) -> dict[str, Any]:
        """What changes with the next token, after these logits."""
        count, ended = moving["count"], moving["ended"]
        never = np.zeros(self.cached.vocab_size, "bool")
        if self.cached.padding_id is not None:
            never[self.cached.padding_id] = True
        early = never.copy()
        early[self.ends] = True
        banned = ops.where(count < search.min_new_tokens, early, never)
        logits = ops.where(banned, LOG_ZERO, logits)
        if search.num_beams > 1:
            moving, tokens = self._extend_beams(search, logits, moving)
            ended = moving["ended"]
        elif search.samples:
            uniforms = ops.take(fixed["uniforms"], count, axis=1)
            tokens = sample_tokens(
                logits,
                uniforms,
                1.0 if search.temperature is None else search.temperature,
                search.top_k,
                search.top_p,
            )
        else:
            tokens = ops.cast(ops.argmax(logits, axis=-1), "int32")
        tokens = ops.where(ended, 0, tokens)
        for end in self.ends:
            ended = ops.logical_or(ended, tokens == end)
        placed = ops.slice_update(moving["tokens"], (0, count), tokens[:, None])
        return {**moving, "tokens": placed, "count": count + 1, "ended": ended}

    def _extend_beams(
        self, search: Search, logits: Any, moving: dict[str, Any]
    ) -> tuple[dict[str, Any], Any]:
        """The best texts among all one token longer and those that ended, and their tokens."""
        rows, size = logits.shape
        beams, ended = search.num_beams, moving["ended"]
        # An ended text goes on with one token only, at no cost.
        stay = np.full(size, LOG_ZERO, "float32")
        stay[0] = 0.0
        logs = ops.where(ended[:, None], stay, ops.cast(ops.log_softmax(logits), "float32"))
        scores = moving["scores"][:, None] + logs  # (batch * beams, vocabulary)
        lengths = moving["lengths"] + ops.cast(ops.logical_not(ended), "int32")
        ranks = scores / ops.cast(lengths, "float32")[:, None] ** search.length_penalty
        _, best = ops.top_k(ops.reshape(ranks, (rows // beams, beams * size)), beams)
        best = ops.cast(best, "int32")
        first = ops.arange(0, rows, beams, dtype="int32")[:, None]
        parents = ops.reshape(first + best // size, (rows,))
        tokens = ops.reshape(best % size, (rows,))
        moving = keras.tree.map_structure(
            lambda x: ops.take(x, parents, axis=0) if len(x.shape) else x,
            {**moving, "lengths": lengths},
        )
        flat = ops.reshape(scores, (rows * size,))
        return {**moving, "scores": ops.take(flat, parents * size + tokens)}, tokens


def _integer(number: int) -> Any:
    return ops.convert_to_tensor(number, "int32")
