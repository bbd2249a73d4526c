"""Bytes as they come, in chunks: decompressed, in UTF-8, divided; never more of them in memory than one document has."""

import codecs
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from mlm_jax.data.sources.base import MAX_DOCUMENT, Damaged

CHUNK = 1 << 18
EXPANDS_TO = 1 << 30  # bytes to which anything may expand
EXPANDS_BY = 1000  # times its size to which it may
_ZSTD_INPUT = 1 << 10  # decoded at once: a block of 128 KiB may be written in 4 bytes, so this is 32 MiB at most
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Piece(NamedTuple):
    """One piece of a stream."""

    number: int  # from 1
    offset: int  # of its first byte in the stream
    raw: bytes | None  # None: too long to hold
    length: int


def chunks_of(file: BinaryIO | Any, start: int = 0, stop: int = 0) -> Iterator[bytes]:
    """The bytes of an open file from `start` to `stop`, 0 for its end."""
    if start:
        file.seek(start)
    left = stop - start if stop else -1
    while left and (chunk := file.read(CHUNK if left < 0 else min(CHUNK, left))):
        left -= len(chunk) if left > 0 else 0
        yield chunk


def decompressed(chunks: Iterable[bytes], compression: str, size: int) -> Iterator[bytes]:
    """What `size` bytes of compressed chunks hold; `compression` is .gz, .zst or empty.

    Raises:
      Damaged: they are not what they should be, are cut short or hold far too much; all that could be read before came out.
    """
    if not compression:
        yield from chunks
        return
    most, total = max(EXPANDS_TO, EXPANDS_BY * size), 0
    for chunk in _gunzip(chunks) if compression == ".gz" else _unzstd(chunks):
        total += len(chunk)
        if total > most:
            raise Damaged("expands too far", f"{size} bytes hold more than {most}")
        yield chunk


