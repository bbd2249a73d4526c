"""Text sources -> documents: the Python documentation on every machine, files, TensorFlow Datasets and Hugging Face data sets.

A source is read part by part, by as many processes as there are: the parts, their order and what each gives depend on the source alone.
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path, PurePath
from types import ModuleType

from mlm_jax.config import InputError, SourceConfig
from mlm_jax.data.document import Document, Fault
from mlm_jax.data.shards import BIN
from mlm_jax.data.sources import fields, files, hugging_face, python_docs, tfds
from mlm_jax.data.sources.base import EMPTY_FILE, MAX_DOCUMENT, Part, Record

__all__ = ["MAX_DOCUMENT", "Part", "detail", "documents", "is_there", "parts", "passed_over", "read", "records", "token_files"]

_PROBED = 100  # of a part at most, until a record is met


def parts(source: SourceConfig) -> list[Part]:
    """The parts of a source, in their order.

    Raises:
      InputError: nothing is there, or nothing of a kind that can be read; or its first record lacks a field that `source` names.
    """
    reader = _reader(source)
    found = reader.parts(source)
    first_of_kind = {_ending(part.name): part for part in reversed(found)}
    for part in reversed(first_of_kind.values()):
        for item in itertools.islice(reader.read(source, part), _PROBED):
            if isinstance(item, Record):
                fields.check(item, source)
                return found
            if isinstance(item, Document):
                break
    return found


def _ending(name: str) -> str:
    """What tells what kind of file it is: .jsonl, .txt.gz."""
    path = PurePath(name)
    return "".join(path.suffixes[-2:]) if path.suffix in (".gz", ".zst") else path.suffix


def read(source: SourceConfig, part: Part) -> Iterator[Document | Fault]:
    """The documents of a part in their order, and what is no document, which ends nothing but what it stands for.

    Raises:
      InputError: the source, not a part of it, is gone.
    """
    for item in _reader(source).read(source, part):
        yield fields.document(item, source) if isinstance(item, Record) else item


def documents(source: SourceConfig) -> Iterator[Document]:
    """All documents of a source that has to be whole.

    Raises:
      InputError: as `parts`; or some of it is no document.
    """
    for part in parts(source):
        for item in read(source, part):
            if isinstance(item, Document):
                yield item
            else:
                _refuse(item)


def passed_over(source: SourceConfig) -> Iterator[Fault]:
    """The files where the source is that are none of its parts."""
    if not source.source.startswith(BIN) and _reader(source) is files:
        yield from files.passed_over(source.source)


def records(source: SourceConfig) -> Iterator[object]:
    """Whatever a source holds: whole texts, and of records all of their fields, whichever `source` names.

    Raises:
      InputError: it cannot be used, or some of it cannot be read.
    """
    reader = _reader(source)
    for item in (item for part in reader.parts(source) for item in reader.read(source, part)):
        if isinstance(item, Fault):
            _refuse(item)
        else:
            yield item.text if isinstance(item, Document) else item.fields


def _refuse(found: Fault) -> None:
    """Raises InputError where something is lost by the fault."""
    if found.kind != EMPTY_FILE:
        reason = found.kind + (f" ({found.detail})" if found.detail else "")
        raise InputError("data.source", found.where, reason, "Mend it, or leave it out")


def detail(source: SourceConfig) -> str:
    """What stands behind a source here and now, in words: the version of Python or of a library, or the number and size of the files.

    Raises:
      InputError: it is missing or of an unknown kind.
    """
    if source.source.startswith(BIN):
        return _sizes(token_files(source.source))
    reader = _reader(source)
    return _sizes(files.files(source.source)) if reader is files else reader.detail(source)


def is_there(source: str) -> bool:
    """True where `source` names files or folders, not what comes with a package or over the network, and they exist."""
    if source == python_docs.NAME:
        return False
    for library in (tfds, hugging_face):
        if source.startswith(library.PREFIX):
            return bool(library.folder_of(source))
    source = os.path.expanduser(source.removeprefix(BIN))
    return os.path.exists(source) or (files.is_pattern(source) and bool(files.matches(source)))


def _reader(source: SourceConfig) -> ModuleType:
    """The module that reads a source."""
    name = source.source
    if name == python_docs.NAME:
        return python_docs
    if name.startswith(BIN):
        raise InputError("data.source", name, "holds tokens, not text", "Leave out what is done to text, or name the text that they were made of")
    return tfds if name.startswith(tfds.PREFIX) else hugging_face if name.startswith(hugging_face.PREFIX) else files


def token_files(source: str) -> list[Path]:
    """The files of a source of tokens. Raises InputError where there is none."""
    name = os.path.expanduser(source.removeprefix(BIN))
    path = Path(name)
    if path.is_dir():
        found = [file for file in files.walk(path, skip=lambda name: name.startswith(".")) if file.suffix == ".bin"]
    else:
        found = [path] if path.is_file() else files.matches(name) if files.is_pattern(name) else []
    if not found:
        raise InputError("data.source", source, "no such file, or no .bin file in it", "Name a .bin file, a folder of them or a pattern")
    return found


def _sizes(found: list[Path]) -> str:
    sizes = [path.stat().st_size for path in found]
    return f"{len(sizes)} file{'s' if len(sizes) > 1 else ''}, {sum(sizes)} bytes"
