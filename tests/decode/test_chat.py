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
    with pytest.raises(InputError, match=r"turn = 109 tokens: with max_tokens = 8 more than the context of 64\. Say less"):
        list(talk.answer("x" * 103))
    assert talk.turns == before


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
