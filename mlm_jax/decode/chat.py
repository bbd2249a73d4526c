"""A conversation with a model in a terminal: it is plain text that the model continues, a line for each turn."""

import dataclasses
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

from mlm_jax.config import SEEDS, ChatConfig, InputError, SampleConfig, override, parse_literal
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.decode import text
from mlm_jax.model import gpt2

UNUSED = ("num", "beams", "length_penalty", "early_stopping")  # an answer is one, and is no beam search
HELP = """/set NAME VALUE   change a setting, for example /set temperature 0.7, or /set stop ('one', 'two')
/settings         show the settings
/history          show the conversation
/undo             take the last turn and its answer back
/retry            answer the last turn anew
/clear            forget the conversation
/quit             leave (so does Ctrl-D); Ctrl-C stops an answer
"""


class Conversation:
    """The turns so far, and the model that answers."""

    def __init__(self, model: gpt2.Model, params: Any, tokenizer: Tokenizer, config: ChatConfig) -> None:
        self.model, self.params, self.tokenizer, self.config = model, params, tokenizer, config
        self.turns: list[tuple[str, str]] = []  # (what was said, the answer)
        self._answers = 0

    def change(self, name: str, value: str) -> None:
        """Sets one setting, given as text; a single value serves where several may stand.

        Raises:
          InputError: no such setting, or not a value for it.
        """
        given, kind = parse_literal(ChatConfig, name, value), typing.get_type_hints(ChatConfig).get(name)
        if typing.get_origin(kind) is tuple and not isinstance(given, tuple | list):
            given = (value if typing.get_args(kind)[0] is str and not isinstance(given, str) else given,)
        self.config = override(self.config, {name: given})

    def answer(self, said: str) -> Iterator[str]:
        """The answer to what is said, piece by piece; the turn is remembered with as much as was written.

        The oldest turns are left out of what the model sees where its context would not hold them. Each answer draws anew.

        Raises:
          InputError: what is said does not fit into the context with `max_tokens` for the answer; the conversation is as before.
        """
        c = self.config
        room = self.model.config.context_len - c.max_tokens
        first, prompt = 0, self.written(self.turns, said)
        while len(self.tokenizer.encode(prompt)) > room:
            if first == len(self.turns):
                n, limit = len(self.tokenizer.encode(prompt)), self.model.config.context_len
                remedy = f"/set max_tokens {limit - n}, or say less" if n < limit else "Say less"
                raise InputError("turn", f"{n} tokens", f"with max_tokens = {c.max_tokens} more than the context of {limit}", remedy)
            first += 1
            prompt = self.written(self.turns[first:], said)
        names = {field.name for field in dataclasses.fields(SampleConfig)} - {"prompt"}
        settings = {name: getattr(c, name) for name in names}
        settings |= {"seed": (c.seed + self._answers) % SEEDS, "stop": (*c.stop, f"\n{c.user}:")}
        pieces = text.stream(self.model, self.params, self.tokenizer, prompt, **settings)
        self._answers += 1
        written = ""
        try:
            for piece in pieces:
                piece = piece if written else piece.lstrip()
                written += piece
                yield piece
        finally:
            self.turns.append((said, written.strip()))

    def written(self, turns: list[tuple[str, str]], said: str | None = None) -> str:
        """The conversation as the model reads it, up to where the answer to `said` begins."""
        c = self.config
        lines = [c.prompt] if c.prompt else []
        for question, answer in turns:
            lines += [f"{c.user}: {question}", f"{c.assistant}: {answer}"]
        lines += [f"{c.user}: {said}", f"{c.assistant}:"] if said is not None else []
        return "\n".join(lines)


def chat(conversation: Conversation, *, read: Callable[[str], str] = input, out: Any = None) -> None:
    """Talks until the input ends or says /quit. What goes wrong is said in a line, and nothing of the conversation is lost."""
    out = out or sys.stdout
    out.write("Say something, or /help.\n")
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            out.write("\n")
            return
        except KeyboardInterrupt:
            out.write("\n")
            continue
        if line == "/quit":
            return
        try:
            obey(conversation, line, out) if line.startswith("/") else speak(conversation, line, out)
        except InputError as e:
            out.write(f"{e}\n")


def speak(conversation: Conversation, line: str, out: Any) -> None:
    """Answers one line; Ctrl-C ends the answer where it is."""
    if not line:
        return
    try:
        for piece in conversation.answer(line):
            out.write(piece)
            out.flush()
    except KeyboardInterrupt:
        pass
    out.write("\n")


def obey(conversation: Conversation, line: str, out: Any) -> None:
    """Does what a line that begins with / asks for.

    Raises:
      InputError: no such command, or nothing to do it with.
    """
    command, _, rest = line.partition(" ")
    if command == "/help":
        out.write(HELP)
    elif command == "/set":
        name, _, value = rest.strip().partition(" ")
        if not name or not value:
            raise InputError("/set", rest, "takes a name and a value", "Write, for example, /set temperature 0.7")
        conversation.change(name, value.strip())
    elif command == "/settings":
        out.writelines(f"{name} = {value!r}\n" for name, value in dataclasses.asdict(conversation.config).items() if name not in UNUSED)
    elif command == "/history":
        out.write(conversation.written(conversation.turns) + "\n")
    elif command == "/clear":
        conversation.turns.clear()
    elif command in ("/undo", "/retry"):
        if not conversation.turns:
            raise InputError(command, "", "nothing was said yet", "Say something first")
        n, turn = len(conversation.turns), conversation.turns.pop()
        if command == "/retry":
            try:
                speak(conversation, turn[0], out)
            finally:
                if len(conversation.turns) < n:  # there is no new answer
                    conversation.turns.append(turn)
    else:
        raise InputError("command", command, "unknown", "/help lists the commands")
