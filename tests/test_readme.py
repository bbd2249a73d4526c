"""What the README shows is run as it stands, with fewer steps and a smaller model."""

import re
import shlex
import shutil
from pathlib import Path

import jax
import pytest

from mlm_jax import cli, experiment
from mlm_jax.model import gpt2

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = [
    "model.n_layers=1",
    "model.n_heads=2",
    "model.d_model=16",
    "model.d_ff=32",
    "train.steps=2",
    "train.eval_windows=8",
    "optim.warmup_steps=1",
    "sample.max_tokens=8",
    "data.bpe_vocab_size=300",
    "data.source=text.txt",
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("mlm-jax ")]


def run(*command: str) -> None:
    small = [word for change in SMALL for word in ("--set", change)] if command[0] == "run" else []
    assert cli.main([*command, *small, "--traceback"]) == 0, command


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with the experiments, a little text, and what `mlm-jax run experiments/tiny.py` leaves."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "experiments", folder / "experiments")
    (folder / "text.txt").write_text("Return the value of the name, or the default if there is none.\n" * 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands():
            run(*command[1:])
        yield folder


def test_the_commands_of_the_readme_work(clone, capfd):
    assert [command[1] for command in commands()] == ["run", "generate", "evaluate"]
    for name in ("report.html", "samples.txt", "hf/model.safetensors", "checkpoints/2"):
        assert (clone / "runs" / "tiny" / name).exists()


def test_the_python_of_the_readme_works(clone, capfd):
    talk, ablation = blocks("python")
    exec(talk, {})
    assert capfd.readouterr().out
    (clone / "experiments" / "parallel_block.py").write_text(ablation)
    run("run", "experiments/parallel_block.py")
    assert (clone / "runs" / "parallel_block" / "evaluation.json").is_file()


def test_every_verb_is_in_the_table_and_every_verb_of_the_table_exists():
    listed = set(re.findall(r"`mlm-jax (\w+)", README))
    actions = [action for action in cli.parser()._actions if action.choices]
    assert listed == set(actions[0].choices)


EXPERIMENTS = sorted(path.name for path in (ROOT / "experiments").glob("[!_]*.py") if re.search("^CONFIG = ", path.read_text("utf-8"), re.MULTILINE))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_file_builds_its_model_and_says_how_it_is_run(name):
    path = ROOT / "experiments" / name
    loaded = experiment.load(str(path)).with_changes({"model.vocab_size": 50_257})
    assert loaded.config.name == path.stem
    params = jax.eval_shape(lambda: gpt2.init(loaded.build(loaded.config.model), jax.random.key(0)))
    assert params["w_token_VD"].shape == (loaded.config.model.padded_vocab_size, loaded.config.model.d_model)
    assert f"Run      mlm-jax run experiments/{name}" in path.read_text("utf-8").split('"""')[1]
