"""The Python documentation, which is on every machine: the help topics, and the docstrings of the standard library."""

import ast
import importlib
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from mlm_jax.config import InputError, SourceConfig
from mlm_jax.data.document import Document
from mlm_jax.data.sources.base import Part
from mlm_jax.data.sources.files import walk

NAME = "python-docs"

# Folders of the standard library whose docstrings are no documentation: tests, what others installed, an editor, a translator, a demo.
_NOT_LIBRARY = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "__pycache__")
)


def parts(source: SourceConfig) -> list[Part]:
    """All in one: it is 2 MB. Raises InputError where this Python came without its documentation."""
    _topics()
    return [Part(source.source)]


def read(source: SourceConfig, part: Part) -> Iterator[Document]:
    topics = _topics()
    for name in sorted(topics):
        yield Document(topics[name], f"pydoc_data.topics: {name}")
    library = Path(sysconfig.get_path("stdlib"))
    for path in walk(library, skip=lambda name: name in _NOT_LIBRARY):
        if path.suffix == ".py":
            yield from _docstrings(path, path.relative_to(library).as_posix())


def detail(source: SourceConfig) -> str:
    return f"Python {platform.python_version()}"


def _topics() -> dict[str, str]:
    try:
        return importlib.import_module("pydoc_data.topics").topics
    except ImportError as e:
        remedy = "Install the whole standard library (on Debian: apt install libpython3-stdlib), or name a text file"
        raise InputError("data.source", NAME, "this Python came without its documentation, pydoc_data", remedy) from e


def _docstrings(path: Path, where: str) -> Iterator[Document]:
    """Every docstring in the source file, the module's first; the file is parsed and never imported."""
    try:
        with warnings.catch_warnings(action="ignore"):  # a library's own "\\d" is no business of ours
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and bad-encoding samples live in the library too
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield Document(text, f"{where}: {getattr(node, 'name', 'module')}")
