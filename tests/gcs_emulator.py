"""An emulator of Google Cloud Storage on this machine, for tests; a module that imports it is skipped where it is not installed."""

import contextlib
import functools
import http.server
import logging
import os
import threading
from collections.abc import Iterator
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # it would ask Google itself what kind of bucket it is
gcsfs = pytest.importorskip("gcsfs")
emulator = pytest.importorskip("gcp_storage_emulator.server")


class Server(http.server.HTTPServer):
    """The emulator with one bucket. `answer(method, name)` may give a status instead of its own answer; 0 breaks the connection."""

    request_queue_size = 128

    def __init__(self):
        self.storage = emulator.Storage(use_memory_fs=True)
        self.storage._write_config_to_file = lambda: None  # of all objects, at each write
        emulator.buckets.create_bucket("bucket", self.storage)
        self.answer = lambda method, name: None
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, self.storage))

    def handle_error(self, request, client_address):
        """Says nothing where the client did not wait for the answer."""

    def names(self):
        return set(self.storage.objects.get("bucket", ()))


class Handler(emulator.RequestHandler):
    """Adds what the emulator lacks: outages, and writes on condition that the object is as it was (`ifGenerationMatch`)."""

    def parse_request(self):
        if not super().parse_request():
            return False
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        name = query["name"][0] if "name" in query else unquote(url.path.partition("/o/")[2])
        status = self.server.answer(self.command, name)
        if status is None and "ifGenerationMatch" in query:
            there = self.server.storage.objects.get("bucket", {}).get(name, {"generation": "0"})
            status = None if query["ifGenerationMatch"] == [there["generation"]] else 412
        if status is None:
            return True
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.close_connection = True
        if status:
            self.send_error(status)
        return False


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    """A running server, which this process and those that it starts take for Google's."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    with Server() as server, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, f"http://127.0.0.1:{server.server_address[1]}")
        yield server
        server.shutdown()
