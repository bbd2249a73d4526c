"""The bytes of one file, or of a member of an archive -> documents and records."""

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from mlm_jax.data.document import Document, Fault
from mlm_jax.data.sources.base import EMPTY_FILE, MAX_DOCUMENT, Item, Record, fault, not_text, too_long
from mlm_jax.data.sources.html import page
from mlm_jax.data.sources.streams import Bytes, Piece, cut, divided, in_utf8
from mlm_jax.data.sources.warc import pages

FORMATS = {".txt": "text", ".md": "text", ".html": "html", ".htm": "html", ".jsonl": "lines", ".json": "json", ".warc": "warc", ".wet": "warc"}
COMPRESSIONS = ("", ".gz", ".zst")
_SPACE = re.compile(r"[\s,]*")


def format_of(name: str) -> tuple[str, str]:
    """The format and the compression, "" for none, that the ending of a name says; two empty ones where it says nothing that can be read."""
    for ending, kind in FORMATS.items():
        for compression in COMPRESSIONS:
            if name.lower().endswith(ending + compression):
                return kind, compression
    return "", ""


def items(kind: str, chunks: Iterable[bytes], name: str, separator: str, *, start: int = 0, whole: bool = True) -> Iterator[Item]:
    """What the chunks of a file of that name hold, from byte `start` of it on; `whole` is False where that is not all of it.

    Raises:
      Damaged: they cannot be read to their end.
    """
    chunks = iter(chunks)
    first = next(chunks, b"")
    if not first:
        yield fault(name, EMPTY_FILE)
        return
    chunks = itertools.chain([first], chunks)
    if kind == "warc":
        yield from pages(chunks, name)
    elif kind == "html":
        yield page(Bytes(chunks), name)
    elif kind == "lines":
        yield from _json_lines(in_utf8(chunks), name, start, whole)
    elif kind == "json":
        yield from _json(in_utf8(chunks), name)
    elif separator:
        pieces = divided(in_utf8(chunks), separator.encode("utf-8", "surrogatepass"))
        yield from (_text(piece, _place(name, piece, start, whole), start) for piece in pieces if not _blank(piece))
    else:
        yield from (_text(piece, name if piece.number == 1 else f"{name}#{piece.number}", start) for piece in cut(in_utf8(chunks)))


def _place(name: str, piece: Piece, start: int, whole: bool) -> str:
    """By number; in a part of a file, whose beginning was not read, by the byte at which it begins."""
    return f"{name}:{piece.number}" if whole else f"{name}@{start + piece.offset}"


def _blank(piece: Piece) -> bool:
    return piece.raw is not None and not piece.raw.strip()


def _text(piece: Piece, where: str, start: int) -> Document | Fault:
    if piece.raw is None:
        return too_long(where, piece.length)
    if b"\0" in piece.raw:
        return fault(where, "binary", f"NUL at offset {start + piece.offset + piece.raw.index(0)}", piece.length)
    text = _decoded(piece, where, start)
    return text if isinstance(text, Fault) else Document(text, where)


def _decoded(piece: Piece, where: str, start: int) -> str | Fault:
    try:
        text = (piece.raw or b"").decode("utf-8")
    except UnicodeDecodeError as e:
        return not_text(where, "UTF-8", e, start + piece.offset, piece.length)
    return text if start + piece.offset else text.removeprefix("\ufeff")


def _json_lines(chunks: Iterable[bytes], name: str, start: int, whole: bool) -> Iterator[Item]:
    for piece in divided(chunks, b"\n"):
        where = _place(name, piece, start, whole)
        if piece.raw is None:
            yield too_long(where, piece.length)
            continue
        line = _decoded(piece, where, start)
        if isinstance(line, Fault):
            yield line
        elif line.strip():
            try:
                yield _record(json.loads(line), where, piece.length)
            except (ValueError, RecursionError) as e:
                yield fault(where, "not JSON", e, piece.length)


def _record(value: Any, where: str, n_bytes: int) -> Record | Fault:
    return Record(value, where, n_bytes) if isinstance(value, dict) else fault(where, "not an object", f"a {type(value).__name__}", n_bytes)


def _json(chunks: Iterable[bytes], name: str) -> Iterator[Item]:
    """A .json file: one object a line, or a list of objects, or objects over several lines."""
    data = Bytes(chunks)
    first = data.line(MAX_DOCUMENT)
    try:
        is_lines = first.endswith(b"\n") and isinstance(json.loads(first.decode("utf-8", "replace").removeprefix("\ufeff")), dict)
    except (ValueError, RecursionError):
        is_lines = False
    chunks = itertools.chain([first], data.rest())
    yield from _json_lines(chunks, name, 0, True) if is_lines else _json_values(chunks, name)


def _json_values(chunks: Iterable[bytes], name: str) -> Iterator[Item]:
    """JSON values one after the other, in a list or not; where one is wrong, there is no telling where the next begins."""
    reader, decode = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
    held, needed, number = "", 1, 1  # the text that is no value yet, and how long it is to be before another try
    in_list, error = False, ""
    for chunk, last in _with_last(chunks):
        try:
            held += decode.decode(chunk, last)
        except UnicodeDecodeError as e:
            yield not_text(f"{name}:{number}", "UTF-8", e, 0, 0)
            return
        if number == 1 and not in_list and (opened := held.removeprefix("\ufeff").lstrip()).startswith("["):
            held, in_list = opened[1:], True
        while held and (last or len(held) >= needed):
            begin = _SPACE.match(held).end()  # pyright: ignore[reportOptionalMemberAccess]
            if in_list and held.startswith("]", begin):
                if held[begin + 1 :].strip():
                    yield fault(f"{name}:{number}", "not JSON", "there is more after the end of the list", len(held) - begin)
                return
            try:
                value, end = reader.raw_decode(held, begin)
            except (ValueError, RecursionError) as e:
                value, end, error = None, -1, str(e)
            if end < 0 or (end == len(held) and not last):  # there may be more of it
                needed = min(2 * len(held), MAX_DOCUMENT + 1)  # to try at every chunk would take the square of the time
                break
            yield _record(value, f"{name}:{number}", end - begin)
            held, needed, number = held[end:], 1, number + 1
        if len(held) > MAX_DOCUMENT:
            yield fault(f"{name}:{number}", f"longer than {MAX_DOCUMENT >> 20} MiB", f"or not JSON ({error}); the rest of the file is not read")
            return
    if in_list or held.strip():
        yield fault(f"{name}:{number}", "not JSON", error or "the list has no end", len(held))


def _with_last(chunks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Each chunk, and whether it is the last."""
    before = None
    for chunk in chunks:
        if before is not None:
            yield before, False
        before = chunk
    if before is not None:
        yield before, True
