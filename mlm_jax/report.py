"""One run directory -> report.html, a page that needs no other file and no network, and loss.png, the curve on it."""

import dataclasses
import json
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mlm_jax.config import Config, InputError, diff, from_json
from mlm_jax.history import goodput, read_history
from mlm_jax.page import FAINT, INK, image, table, write_page

MOST_POINTS = 2000  # in one drawn line: more than the picture has columns

TRAIN, VALIDATION = "#2b6cb0", "#c05621"


def write_report(run_dir: Path) -> Path:
    """Writes report.html, and loss.png where metrics.jsonl holds any, into `run_dir`; returns the path of the page.

    A part whose file is not there is left out, so a run may be looked at while it trains.

    Raises:
      InputError: `run_dir` is no run, or one of its files cannot be read as what it should be.
    """
    if not any((run_dir / name).is_file() for name in ("config.json", "metrics.jsonl", "run.json")):
        raise InputError("run", str(run_dir), "not a run: no config.json, metrics.jsonl or run.json in it", "Name a folder that `mlm-jax run` made")
    config_text = _read(run_dir / "config.json")
    config = from_json(config_text, where=str(run_dir / "config.json")) if config_text else None
    name = config.name if config else run_dir.resolve().name
    run, evaluation = _read_object(run_dir / "run.json"), _read_object(run_dir / "evaluation.json")
    rows, unreadable = read_metrics(run_dir / "metrics.jsonl")
    history = read_history(run_dir)

    parts = [f"<h1>{escape(name)}</h1>", _facts(run, config, rows, history)]
    if rows:
        picture = run_dir / "loss.png"
        draw(rows, evaluation, name).savefig(picture, dpi=160)
        parts.append(f"<h2>Learning curve</h2>{image(picture.read_bytes(), 'Loss against steps')}")
        parts.append(f"<p>{unreadable} lines of metrics.jsonl could not be read.</p>" if unreadable else "")
    parts.append(table("Evaluation", (_figure(key, value) for key, value in evaluation.items())))
    samples = _read(run_dir / "samples.txt")
    parts.append(f"<h2>Samples</h2><pre>{escape(samples)}</pre>" if samples else "")
    starts = [row for row in history if "start" in row]
    parts.append(table("Starts", (_start(row) for row in starts)) if len(starts) > 1 else "")
    parts.append(_configuration(config) if config else "")
    return write_page(run_dir / "report.html", name, parts)


def _read(path: Path) -> str:
    """The text of a file, whatever its bytes (a sample may end inside a character); "" where there is no file."""
    return path.read_text("utf-8", errors="replace") if path.is_file() else ""


