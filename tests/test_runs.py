"""A run directory: what its stages write, what they skip, and how it resumes and rebuilds itself."""

import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mlm_jax import checkpoint, cli, experiment, huggingface, runs, sharding, storage, weights
from mlm_jax.config import InputError, MeshConfig, ModelConfig, from_json
from mlm_jax.data import tokenizer as tokenizers
from mlm_jax.history import read_history
from mlm_jax.metrics import MEASURED, read_metrics
from mlm_jax.model import gpt2
from tests import compilation
from tests.conftest import write_experiment

ROOT = Path(__file__).parents[1]


def times(folder):
    """Every file, and when it was written."""
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def copied(tiny_run, tmp_path):
    """A copy of the finished run, to be changed."""
    return shutil.copytree(tiny_run.folder, tmp_path / "run", copy_function=shutil.copy2)


def again(tiny_run, folder, *more):
    return cli.main(["run", str(tiny_run.experiment), "--out", str(folder), "--traceback", *more])


# ---- what a run leaves ----


def test_a_run_explains_itself(tiny_run):
    folder = tiny_run.folder
    assert {path.name for path in folder.iterdir()} == set(
        "config.json run.json history.jsonl code tokens tokenizer metrics.jsonl tensorboard checkpoints".split()
        + "evaluation.json samples.txt hf report.html loss.png audit.html".split()
        + ["compiled"] * ("JAX_COMPILATION_CACHE_DIR" not in os.environ)
    )
    config = from_json((folder / "config.json").read_text())
    assert config.name == "test" and config.model.vocab_size == 300  # the tokenizer's
    recorded = json.loads((folder / "run.json").read_text())
    assert recorded["experiment"]["files"][0]["origin"] == str(tiny_run.experiment)
    assert (folder / "code/tiny_test.py").read_bytes() == tiny_run.experiment.read_bytes()
    assert {"python", "jax", "flax", "numpy"} <= recorded["versions"].keys()
    assert recorded["device"] == "8 x cpu" and recorded["parameters"] == sum(x.size for x in jax.tree.leaves(runs.load(folder).params))
    assert (folder / "samples.txt").read_text().count("--- sample") == 2
    assert "Learning curve" in (folder / "report.html").read_text()
    assert checkpoint.steps_in(folder / "checkpoints") == [15, 20]


def test_a_run_prints_one_json_object_and_nothing_else_on_stdout(tiny_run):
    printed = json.loads(tiny_run.stdout)
    assert printed == {"run": str(tiny_run.folder), **json.loads((tiny_run.folder / "evaluation.json").read_text())}
    assert tiny_run.stdout.count("\n") == 1
    assert f"done: {tiny_run.folder}" in tiny_run.stderr


def test_the_metrics_have_every_step_once(tiny_run):
    rows = read_metrics(tiny_run.folder / "metrics.jsonl")
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 21))
    assert [row["step"] for row in rows if "val_loss" in row] == [10, 20]
    assert losses[20] < losses[1] - 1  # it learns


def test_a_run_goes_on_with_another_length_and_learning_rate_and_its_history_says_so(tiny_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run.folder, folder)
    changes = {"train.steps": [20, 23], "optim.peak_lr": [0.01, 0.004], "optim.schedule": ["cosine", "constant"]}
    sets = [word for field, (_, new) in changes.items() for word in ("--set", f"{field}={new}")]
    assert cli.main(["run", str(tiny_run.experiment), "--out", str(folder), *sets]) == 0
    rows = read_metrics(folder / "metrics.jsonl")
    before = read_metrics(tiny_run.folder / "metrics.jsonl")
    assert rows[: len(before)] == before and [row["step"] for row in rows if "loss" in row] == list(range(1, 24))
    assert [row["lr"] for row in rows if row.get("step", 0) > 20 and "lr" in row] == pytest.approx([0.004] * 3)
    starts = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [(start["start"], start["changed"]) for start in starts if "start" in start] == [(0, {}), (20, changes)]
    assert runs.read_config(folder).optim.peak_lr == 0.004 and runs.read_config(folder).train.steps == 23
    evaluations = [json.loads((run / "evaluation.json").read_text())["val_loss"] for run in (tiny_run.folder, folder)]
    assert evaluations[1] != evaluations[0]  # that of the new end


