"""Text files: one, those of a folder, or those that a pattern names; in archives too."""

import fnmatch
import importlib.util
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

from mlm_jax.config import InputError, SourceConfig
from mlm_jax.data.document import Fault
from mlm_jax.data.sources.archives import tar_items, zip_items
from mlm_jax.data.sources.base import PART_BYTES, Damaged, Item, Part, fault, missing, printable
from mlm_jax.data.sources.formats import FORMATS, format_of, items
from mlm_jax.data.sources.parquet import parquet_items, parquet_parts
from mlm_jax.data.sources.streams import UTF16, chunks_of, decompressed

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.zst")
ENDINGS = (*FORMATS, ".parquet", ".zip", *_TARS)
_WANTED = (
    f"Name a file ({', '.join(FORMATS)}, each also with .gz or .zst, .parquet, {', '.join(_TARS)} or .zip), a folder of them, a pattern, "
    "tfds:NAME, hf:NAME or python-docs"
)


def parts(source: SourceConfig) -> list[Part]:
    """The files in sorted order; those that can be read from the middle on, in parts of `PART_BYTES`.

    Raises:
      InputError: there is none.
    """
    found = files(source.source)
    _check_libraries(source.source, found)
    return [part for path in found for part in _parts(path, source.separator)]


def files(source: str) -> list[Path]:
    """The files that `source` names. Raises InputError where there is none that can be read."""
    try:
        return _files(source)
    except OSError as e:
        _unreadable(e)


def _files(source: str) -> list[Path]:
    path = Path(os.path.expanduser(source))
    kind = "folder"
    if path.is_dir():
        found = list(walk(path, skip=lambda name: name.startswith(".")))
    elif path.is_file():
        if not _readable(path):
            raise InputError("data.source", source, f"cannot read {path.suffix or 'a file without an ending'}", _WANTED)
        return [path]
    elif is_pattern(source):
        kind, found = "pattern", matches(source)
        if not found:
            raise InputError("data.source", source, "no file matches (hidden files and links do not count)", _WANTED)
    else:
        raise InputError("data.source", source, "no such file or folder", _WANTED)
    if not (found := [file for file in found if _readable(file)]):
        raise InputError("data.source", source, f"the {kind} holds no {', '.join(ENDINGS)} file (hidden files and links do not count)", _WANTED)
    return found


def passed_over(source: str) -> Iterator[Fault]:
    """The files of a folder, or those that a pattern names, that are not read, each as what is wrong with it."""
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        for folder, folders, names in os.walk(path):
            for name in sorted(folders + names):
                if not name.startswith(".") and Path(folder, name).is_symlink():
                    yield fault(os.path.join(folder, name), "a link")
            folders[:] = sorted(name for name in folders if not name.startswith("."))
    found = walk(path, skip=lambda name: name.startswith(".")) if path.is_dir() else matches(source) if is_pattern(source) else ()
    for file in found:
        if not _readable(file):
            yield fault(str(file), "an ending that is not read", "", file.stat().st_size)


def is_pattern(source: str) -> bool:
    return any(c in source for c in "*?[")


def matches(pattern: str) -> list[Path]:
    """The files that a pattern names, sorted; ** is any number of folders. Links, which `glob` follows, and hidden ones do not count."""
    path = Path(os.path.expanduser(pattern))
    names = path.parts[1:] if path.anchor else path.parts
    return sorted(set(_matching(Path(path.anchor or "."), names)))


def _matching(folder: Path, names: tuple[str, ...]) -> Iterator[Path]:
    name, rest = names[0], names[1:]
    if not any(c in name for c in "*?["):  # also .. and links: what is named in full is meant
        path = folder / name
        if rest and path.is_dir():
            yield from _matching(path, rest)
        elif not rest and path.is_file() and not path.is_symlink():
            yield path
        return
    with os.scandir(folder) as entries_of_folder:
        entries = list(entries_of_folder)
    deep = name == "**"
    if deep:
        yield from _matching(folder, rest or ("*",))
    for entry in entries:
        if (entry.name.startswith(".") and not name.startswith(".")) or not fnmatch.fnmatchcase(entry.name, name):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _matching(folder / entry.name, names if deep else rest) if deep or rest else ()
        elif not deep and not rest and entry.is_file(follow_symlinks=False):
            yield folder / entry.name


def walk(root: Path, skip: Callable[[str], bool]) -> Iterator[Path]:
    """Regular files below `root`, sorted part by part. Links are not followed: none can loop, lead outside or count a text twice."""
    for folder, folders, names in os.walk(root, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not skip(name))
        for name in sorted(names):
            path = Path(folder, name)
            if not skip(name) and not path.is_symlink() and path.is_file():
                yield path


