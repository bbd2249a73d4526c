"""Records -> documents: the fields that `SourceConfig` names."""

from typing import Any

from mlm_jax.config import InputError, SourceConfig, one_of
from mlm_jax.data.audit import size
from mlm_jax.data.document import Document, Fault
from mlm_jax.data.sources.base import MAX_DOCUMENT, Record, fault, not_text, printable, too_long

_ABSENT = object()


def document(record: Record, source: SourceConfig) -> Document | Fault:
    """The document of a record, or why it has none."""
    texts = []
    for path in (source.text_field, *([source.prompt_field] if source.prompt_field else [])):
        value = _at(record.fields, path)
        if value is _ABSENT:
            return fault(record.where, f"no field {path}", f"fields: {', '.join(_paths(record.fields))}", record.bytes)
        try:
            text = _text(value)
        except UnicodeDecodeError as e:
            return not_text(record.where, "UTF-8", e, 0, record.bytes)
        if text is None:
            return fault(record.where, f"field {path} is not text", type(value).__name__, record.bytes)
        if len(text) > MAX_DOCUMENT or (len(text) > MAX_DOCUMENT // 4 and size(text) > MAX_DOCUMENT):
            return too_long(record.where, size(text))
        texts.append(text)
    url = _at(record.fields, source.url_field)
    url = url.decode("utf-8", "replace") if isinstance(url, bytes) else url
    return Document(texts[0], record.where, prompt=printable("".join(texts[1:])), url=printable(url) if isinstance(url, str) else "")


def check(record: Record, source: SourceConfig) -> None:
    """Raises InputError, with the closest name, where the record lacks a field that `source` names, or the field never holds text."""
    for name in ("text_field", "prompt_field"):
        path = getattr(source, name)
        if not path:
            continue
        value, there = _at(record.fields, path), _paths(record.fields)
        if value is _ABSENT:
            one_of(f"{record.where}: data.{name}", path, there)
            raise InputError(f"{record.where}: data.{name}", path, "not in all items of the list that it is in", f"Choose from: {', '.join(there)}")
        if value is not None and not isinstance(value, bytes) and _text(value) is None:
            remedy = f"Name a field that holds text; fields: {', '.join(there)}"
            raise InputError(f"{record.where}: data.{name}", path, f"holds {type(value).__name__}, not text", remedy)


def _at(value: Any, path: str) -> Any:
    """What stands at a dotted path; of a list what stands there in each of its items."""
    if isinstance(value, list | tuple):
        found = [_at(item, path) for item in value]
        return _ABSENT if any(item is _ABSENT for item in found) else found
    if not isinstance(value, dict):
        return _ABSENT
    if path in value:
        return value[path]
    first, _, rest = path.partition(".")
    return _at(value[first], rest) if rest and first in value else _ABSENT


def _text(value: Any) -> str | None:
    """The text, or the texts of a list, one a line; None where it is none. Raises UnicodeDecodeError for bytes that are not UTF-8."""
    if isinstance(value, str):
        return str(value)  # not a NumPy scalar
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if hasattr(value, "tolist"):  # a NumPy array
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return None
    texts = [_text(item) for item in value]
    return None if None in texts else "\n".join(text for text in texts if text is not None)


def _paths(fields: dict[str, Any]) -> list[str]:
    """The dotted paths of all fields."""
    return [
        path for key, value in fields.items() for path in ([f"{key}.{rest}" for rest in _paths(value)] if isinstance(value, dict) else [str(key)])
    ]
