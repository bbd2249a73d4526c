"""A run rebuilds its own model from the code that made it, and from no other code unless it is trusted."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import jax
import pytest

from mlm_jax import experiment
from mlm_jax.config import InputError, ModelConfig
from mlm_jax.model import gpt2

BASE = """\
from mlm_jax.config import Config, DataConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig

CONFIG = Config(
    name="base",
    model=ModelConfig(n_layers=2, n_heads=2, d_model=32, d_ff=64, context_len=16),
    data=DataConfig(tokenizer="byte"),
    optim=OptimConfig(warmup_steps=1),
    train=TrainConfig(steps=2, batch_size=8),
    sample=SampleConfig(max_tokens=4),
)
"""
BLOCK = """\
from mlm_jax.model import gpt2
from mlm_jax.sharding import constrain

class ParallelBlock(gpt2.Block):
    def __call__(self, x_BTD, context):
        h_BTD = self.norm_1(x_BTD)
        return constrain(x_BTD + self.attention(h_BTD, context) + self.mlp(h_BTD), "BTD")
"""
PARALLEL = """\
from functools import partial

from experiments.base import CONFIG as BASELINE
from experiments.parts.block import ParallelBlock
from mlm_jax.config import override
from mlm_jax.model import gpt2

CONFIG = override(BASELINE, {"name": "parallel_block"})
MODEL = partial(gpt2.GPT2, block=ParallelBlock)
"""
SMALL = ModelConfig(vocab_size=11, context_len=8, n_layers=2, n_heads=2, d_model=16, d_ff=32)


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def lab(tmp_path):
    """A checkout with a structural experiment whose block stands in a file of its own."""
    names = {"__init__.py": "", "base.py": BASE, "parallel.py": PARALLEL, "parts/__init__.py": "", "parts/block.py": BLOCK, "unrelated.py": "1 / 0"}
    return write(tmp_path / "lab", {f"experiments/{name}": text for name, text in names.items()})


@pytest.fixture
def run(lab, tmp_path):
    """(run directory, what its run.json holds of the code) of the structural experiment."""
    loaded = experiment.load(str(lab / "experiments/parallel.py"))
    experiment.copy_code(loaded, tmp_path / "run")
    return tmp_path / "run", json.loads(json.dumps(experiment.record(loaded)))


def parameters(model):
    return {
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: gpt2.init(model, jax.random.key(0))))
    }


def is_parallel(model):
    return "['blocks']['attention']['w_q_DNH']" in parameters(model) and "['blocks']['norm_2']['scale_D']" not in parameters(model)


def refusal(recorded, run, *, trust_code=False):
    with pytest.raises(InputError) as e:
        experiment.rebuild(recorded, SMALL, run, trust_code=trust_code)
    assert "\n" not in str(e.value)
    return str(e.value)


# ---- loading ----


def test_a_file_and_a_module_name_the_same_experiment(lab, monkeypatch):
    monkeypatch.chdir(lab)
    by_file, by_module = experiment.load("experiments/parallel.py"), experiment.load("experiments.parallel")
    assert by_file.config == by_module.config and by_file.files == by_module.files
    assert by_file.module == by_module.module == "experiments.parallel"
    assert by_file.config.name == "parallel_block" and by_file.structural and is_parallel(by_file.build(SMALL))


def test_an_experiment_without_a_model_builds_gpt2(lab):
    loaded = experiment.load(str(lab / "experiments/base.py"))
    assert not loaded.structural and loaded.build(SMALL) == gpt2.GPT2(SMALL)


def test_changes_reach_the_configuration(lab):
    loaded = experiment.load(str(lab / "experiments/base.py")).with_changes({"train.steps": 7})
    assert loaded.config.train.steps == 7
    with pytest.raises(InputError, match="Did you mean 'steps'"):
        loaded.with_changes({"train.stepz": 7})


def test_an_edited_file_is_read_anew(lab):
    path = lab / "experiments/base.py"
    for steps in (3, 4, 5):  # of the same length and within a second: Python's own bytecode cache would miss it
        path.write_text(BASE.replace("steps=2", f"steps={steps}"))
        loaded = experiment.load(str(path))
        assert loaded.config.train.steps == steps
        assert experiment.load(str(lab / "experiments/parallel.py")).config.train.steps == steps
        assert loaded.files["experiments/base.py"].code == path.read_bytes()
    assert not list(lab.rglob("__pycache__"))


def test_a_file_alone_imports_from_beside_it(tmp_path, monkeypatch):
    for name, width in (("one", 16), ("two", 48)):  # both have a module `widths`, which must not be taken for each other
        write(tmp_path / name, {"mine.py": f"import widths\n{BASE}".replace("d_model=32", "d_model=widths.D"), "widths.py": f"D = {width}"})
    for name, width in (("one", 16), ("two", 48)):
        loaded = experiment.load(str(tmp_path / name / "mine.py"))
        assert loaded.config.model.d_model == width
        assert set(loaded.files) == {"mine.py", "widths.py"}


def test_a_file_elsewhere_may_build_on_the_experiments_here(lab, tmp_path, monkeypatch):
    write(tmp_path / "elsewhere", {"mine.py": PARALLEL})
    monkeypatch.chdir(lab)
    loaded = experiment.load(str(tmp_path / "elsewhere/mine.py"))
    assert loaded.files["mine.py"].origin == tmp_path / "elsewhere/mine.py"
    assert loaded.files["experiments/base.py"].origin == lab / "experiments/base.py"
    monkeypatch.chdir(tmp_path)
    recorded = json.loads(json.dumps(experiment.record(loaded)))
    assert is_parallel(experiment.rebuild(recorded, SMALL, tmp_path / "run", trust_code=False))


def test_a_folder_without_an_init_file_is_a_package_too(lab, monkeypatch):
    (lab / "experiments/__init__.py").unlink()
    monkeypatch.chdir(lab)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not (Path(place) / "experiments").is_dir()])  # the checkout's own
    assert experiment.load("experiments.parallel").structural
    assert set(experiment.load("experiments.base").files) == {"experiments/base.py"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 1", "defines no CONFIG"),
        ("CONFIG = {'name': 'x'}", "defines no CONFIG"),
        (BASE + "MODEL = 3", "MODEL cannot be called"),
        ("def (", r"does not run \(SyntaxError: "),
        ("raise RuntimeError('two\\nlines')", r"does not run \(RuntimeError: two lines\)"),
        ("import sys; sys.exit(3)", r"does not run \(SystemExit: 3\)"),
        ("import nowhere_to_be_found", "imports nowhere_to_be_found, which is not there"),
        ("from experiments import nothing", r"does not run \(ImportError: "),
        ("import experiments.nothing", "imports experiments.nothing, which is not there"),
        ("from experiments.unrelated import x", r"does not run \(ZeroDivisionError: "),
        (BASE.replace("n_heads=2", "n_heads=3"), "model.d_model = 32: model.n_heads = 3 does not divide it"),
        (BASE.replace("n_heads=2", "n_head=2"), r"does not run \(TypeError: .*n_head'"),
    ],
)
def test_a_bad_experiment_is_one_line(lab, text, reason):
    write(lab, {"experiments/bad.py": text})
    with pytest.raises(InputError, match=reason) as e:
        experiment.load(str(lab / "experiments/bad.py"))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "reference", ["experiments/none.py", "none.py", "experiments.none", "none", "json", "mlm_jax.cli", "experiments..base", "", "."]
)
def test_what_is_no_experiment_is_named(lab, monkeypatch, reference):
    monkeypatch.chdir(lab)
    before = set(sys.modules)
    with pytest.raises(InputError, match="EXPERIMENT"):
        experiment.load(reference)
    assert before - set(sys.modules) <= {name for name in before if name.startswith("experiments")}


# ---- recording ----


def test_the_code_and_all_that_it_imports_from_experiments_is_recorded(run, lab):
    folder, recorded = run
    names = {f"experiments/{name}" for name in ("__init__.py", "base.py", "parallel.py", "parts/__init__.py", "parts/block.py")}
    assert {f["path"] for f in recorded["files"]} == names
    assert {path.relative_to(folder / "code").as_posix() for path in (folder / "code").rglob("*") if path.is_file()} == names
    for f in recorded["files"]:
        raw = (lab / f["path"]).read_bytes()
        assert f["origin"] == str(lab / f["path"])
        assert f["sha256"] == hashlib.sha256(raw).hexdigest()
        assert (folder / "code" / f["path"]).read_bytes() == raw


HOW = ["from . import late", "from .late import x", "import experiments.late", "import importlib; importlib.import_module('experiments.late')"]


@pytest.mark.parametrize("how", HOW)
def test_other_ways_to_import_are_recorded_too(lab, how):
    write(lab, {"experiments/late.py": "x = 1", "experiments/other.py": f"{BASE}\n{how}"})
    assert "experiments/late.py" in experiment.load(str(lab / "experiments/other.py")).files


def test_an_import_inside_a_function_is_recorded_and_works_later(lab):
    text = f"{BASE}\ndef MODEL(config):\n    from experiments.parallel import MODEL\n    return MODEL(config)\n"
    write(lab, {"experiments/lazy.py": text, "experiments/broken.py": "def ("})
    loaded = experiment.load(str(lab / "experiments/lazy.py"))
    assert "experiments/parts/block.py" in loaded.files and is_parallel(loaded.build(SMALL))
    write(lab, {"experiments/never.py": f"{BASE}\ndef f():\n    import experiments.broken\n"})
    assert "experiments/broken.py" in experiment.load(str(lab / "experiments/never.py")).files


def test_what_is_recorded_is_what_was_executed(lab, tmp_path):
    loaded = experiment.load(str(lab / "experiments/base.py"))
    (lab / "experiments/base.py").write_text("edited while the text was being tokenized")
    experiment.copy_code(loaded, tmp_path / "run")
    assert (tmp_path / "run/code/experiments/base.py").read_text() == BASE
    assert experiment.record(loaded)["files"][1]["sha256"] == hashlib.sha256(BASE.encode()).hexdigest()


def test_changed_new_and_missing_files_are_named(run, lab):
    _, recorded = run
    path = lab / "experiments/parallel.py"
    assert experiment.changed_files(recorded, experiment.load(str(path))) == []
    write(lab, {"experiments/parts/block.py": BLOCK + "# edited", "experiments/new.py": ""})
    path.write_text("import experiments.new\n" + PARALLEL.replace("from experiments.base import CONFIG as BASELINE", BASE + "BASELINE = CONFIG"))
    assert experiment.changed_files(recorded, experiment.load(str(path))) == [
        f"experiments/{name}" for name in ("base.py", "new.py", "parallel.py", "parts/block.py")
    ]


# ---- rebuilding ----


def test_an_unchanged_experiment_is_rebuilt_from_where_it_stood(run):
    folder, recorded = run
    shutil.rmtree(folder / "code")  # not needed
    assert is_parallel(experiment.rebuild(recorded, SMALL, folder, trust_code=False))


def test_a_run_without_a_structure_of_its_own_executes_nothing(lab, tmp_path):
    recorded = experiment.record(experiment.load(str(lab / "experiments/base.py")))
    shutil.rmtree(lab)
    assert experiment.rebuild(recorded, SMALL, tmp_path, trust_code=False) == gpt2.GPT2(SMALL)


def test_a_changed_file_is_named_and_the_copy_needs_trust(run, lab):
    folder, recorded = run
    write(lab, {"experiments/parts/block.py": "raise RuntimeError('this must not run')"})
    message = refusal(recorded, folder)
    assert f"run = {folder}: its model is built by code that is not as it was: experiments/parts/block.py (changed since)" in message
    assert f"--trust-code to execute {folder / 'code'}" in message
    assert is_parallel(experiment.rebuild(recorded, SMALL, folder, trust_code=True))


def test_a_run_from_elsewhere_needs_trust(run, lab, tmp_path):
    folder, recorded = run
    shutil.rmtree(lab)
    moved = shutil.move(folder, tmp_path / "received")
    assert refusal(recorded, moved).count("not on this machine") == 5
    assert is_parallel(experiment.rebuild(recorded, SMALL, moved, trust_code=True))
    assert not list(moved.rglob("__pycache__"))


def test_only_the_copies_are_executed_on_trust(run, lab):
    folder, recorded = run
    write(lab, {"experiments/base.py": "raise RuntimeError('this must not run')", "experiments/parts/block.py": "raise RuntimeError('nor this')"})
    assert is_parallel(experiment.rebuild(recorded, SMALL, folder, trust_code=True))


@pytest.mark.parametrize("trust_code", [False, True])
def test_a_tampered_copy_is_refused(run, lab, trust_code):
    folder, recorded = run
    shutil.rmtree(lab)
    write(folder, {"code/experiments/parts/block.py": "raise RuntimeError('this must not run')"})
    assert ("code/experiments/parts/block.py is not what the run recorded" in refusal(recorded, folder, trust_code=trust_code)) == trust_code
    (folder / "code/experiments/parts/block.py").unlink()
    refusal(recorded, folder, trust_code=trust_code)


def planted(run, origin):
    """The record, with code that came with the run named as if it were the user's own."""
    folder, recorded = run
    for f in recorded["files"]:
        f["origin"] = origin(f["path"])
    return folder, recorded


