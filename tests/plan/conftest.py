"""What several tests of plans share."""

import fcntl
import json
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[[str, Callable[[], Any]], Any]:
    """(name, make) -> the JSON that `make` gives, called by the first of pytest's processes that asks: compiling for a TPU takes minutes."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder if worker_id == "master" else folder.parent  # of all processes of this run

    def made(name: str, make: Callable[[], Any]) -> Any:
        file = folder / f"{name}.json"
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                text = json.dumps(make())
                file.write_text(text)
        return json.loads(file.read_text())

    return made
