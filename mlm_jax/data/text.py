"""Text sources -> documents: the Python documentation on every machine, files, folders and TensorFlow Datasets."""

import ast
import gzip
import importlib
import json
import os
import platform
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from mlm_jax.config import DataConfig, InputError, one_of

ENDINGS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
TFDS = "tfds:"
_JSON_REMEDY = 'Write one object to a line, such as {"text": "..."}'

# Folders of the standard library whose docstrings are no documentation: tests, what others installed, an editor, a translator, a demo.
_NOT_LIBRARY = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "__pycache__")
)


class Document(NamedTuple):
    """One text, and the place it came from in words that an error message can use: "notes.jsonl:12"."""

    text: str
    where: str


def documents(config: DataConfig) -> Iterator[Document]:
    """The documents of `config.source`, in an order that depends on nothing but the source.

    Raises:
      InputError: the source is missing, of an unknown kind, not UTF-8, damaged, or lacks `config.text_field`.
    """
    if config.source == "python-docs":
        yield from _python_docs()
    elif config.source.startswith(TFDS):
        yield from _tfds(config.source, config.text_field)
    else:
        for path in _files(config.source):
            yield from _read(path, config.text_field)


def source_detail(config: DataConfig) -> str:
    """What stands behind `config.source` here and now, in words: the Python or TFDS version, or the number and size of the files.

    Raises:
      InputError: the source is missing or of an unknown kind.
    """
    if config.source == "python-docs":
        return f"Python {platform.python_version()}"
    if config.source.startswith(TFDS):
        return f"tensorflow_datasets {_import_tfds(config.source).__version__}"
    sizes = [path.stat().st_size for path in _files(config.source)]
    return f"{len(sizes)} file{'s' if len(sizes) > 1 else ''}, {sum(sizes)} bytes"


def _python_docs() -> Iterator[Document]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as e:
        remedy = "Install the whole standard library (on Debian: apt install libpython3-stdlib), or name a text file"
        raise InputError("data.source", "python-docs", "this Python came without its documentation, pydoc_data", remedy) from e
    for name in sorted(topics):
        yield Document(topics[name], f"pydoc_data.topics: {name}")
    library = Path(sysconfig.get_path("stdlib"))
    for path in _walk(library, skip=lambda name: name in _NOT_LIBRARY):
        if path.suffix == ".py":
            yield from _docstrings(path, path.relative_to(library).as_posix())


def _docstrings(path: Path, where: str) -> Iterator[Document]:
    """Every docstring in the source file, the module's first; the file is parsed and never imported."""
    try:
        with warnings.catch_warnings(action="ignore"):  # a library's own "\d" is no business of ours
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and bad-encoding samples live in the library too
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield Document(text, f"{where}: {getattr(node, 'name', 'module')}")


def _walk(root: Path, skip: Callable[[str], bool]) -> Iterator[Path]:
    """Regular files below `root`, sorted part by part. Links are not followed: none can loop, lead outside or count a text twice."""
    for folder, folders, files in os.walk(root, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not skip(name))
        for name in sorted(files):
            path = Path(folder, name)
            if not skip(name) and not path.is_symlink() and path.is_file():
                yield path


def _unreadable(e: OSError) -> NoReturn:
    raise InputError("data.source", str(e.filename), f"cannot be read ({e.strerror})", "Check its permissions") from e


def is_there(source: str) -> bool:
    """True where `source` names a file or folder, not text that comes with a package, and it exists."""
    return source != "python-docs" and not source.startswith(TFDS) and os.path.exists(os.path.expanduser(source))


def _files(source: str) -> list[Path]:
    path = Path(os.path.expanduser(source))
    wanted = f"Name a {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]} file, a folder of them, tfds:NAME or python-docs"
    if path.is_dir():
        found = [file for file in _walk(path, skip=lambda name: name.startswith(".")) if _ending(file)]
        if not found:
            raise InputError("data.source", source, f"the folder holds no {', '.join(ENDINGS)} file (hidden files and links do not count)", wanted)
        return found
    if not path.is_file():
        raise InputError("data.source", source, "no such file or folder", wanted)
    if not _ending(path):
        raise InputError("data.source", source, f"cannot read {path.suffix or 'a file without an ending'}", wanted)
    return [path]


def _ending(path: Path) -> str:
    return next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), "")


def _read(path: Path, text_field: str) -> Iterator[Document]:
    ending = _ending(path)
    try:
        with gzip.open(path) if ending.endswith(".gz") else path.open("rb") as file:
            if ending.startswith(".jsonl"):
                yield from _json_lines(file, str(path), text_field)
            else:
                yield Document(_utf8(file.read(), str(path), 0).removeprefix("\ufeff"), str(path))
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise InputError("data.source", str(path), f"the gzip file is damaged or cut short ({e})", "Fetch it again; gzip -t FILE checks it") from e
    except OSError as e:
        _unreadable(e)


def _utf8(raw: bytes, where: str, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        reason = f"not UTF-8: byte 0x{raw[e.start]:02x} at offset {offset + e.start} ({e.reason})"
        raise InputError("data.source", where, reason, "Convert it, for example with iconv -f LATIN1 -t UTF-8") from e


def _json_lines(file: Iterable[bytes], name: str, text_field: str) -> Iterator[Document]:
    offset = 0
    for number, raw in enumerate(file, start=1):
        where = f"{name}:{number}"
        line = _utf8(raw, where, offset).removeprefix("\ufeff" if number == 1 else "")
        offset += len(raw)
        if line.strip():
            yield Document(_field(_json(line, where), text_field, where), where)


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        raise InputError("data.source", where, f"not a JSON line ({e})", _JSON_REMEDY) from e


def _field(example: Any, text_field: str, where: str) -> str:
    """The text in the field, a JSON string or TFDS bytes."""
    if not isinstance(example, dict):
        raise InputError("data.source", where, f"holds a {type(example).__name__}, not an object", _JSON_REMEDY)
    one_of(f"{where}: data.text_field", text_field, example)
    value = example[text_field]
    if isinstance(value, bytes):
        return _utf8(value, where, 0)
    if not isinstance(value, str):
        remedy = f"Name a field that holds text; fields: {', '.join(example)}"
        raise InputError(f"{where}: data.text_field", text_field, f"holds {type(value).__name__}, not text", remedy)
    return value


def _import_tfds(source: str) -> Any:
    try:
        import tensorflow_datasets as tfds

        for group in ("summarization", "text", "translate"):  # a builder in these is "not found" until its group is imported
            importlib.import_module(f"tensorflow_datasets.{group}")
    except ImportError as e:
        raise InputError("data.source", source, f"needs a package that is not installed ({e})", 'pip install "mlm_jax[data]"') from e
    return tfds


def _tfds(source: str, text_field: str) -> Iterator[Document]:
    """The train split, read from array_record files through `data_source`: `tfds.load` would need TensorFlow."""
    tfds = _import_tfds(source)
    try:
        examples = tfds.data_source(source.removeprefix(TFDS), split="train")
    except ValueError as e:  # DatasetNotFoundError is one; the rest of its message lists a thousand names
        remedy = "Choose a name, or name/config, from https://www.tensorflow.org/datasets/catalog that has a train split"
        raise InputError("data.source", source, str(e).partition("\n")[0], remedy) from e
    for index in range(len(examples)):
        where = f"{source}:{index}"
        yield Document(_field(examples[index], text_field, where), where)
