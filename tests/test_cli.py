"""The commands: exit status, one line for bad input that leaves every file alone, JSON on stdout, and what they make."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlm_jax import cli, huggingface, runs
from mlm_jax.config import InputError
from mlm_jax.decode import text

ROOT = Path(__file__).parents[1]


def contents(folder):
    """Every file and folder below `folder`, with the bytes of the files."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def refused(argv, capfd, status=2):
    """The single line that a refused command writes."""
    capfd.readouterr()
    assert cli.main([str(word) for word in argv]) == status
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("mlm-jax: ") and err.endswith(".\n") and err.count("\n") == 1, err
    return err


# ---- the program ----


def test_help_needs_no_heavy_library():
    heavy = "{'jax', 'numpy', 'flax', 'transformers'} & set(sys.modules)"
    code = f"import sys; from mlm_jax import cli\ntry: cli.main(['--help'])\nfinally: print(sorted({heavy}))"
    done = python(code)
    assert done.returncode == 0 and "prepare, train, evaluate" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", ["run", "prepare", "train", "evaluate", "generate", "chat", "import", "export", "report", "doctor"])
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main([verb, "--help"])
    assert e.value.code == 0
    assert "--json" in (said := capsys.readouterr().out) and "--traceback" in said


@pytest.mark.parametrize("argv", [[], ["runn"], ["run"], ["run", "x.py", "--sett", "a=1"], ["generate", "x", "--num", "many"]])
def test_wrong_arguments_are_one_line(argv, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    assert e.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("mlm-jax") and "--help" in err


def test_the_program_says_bad_input_in_one_line(tmp_path):
    done = python("import sys; from mlm_jax import cli; sys.exit(cli.main(sys.argv[1:]))", "generate", str(tmp_path / "none" / "run"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no such folder" in done.stderr


def test_failed_work_is_status_1_and_one_line(tiny_run, monkeypatch, capfd):
    def fail(*args, **kwargs):
        raise RuntimeError("two\n  lines")

    monkeypatch.setattr(text, "generations", fail)
    assert cli.main(["generate", str(tiny_run.folder)]) == 1
    assert capfd.readouterr().err == "mlm-jax: RuntimeError: two lines (--traceback shows where)\n"


@pytest.mark.parametrize(("error", "ended"), [(RuntimeError("two\n  lines"), 1), (InputError("field", "value", "wrong", "Mend it"), 2)])
def test_a_traceback_is_shown_when_asked_for_and_changes_no_status(error, ended, tiny_run, monkeypatch, capfd):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(text, "generations", fail)
    assert cli.main(["generate", str(tiny_run.folder), "--traceback"]) == ended
    *trace, last = capfd.readouterr().err.splitlines()
    assert trace[0] == "Traceback (most recent call last):" and any(" in fail" in line for line in trace)
    assert last.startswith("mlm-jax: ") and "--traceback" not in last


def test_an_interrupt_is_status_130(tiny_run, tiny_experiment, tmp_path, monkeypatch, capfd):
    def interrupt(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # Python leaves it out where it starts in a shell's background
    monkeypatch.setattr(text, "generations", interrupt)
    assert cli.main(["generate", str(tiny_run.folder)]) == 130
    assert capfd.readouterr().err == "\nmlm-jax: interrupted\n"
    monkeypatch.setattr(runs.Run, "prepare", interrupt)
    assert cli.main(["train", str(tiny_experiment), "--out", str(tmp_path / "run")]) == 130
    assert capfd.readouterr().err == "\nmlm-jax: interrupted; the same command goes on from the last checkpoint\n"


# ---- bad input to a new run: nothing of it is left ----

SHORT = ["--set", "model.context_len=4000", "--set", "sample.max_tokens=4"]
NEW_RUN = {
    "missing text": (lambda d: (d / "text.txt").unlink(), [], "data.source = {d}/text.txt: no such file or folder"),
    "empty text": (lambda d: (d / "text.txt").write_text(""), [], "data.source = {d}/text.txt: no text"),
    "text of spaces": (lambda d: (d / "text.txt").write_text(" \n\n "), [], "data.source = {d}/text.txt: no text"),
    "invalid UTF-8": (lambda d: (d / "text.txt").write_bytes(b"good \xff bad"), [], "(1 x not UTF-8; the first: {d}/text.txt: byte 0xff at offset 5"),
    "text shorter than a window": (lambda d: (d / "text.txt").write_text("abc" * 1000), SHORT, "the text is shorter than one window"),
    "nothing to validate on": (lambda d: None, ["--set", "data.val_fraction=0"], "has no val tokens"),
    "unknown field": (lambda d: None, ["--set", "optim.peek_lr=1"], "optim.peek_lr: OptimConfig has no field 'peek_lr'. Did you mean 'peak_lr'?"),
    "no path=value": (lambda d: None, ["--set", "steps"], "--set = steps: not of the form path=value"),
    "wrong type": (lambda d: None, ["--set", "train.steps=many"], "train.steps = 'many': expected int, got str"),
    "heads that do not divide": (lambda d: None, ["--set", "model.n_heads=3"], "model.d_model = 32: model.n_heads = 3 does not divide it"),
    "a batch that the devices cannot share": (
        lambda d: None,
        ["--set", "train.batch_size=6"],
        "train.batch_size = 6: not a multiple of the 8 devices",
    ),
    "a mesh that does not fit": (lambda d: None, ["--set", "mesh.data=3"], "mesh = data 3: does not fill 8 devices"),
    "missing experiment": (lambda d: (d / "tiny_test.py").unlink(), [], "tiny_test.py: no such file"),
    "an experiment that does not run": (lambda d: (d / "tiny_test.py").write_text("def ("), [], "tiny_test: does not run (SyntaxError"),
    "an experiment without CONFIG": (lambda d: (d / "tiny_test.py").write_text(""), [], "tiny_test: defines no CONFIG"),
    "tokens that are none": (lambda d: ((d / "other").mkdir(), (d / "other/notes").touch()), ["--set", "data.tokens={d}/other"], "no manifest.json"),
}


@pytest.mark.parametrize("name", NEW_RUN)
@pytest.mark.parametrize("verb", ["run", "train"])
def test_bad_input_leaves_nothing_of_a_new_run(tiny_experiment, tmp_path, name, verb, capfd):
    damage, settings, words = NEW_RUN[name]
    folder = tiny_experiment.parent
    damage(folder)
    before = contents(tmp_path)
    argv = [verb, tiny_experiment, "--out", tmp_path / "run", *(word.format(d=folder) for word in settings)]
    assert words.format(d=folder) in refused(argv, capfd)
    assert contents(tmp_path) == before


# What is found when the text has become tokens, and another text would not mend: these stay, as they may have taken days.
AFTER_PREPARE = {
    "small vocabulary": (lambda d: None, ["--set", "model.vocab_size=299"], "model.vocab_size = 299: smaller than the tokenizer's 300"),
    "long sample": (
        lambda d: None,
        ["--set", "sample.max_tokens=16"],
        "sample.max_tokens = 16: with 1 prompt tokens more than model.context_len = 16",
    ),
    "long prompt": (lambda d: None, ["--set", "sample.prompt=" + "ab " * 30], "more than model.context_len = 16. Shorten sample.prompt"),
}


@pytest.mark.parametrize("name", AFTER_PREPARE)
def test_bad_input_that_says_nothing_of_the_text_leaves_the_tokens_for_the_mended_command(tiny_experiment, tmp_path, name, capfd):
    _, settings, words = AFTER_PREPARE[name]
    before = contents(tmp_path)
    assert words in refused(["train", tiny_experiment, "--out", tmp_path / "run", *settings], capfd)
    made = contents(tmp_path)
    tokens = {path: raw for path, raw in made.items() if path.startswith("run/tokens/")}
    assert "run/tokens/manifest.json" in tokens
    assert {path: raw for path, raw in made.items() if path not in tokens} == before | {"run": None, "run/tokens": None}
    assert cli.main(["prepare", str(tiny_experiment), "--out", str(tmp_path / "run")]) == 0
    assert {path: raw for path, raw in contents(tmp_path).items() if path.startswith("run/tokens/")} == tokens


def test_a_mended_text_may_be_prepared_into_the_same_directory(tiny_experiment, tmp_path, capfd):
    text = tiny_experiment.parent / "text.txt"
    good = text.read_text()
    argv = ["prepare", tiny_experiment, "--out", tmp_path / "run", "--json"]
    (tmp_path / "run").mkdir()  # the user's own; it stays
    for bad in (b"", b"\xff", b"short"):
        text.write_bytes(bad)
        refused(argv, capfd)
        assert list((tmp_path / "run").iterdir()) == []
    text.write_text(good)
    assert cli.main([str(word) for word in argv]) == 0
    assert json.loads(capfd.readouterr().out)["tokens"] == str(tmp_path / "run/tokens")


def test_a_directory_in_use_is_left_alone(tiny_experiment, tmp_path, capfd):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    (tmp_path / "coded/code").mkdir(parents=True)
    before = contents(tmp_path)
    for name, words in (("mine", "holds thesis.tex and is no run"), ("coded", "holds code and is no run"), ("mine/thesis.tex", "is a file")):
        assert words in refused(["run", tiny_experiment, "--out", tmp_path / name], capfd)
    assert contents(tmp_path) == before


# ---- bad input to a run that is there: nothing is overwritten ----


@pytest.fixture
def copied(tiny_run, tmp_path):
    return shutil.copytree(tiny_run.folder, tmp_path / "run")


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_a_run_of_another_configuration_names_the_differing_fields(tiny_run, copied, capfd):
    before = contents(copied)
    argv = ["run", tiny_run.experiment, "--out", copied, "--set", "model.d_model=64", "--set", "train.seed=1", "--set", "train.steps=30"]
    assert f"--out = {copied}: holds a run of another configuration (model.d_model 32 -> 64, train.seed 0 -> 1). Name" in refused(argv, capfd)
    assert contents(copied) == before


def test_a_run_that_has_ended_takes_no_other_settings_unless_it_is_to_go_on(tiny_run, copied, capfd):
    before = contents(copied)
    argv = ["run", tiny_run.experiment, "--out", copied, "--set", "optim.peak_lr=0.5"]
    assert f"--out = {copied}: holds a run that has ended at step 20 (optim.peak_lr 0.01 -> 0.5). Train for more than 20" in refused(argv, capfd)
    assert "ended at step 20 (train.steps 20 -> 10)" in refused([*argv[:-1], "train.steps=10"], capfd)
    assert contents(copied) == before


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_truncated_shard_is_named(tiny_run, copied, split, capfd):
    shard = copied / f"tokens/{split}_000000.bin"
    size = shard.stat().st_size
    cut(shard)
    before = contents(copied)
    assert f"data.tokens = {shard}: cut short: {size - 10} bytes, {size} expected" in refused(["run", tiny_run.experiment, "--out", copied], capfd)
    if split == "val":
        assert f"{shard}: cut short" in refused(["evaluate", copied], capfd)
    assert contents(copied) == before


def test_a_changed_shard_is_named(tiny_run, copied, capfd):
    shard = copied / "tokens/train_000000.bin"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert f"{shard}: its SHA-256 is not the one in manifest.json" in refused(["train", tiny_run.experiment, "--out", copied], capfd)


def test_a_truncated_checkpoint_is_named_and_loaded_by_no_command(copied, tmp_path, capfd):
    file = largest(copied / "checkpoints/20/params")
    cut(file)
    before = contents(tmp_path)
    for argv in (
        ["generate", copied],
        ["generate", copied / "checkpoints/20"],
        ["evaluate", copied],
        ["export", copied, tmp_path / "hf"],
    ):
        assert f"checkpoint = {copied / 'checkpoints/20'}: damaged: {file.relative_to(copied / 'checkpoints/20')} has" in refused(argv, capfd)
    assert contents(tmp_path) == before
    assert cli.main(["generate", str(copied / "checkpoints/15"), "--max-tokens", "2"]) == 0  # the one before it is whole


def test_training_does_not_go_on_from_a_truncated_checkpoint(tiny_run, copied, capfd):
    shutil.rmtree(copied / "checkpoints/20")
    shutil.copytree(copied / "checkpoints/15", copied / "checkpoints/18")
    cut(largest(copied / "checkpoints/18/progress"))
    capfd.readouterr()
    assert cli.main(["train", str(tiny_run.experiment), "--out", str(copied)]) == 0
    said = capfd.readouterr().err
    assert "checkpoint 18 is damaged: progress/" in said and "going on from step 15" in said
    assert {path.name for path in (copied / "checkpoints").iterdir()} == {"15", "18.damaged", "20"}


# ---- models ----


def test_what_is_no_model_is_named(tiny_run, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    for model, words in (
        (tmp_path / "none" / "x", "no such folder"),
        (tmp_path / "empty", "config.json"),
        (tiny_run.folder / "checkpoints/17", "no such checkpoint, it has 15, 20"),
        (tiny_run.text, "a file, not a folder"),
    ):
        for argv in (["generate", model], ["evaluate", model], ["export", model, tmp_path / "out"]):
            assert words in refused(argv, capfd)
    assert contents(tmp_path) == {"empty": None}


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop("transformer.ln_f.weight"), "ln_f.weight is missing, expected (32,)"),
        (lambda t: t.update({"transformer.extra": np.zeros(3, np.float32)}), "extra (3,) is not expected"),
        (lambda t: t.update({"transformer.wpe.weight": np.zeros((8, 32), np.float32)}), "wpe.weight is (8, 32), expected (16, 32)"),
    ],
)
def test_a_weight_file_with_wrong_tensors_is_not_imported(tiny_run, tmp_path, edit, words, capfd):
    hf = shutil.copytree(tiny_run.folder / "hf", tmp_path / "hf")
    change(hf, edit)
    before = contents(tmp_path)
    for argv in (
        ["import", hf, tmp_path / "imported"],
        ["generate", hf],
        ["evaluate", hf, "--text", tiny_run.text],
        ["export", hf, tmp_path / "out"],
    ):
        assert words in refused(argv, capfd)
    assert contents(tmp_path) == before


def test_a_truncated_weight_file_is_not_imported(tiny_run, tmp_path, capfd):
    hf = shutil.copytree(tiny_run.folder / "hf", tmp_path / "hf")
    cut(hf / "model.safetensors")
    before = contents(tmp_path)
    assert "not a whole safetensors file" in refused(["import", hf, tmp_path / "imported"], capfd)
    assert contents(tmp_path) == before


def test_a_directory_in_use_is_not_written_into(tiny_run, tmp_path, capfd):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    assert "exists and is not empty" in refused(["import", tiny_run.folder / "hf", tmp_path / "mine"], capfd)
    assert "not empty" in refused(["export", tiny_run.folder, tmp_path / "mine"], capfd)
    assert contents(tmp_path) == before


def test_import_and_export_give_the_same_tensors_byte_by_byte(tiny_run, tmp_path, capfd):
    hf, run, out = tiny_run.folder / "hf", tmp_path / "imported", tmp_path / "hf"
    assert cli.main(["import", str(hf), str(run), "--json"]) == 0
    assert cli.main(["export", str(run), str(out), "--json"]) == 0
    assert [json.loads(line) for line in capfd.readouterr().out.splitlines()] == [{"run": str(run)}, {"hf": str(out)}]
    assert (out / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    for name in huggingface.TOKENIZER_FILES:
        assert (out / name).exists() == (hf / name).exists()
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (hf, out))
    assert theirs == ours
    transformers = pytest.importorskip("transformers")
    text = tiny_run.text.read_text()[:200]
    assert transformers.AutoTokenizer.from_pretrained(out)(text)["input_ids"] == runs.load(run).tokenizer.encode(text).tolist()
    assert "Give a text with --text" in refused(["evaluate", run], capfd)
    assert json.loads((run / "run.json").read_text())["imported_from"] == str(hf)


# ---- generate ----


def texts(capfd, *argv):
    capfd.readouterr()
    assert cli.main(["generate", *map(str, argv), "--json", "--traceback"]) == 0
    return [g["text"] for g in json.loads(capfd.readouterr().out)["generations"]]


def test_every_kind_of_model_generates_the_same_for_the_same_seed(tiny_run, capfd):
    argv = ["--prompt", "the model", "--num", 3, "--max-tokens", 8]
    said = texts(capfd, tiny_run.folder, *argv)
    assert len(said) == 3 and len(set(said)) > 1
    for model in (tiny_run.folder, tiny_run.folder / "checkpoints/20", tiny_run.folder / "hf"):
        assert texts(capfd, model, *argv, "--seed", 0) == said
    assert texts(capfd, tiny_run.folder, *argv, "--seed", 1) != said


def test_generate_prints_the_prompt_and_what_follows(tiny_run, capfd):
    argv = ["generate", str(tiny_run.folder), "--prompt", "the ", "--max-tokens", "8", "--num"]
    said = texts(capfd, *argv[1:], 2)
    assert cli.main([*argv, "2"]) == 0
    assert capfd.readouterr().out == f"--- 1\nthe {said[0]}\n--- 2\nthe {said[1]}\n"
    assert cli.main([*argv, "1"]) == 0
    assert capfd.readouterr().out == f"the {said[0]}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num", "0"], "num = 0: below 1"),
        (["--max-tokens", "0"], "max_tokens = 0: below 1"),
        (["--max-tokens", "16"], "with 1 prompt tokens more than model.context_len = 16. Ask for at most 15"),
        (["--prompt", "ab" * 99], "Shorten the prompt"),
        (["--temperature", "-1"], "temperature = -1.0: out of range"),
        (["--top-k", "-1"], "top_k = -1: out of range"),
        (["--top-p", "0"], "top_p = 0.0: not a probability"),
        (["--stop", ""], "stop = '': empty"),
        (["--banned", "9999"], "banned = token 9999: outside the model's vocabulary of 300. Give ids below 300"),
        (["--forced", "9999"], "forced = token 9999: outside the model's vocabulary of 300. Give ids below 300"),
        (["--seed", "99999999999999999999"], "seed = 99999999999999999999: more than a random key holds"),
        (["--beams", "2", "--stop", "a"], "stop = ('a',): beam search compares whole continuations"),
        (["--beams", "2", "--top-k", "3"], "top_k = 3: beam search draws nothing"),
        (["--length-penalty", "2"], "length_penalty = 2.0: only beam search has a use for it"),
        (["--early-stopping"], "early_stopping = True: only beam search has a use for it"),
        (["--stream", "--scores"], "--scores: of no use with --stream"),
        (["--drafted", "3"], "--drafted = 3: there is no model to guess. Name one with --draft"),
        (["--draft", "{run}", "--drafted", "-3", "--max-tokens", "5"], "drafted = -3: not a number of tokens"),
        (["--draft", "{run}", "--drafted", "0", "--max-tokens", "5"], "drafted = 0: not a number of tokens"),
        (["--draft", "{run}", "--drafted", "200", "--max-tokens", "5"], "drafted = 200: not a number of tokens"),
        (["--stream", "--json"], "--stream: prints one text"),
        (["--stream", "--beams", "2", "--max-tokens", "5"], "beams = 2: a stream is one continuation"),
    ],
)
def test_settings_out_of_range_are_named(tiny_run, argv, words, capfd):
    assert words in refused(["generate", tiny_run.folder, *(word.format(run=tiny_run.folder) for word in argv)], capfd)