def _gunzip(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """All members of a gzip file, one after the other; `gzip.GzipFile` would lose what it had read ahead when it meets damage."""
    decoder: Any = None
    for chunk in chunks:
        while chunk:
            if decoder is None or decoder.eof:
                chunk = chunk.lstrip(b"\0") if decoder else chunk  # some writers pad
                if not chunk:
                    break
                decoder = zlib.decompressobj(wbits=31)
            continue_from = decoder.copy()
            try:
                out = decoder.decompress(chunk, CHUNK)
            except zlib.error as e:
                if out := _until_damage(continue_from, chunk):
                    yield out
                raise Damaged("damaged gzip", e) from e
            if out:
                yield out
            chunk = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
    if decoder is not None and not decoder.eof:
        raise Damaged("damaged gzip", "cut short")


def _until_damage(decoder: Any, chunk: bytes) -> bytes:
    """What a chunk holds before the place at which it cannot be decoded, less than `CHUNK` bytes."""
    found = bytearray()
    try:
        for i in range(len(chunk)):
            found += decoder.decompress(chunk[i : i + 1])
    except zlib.error:
        pass
    return bytes(found)


def _unzstd(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """All frames of a Zstandard file, one after the other."""
    import zstandard

    decoder: Any = None
    for chunk in chunks:
        for i in range(0, len(chunk), _ZSTD_INPUT):
            raw = chunk[i : i + _ZSTD_INPUT]
            while raw:
                if decoder is None or decoder.eof:
                    decoder = zstandard.ZstdDecompressor().decompressobj()
                try:
                    out = decoder.decompress(raw)
                except zstandard.ZstdError as e:
                    raise Damaged("damaged zstd", e) from e
                yield from (out[at : at + CHUNK] for at in range(0, len(out), CHUNK))
                raw = decoder.unused_data if decoder.eof else b""
    if decoder is not None and not decoder.eof:
        raise Damaged("damaged zstd", "cut short")


def in_utf8(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same text in UTF-8 where it says that it is UTF-16, by the mark at its beginning; else the same bytes.

    Raises:
      Damaged: it says so and is not.
    """
    decoder: codecs.IncrementalDecoder | None = None
    for number, chunk in enumerate(chunks):
        if number == 0 and chunk.startswith(UTF16):
            decoder = codecs.getincrementaldecoder("utf-16")()
        yield _recoded(decoder, chunk) if decoder else chunk
    if decoder:
        _recoded(decoder, b"", final=True)


def _recoded(decoder: codecs.IncrementalDecoder, chunk: bytes, *, final: bool = False) -> bytes:
    try:
        return decoder.decode(chunk, final).encode("utf-8")
    except UnicodeDecodeError as e:
        raise Damaged("not UTF-16", e.reason) from e


def divided(chunks: Iterable[bytes], separator: bytes, limit: int = MAX_DOCUMENT) -> Iterator[Piece]:
    """What stands between the separators, where that is anything."""
    keep = len(separator) - 1  # bytes that may be the beginning of a separator
    rest, number, offset, lost = b"", 1, 0, 0  # of the piece that has begun: its bytes, its place, and how many of its bytes were let go
    for chunk in chunks:
        held = rest + chunk
        if not lost and (count := held.count(separator)) * len(separator) == len(held):  # at once: a gigabyte of newlines is short as a gzip file
            number, offset, rest = number + count, offset + len(held), b""
            continue
        *whole, rest = held.split(separator)
        for raw in whole:
            length = lost + len(raw)
            if length:
                yield Piece(number, offset, raw if length <= limit else None, length)
            number += 1
            offset += length + len(separator)
            lost = 0
        if lost + len(rest) > limit + keep:
            lost += len(rest) - keep
            rest = rest[len(rest) - keep :]
    if lost or rest:
        yield Piece(number, offset, None if lost else rest, lost + len(rest))


def cut(chunks: Iterable[bytes], limit: int = MAX_DOCUMENT) -> Iterator[Piece]:
    """All of it in pieces of `limit` bytes at most, which end with a newline, or a space where that many bytes have no newline."""
    held, number, offset, lost = bytearray(), 1, 0, 0  # as in `divided`
    for chunk in chunks:
        held += chunk
        while lost or len(held) > limit:
            end = 0 if lost else held.rfind(b"\n", 0, limit) + 1 or held.rfind(b" ", 0, limit) + 1
            if end:
                yield Piece(number, offset, bytes(held[:end]), end)
            elif end := _end_of_gap(held, 0 if lost else limit):
                yield Piece(number, offset, None, lost + end)
            else:
                lost += len(held)
                held.clear()
                break
            number += 1
            offset += lost + end
            lost = 0
            del held[:end]
    if lost or held:
        yield Piece(number, offset, None if lost else bytes(held), lost + len(held))


def _end_of_gap(held: bytearray, start: int) -> int:
    """The place after the first newline or space from `start` on, 0 where there is none."""
    newline = held.find(b"\n", start)
    space = held.find(b" ", start, newline if newline >= 0 else len(held))
    return (space if space >= 0 else newline) + 1


class Bytes:
    """Chunks as a file that is read forwards."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._held = b""
        self._at = 0

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end."""
        found, left = [], size
        while left:
            if self._at == len(self._held):
                self._held, self._at = next(self._chunks, b""), 0
                if not self._held:
                    break
            found.append(self._held[self._at : self._at + left])
            self._at += len(found[-1])
            left -= len(found[-1])
        return b"".join(found)

    def rest(self) -> Iterator[bytes]:
        """What has not been read, in chunks."""
        if self._at < len(self._held):
            yield self._held[self._at :]
        yield from self._chunks

    def skip(self, size: int) -> int:
        """Passes over the next `size` bytes, fewer at the end; returns how many they were."""
        left = size
        while left and (chunk := self.read(min(left, CHUNK))):
            left -= len(chunk)
        return size - left

    def line(self, limit: int) -> bytes:
        """The next line with its newline, its first `limit` bytes where it is longer; empty at the end."""
        found = b""
        while not found.endswith(b"\n") and len(found) < limit:
            if self._at == len(self._held):
                self._held, self._at = next(self._chunks, b""), 0
                if not self._held:
                    break
            end = self._held.find(b"\n", self._at) + 1 or len(self._held)
            end = min(end, self._at + limit - len(found))
            found += self._held[self._at : end]
            self._at = end
        return found
