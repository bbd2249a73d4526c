"""Folders on this machine's disks and in Google Cloud Storage (gs://bucket/folder), in one way.

In a bucket a folder is no more than what the names of its objects have in common, and each object carries a checksum of its bytes.
"""

import base64
import contextlib
import hashlib
import importlib.util
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from mlm_jax.config import InputError

Place = Path | epath.Path  # on disk, in a bucket
WAIT_S = 60.0  # at most, for the first answer of a bucket; gcsfs tries for half a minute where it is refused
READ_S = 300.0  # at most, for all parts of files that are read together


class NotReached(RuntimeError):
    """A bucket could not be read or written."""


class File(NamedTuple):
    """What is known of a file without reading it."""

    bytes: int
    version: int  # another one after each write: the time in ns, the object's generation
    crc32c: str = ""  # of its bytes, in base64; buckets alone know it


def place(folder: str | os.PathLike[str]) -> Place:
    """The folder of that name; "gs:/bucket", which is what `pathlib` makes of "gs://bucket", is one in a bucket too.

    Raises:
      InputError: it is in a bucket, and the library that reaches buckets is not installed.
    """
    name = os.fspath(folder)
    if not name.startswith("gs:/"):
        return Path(name)
    name = re.sub("^gs:/+", "gs://", name)
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError("folder", name, "Google Cloud Storage needs gcsfs, which is not installed", 'pip install -e ".[gcs]"')
    import fsspec.config

    for library in ("gcs", "gs"):  # other processes write there, so a listing is never kept
        fsspec.config.conf.setdefault(library, {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # else it prints the traceback of what it raises
    return epath.Path(name)


def is_in_bucket(folder: Place) -> bool:
    return not isinstance(folder, Path)


def address(folder: Place) -> str:
    """The folder's name for other libraries, whatever the working directory is."""
    return str(folder if is_in_bucket(folder) else folder.absolute())


def files(folder: Place) -> dict[str, File]:
    """Every file below `folder`, by its path from there. Raises NotReached where it is in a bucket that cannot be listed."""
    if isinstance(folder, Path):
        stats = {path.relative_to(folder).as_posix(): path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
        return {name: File(stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
    root = str(folder).removeprefix("gs://").rstrip("/") + "/"
    with _reached(folder):
        found = _buckets().find(root, detail=True)
    return {name.removeprefix(root): File(int(o["size"]), int(o["generation"]), o["crc32c"]) for name, o in sorted(found.items())}


def move(folder: Place, new: Place) -> None:
    """Gives a folder another name; in a bucket every file is copied before the first is deleted."""
    if isinstance(folder, Path):
        folder.rename(new)
        return
    bucket, names = _buckets(), list(files(folder))
    bucket.copy([str(folder / name) for name in names], [str(new / name) for name in names])
    bucket.rm([str(folder / name) for name in names])


def write_text(path: Place, text: str) -> None:
    """Writes a file whole or not at all."""
    if not isinstance(path, Path):
        with _reached(path):
            path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else the end of the machine may leave the new name of an empty file
    partial.replace(path)


@contextlib.contextmanager
def named(path: str | Path) -> Iterator[None]:
    """An OSError inside says that it is of `path`."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e


def read_text(path: Place) -> str:
    """The text of a file. Raises NotReached where it is in a bucket that cannot be read."""
    if isinstance(path, Path):
        return path.read_text(encoding="utf-8")
    with _reached(path):
        return path.read_text(encoding="utf-8")


def read_ranges(parts: Sequence[tuple[epath.Path, int, int]]) -> list[bytes]:
    """Of each file in a bucket its bytes from the first number up to, not including, the second; they are asked for all at once.

    Raises:
      NotReached: one could not be read, in the six tries that gcsfs makes or within `READ_S` seconds, or has not so many bytes.
    """
    import fsspec.asyn

    if not parts:
        return []
    paths, starts, stops = zip(*parts, strict=True)
    with _reached(paths[0].parent):
        buckets, names = _buckets(), [str(path) for path in paths]
        found: Any = fsspec.asyn.sync(buckets.loop, buckets._cat_ranges, names, starts, stops, on_error="raise", timeout=READ_S)
    for (path, start, stop), raw in zip(parts, found, strict=True):
        if len(raw) != stop - start:
            raise NotReached(f"{path} cannot be read: {len(raw)} bytes came of {stop - start} from byte {start} on")
    return found


def check_writable(folder: epath.Path, *, field: str = "--out") -> float:
    """Writes a file into a folder of a bucket, reads it and takes it away; returns how many seconds the bucket's clock is ahead of this machine's.

    Raises:
      InputError: the bucket is not there, or does not let this be done.
      NotReached: it cannot be reached, after at most `WAIT_S` seconds; that may pass.
    """
    import fsspec.asyn

    name = f".writable_{secrets.token_hex(4)}"
    path, text = str(folder / name), name.encode()
    remedy = "See to the name of the bucket, the network and the permissions (storage.objects: create, get, list, delete)"
    try:
        buckets = _buckets()
        before = time.time()
        fsspec.asyn.sync(buckets.loop, buckets._pipe_file, path, text, timeout=WAIT_S)
        after = time.time()
        made: Any = fsspec.asyn.sync(buckets.loop, buckets._info, path, timeout=WAIT_S)
        same = fsspec.asyn.sync(buckets.loop, buckets._cat_file, path, timeout=WAIT_S) == text
        fsspec.asyn.sync(buckets.loop, buckets._rm_file, path, timeout=WAIT_S)
    except FileNotFoundError as e:
        raise InputError(field, str(folder), "there is no such bucket", remedy) from e
    except fsspec.asyn.FSTimeoutError as e:
        raise NotReached(f"{folder} cannot be reached: no answer within {WAIT_S:g} s") from e
    except Exception as e:  # whatever the library raised
        if isinstance(e, ConnectionError) or type(e).__module__.startswith("aiohttp.") or getattr(e, "code", 0) in (429, *range(500, 600)):
            raise NotReached(f"{folder} cannot be reached: {first_line(e)}") from e
        raise InputError(field, str(folder), f"cannot be written to ({first_line(e)})", remedy) from e
    if not same:
        raise InputError(field, str(folder), "gives back other bytes than were written", "See what is between this machine and the bucket")
    at = made["mtime"].timestamp()
    return at - min(max(at, before), after)


def send(folder: Path, names: Sequence[str], home: epath.Path) -> None:
    """Copies the files and folders of these names to the bucket, one after the other, without the files that are there with the same bytes.

    Raises:
      NotReached: one could not be written; those before it were.
    """
    with _reached(home):
        buckets = _buckets()
        for name in names:
            there = buckets.find(str(home / name), detail=True)
            for path in [folder / name] if (folder / name).is_file() else sorted(path for path in (folder / name).rglob("*") if path.is_file()):
                new = str(home / path.relative_to(folder).as_posix())
                if there.get(new.removeprefix("gs://"), {}).get("md5Hash") != _md5(path):
                    buckets.put_file(str(path), new)


def fetch(home: epath.Path, names: Sequence[str], folder: Path) -> None:
    """Copies the files and folders of these names from the bucket, one after the other; each file is whole or not there.

    Raises:
      InputError: a name of the bucket leads out of `folder`.
      NotReached: one could not be read; those before it were.
    """
    root = str(home).removeprefix("gs://") + "/"
    with _reached(home):
        buckets = _buckets()
        for path in (path for name in names for path in sorted(buckets.find(str(home / name)))):
            new = folder / path.removeprefix(root)
            if ".." in new.parts:
                raise InputError("folder", str(home), f"{path!r} leads out of it", "Remove that object")
            new.parent.mkdir(parents=True, exist_ok=True)
            partial = new.with_name(f".{new.name}.partial")
            buckets.get_file(path, str(partial))
            partial.replace(new)


def remove(home: epath.Path, names: Sequence[str]) -> None:
    """Takes the files and folders of these names away from the bucket, where they are there.

    Raises:
      NotReached: one could not be removed.
    """
    with _reached(home):
        buckets = _buckets()
        if paths := [path for name in names for path in buckets.find(str(home / name))]:
            buckets.rm(paths)


def first_line(reason: object) -> str:
    """Of a text or an error, cut after 200 characters; the kind of error where it says nothing."""
    return next((line for line in str(reason).splitlines() if line.strip()), type(reason).__name__)[:200]


@contextlib.contextmanager
def _reached(folder: epath.Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as e:  # whatever the library raised
        raise NotReached(f"{folder} cannot be reached: {first_line(e)}") from e


def _buckets() -> Any:
    """All buckets, as gcsfs has them."""
    import fsspec

    return fsspec.filesystem("gcs")


def _md5(path: Path) -> str:
    """As buckets tell it."""
    with path.open("rb") as file:
        return base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