def test_several_prompts_are_continued_each_as_alone(tiny_run, capfd):
    argv = [tiny_run.folder, "--max-tokens", 8, "--num", 2]
    together = texts(capfd, *argv, "--prompt", "the model", "--prompt", "a")
    assert together == texts(capfd, *argv, "--prompt", "the model") + texts(capfd, *argv, "--prompt", "a")


def test_a_stream_prints_what_generate_prints(tiny_run, capfd):
    argv = ["generate", str(tiny_run.folder), "--prompt", "the ", "--max-tokens", "8"]
    assert cli.main(argv) == 0
    printed = capfd.readouterr().out
    assert cli.main([*argv, "--stream"]) == 0
    assert capfd.readouterr().out == printed


@pytest.mark.slow
def test_scores_and_beams_and_a_draft_are_asked_for_by_flag(tiny_run, capfd):
    argv = ["generate", str(tiny_run.folder), "--prompt", "the ", "--max-tokens", "8", "--traceback"]
    assert cli.main([*argv, "--beams", "3", "--num", "2", "--scores"]) == 0
    heading = r"^--- \d  (?:length|end of text)  (-\d+\.\d{4}) nats"
    best = re.findall(heading + r"  score (-\d+\.\d{4})$", capfd.readouterr().out, re.M)
    assert len(best) == 2 and float(best[0][1]) >= float(best[1][1])
    assert all(float(nats) <= float(score) <= float(nats) / 8 + 1e-4 for nats, score in best)
    assert cli.main([*argv, "--temperature", "0", "--scores"]) == 0
    alone = capfd.readouterr().out
    assert cli.main([*argv, "--temperature", "0", "--scores", "--draft", str(tiny_run.folder)]) == 0
    assert capfd.readouterr().out == alone and re.match(heading + "\n", alone)
    greedy = texts(capfd, *argv[1:-1], "--temperature", 0)
    assert texts(capfd, *argv[1:-1], "--temperature", 0, "--draft", tiny_run.folder, "--drafted", 2) == greedy


