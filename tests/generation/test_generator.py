"""Generated texts against searches over whole texts, written for the test."""

import itertools

import keras
import numpy as np
import pytest
from compiled import compiled
from families import SIZES, random_model
from generation.mixtures import conditional, mixed
from keras import ops

from keras_ext.generation import Generator, sample_tokens
from keras_ext.generation.generator import Search

LONG = {**SIZES, "max_position_embeddings": 24, "num_hidden_layers": 2}
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6]]
KINDS = {"gpt2": "lm", "roformer": "unilm", "t5": "seq2seq"}


def small(family, seed=0):
    return random_model(family, seed, LONG, with_mlm=True, application=KINDS[family])


class Reference:
    """Log-probabilities of the next token, by the model on the whole text."""

    def __init__(self, model, condition=None):
        self.model, self.known, self.condition = model, {}, condition
        self.names = [x.name for x in model.inputs]
        self.has_prefix = int("prefix_mask" in [layer.name for layer in model.layers])
        self.run = compiled(lambda *inputs: model(list(inputs)))

    def __call__(self, prompt, tokens):
        key = (*prompt, -1, *tokens)
        if key not in self.known:
            self.known[key] = self.compute([*prompt], [*tokens])
        return self.known[key]

    def compute(self, prompt, tokens):
        encodes = "decoder_token_ids" in self.names
        given = [0, *tokens] if encodes else prompt + tokens
        known = {
            "token_ids": prompt if encodes else given,
            "segment_ids": [0] * len(prompt) + [self.has_prefix] * len(tokens),
            "decoder_token_ids": given,
        }
        # Padding behind changes nothing, and spares programs.
        inputs = [np.zeros((1, 24), "int32") for name in self.names if name != "condition"]
        for row, name in zip(inputs, self.names, strict=False):
            row[0, : len(known[name])] = known[name]
        if self.condition is not None:
            inputs.append(self.condition[None])
        outputs = self.run(*inputs)
        logits = ops.convert_to_numpy(next(x for x in outputs if x.shape[-1] == 11))
        logits = logits[0, len(given) - 1].astype("float64")
        if "gpt2" not in self.model.name:
            logits[0] = -np.inf  # padding
        logits -= logits.max()
        return logits - np.log(np.exp(logits).sum())


def greedy(reference, prompt, number, end, least=0):
    tokens = []
    for i in range(number):
        logs = reference(prompt, tokens).copy()
        if i < least:
            logs[end] = -np.inf
        token = int(logs.argmax())
        if token == end:
            break
        tokens.append(token)
    return tokens


def beams(reference, prompt, number, end, width, alpha):
    """The best `width` of (score, tokens, ended) at each length."""
    best = [(0.0, [], False)]
    for _ in range(number):
        candidates = []
        for score, tokens, ended in best:
            if ended:
                candidates.append((score, tokens, True))
                continue
            for token, log in enumerate(reference(prompt, tokens)):
                if np.isfinite(log):
                    candidates.append((score + log, [*tokens, token], token == end))
        best = sorted(candidates, key=lambda c: -c[0] / len(c[1]) ** alpha)[:width]
    tokens = best[0][1]
    return tokens[:-1] if best[0][2] else tokens


@pytest.mark.parametrize("family", KINDS)
def test_greedy(family):
    model = small(family)
    reference = Reference(model)
    generator = Generator(model, end_token=7)
    for number, least in ((6, 0), (1, 0), (6, 4)):
        found = generator.generate(PROMPTS, number, min_new_tokens=least)
        assert found == [greedy(reference, p, number, 7, least) for p in PROMPTS]
    streamed = list(generator.stream(PROMPTS, 6))
    texts = [[t for t in column if t is not None] for column in zip(*streamed, strict=True)]
    assert texts == generator.generate(PROMPTS, 6)


@pytest.mark.parametrize(
    ("family", "width", "alpha"), [("gpt2", 4, 1.0), ("roformer", 3, 0.0), ("t5", 3, 0.5)]
)
def test_beams(family, width, alpha):
    model = small(family, seed=3)
    reference = Reference(model)
    generator = Generator(model, end_token=7)
    found = generator.generate(PROMPTS, 5, num_beams=width, length_penalty=alpha)
    assert found == [beams(reference, p, 5, 7, width, alpha) for p in PROMPTS]


def drawn(reference, prompt, uniforms, options):
    tokens = []
    for uniform in uniforms:
        logs = reference(prompt, tokens)[None].astype("float32")
        tokens.append(int(sample_tokens(logs, np.array([uniform]), **options)[0]))
    return tokens


