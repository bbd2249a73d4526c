"""The report of a run is one page that holds everything, and says nothing that the run does not."""

import base64
import io
import json
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from mlm_jax.config import Config, InputError, override, to_json
from mlm_jax.report import draw, read_metrics, smoothed, thin, write_report

CONFIG = override(
    Config(name="small"), {"optim.peak_lr": 2e-3, "optim.warmup_steps": 1, "train.steps": 40, "train.batch_size": 4, "model.context_len": 32}
)
ROWS = [{"step": step, "loss": 5 - step / 20, "lr": 1e-3, "tokens_per_s": 1000.0 * step} for step in range(1, 41)]
VALIDATIONS = [{"step": 20, "val_loss": 4.1}, {"step": 40, "val_loss": 3.25}]


def write_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(to_json(CONFIG))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS + VALIDATIONS))
    run = {
        "experiment": {"module": "experiments.small", "files": []},
        "git_commit": "abc123",
        "versions": {"jax": "0.10.2"},
        "device": "1 x TPU v5e",
        "parameters": 124439808,
    }
    (folder / "run.json").write_text(json.dumps(run))
    evaluation = {"val_loss": 3.25, "val_bits_per_byte": 1.5, "xz_bits_per_byte": 2.25, "xz_primed_bits_per_byte": 1.75, "other": [1, 2]}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "samples.txt").write_text("Once <script>alert('x')</script> & \"upon\"")
    return folder


