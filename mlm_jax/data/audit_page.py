"""The audit of a folder of token shards -> audit.html, a page with pictures."""

import io
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlm_jax.data.shards import SPLITS, Manifest
from mlm_jax.page import FAINT, INK, image, numbers, write_page

_LANGUAGES, _REASONS = 12, 25  # that are drawn at most
_COLOURS = ("#2b6cb0", "#c05621", "#dd9a5b", "#8f3f71", "#b9770e", "#6b8e23", "#5f6c7b")


def write_audit(manifest: Manifest, folder: Path) -> Path:
    """Writes audit.html into `folder`; returns its path."""
    sources = manifest.audit["sources"]
    parts = [f"<h1>{escape(', '.join(source.source for source in manifest.config.sources))}</h1>", _overview(manifest)]
    if sources:
        parts.append(_picture(_draw_losses(sources), "What took away how many of the bytes, of each source"))
        parts.append(_picture(_draw_histograms(manifest.audit), "Lengths of documents, languages, and sizes of groups of copies"))
    parts += [part for name, counts in sources.items() for part in _source(name, counts)]
    parts.append(_tokenizers(manifest.audit["tokenizers"]))
    return write_page(folder / "audit.html", "What became of the text", parts)


def _overview(manifest: Manifest) -> str:
    rows = []
    for stated, made in zip(manifest.config.sources, manifest.sources, strict=True):
        counts = manifest.audit["sources"].get(stated.label)
        read, kept = (counts["read"], counts["kept"]) if counts else ({"documents": 0, "bytes": 0},) * 2
        faults = sum(entry["documents"] for entry in counts["faults"].values()) if counts else 0
        tokens = [f"{made.splits[split].tokens:,}" for split in SPLITS]
        shares = (f"{kept[unit] / read[unit]:.1%}" if read[unit] else "" for unit in ("documents", "bytes"))
        rows.append([stated.label, f"{read['documents']:,}", f"{read['bytes']:,}", f"{faults:,}", *shares, *tokens])
    return numbers(["source", "documents", "bytes", "faults", "documents kept", "bytes kept", "training tokens", "held-out tokens"], rows)