@pytest.mark.parametrize("name", ["linear, softmax, window", "own, own, softmax"])
def test_any_attention(name):
    """The window of 3 lies within the first prompt, and reaches before the others."""
    model = mixed(name, seed=1)
    reference = Reference(model)
    generator = Generator(model, end_token=7, seed=5)
    texts = generator.generate(PROMPTS, 6)
    assert texts == [greedy(reference, p, 6, 7) for p in PROMPTS]
    streamed = zip(*generator.stream(PROMPTS, 6), strict=True)
    assert [[t for t in column if t is not None] for column in streamed] == texts
    found = generator.generate(PROMPTS, 5, num_beams=3)
    assert found == [beams(reference, p, 5, 7, 3, 1.0) for p in PROMPTS]
    options = {"temperature": 2.0, "top_k": 9}
    found = Generator(model, seed=5).generate(PROMPTS, 5, **options)
    uniforms = keras.random.uniform((3, 32), seed=keras.random.SeedGenerator(5))
    uniforms = ops.convert_to_numpy(uniforms)[:, :5]
    rows = zip(PROMPTS, uniforms, strict=True)
    assert found == [drawn(reference, prompt, row, options) for prompt, row in rows]


@pytest.mark.parametrize("name", ["linear, softmax, window", "own, own, softmax"])
def test_states_follow_their_beams(name):
    """They are those of a cached model that reads prompts and found texts at once."""
    generator = Generator(mixed(name, seed=1))
    cached, search = generator.cached, Search(num_beams=4)
    state, _ = generator._start(PROMPTS, 6, search, None)
    state = generator._compiled(search)[1](state, ops.convert_to_tensor(6, "int32"))
    tokens, valid = state["moving"]["tokens"], state["fixed"]["valid"]
    prompts = np.zeros((3, 32), "int32")
    for row, prompt in zip(prompts, PROMPTS, strict=True):
        row[-len(prompt) :] = prompt
    texts = np.concatenate([np.repeat(prompts, 4, 0), ops.convert_to_numpy(tokens)[:, :5]], 1)
    step = compiled(lambda texts: cached.step(texts, valid, cached.initial_states(12, 64))[1])
    for found, made in zip(
        *map(keras.tree.flatten, (state["moving"]["states"], step(texts))), strict=True
    ):
        np.testing.assert_allclose(*map(ops.convert_to_numpy, (found, made)), atol=1e-5)


CONDITIONS = 3 * np.random.default_rng(5).normal(size=(3, 3))
CONDITIONAL = [("bert", ()), ("t5", ("encoder",)), ("t5", ("encoder", "decoder"))]


@pytest.mark.parametrize(("family", "sides"), CONDITIONAL)
def test_conditions(family, sides):
    model, conditions = conditional(family, sides=sides), CONDITIONS
    references = [Reference(model, row.astype("float32")) for row in conditions]
    generator, prompts = Generator(model, end_token=7), [PROMPTS[0]] * 3
    found = generator.generate(prompts, 6, condition=conditions)
    assert found == [greedy(r, PROMPTS[0], 6, 7) for r in references]
    assert len({*map(tuple, found)}) == 3
    streamed = zip(*generator.stream(prompts, 6, condition=conditions), strict=True)
    assert [[t for t in column if t is not None] for column in streamed] == found


@pytest.mark.parametrize(("family", "sides"), CONDITIONAL)
def test_conditions_of_beams(family, sides):
    model = conditional(family, sides=sides)
    references = [Reference(model, row.astype("float32")) for row in CONDITIONS]
    generator = Generator(model, end_token=7)
    found = generator.generate(PROMPTS, 4, num_beams=3, condition=CONDITIONS)
    pairs = zip(references, PROMPTS, strict=True)
    assert found == [beams(r, prompt, 4, 7, 3, 1.0) for r, prompt in pairs]


def test_conditions_that_do_not_fit():
    generator = Generator(conditional("bert"))
    with pytest.raises(ValueError, match=r"condition must be an array \(3, 3\), .* got None"):
        generator.generate(PROMPTS, 4)
    with pytest.raises(ValueError, match=r"a row for each text, as bert .* got \(1, 3\)"):
        next(generator.stream(PROMPTS, 4, condition=np.zeros((1, 3))))
    with pytest.raises(ValueError, match="condition must be None, as gpt2 has no input"):
        Generator(small("gpt2")).generate(PROMPTS, 4, condition=np.zeros((3, 3)))


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="PyTorch compiles nothing")
def test_other_values_need_no_other_program(monkeypatch):
    generator, traced = Generator(conditional("gpt2")), []
    step = generator.cached.step
    monkeypatch.setattr(
        generator.cached, "step", lambda *args, **kw: traced.append(0) or step(*args, **kw)
    )
    generator.generate(PROMPTS, 5, condition=np.zeros((3, 3)))
    number = len(traced)
    generator.generate([[2] * 9, [1], [4]], 7, condition=np.ones((3, 3), "float32"))
    assert len(traced) == number


