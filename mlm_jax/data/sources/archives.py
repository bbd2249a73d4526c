"""Archives of text files: .tar and .zip. Nothing is ever unpacked to a disk."""

import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from mlm_jax.data.sources.base import Damaged, Item, fault, printable
from mlm_jax.data.sources.formats import format_of, items
from mlm_jax.data.sources.streams import EXPANDS_BY, EXPANDS_TO, Bytes, chunks_of, decompressed

_LONG_NAME = 1 << 16  # bytes of a name at most: the library holds it in memory, and takes the square of the time to read it


class _Names:
    """Names of members as they are shown: "a.zip/b.txt", the second of that name "a.zip/b.txt#2"."""

    def __init__(self, archive: str) -> None:
        self._archive = archive
        self._seen: dict[str, int] = {}

    def place(self, name: str) -> str:
        self._seen[name] = self._seen.get(name, 0) + 1
        number = self._seen[name]
        return f"{self._archive}/{printable(name)}" + (f"#{number}" if number > 1 else "")


def _leads_outside(name: str) -> bool:
    return bool(re.match(r"[/\\]|[A-Za-z]:", name)) or ".." in re.split(r"[/\\]", name)


class _Member(tarfile.TarInfo):
    """A header; `tarfile` would take a damaged one, or none, for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Member":
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as e:
            if len(buf) == tarfile.BLOCKSIZE and not buf.strip(b"\0"):  # the end
                raise
            raise Damaged("damaged tar", "cut short" if len(buf) < tarfile.BLOCKSIZE else e) from e
        if member.type not in tarfile.REGULAR_TYPES and member.size > _LONG_NAME:
            raise Damaged("damaged tar", f"a header of {member.size} bytes")
        return member


def tar_items(chunks: Iterable[bytes], archive: str, separator: str) -> Iterator[Item]:
    """What the members of a tar file hold, in its own order: compressed, it can be read forwards only.

    Raises:
      Damaged: it cannot be read to its end.
    """
    names, stream, count = _Names(archive), Bytes(chunks), 0
    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
            while (member := tar.next()) is not None:
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue] # else it keeps them all
                kind, compression = format_of(member.name)
                if member.isdir():
                    continue
                if not kind:
                    yield fault(names.place(member.name), "an ending that is not read", "", member.size)
                    continue
                count += 1
                where = names.place(member.name)
                if _leads_outside(member.name):
                    yield fault(where, "a name that leads outside", "", member.size)
                elif not member.isreg() or member.issparse() or (file := tar.extractfile(member)) is None:
                    yield fault(where, "a link or no file", "", member.size)
                else:
                    yield from _member(kind, file, where, separator, compression, member.size)
    except Damaged:
        raise
    except Exception as e:  # of a damaged header the library raises many kinds
        raise Damaged("damaged tar", e) from e
    if not count:
        yield fault(archive, "no text in it")


def zip_items(file: BinaryIO, archive: str, separator: str, size: int) -> Iterator[Item]:
    """What the members of a zip file of `size` bytes hold, by their names in sorted order.

    Raises:
      Damaged: its list of members cannot be read, or it holds far too much.
    """
    try:
        opened = zipfile.ZipFile(file)
    except Exception as e:  # of a damaged list the library raises many kinds
        raise Damaged("damaged zip", e) from e
    names, left, count = _Names(archive), [max(EXPANDS_TO, EXPANDS_BY * size)], 0
    for member in sorted(opened.infolist(), key=lambda member: (member.filename, member.header_offset)):
        kind, compression = format_of(member.filename)
        if member.is_dir():
            continue
        if not kind:
            yield fault(names.place(member.filename), "an ending that is not read", "", member.file_size)
            continue
        count += 1
        where = names.place(member.filename)
        if _leads_outside(member.orig_filename):
            yield fault(where, "a name that leads outside", "", member.file_size)
        elif (member.external_attr >> 16) & 0o170000 not in (0, 0o100000):
            yield fault(where, "a link or no file", "", member.file_size)
        else:
            try:
                with opened.open(member) as inner:
                    yield from _member(kind, _Counted(inner, left, size), where, separator, compression, member.file_size)
            except Damaged:
                raise
            except Exception as e:  # whatever the four decoders raise; the other members may be whole
                yield fault(where, "damaged zip", e, member.file_size)
    if not count:
        yield fault(archive, "no text in it")


class _Counted:
    """A member of an archive, which ends the reading when the archive has expanded too far; `left` is shared by its members."""

    def __init__(self, file: Any, left: list[int], size: int) -> None:
        self._file, self._left, self._size = file, left, size

    def read(self, size: int) -> bytes:
        chunk = self._file.read(size)
        self._left[0] -= len(chunk)
        if self._left[0] < 0:
            raise Damaged("expands too far", f"an archive of {self._size} bytes")
        return chunk


class _ArchiveDamaged(Damaged):
    """It is the archive, not the member that is being read."""


def _member(kind: str, file: Any, where: str, separator: str, compression: str, size: int) -> Iterator[Item]:
    """What a member holds; damage inside it is its own."""
    try:
        yield from items(kind, decompressed(_of_archive(chunks_of(file)), compression, size), where, separator)
    except _ArchiveDamaged:
        raise
    except Damaged as e:
        yield fault(where, e.kind, e.detail)


def _of_archive(chunks: Iterable[bytes]) -> Iterator[bytes]:
    try:
        yield from chunks
    except Damaged as e:
        raise _ArchiveDamaged(e.kind, e.detail) from e
