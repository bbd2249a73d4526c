"""Documents -> clean documents: Unicode NFC, no control characters, no exact duplicates, with an audit of every change and loss."""

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from mlm_jax.data.text import Document

_NEWLINE = re.compile(r"\r\n?")
# C0 and C1 except tab and newline, and halves of surrogate pairs, which a JSON escape can smuggle in and UTF-8 cannot hold.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclasses.dataclass
class Count:
    """Documents that a rule touched, and the UTF-8 bytes they lost by it (NFC may give some: then below 0)."""

    documents: int = 0
    bytes: int = 0

    def add(self, n_bytes: int) -> None:
        self.documents += 1
        self.bytes += n_bytes


@dataclasses.dataclass
class Audit:
    """What came in, what went out, and which rule changed or dropped the difference: bytes in - bytes of all rules = bytes out."""

    read: Count = dataclasses.field(default_factory=Count)
    kept: Count = dataclasses.field(default_factory=Count)
    newlines_changed: Count = dataclasses.field(default_factory=Count)  # \r\n and \r became \n
    control_characters_removed: Count = dataclasses.field(default_factory=Count)
    nfc_changed: Count = dataclasses.field(default_factory=Count)
    empty_dropped: Count = dataclasses.field(default_factory=Count)
    duplicates_dropped: Count = dataclasses.field(default_factory=Count)

    def to_dict(self) -> dict[str, Any]:
        """The counts as plain numbers, for JSON."""
        return dataclasses.asdict(self)


def clean(documents: Iterable[Document], audit: Audit) -> Iterator[Document]:
    """The cleaned documents in their order; `audit` counts as they pass."""
    seen: set[bytes] = set()
    for text, where in documents:
        audit.read.add(_size(text))
        text = _changed(text, _NEWLINE.sub("\n", text), audit.newlines_changed)
        text = _changed(text, _CONTROL.sub("", text), audit.control_characters_removed)
        text = _changed(text, unicodedata.normalize("NFC", text), audit.nfc_changed)
        if not text.strip():
            audit.empty_dropped.add(_size(text))
            continue
        digest = digest_of(text)
        if digest in seen:
            audit.duplicates_dropped.add(_size(text))
            continue
        seen.add(digest)
        audit.kept.add(_size(text))
        yield Document(text, where)


def digest_of(text: str) -> bytes:
    """SHA-256 of the clean text, 32 bytes: what makes two documents the same, and what chooses their split."""
    return hashlib.sha256(text.encode("utf-8")).digest()


def _changed(before: str, after: str, count: Count) -> str:
    if after != before:
        count.add(_size(before) - _size(after))
    return after


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