def test_code_inside_the_run_is_not_the_users_own(run):
    folder, recorded = planted(run, lambda path: str(run[0] / "code" / path))
    assert refusal(recorded, folder).count("somebody else's") == 5


def test_code_that_a_relative_path_or_a_link_leads_to_is_not_the_users_own(run, lab, tmp_path, monkeypatch):
    monkeypatch.chdir(lab)  # as if a folder with a run and with code had been received
    folder, recorded = planted(run, lambda path: path)
    assert refusal(recorded, folder).count("not on this machine") == 5
    (tmp_path / "link").symlink_to(lab)
    for here in ("/proc/self/cwd", str(tmp_path / "link"), f"{lab}/experiments/.."):
        folder, recorded = planted(run, lambda path, here=here: f"{here}/{path}")
        assert refusal(recorded, folder).count("not on this machine") == 5


def test_an_origin_with_another_name_is_refused(run, lab):
    folder, recorded = run
    other = write(lab, {"notexperiments/parallel.py": PARALLEL}) / "notexperiments/parallel.py"
    next(f for f in recorded["files"] if f["path"] == "experiments/parallel.py")["origin"] = str(other)
    assert "experiments/parallel.py (not on this machine)" in refusal(recorded, folder)


def test_a_file_of_another_user_is_not_executed(run, monkeypatch):
    folder, recorded = run
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert refusal(recorded, folder).count("somebody else's") == 5