@pytest.mark.parametrize("flags", [["--num", 2], ["--beams", 3, "--num", 2], ["--draft", "{run}"]])
def test_json_says_how_likely_each_token_was(tiny_run, flags, capfd):
    flags = [str(flag).format(run=tiny_run.folder) for flag in flags]
    assert cli.main(["generate", str(tiny_run.folder), "--prompt", "the ", "--max-tokens", "8", "--json", *flags]) == 0
    for g in json.loads(capfd.readouterr().out)["generations"]:
        assert list(g) == ["prompt", "text", "tokens", "logprobs", "logprob", "score", "ended_by"]
        assert len(g["logprobs"]) == len(g["tokens"]) + (g["ended_by"] == "end of text")
        assert g["logprob"] == pytest.approx(sum(g["logprobs"]), abs=1e-4) and (g["score"] is None) == ("--beams" not in flags)


def test_help_of_chat_shows_its_own_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.main(["chat", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "half the context at most (default 200)" in said and "0 is greedy (default 0.8)" in said and "(default 'User')" in said


@pytest.mark.slow
def test_a_conversation_with_a_small_context_needs_no_flags(tiny_run):
    done = subprocess.run(
        [sys.executable, "-m", "mlm_jax.cli", "chat", str(tiny_run.folder), "--user", "a", "--assistant", "the"],
        input="a\n/settings\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "max_tokens = 8\n" in done.stdout and "turn = " not in done.stdout, done.stdout + done.stderr


def test_a_conversation_over_standard_input(tiny_run):
    done = subprocess.run(
        [sys.executable, "-m", "mlm_jax.cli", "chat", str(tiny_run.folder), "--max-tokens", "4", "--user", "a", "--assistant", "the", "--json"],
        input="reads\n/set max_tokens 2\nwrites\n/set max_tokens x\n/quit\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    turns = json.loads(done.stdout)["turns"]
    assert [said for said, _ in turns] == ["reads", "writes"]
    assert "max_tokens = 'x': expected int, got str" in done.stderr


# ---- evaluate and report ----


def test_a_run_is_evaluated_as_it_was_at_its_end(tiny_run, capfd):
    assert cli.main(["evaluate", str(tiny_run.folder), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    at_the_end = json.loads((tiny_run.folder / "evaluation.json").read_text())
    assert found == pytest.approx({key: value for key, value in at_the_end.items() if not key.startswith("xz")}, rel=1e-5)
    assert cli.main(["evaluate", str(tiny_run.folder / "checkpoints/15")]) == 0
    assert "bits/byte" in capfd.readouterr().out


def test_a_model_is_evaluated_on_a_text(tiny_run, tmp_path, capfd):
    text = tiny_run.text.read_text()
    (tmp_path / "held_out.txt").write_text(text[int(len(text) * 0.9) :])
    for model in (tiny_run.folder, tiny_run.folder / "hf"):
        assert cli.main(["evaluate", str(model), "--text", str(tmp_path / "held_out.txt"), "--json"]) == 0
        found = json.loads(capfd.readouterr().out)
        assert found["val_loss"] == pytest.approx(json.loads((tiny_run.folder / "evaluation.json").read_text())["val_loss"], rel=1e-5)


def test_a_text_that_cannot_be_read_is_named(tiny_run, tmp_path, capfd):
    (tmp_path / "empty.txt").write_text("")
    assert "has no validation split. Give a text with --text" in refused(["evaluate", tiny_run.folder / "hf"], capfd)
    assert "none.txt: no such file" in refused(["evaluate", tiny_run.folder, "--text", tmp_path / "none.txt"], capfd)
    assert "--text" in refused(["evaluate", tiny_run.folder, "--text", tmp_path / "empty.txt"], capfd)


def test_a_report_is_drawn_anew(tiny_run, tmp_path, capfd):
    run = shutil.copytree(tiny_run.folder, tmp_path / "run")
    (run / "report.html").unlink()
    assert cli.main(["report", str(run), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"report": str(run / "report.html")}
    assert (run / "report.html").is_file()
    assert "not a run" in refused(["report", tmp_path], capfd)


def test_the_run_directory_is_named_after_the_experiment(tiny_experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", str(tiny_experiment), "--set", "name=other"]) == 0
    assert os.path.isfile("runs/other/config.json")


def test_what_weights_do_not_say_is_set_by_flag(tiny_run, tmp_path, capfd):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_bytes((tiny_run.folder / "hf" / "model.safetensors").read_bytes())
    weights = tmp_path / "hf" / "model.safetensors"
    assert "--set model.n_heads=12" in refused(["import", weights, tmp_path / "out"], capfd)
    assert "is no field of the model" in refused(["import", weights, tmp_path / "out", "--set", "optim.peak_lr=1"], capfd)
    assert not (tmp_path / "out").exists()
    config = json.loads((tiny_run.folder / "config.json").read_text())["model"]
    flags = ["--set", f"model.n_heads={config['n_heads']}", "--set", "model.activation=gelu_tanh", "--set", "model.vocab_multiple=128"]
    tokenizer = ["--tokenizer", str(tiny_run.folder / "tokenizer")]
    assert cli.main(["import", str(weights), str(tmp_path / "out"), *flags, *tokenizer]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model"]["vocab_multiple"] == 128
    assert cli.main(["export", str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights.read_bytes()