def params_of(folder):
    """All parameters of the newest checkpoint of a run, in a row."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(runs.load(folder).params)])


def contents_of(folder):
    return {path.name for path in folder.iterdir()}


def test_a_fork_begins_at_the_named_checkpoint_and_without_a_change_is_the_same_run(tiny_run, tmp_path, capfd):
    argv = ["train", str(tiny_run.experiment), "--out", str(tmp_path / "fork"), "--from", f"{tiny_run.folder}@15"]
    assert cli.main([*argv, "--set", "train.save_every=19"]) == 0
    np.testing.assert_array_equal(params_of(tmp_path / "fork"), params_of(tiny_run.folder))
    origin = {"run": str(tiny_run.folder), "step": 15, "changed": {"train.save_every": [5, 19]}}
    assert runs.read_json(tmp_path / "fork/run.json")["origin"] == origin
    assert [row["step"] for row in read_metrics(tmp_path / "fork/metrics.jsonl") if "loss" in row] == list(range(16, 21))
    assert contents_of(tiny_run.folder / "checkpoints") == {"15", "20"}

    assert cli.main([*argv[:-1], f"{tiny_run.folder}@20", "--set", "train.save_every=19"]) == 2  # it began elsewhere
    assert f"the run in {tmp_path / 'fork'} began from {tiny_run.folder}@15. Leave it out to go on" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("origin", "sets", "message"),
    [
        ("{run}@16", {}, "no such checkpoint, it has 15, 20. Name a step that it has"),
        ("{run}", {}, "is at step 20 of train.steps = 20. Train for more steps"),
        ("{run}/nothing", {}, "no run is there. Name a run directory"),
        ("{run}@15", {"model.d_ff": 128}, "does not hold this model's arrays: blocks.mlp.b_up_F float32(2, 64) instead of float32(2, 128)"),
        ("{run}@15", {"data.tokenizer": "byte"}, "data.tokenizer = byte: another one than that of {run}"),
    ],
)
def test_a_fork_that_cannot_be_is_refused(tiny_run, tmp_path, capfd, origin, sets, message):
    argv = ["train", str(tiny_run.experiment), "--out", str(tmp_path / "fork"), "--from", origin.format(run=tiny_run.folder)]
    assert cli.main([*argv, *(word for field, value in sets.items() for word in ("--set", f"{field}={value}"))]) == 2
    assert message.format(run=tiny_run.folder) in capfd.readouterr().err


def test_the_exported_folder_is_what_transformers_loads(tiny_run):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(tiny_run.folder / "hf")
    assert (config.model_type, config.vocab_size, config.n_layer, config.n_positions) == ("gpt2", 300, 2, 16)
    theirs = transformers.AutoTokenizer.from_pretrained(tiny_run.folder / "hf")
    ours = runs.load(tiny_run.folder).tokenizer
    text = tiny_run.text.read_text()[:500]
    assert theirs(text)["input_ids"] == ours.encode(text).tolist()
    assert theirs.decode(theirs(text)["input_ids"]) == text


# ---- what is skipped, and what is made again ----


def test_a_second_run_writes_nothing(tiny_run, copied, capfd):
    before = times(copied)
    assert again(tiny_run, copied, "--json") == 0
    assert times(copied) == before
    out, err = capfd.readouterr()
    assert json.loads(out)["val_loss"] == json.loads(tiny_run.stdout)["val_loss"]
    assert err == f"done: {copied} (report.html, samples.txt, hf/)\n"


@pytest.mark.parametrize("name", ["evaluation.json", "samples.txt", "hf", "report.html"])
def test_a_stage_whose_output_is_gone_is_done_alone(tiny_run, copied, name):
    before, path = times(copied), copied / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert again(tiny_run, copied) == 0
    now = times(copied)
    written = {file for file in now if before.get(file) != now[file]}
    shown = {"report.html", "loss.png"} if name != "hf" else set()  # the report shows it
    assert now.keys() == before.keys()
    assert written == {file for file in before if file.startswith(name)} | shown
    for file in written - {"report.html", "loss.png"}:
        assert (copied / file).read_bytes() == (tiny_run.folder / file).read_bytes()


def test_a_finished_run_whose_last_checkpoint_is_damaged_takes_its_last_steps_again(tiny_run, copied, capfd):
    path = copied / "checkpoints/20/params/blocks.attention.b_v_KH/c/0/0/0"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    assert again(tiny_run, copied) == 0
    said = capfd.readouterr().err
    assert "checkpoint 20 is damaged: params/blocks.attention.b_v_KH/c/0/0/0 has other bytes than were written; it was moved to 20.damaged" in said
    assert "going on from step 15" in said
    curves = [[(row["step"], row["loss"]) for row in read_metrics(folder / "metrics.jsonl") if "loss" in row] for folder in (copied, tiny_run.folder)]
    assert curves[0] == curves[1] and len(curves[0]) == 20
    for ours, theirs in zip(jax.tree.leaves(runs.load(copied).params), jax.tree.leaves(runs.load(tiny_run.folder).params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for name in ("evaluation.json", "samples.txt"):
        assert (copied / name).read_bytes() == (tiny_run.folder / name).read_bytes()


def test_a_damaged_hf_folder_is_not_taken_for_done(tiny_run, copied):
    (copied / "hf").rename(copied / ".hf.new.123")  # what a kill during the export leaves
    assert again(tiny_run, copied) == 0
    assert (copied / "hf/model.safetensors").read_bytes() == (tiny_run.folder / "hf/model.safetensors").read_bytes()


def test_shards_in_a_folder_of_their_own_are_shared(tiny_experiment, tmp_path, capfd):
    argv = ["prepare", str(tiny_experiment), "--set", f"data.tokens={tmp_path / 'shards'}", "--json"]
    assert cli.main([*argv, "--out", str(tmp_path / "a")]) == 0
    before = times(tmp_path / "shards")
    assert cli.main([*argv, "--out", str(tmp_path / "b")]) == 0
    assert times(tmp_path / "shards") == before
    a, b = map(json.loads, capfd.readouterr().out.splitlines())
    assert a == b and a["tokens"] == str(tmp_path / "shards") and a["vocab_size"] == 300 and a["train"] > a["val"] > 0
    assert not (tmp_path / "a/tokens").exists()


def test_a_start_that_was_cut_off_is_finished(tiny_experiment, tmp_path):
    out = tmp_path / "run"
    argv = ["prepare", str(tiny_experiment), "--out", str(out), "--traceback"]
    assert cli.main(argv) == 0
    whole = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for left in (["tokens"], ["tokens", "run.json"], ["tokens", "run.json", "code"], ["tokens", "run.json", "code", "tokenizer"]):
        for path in list(out.iterdir()):
            if path.name not in left:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert cli.main(argv) == 0
        assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} == whole


def test_a_run_goes_on_on_another_mesh(tiny_run, copied):
    assert again(tiny_run, copied, "--set", "mesh.data=4", "--set", "mesh.fsdp=2") == 0


def test_a_changed_experiment_file_of_the_same_configuration_is_noted(tiny_experiment, tmp_path, capfd):
    argv = ["prepare", str(tiny_experiment), "--out", str(tmp_path / "run")]
    assert cli.main(argv) == 0
    tiny_experiment.write_text(tiny_experiment.read_text() + "# a word\n")
    capfd.readouterr()
    assert cli.main(argv) == 0
    assert capfd.readouterr().err == "note: tiny_test.py changed since the run was started; the configuration is the same, so it goes on\n"


# ---- loading ----


def test_a_run_a_checkpoint_and_the_export_are_the_same_model(tiny_run):
    run, step, hf = (runs.load(path) for path in (tiny_run.folder, tiny_run.folder / "checkpoints/20", tiny_run.folder / "hf"))
    earlier = runs.load(tiny_run.folder / "checkpoints/15")
    for other in (step, hf):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), run.params, other.params)
        assert other.tokenizer.encode("a token").tolist() == run.tokenizer.encode("a token").tolist()
    assert not np.array_equal(run.params["w_token_VD"], earlier.params["w_token_VD"])
    config = dict(vars(hf.model.config))
    assert all(config[name] == value for name, value in vars(run.model.config).items() if name != "unroll_layers")


def test_a_checkpoint_is_named_by_its_step_or_as_the_best(tiny_run, copied):
    losses = {row["step"]: row["val_loss"] for row in read_metrics(copied / "metrics.jsonl") if "val_loss" in row}
    assert losses.keys() == {10, 20} and checkpoint.steps_in(copied / "checkpoints") == [15, 20]
    at_15, at_20 = (runs.load(copied / f"checkpoints/{step}").params for step in (15, 20))
    for reference, params in ((f"{copied}@15", at_15), (f"{copied}@20", at_20), (f"{copied}@best", at_20), (copied, at_20)):
        for ours, theirs in zip(jax.tree.leaves(runs.load(reference).params), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    shutil.rmtree(copied / "checkpoints/20")  # the other has no validation loss
    with pytest.raises(InputError, match=r"run@best: no checkpoint there tells its validation loss\."):
        runs.load(f"{copied}@best")
    with pytest.raises(InputError, match=r"run@20: no such checkpoint, it has 15"):
        runs.load(f"{copied}@20")
    moved = copied.rename(copied.with_name("run@15"))  # what is there by its whole name is meant
    assert len(jax.tree.leaves(runs.load(moved).params)) == len(jax.tree.leaves(at_15))


def test_loading_changes_no_file(tiny_run):
    before = times(tiny_run.folder)
    runs.load(tiny_run.folder)
    assert times(tiny_run.folder) == before


def test_a_run_is_loaded_onto_a_mesh(tiny_run):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = runs.load(tiny_run.folder, mesh=mesh).params
    assert params["blocks"]["mlp"]["w_up_DF"].sharding.mesh.size == 8
    np.testing.assert_array_equal(params["w_token_VD"], runs.load(tiny_run.folder).params["w_token_VD"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: shutil.rmtree(run / "checkpoints"), "no such checkpoint, it has none"),
        (lambda run: (run / "config.json").unlink(), "config.json: cannot be read as JSON"),
        (lambda run: (run / "config.json").write_text("[]"), "config.json: not a JSON object"),
        (
            lambda run: (run / "config.json").write_text('{"name": "x", "modell": {}}'),
            "config.json: modell: Config has no field 'modell'. Did you mean",
        ),
        (lambda run: (run / "run.json").write_text("{"), "run.json: cannot be read as JSON"),
        (lambda run: (run / "run.json").write_text("{}"), "run.json: does not say what code made the run"),
        (lambda run: shutil.rmtree(run / "tokenizer"), "tokenizer"),
        (lambda run: (run / "checkpoints/20/params/_METADATA").unlink(), "checkpoints/20: damaged: params/_METADATA is missing"),
    ],
)
def test_a_damaged_run_is_named(copied, damage, message):
    damage(copied)
    with pytest.raises(InputError) as e:
        runs.load(copied)
    assert message in str(e.value) and "\n" not in str(e.value)


# ---- structural ablations ----

PARALLEL = """from functools import partial
from pathlib import Path

