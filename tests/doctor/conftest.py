"""A Python environment, a bucket and a TPU VM, none of which is real."""

import http.server
import importlib
import shlex
import shutil
import subprocess
import sys
import threading
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlm_jax import storage


def wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    """An empty package that can be installed."""
    info, extras = f"{name}-{version}.dist-info", {line.partition("extra == ")[2].strip('"') for line in requires} - {""}
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
    metadata += [f"Provides-Extra: {extra}" for extra in extras]
    files = {
        f"{info}/METADATA": "\n".join(metadata) + "\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        for path, text in files.items():
            file.writestr(path, text)
        file.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]))


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """An environment that this process takes for its own: `place(name, version)` plants an empty package, `pip(command)` is a user's."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel(folder, "jax", "0.10.2", "jaxlib<=0.10.2,>=0.10.1", 'libtpu==0.0.42.*; extra == "tpu"', 'jaxlib<=0.10.2,>=0.10.2; extra == "tpu"')
    versions = {"jaxlib": ("0.9.2", "0.10.1", "0.10.2"), "libtpu": ("0.0.40", "0.0.42.1"), "libtpu-nightly": ("0.1",), "optax": ("0.1.9", "0.2.8")}
    versions |= {"pytest": ("8.4",), "ruff": ("0.14",), "wandb": ("0.1", "0.18")}
    for name, version in ((name, version) for name, some in versions.items() for version in some):
        wheel(folder, name.replace("-", "_"), version)
    venv.create(tmp_path / "venv", with_pip=False)
    packages = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    monkeypatch.syspath_prepend(packages)

    def place(name: str, version: str) -> None:
        name = name.replace("-", "_")
        for old in packages.glob(f"{name}-*.dist-info"):
            shutil.rmtree(old)
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl") as file:
            file.extractall(packages)
        importlib.invalidate_caches()

    def pip(command: str) -> None:
        for words in map(shlex.split, command.split(" && ")):
            assert words[:3] == [sys.executable, "-m", "pip"]
            options = ["--no-index", "--find-links", str(folder)] if words[3] == "install" else ["--yes"]
            where = ["--python", str(tmp_path / "venv"), words[3], *options, "--quiet", "--disable-pip-version-check"]
            subprocess.run([*words[:3], *where, *words[4:]], check=True, timeout=120)
            importlib.invalidate_caches()

    return SimpleNamespace(place=place, pip=pip)


@pytest.fixture
def bucket(monkeypatch):
    from tests.gcs_emulator import serve

    monkeypatch.setattr(storage, "WAIT_S", 2.0)
    with serve() as server:
        yield server


@pytest.fixture
def tpu_vm(monkeypatch):
    """A machine with TPU chips as JAX sees it, and a stand-in for Google's metadata: {name of an attribute: its text}, at first none."""
    from jax._src.clusters import cloud_tpu_cluster

    attributes: dict[str, str] = {}

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            text = attributes.get(self.path.removeprefix("/computeMetadata/v1/instance/attributes/"))
            known = text is not None and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write((text if known else "<!DOCTYPE html><title>404: not found</title>").encode())

        def log_message(self, *arguments):
            """Says nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
        monkeypatch.setattr(cloud_tpu_cluster.time, "sleep", lambda seconds: None)
        yield attributes
        server.shutdown()
