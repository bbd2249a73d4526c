"""A healthy machine has nothing to be found fault with, and what fails, hangs or ends does not take the other findings with it."""

import os
import re
import subprocess
import sys
import tempfile

import pytest

from mlm_jax import cli, status
from mlm_jax.doctor import examine
from mlm_jax.doctor.findings import FAILED, OK, REMEDIES, WARNING, Finding, Wanted, words
from tests.doctor.shared import BEFORE_A_RUN, ROOT, examined, only
from tests.test_distributed import free_port


def test_a_healthy_machine_is_found_fit_in_the_words_of_the_readme(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.chdir(tmp_path)
    for name in ("machine.OPEN_FILES", "machine.MEMORY_BYTES", "place.DISK_BYTES", "place.CHECKPOINT_BYTES", "place.FREE_INODES"):
        monkeypatch.setattr(f"mlm_jax.doctor.{name}", 0)
    tpu_in_use = examine.tpu_in_use
    monkeypatch.setattr(examine, "tpu_in_use", lambda root: tpu_in_use(tmp_path))
    assert cli.main(["doctor"]) == status.DONE
    said, readme = capfd.readouterr().out, BEFORE_A_RUN.split("```text\n")[1].split("```")[0]
    plain = [re.sub(r"/\S+", "PATH", re.sub(r"(, libtpu [\d.]+)|[\d.]+", "", text)) for text in (said, readme)]
    assert plain[0].splitlines() == plain[1].splitlines() and said.endswith(" 0 failed\n")
    assert not (tmp_path / "runs").exists()


def test_a_flag_that_xla_does_not_know_is_named_and_does_not_take_the_other_findings_with_it(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_nonsense=1")
    assert cli.main(["doctor", "--out", str(tmp_path / "run")]) == status.FAILED
    lines = capfd.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("FAILED   devices "))
    assert "Unknown flag in XLA_FLAGS: --xla_nonsense" in lines[at]
    assert lines[at + 1].strip() == "-> Take --xla_nonsense=1 out of the environment variable XLA_FLAGS"  # without it all is well: test_faults.py
    assert any(line.startswith("ok       out ") for line in lines) and lines[-1].startswith("10 findings: ") and lines[-1].endswith("1 failed")


def test_processes_that_do_not_come_are_named(tmp_path):
    wanted = Wanted(str(tmp_path), coordinator=f"127.0.0.1:{free_port()}", processes=4, process=0, join_timeout=1.0)
    findings = examine.examine(wanted, say=lambda line: None)
    found = only(findings, "processes")
    assert found.state == FAILED and f"processes 1, 2, 3 of 4 did not come to {wanted.coordinator} within 1 s" in found.saw
    assert only(findings, "devices").state == WARNING and "all processes" in found.remedy


def test_arguments_that_make_no_sense_are_refused(capfd):
    for argv, line in (
        (["--devices", "0"], "mlm-jax: --devices = 0: below 1."),
        (["--distributed", "--process", "0"], "mlm-jax: --distributed: detects what"),
    ):
        assert cli.main(["doctor", *argv]) == status.BAD_INPUT
        assert capfd.readouterr().err.startswith(line)


def test_a_check_that_fails_itself_is_a_finding_and_the_others_are_made(tmp_path, monkeypatch):
    def broken(root):
        raise RuntimeError("no such file\nand more")

    monkeypatch.setattr(examine, "memory", broken)
    findings = examine.local(Wanted(str(tmp_path / "run")), tmp_path)
    assert only(findings, "memory")[1:3] == (FAILED, "RuntimeError: no such file") and only(findings, "out").state == OK


def heard(code: str, limit: float = 30.0) -> list[Finding]:
    """What is found of a process that executes `code` in place of the one that looks at the devices."""
    say = f"import json, sys, time\ndef say(*what): print(json.dumps(what), flush=True)\nsay('stage', ['devices', {limit}])\n"
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen([sys.executable, "-c", say + code], stdout=pipe, stderr=errors, text=True) as other:
        found = list(examine._heard(other, errors, lambda line: None))
        other.kill()
    return found


def test_a_process_that_hangs_or_ends_in_a_stage_is_a_finding_with_its_last_words():
    found = heard("say('finding', ['processes', 'ok', '2 came', '', ''])\ntime.sleep(600)", 0.5)
    assert found[0] == Finding("processes", "ok", "2 came")
    assert only(found, "devices").saw == "no answer within 0.5 s"
    (found,) = heard("import os\nprint('F0 first', file=sys.stderr, flush=True)\nos.abort()")
    assert found.saw == "ended with status -6, its last words: F0 first" and found.remedy == REMEDIES["devices"]
    said = "raise RuntimeError('ALREADY_EXISTS: The TPU is already in use by process with pid 1234. Not attempting to load libtpu.so')"
    (found,) = heard(said)
    assert "already in use by process with pid 1234" in found.saw and found.remedy == "kill 1234"
    assert heard("say('stage', ['end', 30.0])") == []


@pytest.mark.parametrize("argv", [[], ["--coordinator", "127.0.0.1:1", "--processes", "2", "--process", "0"]])
def test_where_jax_cannot_be_imported_the_command_ends_with_its_findings(argv, tmp_path):
    (tmp_path / "jax.py").write_text("raise ImportError('broken on purpose')")
    code = "import sys; from mlm_jax import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "doctor", "--out", str(tmp_path / "run"), *argv]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == status.FAILED and "Traceback" not in done.stderr
    assert "ImportError: broken on purpose" in done.stdout and done.stdout.endswith(" 1 failed\n")


def test_a_process_that_ends_before_it_is_told_what_was_found_does_not_take_that_with_it(tmp_path, capfd, monkeypatch):
    (tmp_path / "jax.py").write_text("raise ImportError('broken on purpose')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started: list[subprocess.Popen] = []
    local, popen = examine.local, subprocess.Popen

    def start(*arguments, **named):
        started.append(popen(*arguments, **named))
        return started[-1]

    def late(wanted, root):
        started[0].wait(60)
        return local(wanted, root)

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(examine, "local", late)
    end, findings = examined(capfd, "--out", tmp_path / "run")
    right, broken = (found for found in findings if found.check == "jax")
    assert end == status.FAILED and right.state == OK and "ImportError: broken on purpose" in broken.saw
    assert only(findings, "memory").state == OK


def test_one_line_stands_for_all_processes_that_are_fine_and_each_other_one_is_named():
    found = [Finding("disk", OK, "80 GiB")]
    found += [Finding("disk", OK, f"{i} GiB", process=f"process {i} (b)") for i in (5, 6)]
    found += [
        Finding("disk", FAILED, "full", "Free some space", "process 7 (c)"),
        Finding("memory", WARNING, "low", "End some"),
    ]
    assert words(found).splitlines() == [
        "ok       disk               80 GiB (ok in 2 more processes)",
        "FAILED   disk               process 7 (c): full",
        "                            -> Free some space",
        "warning  memory             low",
        "                            -> End some",
        "5 findings: 3 ok, 1 warning, 1 failed",
    ]