def text_of(page: str) -> str:
    """What a reader sees: tags and pictures taken away, one space where they were."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page[page.index("<body>") :]))


def test_a_page_shows_what_each_file_of_the_run_holds(tmp_path):
    path = write_report(write_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "report.html"
    text = text_of(path.read_text("utf-8"))
    for shown in (
        "small",
        "experiment experiments.small git commit abc123",
        "versions jax 0.10.2",
        "device 1 x TPU v5e",
        "parameters 124,439,808",
        "steps 40",
        "tokens trained on 5,120",  # 40 steps x 4 windows x 32 tokens
        "speed, median 20,500 tokens/s",  # of 1,000 .. 40,000
        "validation loss 3.2500 nats per token",
        "xz -9, bits per byte of the same text 2.2500",
        "other [1, 2]",
        "peak_lr 0.002 default 0.0006",
        "context_len 32 default 1024",
        "clip_norm 1.0",
    ):
        assert shown in text, shown
    assert "clip_norm 1.0 default" not in text


def test_the_page_runs_nothing_and_loads_nothing(tmp_path):
    folder = write_run(tmp_path / "run")
    hostile = "<img src=x onerror=alert(1)>"
    (folder / "run.json").write_text(json.dumps({"device": hostile, hostile: 1, "versions": {hostile: hostile}}))
    (folder / "evaluation.json").write_text(json.dumps({hostile: hostile}))
    (folder / "config.json").write_text(to_json(override(CONFIG, {"data.source": hostile, "sample.prompt": "</pre><script>"})))
    page = write_report(folder).read_text("utf-8")
    assert "<script" not in page and "<img src=x" not in page
    assert "Once &lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;upon&quot;" in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") == 7
    assert set(re.findall(r'(?:src|href)="(.{5})', page)) == {"data:"}


def test_the_picture_on_the_page_is_the_file_beside_it(tmp_path):
    page = write_report(write_run(tmp_path / "run")).read_text("utf-8")
    (encoded,) = re.findall(r"data:image/png;base64,([^\"]+)", page)
    png = (tmp_path / "run" / "loss.png").read_bytes()
    assert base64.b64decode(encoded) == png
    picture = matplotlib.image.imread(io.BytesIO(png))
    assert picture.shape[1] == 9 * 160 and picture.min() < 0.5  # something is drawn


def test_the_same_run_gives_the_same_page(tmp_path):
    folder = write_run(tmp_path / "run")
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def test_the_curve_shows_the_rows(tmp_path):
    figure = draw(ROWS + VALIDATIONS, {"val_bits_per_byte": 1.5, "xz_bits_per_byte": 2.25}, "small")
    loss, rate, bars = figure.axes
    training, validation = loss.lines
    assert np.array_equal(training.get_xydata(), [(row["step"], row["loss"]) for row in ROWS])
    assert np.array_equal(validation.get_xydata(), [(20, 4.1), (40, 3.25)])
    assert "validation, 3.250 at the end" in [entry.get_text() for entry in loss.get_legend().get_texts()]
    assert np.array_equal(rate.lines[0].get_ydata(), [1e-3] * 40)
    assert [bar.get_width() for bar in bars.patches] == [1.5, 2.25]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["this model", "xz -9"]
    assert loss.get_ylabel() == "loss, nats per token" and rate.get_xlabel() == "step"


@pytest.mark.parametrize("missing", ["config.json", "metrics.jsonl", "run.json", "evaluation.json", "samples.txt"])
def test_a_part_without_its_file_is_left_out(tmp_path, missing):
    folder = write_run(tmp_path / "run")
    (folder / missing).unlink()
    page = write_report(folder).read_text("utf-8")
    heading = {"config.json": "Configuration", "metrics.jsonl": "Learning curve", "evaluation.json": "Evaluation", "samples.txt": "Samples"}
    assert [f"<h2>{title}</h2>" in page for title in heading.values()] == [name != missing for name in heading]
    assert (folder / "loss.png").exists() == (missing != "metrics.jsonl")
    assert ("git commit" in page) == (missing != "run.json")
    if missing == "config.json":
        assert "<h1>run</h1>" in page  # called by its folder


def test_a_long_run_is_drawn_with_few_points_and_all_its_spikes():
    values = np.sin(np.arange(100_000) / 7000)
    values[12_345], values[77_777], values[50_000] = 9.0, -9.0, np.nan
    kept = thin(values)
    assert len(kept) <= 2000 and np.all(np.diff(kept) > 0)
    assert {12_345, 77_777} <= set(kept)
    figure = draw([{"step": step, "loss": float(loss)} for step, loss in enumerate(values)], {}, "long")
    assert all(len(line.get_xdata()) <= 2000 for axes in figure.axes for line in axes.lines)
    assert np.array_equal(thin(values[:2000]), np.arange(2000))


def test_the_smooth_line_is_the_mean_of_the_neighbours():
    values = np.array([1.0, 2.0, 6.0, np.nan, 4.0])
    assert np.allclose(smoothed(values, 1), [1.5, 3.0, 4.0, 5.0, 4.0])
    assert np.isnan(smoothed(np.array([np.nan, np.nan, 3.0]), 1)[0])
    noisy = draw([{"step": step, "loss": float(step % 2)} for step in range(400)], {}, "noisy")
    assert len(noisy.axes[0].lines) == 2
    assert np.allclose(noisy.axes[0].lines[1].get_ydata()[10:-10], 0.5, atol=0.06)


def test_what_a_resumed_run_writes_again_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "loss": 3}', '{"step": 2, "loss": 9}', '{"step": 3, "lo', "[1]", '{"step": 2, "loss": 2}', '{"step": 2, "val_loss": 4}']
    path.write_text("\n".join([*lines, '{"step": 0, "loss": 7}', ""]))
    assert read_metrics(path) == ([{"step": 0, "loss": 7}, {"step": 1, "loss": 3}, {"step": 2, "loss": 2, "val_loss": 4}], 2)
    assert "2 lines of metrics.jsonl could not be read" in write_report(tmp_path).read_text("utf-8")


def test_what_is_no_run_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(
            InputError, match=r"not a run: no config\.json, metrics\.jsonl or run\.json in it\. Name a folder that `mlm-jax run` made"
        ):
            write_report(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("file", "text", "line"), [("evaluation.json", "{", "not JSON"), ("run.json", "[]", "not a JSON object")])
def test_a_broken_file_is_named(tmp_path, file, text, line):
    folder = write_run(tmp_path / "run")
    (folder / file).write_text(text)
    with pytest.raises(InputError, match=rf"{file}: {line}.*Remove the file and run the stage that makes it again"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_a_broken_configuration_is_named(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "config.json").write_text('{"name": "x", "train": {"stepz": 1}}')
    with pytest.raises(InputError, match=r"config\.json: train\.stepz: TrainConfig has no field 'stepz'\. Did you mean 'steps'\?"):
        write_report(folder)
