"""What the README shows is run as it stands, with fewer steps and a smaller model."""

import ast
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
    text, talk, ablation = blocks("python")
    exec(text, {})
    exec(talk, {})
    assert capfd.readouterr().out
    (clone / "experiments" / "parallel_block.py").write_text(ablation)
    run("run", "experiments/parallel_block.py")
    assert (clone / "runs" / "parallel_block" / "evaluation.json").is_file()


def test_every_verb_is_in_the_table_and_every_verb_of_the_table_exists():
    listed = set(re.findall(r"`mlm-jax (\w+)", README))
    actions = [action for action in cli.parser()._actions if action.choices]
    assert listed == set(actions[0].choices)


EXPERIMENTS = sorted(path.name for path in (ROOT / "experiments").glob("[!_]*.py") if not path.name.startswith("bench_"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_file_builds_its_model_and_says_how_it_is_run(name):
    path = ROOT / "experiments" / name
    loaded = experiment.load(str(path)).with_changes({"model.vocab_size": 50_257})
    assert loaded.config.name == path.stem
    params = jax.eval_shape(lambda: gpt2.init(loaded.build(loaded.config.model), jax.random.key(0)))
    assert params["w_token_VD"].shape == (loaded.config.model.padded_vocab_size, loaded.config.model.d_model)
    assert f"Run      mlm-jax run experiments/{name}" in path.read_text("utf-8").split('"""')[1]


# Each row of the table of failures, and the tests that provoke it and look for its words.
PROVOKED = {
    "A field or an argument is wrong": ["test_config.py::test_each_invalid_value_is_answered_with_its_remedy"],
    "The directory holds a run of another model or other data": ["test_cli.py::test_a_run_of_another_configuration_names_the_differing_fields"],
    "Another process uses the directory": ["test_lock.py::test_a_second_run_in_the_directory_is_refused_with_the_owner_named"],
    "Another machine has taken over the run in a bucket": ["test_runs_gcs.py::test_of_two_machines_the_one_that_began_last_goes_on"],
    "The directory cannot be written to": ["test_lock.py::test_a_directory_that_cannot_be_written_to_is_refused"],
    "A token shard is damaged": ["data/test_prepare.py::test_a_damaged_shard_is_named_with_its_sizes"],
    "The newest checkpoint is damaged; one before it is whole": [
        "test_runs.py::test_a_finished_run_whose_last_checkpoint_is_damaged_takes_its_last_steps_again"
    ],
    "All checkpoints are damaged": ["test_checkpoint.py::test_all_damaged_ones_go_and_none_is_overwritten"],
    "A kill, at any moment, also in a save": [
        "test_runs.py::test_a_run_that_was_killed_ends_as_an_undisturbed_one",
        "test_runs.py::test_a_run_that_was_killed_many_times_ends_as_an_undisturbed_one",
    ],
    "SIGTERM or Ctrl-C": ["test_stopping.py::test_a_signal_ends_a_run_after_its_step_and_the_same_command_goes_on_from_there"],
    "A second one": ["test_stopping.py::test_a_second_signal_ends_the_process_at_once_also_while_it_waits_for_the_devices"],
    "The disk is full at a save": ["test_runs.py::test_a_run_on_a_full_disk_says_so_and_with_space_again_ends_as_an_undisturbed_one"],
    "The disk is full at another file": ["test_runs.py::test_a_run_on_a_full_disk_says_so_and_with_space_again_ends_as_an_undisturbed_one"],
    "A bucket is not there, or may not be written to, at the start": [
        "test_runs_gcs.py::test_a_bucket_that_is_not_there_or_may_not_be_written_to_is_refused_in_one_line"
    ],
    "A bucket cannot be reached at the start": [
        "test_runs_gcs.py::test_a_bucket_that_does_not_answer_ends_the_start_with_status_1_as_it_may_later",
        "test_runs_gcs.py::test_a_bucket_that_refuses_connections_ends_the_start_within_a_minute",
    ],
    "A bucket vanishes in mid-run": [
        "test_runs_gcs.py::test_a_bucket_that_vanishes_before_the_rows_are_sent_ends_the_run_which_goes_on_when_it_is_back",
        "test_runs_gcs.py::test_a_bucket_that_vanishes_during_a_save_ends_the_run_which_goes_on_when_it_is_back",
    ],
    "Many steps in a row are not finite, or spikes": [
        "test_guard.py::test_a_run_ends_in_words_after_so_many_skipped_steps_in_a_row_and_keeps_its_checkpoint"
    ],
    "A step takes far too long (`train.step_timeout`)": ["test_watch.py::test_where_a_process_stands_still_another_ends_and_names_it"],
    "Another process of the run is gone": ["test_watch.py::test_where_a_process_is_killed_the_others_end_and_say_so"],
    "A process does not come": ["test_distributed.py::test_a_process_that_never_comes_is_named"],
    "Bad input that one process alone finds": ["test_distributed.py::test_bad_input_of_one_process_ends_every_process_with_the_same_line"],
    "The clock is set back between two starts": ["test_history.py::test_a_clock_that_was_set_back_makes_the_time_between_two_starts_nothing"],
    "A supervised run fails five times in a row without a new step": [
        "test_supervise.py::test_without_a_new_step_it_waits_twice_as_long_each_time_and_gives_up_in_the_end",
        "test_supervise.py::test_it_gives_up_after_five_tries_with_the_last_status",
    ],
}


def test_each_failure_of_the_table_is_provoked_by_a_test_that_looks_for_its_words():
    table = README.split("## When something fails")[1].split("\n## ")[0]
    _, *rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+) \|$", table, re.MULTILINE)
    assert [what for what, _, _ in rows] == list(PROVOKED)
    for what, _, words in rows:
        sources = [source_of(*place.split("::")) for place in PROVOKED[what]]
        plain = re.sub(r"\\(.)", r"\1", "".join(sources))  # patterns escape
        for fragment in re.findall("`([^`]+)`", words):
            assert fragment in plain, f"{fragment!r} is not in {', '.join(PROVOKED[what])}"


def source_of(file: str, name: str) -> str:
    """The text of a test, with what it is parametrized with."""
    text = (ROOT / "tests" / file).read_text("utf-8")
    (found,) = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == name)
    first = min([found.lineno, *(decorator.lineno for decorator in found.decorator_list)])
    return "\n".join(text.splitlines()[first - 1 : found.end_lineno])
