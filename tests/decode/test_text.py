"""Generation speaks in text: stop strings, streams that never break a character, and settings by name."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlm_jax
from mlm_jax import sharding
from mlm_jax.config import InputError, SampleConfig
from mlm_jax.data import tokenizer as tokenizers
from mlm_jax.decode import loop, text
from mlm_jax.model import gpt2

TOKENIZER = tokenizers.byte_level()


def test_generate_gives_texts_for_a_prompt_and_lists_of_them_for_several(model, params):
    settings = {"max_tokens": 8, "seed": 3}
    one = mlm_jax.generate(model, params, TOKENIZER, "ab", num=2, **settings)
    assert len(one) == 2 and all(isinstance(t, str) for t in one)
    assert mlm_jax.generate(model, params, TOKENIZER, ["ab", "", "a longer one"], num=2, **settings)[0] == one
    decoding = loop.Decoding(model, params, [[97, 98]], SampleConfig(num=2, **settings), TOKENIZER.eot_id)
    decoding.advance(8)
    assert one == [TOKENIZER.decode(tokens) for tokens, _ in decoding.rows()]


def test_an_empty_prompt_starts_a_document(model, params):
    decoding = loop.Decoding(model, params, [[TOKENIZER.eot_id]], SampleConfig(max_tokens=5), TOKENIZER.eot_id)
    decoding.advance(5)
    assert mlm_jax.generate(model, params, TOKENIZER, max_tokens=5) == [TOKENIZER.decode(decoding.rows()[0][0])]


def test_text_ends_before_the_first_stop_string(model, params):
    (free,) = mlm_jax.generate(model, params, TOKENIZER, "ab", max_tokens=40)
    stop = free[10:12]
    ((found,),) = text.generations(model, params, TOKENIZER, ["ab"], SampleConfig(max_tokens=40, stop=("never there", stop)))
    assert found.text == free[: free.index(stop)] and found.ended_by == "stop" and len(found.tokens) < 40


@pytest.mark.parametrize("every", [1, 3, 8, 40])
def test_tokens_and_log_probabilities_end_with_the_stop_string_whenever_it_is_looked_for(model, params, every, monkeypatch):
    ((free,),) = mlm_jax.generations(model, params, TOKENIZER, ["ab"], max_tokens=40)
    stop = free.text[10:12]
    n = next(n for n in range(1, 41) if stop in TOKENIZER.decode(free.tokens[:n]))
    monkeypatch.setattr(text, "CHECK_EVERY", every)
    ((found,),) = mlm_jax.generations(model, params, TOKENIZER, ["ab"], max_tokens=40, stop=(stop,))
    np.testing.assert_array_equal(found.tokens, free.tokens[:n])
    np.testing.assert_array_equal(found.logprobs, free.logprobs[:n])
    assert found.logprob == pytest.approx(float(free.logprobs[:n].sum())) and found.ended_by == "stop"
    ((drafted,),) = mlm_jax.generations(
        model, params, TOKENIZER, ["ab"], max_tokens=40, temperature=0, stop=("t",), draft=mlm_jax.Draft(model, params)
    )
    ((greedy,),) = mlm_jax.generations(model, params, TOKENIZER, ["ab"], max_tokens=40, temperature=0, stop=("t",))
    np.testing.assert_array_equal(drafted.tokens, greedy.tokens)


def test_of_two_stop_strings_the_one_that_is_whole_first_counts():
    tokens = TOKENIZER.encode("xabcdef")
    found = text.finish(TOKENIZER, SampleConfig(max_tokens=99, stop=("abcd", "bc")), tokens, np.zeros(7, np.float32))
    assert found.text == "xa" and found.tokens.tolist() == tokens[:4].tolist()  # a stream has shown the a by then
    assert "".join(streamed("xabcdef", TOKENIZER, stop=("abcd", "bc"))) == "xa"


def test_a_generation_says_how_likely_it_was_and_why_it_ended(model, params):
    rows = text.generations(model, params, TOKENIZER, ["ab"], SampleConfig(max_tokens=30, num=20))[0]
    assert {g.ended_by for g in rows} <= {"end of text", "length"} and len({g.logprob for g in rows}) > 10
    for g in rows:
        assert len(g.logprobs) == len(g.tokens) + (g.ended_by == "end of text")
        ids = np.array([97, 98, *g.tokens, *([TOKENIZER.eot_id] if g.ended_by == "end of text" else [])], np.int32)
        full_TV = jax.nn.log_softmax(jax.jit(model.apply)({"params": params}, jnp.asarray(ids[None]))[0])
        assert g.score is None and g.logprob == pytest.approx(float(full_TV[np.arange(1, len(ids) - 1), ids[2:]].sum()), abs=1e-3)


def test_beams_and_drafts_are_reached_by_name(model, params):
    best = mlm_jax.generate(model, params, TOKENIZER, "ab", beams=3, num=2, max_tokens=8)
    assert len(best) == 2 and best[0] != best[1]
    drafted = mlm_jax.generate(model, params, TOKENIZER, "ab", draft=mlm_jax.Draft(model, params), temperature=0, max_tokens=8)
    assert drafted == mlm_jax.generate(model, params, TOKENIZER, "ab", temperature=0, max_tokens=8)


@pytest.mark.parametrize("settings", [{"num": 3}, {"beams": 3, "num": 3, "length_penalty": 0.5}, {"temperature": 0, "draft": True}])
def test_every_way_of_generating_gives_log_probabilities(model, params, settings):
    settings = settings | ({"draft": mlm_jax.Draft(model, params)} if "draft" in settings else {}) | {"max_tokens": 8}
    found = mlm_jax.generations(model, params, TOKENIZER, ["ab", "c"], **settings)
    assert [[g.text for g in row] for row in found] == mlm_jax.generate(model, params, TOKENIZER, ["ab", "c"], **settings)
    for g in itertools.chain(*found):
        assert len(g.logprobs) == len(g.tokens) + (g.ended_by == "end of text") and g.logprob == pytest.approx(float(g.logprobs.sum()))
        assert (g.score is None) if "beams" not in settings else g.score == pytest.approx(g.logprob / len(g.logprobs) ** 0.5, abs=1e-5)


def test_settings_by_name_change_those_of_a_configuration(model, params):
    config = SampleConfig(max_tokens=6, num=2)
    (row,) = mlm_jax.generations(model, params, TOKENIZER, ["ab"], config, seed=4)
    assert [g.text for g in row] == mlm_jax.generate(model, params, TOKENIZER, "ab", max_tokens=6, num=2, seed=4)


def test_what_is_no_prompt_is_refused_by_name():
    # In a process of its own: here the type checker of the tests would answer first.
    code = """
