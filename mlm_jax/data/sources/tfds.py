"""TensorFlow Datasets, read from array_record files through `data_source`: `tfds.load` would need TensorFlow."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from mlm_jax.config import InputError, SourceConfig
from mlm_jax.data.sources.base import PART_EXAMPLES, Item, Part, Record, fault, line, missing

PREFIX = "tfds:"
_AT_ONCE = 100  # examples that are fetched together


def parts(source: SourceConfig) -> list[Part]:
    """Runs of `PART_EXAMPLES` examples. Raises InputError where there is no such data set, or it has no such split."""
    count = len(_examples(source))
    return [Part(source.source, start, min(start + PART_EXAMPLES, count)) for start in range(0, count, PART_EXAMPLES)]


def read(source: SourceConfig, part: Part) -> Iterator[Item]:
    """The examples of a part."""
    examples = _examples(source)
    if len(examples) < part.stop:
        yield fault(source.source, "changed while being read", f"{len(examples)} examples now")
    stop = min(part.stop, len(examples))
    for start in range(part.start, stop, _AT_ONCE):
        yield from _records(examples, range(start, min(start + _AT_ONCE, stop)), source.source)


def _records(examples: Any, indices: range, name: str) -> Iterator[Item]:
    try:
        found = examples.__getitems__(list(indices))
    except Exception:  # whatever the library raises: then one by one, to find which
        for index in indices:
            try:
                example = examples[index]
            except Exception as e:
                yield fault(f"{name}:{index}", "damaged example", e)
            else:
                yield Record(example, f"{name}:{index}")
        return
    for index, example in zip(indices, found, strict=True):
        yield Record(example, f"{name}:{index}")


def detail(source: SourceConfig) -> str:
    """The library's version; of a folder also the data set's and its number of examples."""
    tfds = _import(source.source)
    version = f"tensorflow_datasets {tfds.__version__}"
    if folder := folder_of(source.source):
        info = _builder(tfds, source, folder).info
        version += f", {info.full_name}, {sum(split.num_examples for split in info.splits.values())} examples"
    return version


def folder_of(source: str) -> str:
    """The folder that the source names, empty where it names none that is there."""
    folder = os.path.expanduser(source.removeprefix(PREFIX))
    return folder if os.path.isfile(os.path.join(folder, "dataset_info.json")) else ""


def _import(source: str) -> Any:
    try:
        import tensorflow_datasets as tfds

        for group in ("summarization", "text", "translate", "question_answering"):  # a builder in these is "not found" until its group is imported
            importlib.import_module(f"tensorflow_datasets.{group}")
    except ImportError as e:
        raise missing(source, e) from e
    return tfds


def _builder(tfds: Any, source: SourceConfig, folder: str) -> Any:
    try:
        return tfds.builder_from_directory(folder)
    except Exception as e:  # whatever the library raised
        raise InputError("data.source", source.source, f"cannot be read ({line(e)})", "Prepare the data set again") from e


def _examples(source: SourceConfig) -> Any:
    """All examples of the split, by index."""
    tfds = _import(source.source)
    name = source.source.removeprefix(PREFIX)
    folder = folder_of(source.source)
    if not folder and (("/" in name and os.path.exists(os.path.expanduser(name))) or name.startswith(("/", "~", "."))):
        raise InputError("data.source", source.source, "no folder with a dataset_info.json", "Name the folder of one version, as tfds writes it")
    try:
        if folder:
            return _builder(tfds, source, folder).as_data_source(split=source.split)
        with contextlib.redirect_stdout(sys.stderr):  # where it is not here yet, the library says that it fetches it
            return tfds.data_source(name, split=source.split)
    except InputError:
        raise
    except NotImplementedError as e:
        remedy = "Prepare it anew with file_format='array_record', the one that is read without TensorFlow"
        raise InputError("data.source", source.source, line(e), remedy) from e
    except Exception as e:  # DatasetNotFoundError, a network that is not there, no such split; the rest of a message may list a thousand names
        remedy = f"Choose a name, or name/config, from https://www.tensorflow.org/datasets/catalog that has a split {source.split}"
        raise InputError("data.source", source.source, line(str(e).partition("\n")[0]) or type(e).__name__, remedy) from e