def test_enough_beams_find_the_best_text():
    """All texts of two tokens, of eleven each."""
    model = small("gpt2", seed=5)
    reference = Reference(model)
    found = Generator(model).generate([[3, 1]], 2, num_beams=11)[0]

    def score(tokens):
        return sum(reference([3, 1], tokens[:i])[tokens[i]] for i in range(2))

    best = max(itertools.product(range(11), repeat=2), key=score)
    assert found == list(best)


def test_sampling_follows_the_model():
    model = small("gpt2")
    p = np.exp(Reference(model)([3, 1, 4], []))
    generator = Generator(model, seed=0)
    drawn = generator.generate([[3, 1, 4]] * 3000, 1, temperature=1.0)
    counts = np.bincount([tokens[0] for tokens in drawn], minlength=11)
    assert (np.abs(counts / 3000 - p) < 4 * np.sqrt(p / 3000)).all()
    second = generator.generate([[3, 1, 4]] * 3000, 1, temperature=1.0)
    assert second != drawn
    again = Generator(model, seed=0).generate([[3, 1, 4]] * 3000, 1, temperature=1.0)
    assert again == drawn


def test_training_between_is_seen():
    """Programs are compiled once, weights are read anew."""
    model = small("gpt2")
    generator = Generator(model)
    before = generator.generate(PROMPTS, 6)
    table = model.get_layer("token_embedding").embeddings
    table.assign(ops.convert_to_numpy(table)[::-1].copy())
    after = generator.generate(PROMPTS, 6)
    assert after != before
    assert after == [greedy(Reference(model), p, 6, None) for p in PROMPTS]


def test_programs_are_few():
    model = small("roformer")
    generator = Generator(model, end_token=[7, 8])
    for length in (1, 5, 17):
        generator.generate([[3] * length, [4]], 5)
    assert len(generator._programs) == 1
    # A batch alone gives what it gives among others, whatever the padding.
    together = generator.generate([[3] * 17, [4, 5]], 6)
    assert together[1] == generator.generate([[4, 5]], 6)[0]


def test_several_ends():
    model = small("gpt2")
    reference = Reference(model)
    texts = [greedy(reference, prompt, 8, None) for prompt in PROMPTS]
    ends = sorted({texts[0][-1], texts[1][0]})
    generator = Generator(model, end_token=ends)
    cut = [[*itertools.takewhile(lambda token: token not in ends, text)] for text in texts]
    assert cut[1] == []
    assert generator.generate(PROMPTS, 8) == cut
    assert list(generator.stream([PROMPTS[1]], 8)) == []


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's choice")
def test_without_xla():
    model = mixed("linear, softmax, window")
    plain, fast = Generator(model, jit_compile=False), Generator(model, jit_compile=True)
    texts = [generator.generate(PROMPTS, 5, num_beams=2) for generator in (plain, fast)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts must be texts of at least one token, got"),
        ({"prompts": [[1], []]}, "prompts must be texts of at least one token"),
        ({"prompts": [[1, 11]]}, "Tokens of prompts must be from 0 to 10, got 11"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        (
            {"max_new_tokens": 22},
            "max_new_tokens must be at most 21 after a prompt of 3 tokens",
        ),
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"min_new_tokens": -1}, "min_new_tokens must be at least 0, got -1"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"num_beams": 2, "top_k": 5}, "Beams are not sampled"),
    ],
)
def test_wrong_arguments(arguments, message):
    generator = Generator(small("gpt2"))
    with pytest.raises(ValueError, match=message):
        generator.generate(**{"prompts": [[1, 2, 3]], "max_new_tokens": 4, **arguments})


def test_wrong_tokens_of_the_generator():
    with pytest.raises(ValueError, match="end_token must be from 0 to 10, got 11"):
        Generator(small("gpt2"), end_token=11)
    with pytest.raises(ValueError, match="start_token must be from 0 to 10, got -1"):
        Generator(small("t5"), start_token=-1)
    with pytest.raises(ValueError, match="jit_compile must be True, False or 'auto', got '1'"):
        Generator(small("gpt2"), jit_compile="1")
    padding = Generator(small("roformer"))
    with pytest.raises(ValueError, match="from 0 to 10 and not 0, the padding, got 0"):
        padding.generate([[0, 3]], 4)