from mlm_jax import generate, generations, stream
for call, prompt in ((generate, None), (generate, 5), (generate, b'x'), (generate, ['a', None]), (generations, 'ab'), (stream, None)):
    try:
        call(None, None, None, prompt)
    except ValueError as e:
        print(e)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    values = ("None", "5", "b'x'", "['a', None]", "'ab'", "[None]")
    rest = "not a list of texts. Give a list of str; generate and stream take one str too."
    assert answer.splitlines() == [f"prompt = {value}: {rest}" for value in values]


@pytest.mark.slow
def test_a_stream_on_a_mesh_is_that_of_one_device(model, params, padded, mesh):
    model, params = padded(model, params)
    with jax.sharding.set_mesh(mesh):
        placed = jax.device_put(params, sharding.shardings(mesh, params))
        pieces = list(mlm_jax.stream(model, placed, TOKENIZER, "ab", max_tokens=20, stop=("a",)))
    assert pieces == list(mlm_jax.stream(model, params, TOKENIZER, "ab", max_tokens=20, stop=("a",))) and len(pieces) > 3


class Script(loop.Decoding):
    """Writes the given tokens, one at each step."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self._n = tokens, 1

    @property
    def ended(self) -> bool:
        return self.n >= len(self.tokens)

    def advance(self, until: int) -> None:
        self._n = until

    def rows(self) -> list:
        return [(np.array(self.tokens[: self.n]), np.zeros(self.n))]


def streamed(written: str, tokenizer: tokenizers.Tokenizer, **settings) -> list[str]:
    return list(text._stream(Script(tokenizer.encode(written).tolist()), tokenizer, SampleConfig(max_tokens=999, **settings)))


@pytest.mark.parametrize("written", ["日本語のテキスト", "👩‍👩‍👧 and 🏴‍☠️!", "naïve café — Ωμέγα", "plain", "汉字🙂"])
@pytest.mark.parametrize("tokenizer", [TOKENIZER, tokenizers.gpt2()], ids=["byte", "gpt2"])
def test_a_stream_never_shows_part_of_a_character(written, tokenizer):
    pieces = streamed(written, tokenizer)
    assert "".join(pieces) == written and "�" not in "".join(pieces)
    assert all(written.startswith("".join(pieces[:i])) for i in range(len(pieces)))
    assert len(tokenizer.encode(written)) > len(pieces) or written == "plain"  # some tokens were part of a character


def test_a_character_that_never_becomes_whole_is_shown_as_decode_shows_it():
    for ids in ([0xE6, 0x97], [0xF0, 0x9F, 0x41], [0x80, 0xFF, 0x42], [0xE6, 0x97, 0xE6, 0x97, 0xA5]):
        pieces = TOKENIZER.pieces()
        assert "".join([pieces.push(i) for i in ids]) + pieces.end() == TOKENIZER.decode(ids)


def test_a_stream_ends_before_a_stop_string_and_shows_no_part_of_it():
    for written, shown in (("one two STOP three", "one two "), ("one ST", "one ST"), ("S ST STO STOP", "S ST STO "), ("none", "none")):
        pieces = streamed(written, TOKENIZER, stop=("STOP",))
        assert "".join(pieces) == shown
        assert not any("".join(pieces[:i]).endswith("STO") and written.startswith("".join(pieces[:i]) + "P") for i in range(len(pieces)))


def test_a_stream_is_the_text_of_generate(model, params):
    for settings in ({"seed": 2}, {"temperature": 0}, {"stop": ("a", "e")}, {"max_tokens": 100, "overflow": "window"}):
        settings = {"max_tokens": 30, **settings}
        pieces = list(mlm_jax.stream(model, params, TOKENIZER, "ab", **settings))
        assert ["".join(pieces)] == mlm_jax.generate(model, params, TOKENIZER, "ab", **settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temprature": 1}, "setting = temprature: unknown. Did you mean 'temperature'"),
        ({"temperature": -1.0}, "temperature = -1.0: out of range"),
        ({"num": 2}, "num = 2: a stream is one continuation"),
        ({"beams": 2}, "beams = 2: a stream is one continuation"),
    ],
)
def test_a_wrong_setting_is_refused(model, params, settings, message):
    with pytest.raises(InputError, match=message):
        next(itertools.chain(mlm_jax.stream(model, params, TOKENIZER, "ab", **settings)))


def test_parameters_are_unstacked_once_and_let_go_with_their_owner(model, params):
    fresh = jax.tree.map(lambda x: x + 0, params)
    loop._flat.clear()
    assert loop.flat(fresh) is loop.flat(fresh)
    assert len(loop._flat) == 1
    assert isinstance(loop.flat(loop.flat(fresh)), dict) and gpt2.n_params(loop.flat(fresh)) == gpt2.n_params(fresh)
    del fresh
    assert not loop._flat
