"""A conversation keeps its history, fits its context, and loses nothing to a mistake."""

import io

import pytest

from mlm_jax.config import InputError, override
from mlm_jax.data import tokenizer as tokenizers
from mlm_jax.decode import chat, text

TOKENIZER = tokenizers.byte_level()


@pytest.fixture
def talk(model, params):
    return chat.Conversation(model, params, TOKENIZER, chat.ChatConfig(max_tokens=8, user="U", assistant="A"))


def scripted(conversation: chat.Conversation, *lines: str | type[BaseException]) -> str:
    script, out = iter(lines), io.StringIO()

    def read(prompt: str) -> str:
        line = next(script, EOFError)
        if isinstance(line, str):
            return line
        raise line

    chat.chat(conversation, read=read, out=out)
    return out.getvalue()


def test_the_model_reads_the_turns_so_far(talk, monkeypatch):
    seen = []

    def stream(model, params, tokenizer, prompt, **settings):
        seen.append((prompt, settings["stop"], settings["seed"]))
        yield from (" ", "yes", " indeed\n")

    monkeypatch.setattr(text, "stream", stream)
    talk.config = override(talk.config, {"prompt": "A talk.", "seed": 5})
    assert "".join(talk.answer("one")) == "yes indeed\n"
    list(talk.answer("two"))
    assert seen == [
        ("A talk.\nU: one\nA:", ("\nU:",), 5),
        ("A talk.\nU: one\nA: yes indeed\nU: two\nA:", ("\nU:",), 6),
    ]
    assert talk.turns == [("one", "yes indeed"), ("two", "yes indeed")]


def test_the_oldest_turns_leave_when_the_context_is_full(talk, monkeypatch):
    prompts = []
    monkeypatch.setattr(text, "stream", lambda model, params, tokenizer, prompt, **settings: prompts.append(prompt) or iter(["12345"]))
    for i in range(8):
        list(talk.answer(f"turn {i}"))
    assert all(len(TOKENIZER.encode(prompt)) + 8 <= 64 for prompt in prompts)
    assert "turn 0" in prompts[1] and "turn 0" not in prompts[-1] and "turn 6" in prompts[-1]
    assert len(talk.turns) == 8


def test_what_is_too_long_is_refused_and_the_conversation_stays(talk):
    list(talk.answer("hello"))
    before = list(talk.turns)
    with pytest.raises(InputError, match=r"turn = 109 tokens: with max_tokens = 8 more than the context of 64\. Say less\."):
        list(talk.answer("x" * 103))
    with pytest.raises(InputError, match=r"turn = 60 tokens: with max_tokens = 8 more than the context of 64\. /set max_tokens 4, or say less\."):
        list(talk.answer("x" * 54))
    scripted(talk, "/set max_tokens 4", "x" * 54)
    assert talk.turns[:-1] == before and talk.turns[-1][0] == "x" * 54


@pytest.mark.parametrize("context_len, most", [(1, 1), (64, 32), (128, 64), (400, 200), (1024, 200)])
def test_an_answer_is_half_the_context_at_most_where_its_length_is_not_given(context_len, most):
    assert chat.ChatConfig.fitting(context_len, seed=3) == chat.ChatConfig(max_tokens=most, seed=3)
    assert chat.ChatConfig.fitting(context_len, max_tokens=150).max_tokens == 150
    assert (chat.ChatConfig().max_tokens, chat.ChatConfig().temperature) == (200, 0.8)


def test_a_turn_that_cannot_be_answered_anew_keeps_its_answer(talk, monkeypatch):
    scripted(talk, "hello")
    before = list(talk.turns)
    assert "turn = " in scripted(talk, "/set max_tokens 60", "/retry") and talk.turns == before
    assert "no such" not in scripted(talk, "/undo") and talk.turns == []
    talk.turns = list(before)

    def stopped(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(text, "stream", stopped)
    scripted(talk, "/set max_tokens 4", "/retry")
    assert talk.turns == before


def test_a_single_value_serves_where_several_may_stand(talk):
    for value, stop in (("X", ("X",)), ("5", ("5",)), (r'"\n\n"', ("\n\n",)), ("('a', 'b')", ("a", "b")), ("['a']", ("a",)), ("()", ())):
        scripted(talk, f"/set stop {value}")
        assert talk.config.stop == stop
    scripted(talk, "/set banned 7")
    assert talk.config.banned == (7,)
    assert "banned = 'x': expected int, got str" in scripted(talk, "/set banned x") and talk.config.banned == (7,)


def test_the_largest_seed_serves_many_turns(talk):
    scripted(talk, "/set max_tokens 2", f"/set seed {2**32 - 1}", "one", "two")
    assert len(talk.turns) == 2


def test_commands_change_settings_and_history(talk):
    out = scripted(talk, "/help", "hello", "/set temperature 0", "/settings", "/history", "/retry", "/undo", "/undo", "/clear", "/quit", "never read")
    assert chat.HELP in out and "temperature = 0.0\n" in out and "U: hello\nA: " in out
    assert "/undo: nothing was said yet" in out
    assert talk.turns == [] and talk.config.temperature == 0


def test_a_new_answer_is_drawn_anew_and_undo_takes_one_turn_back(talk):
    scripted(talk, "hello", "again")
    (_, (said, first)) = talk.turns
    scripted(talk, "/retry")
    assert talk.turns[1][0] == said and talk.turns[1][1] != first
    scripted(talk, "/undo")
    assert [said for said, _ in talk.turns] == ["hello"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("/set", "/set: takes a name and a value"),
        ("/set temprature 1", "no field 'temprature'. Did you mean 'temperature'?"),
        ("/set temperature hot", "temperature = 'hot': expected float"),
        ("/set top_p 2", "top_p = 2.0: not a probability"),
        ("/set num 3", "num = 3: a turn has one answer"),
        ("/set beams 3", "beams = 3: a turn has one answer"),
        ("/set length_penalty 2", "length_penalty = 2.0: only beam search has a use for it"),
        ("/fly", "command = /fly: unknown. /help lists the commands"),
    ],
)
def test_a_mistake_is_a_line_and_changes_nothing(talk, line, message):
    before = talk.config
    out = scripted(talk, line)
    assert message in out and out.count("\n") == 3  # greeting, mistake, end
    assert talk.config == before


def test_ctrl_c_stops_the_answer_and_keeps_what_was_written(talk, monkeypatch):
    def stream(*args, **settings):
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(text, "stream", stream)
    assert "half\n" in scripted(talk, KeyboardInterrupt, "hello")
    assert talk.turns == [("hello", "half")]