from experiments.tiny_test import CONFIG as BASELINE
from mlm_jax.config import override
from mlm_jax.model import gpt2
from mlm_jax.sharding import constrain


class ParallelBlock(gpt2.Block):
    def __call__(self, x_BTD, context):
        h_BTD = self.norm_1(x_BTD)
        return constrain(x_BTD + self.attention(h_BTD, context) + self.mlp(h_BTD), "BTD")


CONFIG = override(BASELINE, {"name": "parallel_block", "train.steps": 3})
MODEL = partial(gpt2.GPT2, block=ParallelBlock)
"""


@pytest.mark.slow
def test_a_structural_ablation_rebuilds_itself_from_its_run(tiny_experiment, tmp_path, capfd):
    lab, out = tmp_path / "lab/experiments", tmp_path / "run"
    lab.mkdir(parents=True)
    (lab / "__init__.py").touch()
    (lab / "parallel.py").write_text(PARALLEL)
    shutil.copy(tiny_experiment, lab)
    argv = ["run", str(lab / "parallel.py"), "--out", str(out)]
    assert cli.main([*argv, "--traceback"]) == 0
    assert "export: skipped" in capfd.readouterr().err and not (out / "hf").exists()
    model, params, _ = runs.load(out)
    assert "norm_2" not in params["blocks"]
    tokens = jax.numpy.arange(8)[None]
    logits = model.apply({"params": params}, tokens)
    assert not np.allclose(logits, gpt2.GPT2(model.config).apply({"params": runs.load(out).params | {"blocks": with_norm_2(params)}}, tokens))
    assert cli.main(["generate", str(out), "--max-tokens", "3", "--json"]) == 0
    said = json.loads(capfd.readouterr().out)["generations"]

    block = lab / "parallel.py"
    block.write_text(PARALLEL + "# edited\n")
    for command in (["generate", str(out)], argv):
        assert cli.main(command) == 2
        err = capfd.readouterr().err
        assert "experiments/parallel.py" in err and err.count("\n") == 1

    shutil.rmtree(lab)
    assert cli.main(["generate", str(out), "--max-tokens", "3"]) == 2
    assert "pass --trust-code to execute" in capfd.readouterr().err
    assert cli.main(["generate", str(out), "--max-tokens", "3", "--trust-code", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["generations"] == said
    assert cli.main(["export", str(out), str(tmp_path / "hf"), "--trust-code"]) == 2
    assert "cannot express the structure of ParallelBlock" in capfd.readouterr().err and not (tmp_path / "hf").exists()


@pytest.mark.slow
def test_a_run_with_switches_goes_to_its_end_and_names_those_that_keep_it_from_an_export(tiny_experiment, tmp_path, capfd):
    switches = ["model.norm=rms", "model.position=rotary", "train.steps=3"]
    assert cli.main(["run", str(tiny_experiment), "--out", str(tmp_path / "run"), *(part for s in switches for part in ("--set", s))]) == 0
    err = capfd.readouterr().err
    assert "export: skipped, Hugging Face's GPT-2 cannot express model.position = rotary, model.norm = rms" in err
    assert err.endswith("(report.html, samples.txt)\n") and not (tmp_path / "run/hf").exists() and (tmp_path / "run/report.html").is_file()
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 2
    assert "cannot express model.position = rotary, model.norm = rms" in capfd.readouterr().err


def with_norm_2(params):
    return params["blocks"] | {"norm_2": params["blocks"]["norm_1"]}


# ---- kills ----


@pytest.fixture
def start():
    """Starts a command in a process of its own; none outlives the test."""
    started = []

    def start(argv):
        environment = compilation.as_users(OMP_NUM_THREADS="1")
        started.append(subprocess.Popen([sys.executable, "-m", "mlm_jax.cli", *argv], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def finish(process):
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return err


def last_step(folder):
    try:
        return max((row["step"] for row in read_metrics(folder / "metrics.jsonl")), default=0)
    except FileNotFoundError:
        return 0


def arrays(folder):
    """Parameters and progress of the last checkpoint."""
    config = from_json((folder / "config.json").read_text())
    from mlm_jax import train

    wanted = train.abstract_state(config, gpt2.GPT2(config.model), sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    return jax.tree.leaves(checkpoint.restore(folder / "checkpoints" / str(config.train.steps), wanted.params, train.progress(wanted)))


def check_equal(a, b):
    for x, y in zip(arrays(a), arrays(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True)
    rows = [[{k: v for k, v in row.items() if k not in MEASURED} for row in read_metrics(folder / "metrics.jsonl")] for folder in (a, b)]
    rows = [[row for row in each if row.keys() != {"step"}] for each in rows]  # that of a save alone is lost by a kill within it
    assert rows[0] == rows[1]
    steps = [row["step"] for row in rows[0] if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))


KILLED = [f"--set={field}={value}" for field, value in {"train.steps": 400, "train.eval_every": 200, "model.dropout": 0.1}.items()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(an experiment, what `mlm-jax run` of it with KILLED leaves that nothing disturbs)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    experiment, _ = write_experiment(folder)
    command = [sys.executable, "-m", "mlm_jax.cli", "run", str(experiment), *KILLED, "--set", "train.save_every=7", "--out", str(folder / "run")]
    environment = compilation.as_users(OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return experiment, folder / "run"


@pytest.mark.slow
def test_a_run_that_was_killed_ends_as_an_undisturbed_one(undisturbed, tmp_path, start):
    argv = ["train", str(undisturbed[0]), *KILLED, "--set", "train.save_every=40", "--out", str(tmp_path / "killed")]
    killed = start(argv)
    when = random.randint(1, 100)
    while killed.poll() is None and not (checkpoint.steps_in(tmp_path / "killed/checkpoints") and last_step(tmp_path / "killed") >= when):
        time.sleep(0.005)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -9, "it was done before the kill"
    assert "going on from step" in finish(start(argv))
    check_equal(tmp_path / "killed", undisturbed[1])


@pytest.mark.slow
def test_a_supervised_run_that_is_killed_starts_again_and_ends_as_an_undisturbed_one(undisturbed, tmp_path, start):
    argv = ["train", str(undisturbed[0]), *KILLED, "--set", "train.save_every=40", "--out", str(tmp_path / "killed")]
    supervisor = start([*argv, "--supervise"])
    while supervisor.poll() is None and not checkpoint.steps_in(tmp_path / "killed/checkpoints"):
        time.sleep(0.005)
    (child,) = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    said = finish(supervisor)
    assert "the run was ended by SIGKILL" in said and "it starts again in 1 s" in said and "going on from step" in said
    check_equal(tmp_path / "killed", undisturbed[1])
    first, again = [row["start"] for row in read_history(tmp_path / "killed") if "start" in row]
    assert first == 0 and again >= 40


@pytest.mark.slow
def test_a_run_that_was_killed_many_times_ends_as_an_undisturbed_one(undisturbed, tmp_path, start):
    argv = ["run", str(undisturbed[0]), *KILLED, "--set", "train.save_every=7", "--out", str(tmp_path / "killed")]
    for _ in range(8):
        process = start(argv)
        time.sleep(random.uniform(0.5, 9.0))  # while it starts, prepares, trains, evaluates or exports
        process.kill()
        process.communicate()
    finish(start(argv))
    check_equal(tmp_path / "killed", undisturbed[1])
    for name in ("evaluation.json", "samples.txt", "hf/model.safetensors", "hf/tokenizer.json", "tokens/manifest.json", "config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (undisturbed[1] / name).read_bytes()


# In a mount namespace of its own: three runs on a disk of 3 MB, of which two meet its end, and one elsewhere; what is printed are their statuses.
ON_A_FULL_DISK = """
import shutil, subprocess, sys
from pathlib import Path
from mlm_jax import cli
disk, undisturbed, experiment = map(Path, sys.argv[1:])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", disk], check=True)

