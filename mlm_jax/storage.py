"""Folders on this machine's disks and in Google Cloud Storage (gs://bucket/folder), in one way.

In a bucket a folder is no more than what the names of its objects have in common, and each object carries a checksum of its bytes.
"""

import importlib.util
import os
import re
from pathlib import Path
from typing import NamedTuple

from etils import epath

from mlm_jax.config import InputError

Place = Path | epath.Path  # on disk, in a bucket


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
    return epath.Path(name)


def is_in_bucket(folder: Place) -> bool:
    return not isinstance(folder, Path)


def address(folder: Place) -> str:
    """The folder's name for other libraries, whatever the working directory is."""
    return str(folder if is_in_bucket(folder) else folder.absolute())


def files(folder: Place) -> dict[str, File]:
    """Every file below `folder`, by its path from there."""
    if isinstance(folder, Path):
        stats = {path.relative_to(folder).as_posix(): path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
        return {name: File(stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
    import fsspec

    root = str(folder).removeprefix("gs://").rstrip("/") + "/"
    found = fsspec.filesystem("gcs").find(root, detail=True)
    return {name.removeprefix(root): File(int(o["size"]), int(o["generation"]), o["crc32c"]) for name, o in sorted(found.items())}


def move(folder: Place, new: Place) -> None:
    """Gives a folder another name; in a bucket every file is copied before the first is deleted."""
    if isinstance(folder, Path):
        folder.rename(new)
        return
    import fsspec

    bucket, names = fsspec.filesystem("gcs"), list(files(folder))
    bucket.copy([str(folder / name) for name in names], [str(new / name) for name in names])
    bucket.rm([str(folder / name) for name in names])


def write_text(path: Place, text: str) -> None:
    """Writes a file whole or not at all."""
    if not isinstance(path, Path):
        path.write_text(text)
        return
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
