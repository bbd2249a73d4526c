"""Reading a source as one process does, and what it is refused with."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from mlm_jax.config import InputError, SourceConfig
from mlm_jax.data import sources
from mlm_jax.data.document import Document, Fault


class Found(NamedTuple):
    """What a source gave, in order."""

    documents: list[Document]
    faults: list[Fault]

    @property
    def texts(self) -> list[str]:
        return [document.text for document in self.documents]

    @property
    def kinds(self) -> list[str]:
        return [fault.kind for fault in self.faults]


def _read(source: Path | str, **fields: str) -> Found:
    config = SourceConfig(source=str(source), **fields)
    items = [item for part in sources.parts(config) for item in sources.read(config, part)]
    assert {type(item) for item in items} <= {Document, Fault}
    for fault in (item for item in items if isinstance(item, Fault)):
        assert len(fault.detail.splitlines()) <= 1
        (fault.where + fault.kind + fault.detail).encode("utf-8")
    return Found([item for item in items if isinstance(item, Document)], [item for item in items if isinstance(item, Fault)])


def _refused(source: Path | str, **fields: str) -> str:
    with pytest.raises(InputError) as caught:
        _read(source, **fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def read() -> Callable[..., Found]:
    """Everything that a source holds."""
    return _read


@pytest.fixture
def refused() -> Callable[..., str]:
    """The one line with which a source is refused."""
    return _refused