def train(out, free=0, **settings):
    if free:
        with (disk / "filler").open("wb", buffering=0) as file:
            file.write(bytes(shutil.disk_usage(disk).free - free))
    sets = [word for name, value in settings.items() for word in ("--set", f"train.{name}={value}")]
    print(cli.main(["train", str(experiment), "--out", str(out), *sets]), flush=True)
    (disk / "filler").unlink(missing_ok=True)

train(undisturbed)
cli.main(["prepare", str(experiment), "--out", str(disk / "run")])
train(disk / "run", free=12 << 10, save_every=0, eval_every=0)
train(disk / "run", free=100 << 10)
train(disk / "run")
shutil.copytree(disk / "run", undisturbed.with_name("run"))
"""


@pytest.mark.slow
def test_a_run_on_a_full_disk_says_so_and_with_space_again_ends_as_an_undisturbed_one(tiny_experiment, tmp_path):
    (tmp_path / "disk").mkdir()
    as_root = ["unshare", "--mount", *(["--user", "--map-root-user"] if os.getuid() else [])]
    probe = [*as_root, "mount", "-t", "tmpfs", "none", str(tmp_path / "disk")]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    command = [*as_root, sys.executable, "-c", ON_A_FULL_DISK, str(tmp_path / "disk"), str(tmp_path / "undisturbed"), str(tiny_experiment)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.split()) == (0, ["0", "1", "1", "0"]), done.stderr
    of_a_row, of_a_checkpoint = [line for line in done.stderr.splitlines() if line.startswith("mlm-jax: ")]
    run = tmp_path / "disk/run"
    there = "could not be written: No space left on device; free some space; the same command goes on from the last checkpoint"
    assert of_a_row in {f"mlm-jax: {run}/{name} {there}" for name in ("metrics.jsonl", "tensorboard")}
    there = "could not be written to"
    assert of_a_checkpoint == f"mlm-jax: checkpoint 5 {there} {run}/checkpoints: No space left on device; those before it are as they were"
    check_equal(tmp_path / "run", tmp_path / "undisturbed")


def test_the_code_of_a_run_is_the_installed_commit_or_nothing(monkeypatch, tmp_path):
    commit = runs.git_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 40
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert runs.git_commit() is None


def test_a_text_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    storage.write_text(tmp_path / "new/file.txt", "first")

    def fail(self, target):
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="full"):
        storage.write_text(tmp_path / "new/file.txt", "second")
    assert (tmp_path / "new/file.txt").read_text() == "first"


def test_the_experiment_of_a_run_is_checked_before_its_stages(tiny_run, copied):
    (copied / "run.json").write_text(json.dumps({"experiment": {"module": "x"}}))
    with pytest.raises(InputError, match="does not say what code made the run"):
        runs.Run(experiment.load(str(tiny_run.experiment)), copied)


MEMORY = """
import json, os, resource, sys
from mlm_jax import cli
import orbax.checkpoint, transformers, mlm_jax.runs  # what the command imports is no part of the weights
transformers.GPT2Config, transformers.GenerationConfig
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert cli.main(sys.argv[1:]) == 0
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process in Linux's unit")
def test_import_and_export_hold_the_weights_once_or_not_at_all(tmp_path):
    config = ModelConfig(vocab_size=50_257, n_layers=24, n_heads=16, d_model=1024, d_ff=4096)  # 355M
    shapes = {huggingface.PREFIX + name: shape for name, shape in huggingface.tensor_shapes(config).items()}
    source = tmp_path / "source"
    source.mkdir()
    weights.write_safetensors(source / "model.safetensors", shapes, lambda name: np.full(shapes[name], 0.02, np.float32))
    huggingface._write_configs(config, source, None)
    tokenizers.gpt2().save(source)
    size = (source / "model.safetensors").stat().st_size

    def peak(*command: object) -> float:
        done = subprocess.run([sys.executable, "-c", MEMORY, *map(str, command)], check=True, stdout=subprocess.PIPE, text=True, timeout=600)
        return float(done.stdout.splitlines()[-1]) / size

    assert peak("import", source, tmp_path / "run") < 1.3
    assert peak("export", tmp_path / "run", tmp_path / "back") < 1.5  # orbax reads a tensor more than it keeps
    assert peak("export", source, tmp_path / "again") < 0.5
    for folder in ("back", "again"):
        assert filecmp.cmp(source / "model.safetensors", tmp_path / folder / "model.safetensors", shallow=False)
