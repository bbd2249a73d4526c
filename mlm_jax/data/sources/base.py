"""What all sources share: their parts, their records and what is wrong with them."""

from typing import Any, NamedTuple

from mlm_jax.config import InputError
from mlm_jax.data.document import Document, Fault

MAX_DOCUMENT = 16 << 20  # bytes of UTF-8; what is longer is no text to learn from, or is cut, and is never held in memory
PART_BYTES = 64 << 20  # of a part, where a file can be divided
PART_EXAMPLES = 10_000  # of a part, where a data set is read by index


EMPTY_FILE = "empty file"  # the one kind of fault by which nothing is lost


class Part(NamedTuple):
    """What one task reads at least. `start` and `stop` count bytes, row groups, examples or shards, whatever the source is divided by."""

    name: str
    start: int = 0
    stop: int = 0  # 0: to the end
    size: int = 0  # in bytes, as far as known


class Record(NamedTuple):
    """A row, an object or an example, one of whose fields is the document."""

    fields: dict[str, Any]
    where: str
    bytes: int = 0  # that are lost if it is no document, as far as known


Item = Document | Fault | Record


class Damaged(Exception):
    """What is being read cannot be read any further."""

    def __init__(self, kind: str, detail: object) -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, str(detail)


def printable(text: str) -> str:
    """The text without halves of surrogate pairs, which names of files and JSON may hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def line(text: object) -> str:
    """As much of a text as fits a line."""
    return " ".join(printable(str(text)).split())[:200]


def fault(where: str, kind: str, detail: object = "", n_bytes: int = 0) -> Fault:
    """The fault, its words cut to a line."""
    return Fault(where, line(kind), line(detail), n_bytes)


def too_long(where: str, n_bytes: int) -> Fault:
    return fault(where, f"longer than {MAX_DOCUMENT >> 20} MiB", f"{n_bytes} bytes", n_bytes)


def not_text(where: str, encoding: str, e: UnicodeDecodeError, offset: int, n_bytes: int) -> Fault:
    """The fault of bytes, `offset` of them before these, that are not in their encoding."""
    byte = f"byte 0x{e.object[e.start]:02x} at offset {offset + e.start} ({e.reason})"
    return fault(where, f"not {encoding}", byte, n_bytes)


def missing(source: str, library: object) -> InputError:
    """The error for a source that needs a library which is not installed."""
    return InputError("data.source", source, f"needs a package that is not installed ({library})", 'pip install "mlm_jax[data]"')