def _unreadable(e: OSError) -> NoReturn:
    raise InputError("data.source", str(e.filename), f"cannot be read ({e.strerror})", "Check its permissions") from e


def _readable(path: Path) -> bool:
    return bool(format_of(path.name)[0]) or path.name.lower().endswith((".parquet", ".zip", *_TARS))


def _check_libraries(source: str, found: list[Path]) -> None:
    """Raises InputError where a library that reads one of the files is not installed."""
    names = [path.name.lower() for path in found]
    needed = {
        "zstandard": any(name.endswith(".zst") for name in names),
        "pyarrow": any(name.endswith(".parquet") for name in names),
        "warcio": any(format_of(name)[0] == "warc" for name in names),
    }
    for library, is_needed in needed.items():
        if is_needed and importlib.util.find_spec(library) is None:
            raise missing(source, library)


def _parts(path: Path, separator: str) -> list[Part]:
    try:
        return _parts_of_file(path, separator)
    except OSError:  # `read` tells
        return [Part(str(path))]


def _parts_of_file(path: Path, separator: str) -> list[Part]:
    if path.name.lower().endswith(".parquet"):
        return parquet_parts(path)
    kind, compression = format_of(path.name)
    size = path.stat().st_size
    if size <= PART_BYTES or compression or not (kind == "lines" or (kind == "text" and separator)):
        return [Part(str(path), size=size)]
    between = b"\n" if kind == "lines" else separator.encode("utf-8", "surrogatepass")
    borders = _borders(path, size, between)
    ends = [*borders[1:], 0]  # the last goes to the end, so that `read` sees a file that has grown
    return [Part(str(path), start, stop, (stop or size) - start) for start, stop in zip(borders, ends, strict=True)]


def _borders(path: Path, size: int, between: bytes) -> list[int]:
    """Where parts begin: the first beginning of a line, or of what else stands between separators, in every `PART_BYTES`."""
    borders, at = [0], PART_BYTES
    with path.open("rb") as file:
        if file.read(2) in UTF16:
            return borders
        while at < size:
            border = _after_separator(file, at, between)
            if not border or border >= size:
                break
            borders.append(border)
            at = border - border % PART_BYTES + PART_BYTES
    return borders


def _after_separator(file: BinaryIO, at: int, between: bytes) -> int:
    """The place after the first separator from `at` on, 0 where there is none."""
    rest = b""
    for chunk in chunks_of(file, at):
        held = rest + chunk
        if (found := held.find(between)) >= 0:
            return at - len(rest) + found + len(between)
        at += len(chunk)
        rest = held[len(held) - len(between) + 1 :] if len(between) > 1 else b""
    return 0


def read(source: SourceConfig, part: Part) -> Iterator[Item]:
    """What a part holds, and what is wrong with it."""
    path, name = Path(part.name), printable(part.name)
    try:
        before = path.stat()
        is_split = bool(part.start or part.stop)
        is_parquet = path.name.lower().endswith(".parquet")
        if not stat.S_ISREG(before.st_mode) or not (is_parquet or _as_before(part, before.st_size)):
            yield fault(name, "changed while being read", f"{before.st_size} bytes now", part.size)
            return
        if is_parquet:
            yield from parquet_items(source, part)
        else:
            with path.open("rb") as file:
                yield from _items(source, part, file, name, before.st_size, whole=not is_split)
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            yield fault(name, "changed while being read", f"{before.st_size} bytes before, {after.st_size} after")
    except FileNotFoundError:
        yield fault(name, "vanished", "", part.size)
    except OSError as e:
        yield fault(name, "unreadable", e.strerror or e, part.size)
    except Damaged as e:
        yield fault(name, e.kind, e.detail)


def _as_before(part: Part, size: int) -> bool:
    return size >= part.stop if part.stop else size == part.start + part.size


def _items(source: SourceConfig, part: Part, file: BinaryIO, name: str, size: int, *, whole: bool) -> Iterator[Item]:
    lower = part.name.lower()
    if lower.endswith(".zip"):
        yield from zip_items(file, name, source.separator, size)
        return
    kind, compression = format_of(lower)
    if lower.endswith(_TARS):
        compression = ".gz" if lower.endswith("gz") else ".zst" if lower.endswith(".zst") else ""
    chunks = decompressed(chunks_of(file, part.start, part.stop), compression, size)
    if kind:
        yield from items(kind, chunks, name, source.separator, start=part.start, whole=whole)
    else:
        yield from tar_items(chunks, name, source.separator)
