"""What became of every document: counts by source and by rule, with examples; parts of it add up to the whole."""

import math
from typing import Any

from mlm_jax.data.document import Document, Dropped, Fault

EXAMPLES = 5  # of what was dropped, for each reason
_EXAMPLE_CHARACTERS = 300


def size(text: str) -> int:
    """Bytes in UTF-8; half of a surrogate pair, which has none, counts three."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


class Audit:
    """The counts of one source, or of a part of it.

    Of each rule the bytes that come in are those that it drops, those by which it changes documents, and those that go on: bytes read are
    bytes kept, dropped and lost by changes. `counts` are plain numbers, texts, lists and dicts, for JSON; `merged` adds two.
    """

    def __init__(self) -> None:
        self.counts: dict[str, Any] = {"read": _nothing(), "kept": _nothing(), "faults": {}, "rules": {}, "languages": {}, "lengths": {}}

    def read(self, document: Document) -> None:
        _add(self.counts["read"], size(document.text))

    def fault(self, fault: Fault) -> None:
        """Something that is no document; its bytes, as far as known, are not among those read."""
        entry = self.counts["faults"].setdefault(fault.kind, _nothing() | {"examples": []})
        _add(entry, fault.bytes)
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append(f"{fault.where}: {fault.detail}" if fault.detail else fault.where)

    def rule(self, name: str, before: Document, after: Document | Dropped) -> None:
        """What the rule made of a document."""
        entry = self.counts["rules"].setdefault(name, {"changed": _nothing(), "dropped": {}})
        if isinstance(after, Dropped):
            reason = entry["dropped"].setdefault(after.reason, _nothing() | {"examples": []})
            _add(reason, size(before.text))
            if len(reason["examples"]) < EXAMPLES:
                reason["examples"].append({"where": before.where, "text": before.text[:_EXAMPLE_CHARACTERS].encode("utf-8", "replace").decode()})
        elif (after.text, after.prompt) != (before.text, before.prompt):
            _add(entry["changed"], size(before.text) - size(after.text))

    def keep(self, document: Document) -> None:
        _add(self.counts["kept"], size(document.text))
        for table, key in (("languages", document.language), ("lengths", str(int(math.log2(len(document.text) or 1))))):
            if key:
                self.counts[table][key] = self.counts[table].get(key, 0) + 1


def _nothing() -> dict[str, Any]:
    return {"documents": 0, "bytes": 0}


def _add(entry: dict[str, Any], n_bytes: int) -> None:
    entry["documents"] += 1
    entry["bytes"] += n_bytes


def merged(a: Any, b: Any) -> Any:
    """The counts of two parts as those of the whole: numbers are added, of lists the first few stay."""
    if isinstance(a, dict):
        return {key: merged(a[key], b[key]) if key in a and key in b else a.get(key, b.get(key)) for key in [*a, *(key for key in b if key not in a)]}
    return (a + b)[:EXAMPLES] if isinstance(a, list) else a + b