def _read_object(path: Path) -> dict[str, Any]:
    text = _read(path)
    try:
        values = json.loads(text or "{}")
    except json.JSONDecodeError as e:
        raise InputError(str(path), "", f"not JSON ({e})", "Remove the file and run the stage that makes it again") from e
    if not isinstance(values, dict):
        raise InputError(str(path), "", "not a JSON object", "Remove the file and run the stage that makes it again")
    return values


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of metrics.jsonl by step, one for each step, and how many lines could not be read.

    A killed run leaves a torn line, and steps that the resumed run writes again: the later row counts.
    """
    rows: dict[int, dict[str, Any]] = {}
    unreadable = 0
    for line in _read(path).splitlines():
        try:
            row = json.loads(line)
            rows.setdefault(int(row["step"]), {}).update(row)
        except (ValueError, TypeError, KeyError):  # no JSON, no object, no step
            unreadable += 1
    return [rows[step] for step in sorted(rows)], unreadable


def draw(rows: list[dict[str, Any]], evaluation: Mapping[str, Any], name: str) -> Figure:
    """The picture of a run: loss in nats per token and learning rate over steps, and bits per byte beside those of compressors."""
    bars = [(label, evaluation[key]) for key, label in COMPRESSION.items() if math.isfinite(evaluation.get(key, math.nan))]
    heights = {"loss": 4.0} | ({"rate": 1.1} if _series(rows, "lr")[0].size else {}) | ({"bars": 0.35 + 0.25 * len(bars)} if bars else {})
    figure = Figure(figsize=(9, sum(heights.values()) + 1), layout="constrained")
    axes = dict(zip(heights, figure.subplots(len(heights), height_ratios=list(heights.values()), squeeze=False).flat, strict=True))
    axes["loss"].set_title(name, loc="left", fontweight="bold", color=INK, parse_math=False)
    _draw_loss(axes["loss"], rows)
    steps_on = axes["loss"]
    if "rate" in axes:
        steps_on = axes["rate"]
        steps, rates = _series(rows, "lr")
        kept = thin(rates)
        steps_on.plot(steps[kept], rates[kept], color=INK, linewidth=1.2)
        steps_on.set_ylim(bottom=0)
        steps_on.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        steps_on.set_ylabel("learning rate")
        steps_on.sharex(axes["loss"])
        axes["loss"].tick_params(labelbottom=False)
    steps_on.set_xlabel("step")
    steps_on.xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in axes.values():
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(FAINT)
        panel.tick_params(color=FAINT, labelcolor=INK)
    if "bars" in axes:
        _draw_bars(axes["bars"], bars)
    return figure


def _draw_loss(axes: Axes, rows: list[dict[str, Any]]) -> None:
    steps, losses = _series(rows, "loss")
    reach = len(losses) // 100
    if losses.size:
        kept = thin(losses)
        width, alpha, label = (0.7, 0.3, None) if reach else (1.6, 1.0, "training")
        axes.plot(steps[kept], losses[kept], color=TRAIN, linewidth=width, alpha=alpha, label=label)
    if reach:
        smooth = smoothed(losses, reach)
        kept = thin(smooth)
        axes.plot(steps[kept], smooth[kept], color=TRAIN, linewidth=1.6, label=f"training, mean of {2 * reach + 1} rows")
    steps, losses = _series(rows, "val_loss")
    if losses.size:
        axes.plot(steps, losses, color=VALIDATION, linewidth=1.2, marker="o", markersize=4, label=f"validation, {losses[-1]:.3f} at the end")
    axes.set_ylabel("loss, nats per token")
    axes.grid(axis="y", color=FAINT, alpha=0.35, linewidth=0.6)
    if axes.lines:
        axes.legend(frameon=False, labelcolor=INK)


def _draw_bars(axes: Axes, bars: list[tuple[str, float]]) -> None:
    labels, values = zip(*bars, strict=True)
    drawn = axes.barh(labels, values, color=[VALIDATION, *[FAINT] * (len(bars) - 1)], height=0.65)
    axes.bar_label(drawn, fmt="%.3f", padding=4, color=INK)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("bits per byte of the validation text, less is better")


def _series(rows: list[dict[str, Any]], key: str) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Steps and values of the rows that hold `key`; NaN for null, which is no finite number."""
    found = [(row["step"], math.nan if row[key] is None else row[key]) for row in rows if isinstance(row.get(key, ""), int | float | None)]
    return np.array([step for step, _ in found], np.int64), np.array([value for _, value in found], np.float64)


