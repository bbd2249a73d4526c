"""What flows from the sources through cleaning to the tokens."""

from collections.abc import Callable
from typing import NamedTuple


class Document(NamedTuple):
    """One text."""

    text: str
    where: str  # the place that it came from in words that an error message can use: "notes.jsonl:12"
    prompt: str = ""  # text before it that is not learned
    url: str = ""
    language: str = ""  # as a rule of cleaning found it
    is_html: bool = False  # the text is a whole page


class Fault(NamedTuple):
    """Something of a source that is no document; it is counted, named in the audit and passed over."""

    where: str
    kind: str  # a few words that are the same for all such: "not UTF-8"
    detail: str = ""  # of this one, in a line
    bytes: int = 0  # that are lost by it, as far as known


class Dropped(NamedTuple):
    """What a rule makes of a document that is not kept."""

    reason: str  # a few words that are the same for all such


class Rule(NamedTuple):
    """One step of cleaning: the document as it goes on, the same or another, or why it does not."""

    name: str
    apply: Callable[[Document], Document | Dropped]
