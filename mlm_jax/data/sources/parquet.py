"""Parquet files, by their row groups."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlm_jax.config import SourceConfig
from mlm_jax.data.sources.base import EMPTY_FILE, PART_BYTES, Item, Part, Record, fault, not_text, printable

_ROWS = 64  # decoded at once: each may have megabytes


def _opened(path: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)


def parquet_parts(path: Path) -> list[Part]:
    """Row groups that have `PART_BYTES` together; the whole file in one where it cannot be read, which `parquet_items` tells."""
    import pyarrow

    try:
        with _opened(path) as file:
            sizes = _sizes(file)
    except (OSError, ValueError, pyarrow.ArrowException):
        return [Part(str(path), size=path.stat().st_size)]
    borders, held = [0], 0
    for i, size in enumerate(sizes):
        if held and held + size > PART_BYTES:
            borders.append(i)
            held = 0
        held += size
    ends = [*borders[1:], 0]  # the last goes to the end, so that `parquet_items` sees a file that has grown
    return [Part(str(path), start, stop, sum(sizes[start : stop or None])) for start, stop in zip(borders, ends, strict=True)]


def _sizes(file: Any) -> list[int]:
    return [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]


def parquet_items(source: SourceConfig, part: Part) -> Iterator[Item]:
    """The rows of a part; of a row group that is damaged those before the damage."""
    import pyarrow

    path, name = Path(part.name), printable(part.name)
    try:
        file = _opened(path)
    except (OSError, ValueError, pyarrow.ArrowException) as e:
        if isinstance(e, OSError) and e.errno:  # of the disk, not of what stands on it
            raise
        yield fault(name, "damaged parquet", e, part.size)
        return
    with file:
        sizes = _sizes(file)
        if part.stop > len(sizes) or sum(sizes[part.start : part.stop or None]) != part.size:
            yield fault(name, "changed while being read", "", part.size)
            return
        if not file.metadata.num_rows:
            yield fault(name, EMPTY_FILE)
            return
        columns = [column for column in file.schema_arrow.names if _needed(column, source)]
        row = sum(file.metadata.row_group(i).num_rows for i in range(part.start))
        for group in range(part.start, part.stop or len(sizes)):
            if any(_leads_to(column, source.text_field) for column in columns):
                yield from _rows(file, group, columns, name, row, sizes[group])
            else:  # all its rows lack the field: that is told once
                yield Record(dict.fromkeys(column.path for column in file.schema), f"{name}:{row + 1}", sizes[group])
            row += file.metadata.row_group(group).num_rows


def _needed(column: str, source: SourceConfig) -> bool:
    return any(_leads_to(column, path) for path in (source.text_field, source.prompt_field, source.url_field))


def _leads_to(column: str, path: str) -> bool:
    return path == column or path.startswith(f"{column}.")


def _rows(file: Any, group: int, columns: list[str], name: str, begin: int, size: int) -> Iterator[Item]:
    import pyarrow

    number = begin
    try:
        for batch in file.iter_batches(_ROWS, row_groups=[group], columns=columns):
            for row in _values(batch):
                number += 1
                where = f"{name}:{number}"
                yield not_text(where, "UTF-8", row, 0, len(row.object)) if isinstance(row, UnicodeDecodeError) else Record(row, where)
    except (OSError, ValueError, pyarrow.ArrowException) as e:
        yield fault(f"{name}:{number + 1}", "damaged parquet", e, size)


def _values(batch: Any) -> list[Any]:
    """The rows of a batch; in place of one that holds what is not UTF-8 the error."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as e:
        return [row for i in range(len(batch)) for row in _values(batch.slice(i, 1))] if len(batch) > 1 else [e]