@pytest.mark.parametrize("path", ["../outside.py", "experiments/../../outside.py", "/outside.py", "..\\outside.py"])
@pytest.mark.parametrize("trust_code", [False, True])
def test_a_record_cannot_lead_out_of_the_run(run, tmp_path, path, trust_code):
    folder, recorded = run
    write(tmp_path, {"outside.py": ""})
    recorded["files"].append({"path": path, "origin": str(tmp_path / "outside.py"), "sha256": hashlib.sha256(b"").hexdigest()})
    assert "is not inside the run" in refusal(recorded, folder, trust_code=trust_code)


def test_a_link_in_the_copy_cannot_lead_out_of_the_run(run, lab, tmp_path):
    folder, recorded = run
    shutil.rmtree(lab)
    block = folder / "code/experiments/parts/block.py"
    block.rename(tmp_path / "block.py")
    block.symlink_to(tmp_path / "block.py")
    assert "block.py is not what the run recorded" in refusal(recorded, folder, trust_code=True)


@pytest.mark.parametrize("module", ["os", "experiments.unrelated", "", "experiments.parts.block.x", "..experiments"])
@pytest.mark.parametrize("trust_code", [False, True])
def test_a_module_that_is_not_among_the_files_is_refused(run, module, trust_code):
    folder, recorded = run
    recorded["module"] = module
    assert f"does not list the code of {module!r}" in refusal(recorded, folder, trust_code=trust_code)


@pytest.mark.parametrize(
    "recorded", [None, [], {}, {"module": "x", "structural": 1, "files": []}, {"module": "x", "structural": True, "files": [{"path": 1}]}]
)
def test_a_record_of_another_form_is_refused(tmp_path, recorded):
    assert f"{tmp_path / 'run.json'}: does not say what code made the run" in refusal(recorded, tmp_path)
