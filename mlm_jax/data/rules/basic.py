"""What is done to every document: one kind of newline, no control characters, Unicode NFC, nothing binary, nothing empty."""

import re
import unicodedata
from collections.abc import Callable

from mlm_jax.config import InputError
from mlm_jax.data.document import Document, Dropped, Rule

BINARY_SHARE = 0.1  # of the characters; above it a document is no text

_NEWLINE = re.compile(r"\r\n?")
# C0 and C1 except tab and newline, and halves of surrogate pairs, which a JSON escape can smuggle in and UTF-8 cannot hold.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_BINARY = "\x00-\x08\x0b\x0e-\x1f\x7f\ud800-\udfff\ufffd"
_C1 = "\x80-\x9f"


def binary(*, c1: bool) -> Rule:
    """Drops what is no text: too many control characters, U+FFFD and halves of surrogate pairs. `c1`: those from U+0080 on count."""
    pattern = re.compile(f"[{_BINARY}{_C1 if c1 else ''}]")

    def apply(document: Document) -> Document | Dropped:
        return Dropped("binary") if len(pattern.findall(document.text)) > BINARY_SHARE * len(document.text) else document

    return Rule("binary", apply)


def rewrite(name: str, change: Callable[[str], str]) -> Rule:
    """A rule that changes the text, and the prompt in the same way."""
    return Rule(name, lambda document: document._replace(text=change(document.text), prompt=change(document.prompt)))


def without_control_characters(text: str) -> str:
    """The text without C0 and C1 characters, of which tab and newline stay, and without halves of surrogate pairs."""
    return _CONTROL.sub("", text)


def not_installed(field: str, value: object, error: ImportError) -> InputError:
    """A package that a rule needs is missing: what to tell the user."""
    return InputError(field, value, f"needs a package that is not installed ({error})", 'pip install "mlm_jax[data]"')


NEWLINES = rewrite("newlines", lambda text: _NEWLINE.sub("\n", text))
CONTROL_CHARACTERS = rewrite("control_characters", without_control_characters)
NFC = rewrite("nfc", lambda text: unicodedata.normalize("NFC", text))
EMPTY = Rule("empty", lambda document: document if document.text.strip() else Dropped("empty"))