def _losses(counts: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """What each rule took away: its name and reason, documents, bytes."""
    for rule, entry in counts["rules"].items():
        if entry["changed"]["documents"]:
            yield f"{rule}: changed", entry["changed"]["documents"], entry["changed"]["bytes"]
        for reason, lost in entry["dropped"].items():
            yield f"{rule}: {reason}", lost["documents"], lost["bytes"]


def _draw_losses(sources: dict[str, Any]) -> Figure:
    """What took text away, the most first: for each reason and source a bar of its share of the bytes read."""
    shares = {name: {what: 100 * n / max(counts["read"]["bytes"], 1) for what, _, n in _losses(counts)} for name, counts in sources.items()}
    totals = {what: sum(found.get(what, 0) for found in shares.values()) for found in shares.values() for what in found}
    reasons = sorted(totals, key=lambda what: -totals[what])[:_REASONS]
    figure = Figure(figsize=(9, 1.2 + 0.32 * max(len(reasons), 1)), layout="constrained")
    axes, height = figure.subplots(), 0.8 / len(sources)
    for i, (name, found) in enumerate(shares.items()):
        places = [row + (i - (len(sources) - 1) / 2) * height for row in range(len(reasons))]
        axes.barh(places, [max(found.get(what, 0), 0) for what in reasons], height=height, label=name, color=_COLOURS[i % len(_COLOURS)])
    axes.set_yticks(range(len(reasons)), reasons, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("% of the bytes read that were taken away")
    if len(sources) > 1 and reasons:
        axes.legend(frameon=False, labelcolor=INK)
    _plain(axes)
    return figure


def _draw_histograms(audit: dict[str, Any]) -> Figure:
    """Lengths and languages of the documents that are kept, and how many were how often the same."""
    tables = {name: _sums([counts[name] for counts in audit["sources"].values()]) for name in ("lengths", "languages")}
    groups = {kind: sizes for kind, sizes in audit["groups"].items() if sizes}
    shown = [name for name in ("lengths", "languages") if tables[name]] + (["groups"] if groups else [])
    figure = Figure(figsize=(9, 3), layout="constrained")
    for name, axes in zip(shown, figure.subplots(1, max(len(shown), 1), squeeze=False).flat, strict=False):
        if name == "lengths":
            powers = range(min(map(int, tables[name])), max(map(int, tables[name])) + 1)
            axes.bar([str(2**power) for power in powers], [tables[name].get(str(power), 0) for power in powers], color=_COLOURS[0])
            axes.tick_params(axis="x", rotation=60)
            axes.set_xlabel("characters of a document, at least")
        elif name == "languages":
            most = sorted(tables[name].items(), key=lambda entry: (-entry[1], entry[0]))[:_LANGUAGES]
            axes.bar([language for language, _ in most], [count for _, count in most], color=_COLOURS[0])
            axes.set_xlabel("language")
        else:
            sizes = sorted({int(size) for found in groups.values() for size in found})
            for i, (kind, found) in enumerate(groups.items()):
                places = [place + (i - (len(groups) - 1) / 2) * 0.8 / len(groups) for place in range(len(sizes))]
                axes.bar(places, [found.get(str(size), 0) for size in sizes], width=0.8 / len(groups), label=kind, color=_COLOURS[i])
            axes.set_xticks(range(len(sizes)), list(map(str, sizes)))
            axes.set_yscale("log")
            axes.set_xlabel("size of a group of copies")
            axes.legend(frameon=False, labelcolor=INK)
        axes.set_ylabel("groups" if name == "groups" else "documents kept")
        _plain(axes)
    return figure


def _sums(tables: list[dict[str, int]]) -> dict[str, int]:
    return {key: sum(table.get(key, 0) for table in tables) for table in tables for key in table}


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(color=FAINT, labelcolor=INK)


def _picture(figure: Figure, what: str) -> str:
    raw = io.BytesIO()
    figure.savefig(raw, dpi=160, format="png")
    return image(raw.getvalue(), what)


def _source(name: str, counts: dict[str, Any]) -> Iterator[str]:
    """What happened to the documents of a source, rule by rule, with examples."""
    yield f"<h2>{escape(name)}</h2>"
    read = counts["read"]
    rows = [["read", f"{read['documents']:,}", f"{read['bytes']:,}", "100.0%"]]
    rows += [[what, f"{documents:,}", f"{n:,}", f"{n / max(read['bytes'], 1):.1%}"] for what, documents, n in _losses(counts)]
    rows.append(
        ["kept", f"{counts['kept']['documents']:,}", f"{counts['kept']['bytes']:,}", f"{counts['kept']['bytes'] / max(read['bytes'], 1):.1%}"]
    )
    yield numbers(["", "documents", "bytes", "of the bytes read"], rows)
    if counts["faults"]:
        yield "<h3>What could not be read</h3>"
        yield numbers(
            ["fault", "times", "bytes"], [[kind, f"{entry['documents']:,}", f"{entry['bytes']:,}"] for kind, entry in counts["faults"].items()]
        )
        for kind, entry in counts["faults"].items():
            yield _examples(f"{kind}: where", entry["examples"])
    for rule, entry in counts["rules"].items():
        for reason, lost in entry["dropped"].items():
            yield _examples(f"dropped by {rule}: {reason}", [f"{example['where']}\n{example['text']}" for example in lost["examples"]])


def _examples(what: str, texts: list[str]) -> str:
    return f"<details><summary>{escape(what)}</summary>{''.join(f'<pre>{escape(text)}</pre>' for text in texts)}</details>"


def _tokenizers(compared: dict[str, Any]) -> str:
    """What a sample of the text costs, by tokenizer."""
    found = {name: figures for name, figures in compared.items() if isinstance(figures, dict)}
    if not found:
        return ""
    names = list(next(iter(found.values())))
    rows = [
        [name, *(f"{figures[key]:,}" if isinstance(figures[key], int) else f"{figures[key]:.3f}" for key in names)] for name, figures in found.items()
    ]
    text = {"val": "held-out", "train": "training"}[compared["text"]]
    heading = f"<h2>Tokenizers</h2><p>On {text} text; fertility is tokens_per_word.</p>"
    return heading + numbers(["", *names], rows)
