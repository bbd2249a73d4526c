"""Data sets in the format of Hugging Face `datasets`, from the hub or from a folder, streamed: nothing is written to a cache."""

import logging
import os
from collections.abc import Iterator
from typing import Any

from mlm_jax.config import InputError, SourceConfig
from mlm_jax.data.sources.base import Item, Part, Record, fault, line, missing

PREFIX = "hf:"


def parts(source: SourceConfig) -> list[Part]:
    """One for each shard of the data set. Raises InputError where it cannot be reached, or has no such configuration or split."""
    count = _stream(source).num_shards
    return [Part(source.source, i, i + 1) for i in range(count)] if count > 1 else [Part(source.source)]


def read(source: SourceConfig, part: Part) -> Iterator[Item]:
    """The examples of a shard."""
    stream = _stream(source)
    place = source.source
    if part.stop:
        if part.stop > stream.num_shards:
            yield fault(source.source, "changed while being read", f"{stream.num_shards} shards now")
            return
        stream, place = stream.shard(num_shards=stream.num_shards, index=part.start), f"{source.source}:{part.start}"
    examples, index = iter(stream), 0
    while True:
        try:
            example = next(examples)
        except StopIteration:
            return
        except Exception as e:  # whatever the libraries underneath raise, also for a network that is gone
            yield fault(f"{place}:{index}", "damaged shard", f"{type(e).__name__}: {e}")
            return
        yield Record(example, f"{place}:{index}")
        index += 1


def detail(source: SourceConfig) -> str:
    """The library's version; of a folder also the number of files and their bytes."""
    datasets = _import(source.source)
    version = f"datasets {datasets.__version__}"
    if folder := _folder_and_config(source.source)[0]:
        sizes = [os.path.getsize(os.path.join(place, name)) for place, _, names in os.walk(folder) for name in names if not name.startswith(".")]
        version += f", {len(sizes)} files, {sum(sizes)} bytes"
    return version


def folder_of(source: str) -> str:
    """The folder that the source names, empty where it names none that is there."""
    return _folder_and_config(source)[0]


def _folder_and_config(source: str) -> tuple[str, str | None]:
    path = os.path.expanduser(source.removeprefix(PREFIX).rstrip("/"))
    if os.path.isdir(path):
        return path, None
    folder, _, config = path.rpartition("/")
    return (folder, config) if os.path.isdir(folder) else ("", None)


def _import(source: str) -> Any:
    try:
        import datasets

        logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # else it says what it raises
    except ImportError as e:
        raise missing(source, e) from e
    return datasets


def _stream(source: SourceConfig) -> Any:
    datasets = _import(source.source)
    name, config = _folder_and_config(source.source)
    if not name:
        user, _, rest = source.source.removeprefix(PREFIX).partition("/")
        rest, _, config = rest.partition("/")
        name = f"{user}/{rest}" if rest else user
    try:
        return datasets.load_dataset(name, config or None, split=source.split, streaming=True)
    except Exception as e:  # whatever the libraries underneath raise
        remedy = "Name hf:USER/NAME, hf:USER/NAME/CONFIG or a folder, and a split that it has; the hub needs a network, and HF_HUB_OFFLINE not set"
        raise InputError("data.source", source.source, f"cannot be opened with split {source.split} ({line(e)})", remedy) from e