def smoothed(values: Float[np.ndarray, " n"], reach: int) -> Float[np.ndarray, " n"]:
    """The mean of the finite values from `reach` before to `reach` after each; NaN where none is finite."""
    finite = np.isfinite(values)
    start = np.maximum(np.arange(len(values)) - reach, 0)
    end = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    totals = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    total, count = totals[end] - totals[start], counts[end] - counts[start]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def thin(values: Float[np.ndarray, " n"], most: int = MOST_POINTS) -> Int[np.ndarray, " m"]:
    """Indices of at most `most` values, in order: the least and the greatest of each stretch, so that no spike is lost."""
    if len(values) <= most:
        return np.arange(len(values))
    low, high = (np.where(np.isnan(values), never, values) for never in (np.inf, -np.inf))
    kept = set()
    for stretch in np.array_split(np.arange(len(values)), most // 2):
        kept |= {stretch[np.argmin(low[stretch])], stretch[np.argmax(high[stretch])]}
    return np.array(sorted(kept))


def _facts(run: Mapping[str, Any], config: Config | None, rows: list[dict[str, Any]], history: list[dict[str, Any]]) -> str:
    facts: list[tuple[str, str]] = []
    for key, value in run.items():
        if key == "experiment" and isinstance(value, dict):
            facts.append(("experiment", str(value.get("module", ""))))
        elif key == "versions" and isinstance(value, dict):
            facts.append(("versions", ", ".join(f"{library} {version}" for library, version in value.items())))
        elif isinstance(value, str | int | float):  # what else is nested is for programs
            facts.append(_figure(key, value))
    if rows:
        facts.append(("steps", f"{rows[-1]['step']:,}"))
    if rows and config:
        facts.append(("tokens trained on", f"{config.train.rows_before(rows[-1]['step']) * config.model.context_len:,}"))
    speeds = _series(rows, "tokens_per_s")[1]
    if speeds.size:
        facts.append(("speed, median", f"{np.median(speeds):,.0f} tokens/s"))
    mfu, peaks = _series(rows, "mfu")[1], _series(rows, "memory_peak_bytes")[1]
    if mfu.size:
        facts.append(("model FLOPs utilisation, median", f"{np.median(mfu):.1%}"))
    step_s, idle_s, data_s = (_series(rows, name)[1].sum() for name in ("step_s", "idle_s", "data_s"))
    if step_s:
        facts.append(("devices idle between steps", f"{idle_s / step_s:.2%} of the time, {data_s / step_s:.2%} for want of a batch"))
    if found := goodput(history, rows):
        facts.append(("goodput: time in steps that count", str(found)))
    if peaks.size:
        facts.append(("memory of a device, at most", f"{peaks.max() / 2**30:.2f} GiB"))
    return table("", facts)


# Bits per byte of the same text, ours first: key of evaluation.json -> label.
COMPRESSION = {
    "val_bits_per_byte": "this model",
    "xz_primed_bits_per_byte": "xz -9, primed",
    "xz_bits_per_byte": "xz -9",
}

# What a key of run.json or evaluation.json is called, and its unit; another key stands as it is.
NAMES = {
    "git_commit": ("git commit", ""),
    "vocab_size": ("vocabulary", " tokens"),
    "wall_time_s": ("wall time", " s"),
    "val_loss": ("validation loss", " nats per token"),
    "val_nats_per_character": ("validation loss", " nats per character"),
    "val_bits_per_byte": ("validation, bits per byte", ""),
    "val_bytes": ("validation text", " bytes"),
    "val_tokens": ("validation text", " tokens"),
    "xz_bits_per_byte": ("xz -9, bits per byte of the same text", ""),
    "xz_primed_bits_per_byte": ("xz -9 after the training text, bits per byte", ""),
}


def _figure(key: str, value: Any) -> tuple[str, str]:
    """Label and value of one figure, with its unit where we know it."""
    label, unit = NAMES.get(key, (key, ""))
    if isinstance(value, bool) or not isinstance(value, int | float):
        shown = value if isinstance(value, str) else json.dumps(value)
    else:
        shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" if abs(value) >= 0.01 else f"{value:.3g}"
    return label, shown + unit


def _start(row: dict[str, Any]) -> tuple[str, str]:
    """When the run was started, and where, on what and with what changes."""
    processes = f" in {row['processes']} processes" if row.get("processes", 1) > 1 else ""
    changes = "".join(f", {field} {old!r} → {new!r}" for field, (old, new) in row.get("changed", {}).items())
    return row["at"][:19].replace("T", " "), f"from step {row['start']:,} on {row.get('device', 'unknown devices')}{processes}{changes}"


def _configuration(config: Config) -> str:
    """Every field of every section; those that differ from the defaults are marked and carry the default."""
    defaults = {path: b for path, (_, b) in diff(config, Config(name=config.name)).items()}
    tables = []
    for section, values in dataclasses.asdict(config).items():
        if not isinstance(values, dict):
            continue
        lines = []
        for field, value in values.items():
            default = defaults.get(f"{section}.{field}")
            mark, note = ("", "") if default is None else (' class="changed"', f" <small>default {escape(str(default))}</small>")
            lines.append(f"<tr{mark}><th>{escape(field)}</th><td>{escape(str(value))}{note}</td></tr>")
        tables.append(f"<section><h3>{escape(section)}</h3><table>{''.join(lines)}</table></section>")
    return f'<h2>Configuration</h2><p>Marked: what differs from the defaults.</p><div class="sections">{"".join(tables)}</div>'
