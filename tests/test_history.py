"""Where the wall time of a run went, over all its starts, adds up by hand."""

import json

import pytest

from mlm_jax import history
from mlm_jax.metrics import read_metrics
from mlm_jax.report import write_report


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def goodput(run):
    return history.goodput(history.read_history(run), read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else [])


def at(second, **row):
    return {"at": f"2026-01-01T00:{second // 60:02}:{second % 60:02}.000+00:00", **row}


def metrics(run, taken, step_s=1.0, idle_s=0.25):
    write(run / "metrics.jsonl", [{"step": step, "loss": 3.0, "step_s": step_s, "idle_s": idle_s} for step in range(1, taken + 1)])


def test_the_time_of_a_run_without_a_break_is_what_its_clock_measured(tmp_path):
    spent = {"compiling": 5.0, "steps": 7.5, "idle": 2.5, "saving": 1.0}
    write(tmp_path / "history.jsonl", [at(0, start=0, lost_s=0), at(9, step=5, seconds={"steps": 3.75}), at(16, step=10, seconds=spent)])
    metrics(tmp_path, 10)
    found = goodput(tmp_path)
    assert found.seconds == {"steps": 7.5, "lost steps": 0, "down": 0, "compiling": 5, "idle": 2.5, "saving": 1}
    assert found.share == 7.5 / 16 and str(found).startswith("46.9% of 16s; compiling 31.2%, idle 15.6%")


def test_what_a_kill_lost_and_the_time_until_the_next_start_count(tmp_path):
    rows = [at(0, start=0, lost_s=0), at(10, step=5, seconds={"compiling": 5.0, "steps": 3.75, "idle": 1.25})]
    rows += [at(30, start=5, lost_s=8.0)]  # killed at step 13, 12 s before it was started again
    rows += [at(40, step=10, seconds={"compiling": 5.0, "steps": 3.75, "idle": 1.25})]
    write(tmp_path / "history.jsonl", rows)
    metrics(tmp_path, 10)
    found = goodput(tmp_path)
    assert found.seconds == {"steps": 7.5, "lost steps": 8, "down": 12, "compiling": 10, "idle": 2.5}
    assert found.share == pytest.approx(7.5 / 40)


def test_steps_that_an_older_checkpoint_takes_again_are_lost(tmp_path):
    rows = [at(0, start=0, lost_s=0), at(10, step=10, seconds={"steps": 10.0}), at(10, start=5, lost_s=0), at(15, step=10, seconds={"steps": 5.0})]
    write(tmp_path / "history.jsonl", rows)
    metrics(tmp_path, 10, idle_s=0.0)
    assert goodput(tmp_path).seconds == {"steps": 10, "lost steps": 5, "down": 0}


def test_a_clock_that_was_set_back_makes_the_time_between_two_starts_nothing(tmp_path):
    write(tmp_path / "history.jsonl", [at(100, start=0, lost_s=0), at(110, step=5, seconds={"steps": 10.0}), at(30, start=5, lost_s=3.0)])
    metrics(tmp_path, 10, idle_s=0.0)
    assert goodput(tmp_path).seconds == {"steps": 10, "lost steps": 0, "down": 0}


def test_a_directory_without_a_history_has_no_goodput(tmp_path):
    assert goodput(tmp_path) is None


def test_a_run_writes_its_goodput_and_the_report_shows_it(tiny_run):
    found = goodput(tiny_run.folder)
    (row,) = (row for row in map(json.loads, (tiny_run.folder / "metrics.jsonl").read_text().splitlines()) if "goodput" in row)
    assert row["step"] == 20 and 0 < row["goodput"] < 1 and row["goodput"] == pytest.approx(found.share, rel=1e-3)
    assert {"compiling", "initialising", "validation", "saving", "idle", "waiting for data"} <= found.seconds.keys()
    assert f"{found.share:.1%} of " in (tiny_run.folder / "report.html").read_text()


def test_the_report_shows_every_start_and_what_was_changed_then(tmp_path):
    rows = [at(0, start=0, lost_s=0, device="8 x cpu", processes=2, changed={})]
    rows += [at(61, start=5, lost_s=0, device="1 x cpu", processes=1, changed={"optim.peak_lr": [0.1, 0.2]})]
    write(tmp_path / "history.jsonl", rows)
    metrics(tmp_path, 10)
    page = write_report(tmp_path).read_text()
    assert "2026-01-01 00:00:00" in page and "from step 0 on 8 x cpu in 2 processes<" in page
    assert "2026-01-01 00:01:01" in page and "from step 5 on 1 x cpu, optim.peak_lr 0.1 → 0.2" in page


def test_a_start_takes_away_the_line_that_a_full_disk_cut_off(tmp_path):
    path = tmp_path / "history.jsonl"
    write(path, [at(0, start=0, lost_s=0)])
    whole = path.read_text()
    for torn in ('{"at": "2026-01', ""):
        path.write_text(whole + torn)
        history.History(path).start(5, lost_s=1.0)
        assert path.read_text().startswith(whole + '{"at": ')
        assert [row["start"] for row in history.read_history(tmp_path)] == [0, 5]
    path.write_text('{"at": "2026-01')
    history.History(path).start(0, lost_s=0.0)
    assert [row["start"] for row in history.read_history(tmp_path)] == [0]
