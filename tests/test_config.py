"""Configurations are whole or they are refused, in one line that says what to do."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest

from mlm_jax.config import (
    Config,
    DataConfig,
    InputError,
    MeshConfig,
    MixedSourceConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
    diff,
    from_json,
    one_of,
    override,
    parse_set,
    to_json,
)

BASE = Config(name="base")


def message(call, *args, **kwargs) -> str:
    """The one line that `call` is refused with."""
    with pytest.raises(InputError) as refused:
        call(*args, **kwargs)
    line = str(refused.value)
    assert "\n" not in line and line.endswith(".")
    return line


def changed(**changes) -> str:
    """The one line that BASE with `changes` is refused with; section__field stands for section.field."""
    return message(override, BASE, {path.replace("__", "."): value for path, value in changes.items()})


def test_the_defaults_are_gpt2_124m():
    # Radford et al. 2019, table 2: 12 layers, 768 wide; 12 heads and a four times wider MLP as in GPT-1.
    model = BASE.model
    assert (model.n_layers, model.d_model, model.n_heads, model.d_ff, model.context_len, model.head_dim) == (12, 768, 12, 3072, 1024, 64)


def test_a_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASE.model.d_model = 1  # type: ignore[misc]


def test_override_changes_the_named_fields_and_nothing_else():
    new = override(BASE, {"optim.peak_lr": 1e-3, "train.steps": 2000, "name": "new"})
    assert new == Config(name="new", optim=OptimConfig(peak_lr=1e-3), train=TrainConfig(steps=2000))
    assert Config(name="base") == BASE


def test_two_fields_that_depend_on_each_other_change_at_once():
    # Either change alone is refused, so an order between them would refuse both.
    assert "does not divide" in changed(model__n_heads=5)
    assert "does not divide" in changed(model__d_model=100)
    model = override(BASE, {"model.n_heads": 5, "model.d_model": 100}).model
    assert (model.n_heads, model.d_model, model.head_dim) == (5, 100, 20)
    short = override(BASE, {"train.steps": 10, "optim.warmup_steps": 2})  # across sections too
    assert (short.train.steps, short.optim.warmup_steps) == (10, 2)


def test_override_takes_a_whole_section_and_leaves_it_alone():
    section = {"peak_lr": 1e-3}
    assert override(BASE, {"optim": section, "optim.eps": 1e-6}).optim == OptimConfig(peak_lr=1e-3, eps=1e-6)
    assert section == {"peak_lr": 1e-3}
    assert override(BASE, {"optim": OptimConfig(b1=0.8)}).optim.b1 == 0.8
    assert override(BASE.model, {"n_layers": 2}) == ModelConfig(n_layers=2)  # a section by itself


def test_a_field_set_whole_and_in_part_is_refused():
    assert message(override, BASE, {"optim": OptimConfig(), "optim.eps": 1e-6}).startswith("optim.eps = 1e-06: 'optim' is set as a whole")
    assert message(override, BASE, {"optim.eps": 1e-6, "optim": OptimConfig()}).startswith("optim = OptimConfig(")


def test_an_unknown_field_is_answered_with_the_closest_one():
    line = changed(optim__peek_lr=1e-3)
    assert line.startswith("optim.peek_lr: OptimConfig has no field 'peek_lr'. Did you mean 'peak_lr'? Fields: peak_lr, end_lr, ")
    assert changed(modle__d_model=8).startswith("modle: Config has no field 'modle'. Did you mean 'model'?")
    assert changed(zzz=1).startswith("zzz: Config has no field 'zzz'. Fields: name, model, ")  # nothing is close
    assert changed(train__steps__x=1) == "train.steps = {'x': 1}: a single value, it has no fields. Write a value of type int."


def test_a_wrong_type_is_refused_wherever_it_comes_from():
    expected = "train.steps = '10': expected int, got str. Write a value of type int."
    assert changed(train__steps="10") == expected
    assert message(from_json, '{"name": "x", "train": {"steps": "10"}}', where="run/config.json") == "run/config.json: " + expected
    assert "expected int, got float" in changed(model__n_layers=2.0)
    assert "expected int, got bool" in changed(train__steps=True)
    assert "expected ModelConfig, got NoneType" in changed(model=None)
    assert "expected ModelConfig, got OptimConfig" in changed(model=OptimConfig())


def test_a_wrong_type_is_refused_in_an_experiment_file_too():
    # In a process of its own: here the type checker of the tests would answer first.
    code = "from mlm_jax.config import TrainConfig\ntry:\n    TrainConfig(steps='10')\nexcept ValueError as e:\n    print(e)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert answer == "train.steps = '10': expected int, got str. Write a value of type int.\n"


def test_an_int_serves_where_a_float_is_due():
    for optim in (OptimConfig(peak_lr=1), override(BASE, {"optim.peak_lr": 1}).optim, from_json('{"name": "x", "optim": {"peak_lr": 1}}').optim):
        assert optim.peak_lr == 1.0 and type(optim.peak_lr) is float


@pytest.mark.parametrize(
    ("section", "values", "line"),
    [
        (
            ModelConfig,
            {"n_heads": 5},
            "model.d_model = 768: model.n_heads = 5 does not divide it, a head would be 153.60 wide. Nearest that fit: 765 and 770.",
        ),
        (
            ModelConfig,
            {"d_model": 2, "n_heads": 4},
            "model.d_model = 2: model.n_heads = 4 does not divide it, a head would be 0.50 wide. Nearest that fit: 4.",
        ),
        (TrainConfig, {"keep_every": -1}, "train.keep_every = -1: below the least that makes sense, 0. Give a finite value of 0 or more."),
        (
            TrainConfig,
            {"keep_best": 2, "save_every": 100, "eval_every": 40},
            "train.keep_best = 2: not every checkpoint's loss is known: train.save_every = 100 is no multiple of train.eval_every = 40. "
            "Make it one, or set train.keep_best to 0.",
        ),
        (ModelConfig, {"n_layers": 0}, "model.n_layers = 0: below the least that makes sense, 1. Give a finite value of 1 or more."),
        (ModelConfig, {"dropout": 1.0}, "model.dropout = 1.0: not a fraction. Give a value from 0 up to, not including, 1."),
        (ModelConfig, {"dropout": math.nan}, "model.dropout = nan: not a fraction. Give a value from 0 up to, not including, 1."),
        (
            ModelConfig,
            {"compute_dtype": "bfloat"},
            "model.compute_dtype = bfloat: unknown. Did you mean 'bfloat16'? Choose from: float32, bfloat16.",
        ),
        (DataConfig, {"source": ""}, "data.source: empty. Name a text file, a folder, tfds:NAME or python-docs."),
        (DataConfig, {"tokenizer": "gtp2"}, "data.tokenizer = gtp2: unknown. Did you mean 'gpt2'? Choose from: gpt2, bpe, char, byte."),
        (
            DataConfig,
            {"bpe_vocab_size": 256},
            "data.bpe_vocab_size = 256: below the least that makes sense, 257. Give a finite value of 257 or more.",
        ),
        (DataConfig, {"val_fraction": -0.1}, "data.val_fraction = -0.1: not a fraction. Give a value from 0 up to, not including, 1."),
        (OptimConfig, {"peak_lr": math.nan}, "optim.peak_lr = nan: not a number. Give a finite value of 0 or more."),
        (OptimConfig, {"b2": 1.0}, "optim.b2 = 1.0: not a fraction. Give a value from 0 up to, not including, 1."),
        (TrainConfig, {"seed": 2**32}, "train.seed = 4294967296: more than a random key holds. Give a seed below 4294967296."),
        (TrainConfig, {"steps": 0}, "train.steps = 0: below the least that makes sense, 1. Give a finite value of 1 or more."),
        (MeshConfig, {"fsdp": 0}, "mesh.fsdp = 0: not a number of devices. Give 1 or more, or -1 for all that remain."),
        (MeshConfig, {"tensor": -1}, "mesh.tensor = -1: mesh.data is -1 too. Let one axis take the devices that remain."),
        (SampleConfig, {"seed": 10**20}, "seed = 100000000000000000000: more than a random key holds. Give a seed below 4294967296."),
        (SampleConfig, {"top_p": 0.0}, "top_p = 0.0: not a probability. Give a value above 0, at most 1."),
        (Config, {"name": ".."}, "name = ..: not usable as the name of a folder. Use letters, digits, '.', '_' and '-'."),
        (Config, {"name": "a/b"}, "name = a/b: not usable as the name of a folder. Use letters, digits, '.', '_' and '-'."),
    ],
)
def test_each_invalid_value_is_answered_with_its_remedy(section, values, line):
    assert message(section, **values) == line


def test_infinity_is_refused():
    assert "Give a finite value" in message(OptimConfig, peak_lr=math.inf)


def test_a_warmup_longer_than_the_run_is_refused():
    assert changed(train__steps=10) == ("optim.warmup_steps = 700: longer than the run, train.steps = 10. Warm up for fewer steps or train for more.")


def test_set_items_are_read_by_the_type_of_their_field():
    items = ["optim.peak_lr=1e-3", "train.steps=1_000", "mesh.data=-1", "model.unroll_layers=true", "name=1e3", "data.source=a=b", "data.tokens="]
    changes = parse_set(items)
    assert changes == {
        "optim.peak_lr": 0.001,
        "train.steps": 1000,
        "mesh.data": -1,
        "model.unroll_layers": True,
        "name": "1e3",  # a string field takes the text as it stands
        "data.source": "a=b",
        "data.tokens": "",
    }
    assert override(BASE, changes).model.unroll_layers is True


@pytest.mark.parametrize("text", ["many", "{[]: 1}", "1 +", "(" * 10_000, "\0"])
def test_text_that_is_no_literal_reaches_the_type_check(text):
    assert "expected int, got str" in message(override, BASE, parse_set([f"train.steps={text}"]))


@pytest.mark.parametrize("item", ["train.steps", "=3", ""])
def test_a_set_item_without_path_or_value_is_refused(item):
    assert "not of the form path=value. Write, for example, --set optim.peak_lr=3e-4." in message(parse_set, [item])


def test_diff_names_exactly_what_override_changed():
    changes = {"name": "new", "optim.peak_lr": 1e-3, "model.n_layers": 2, "data.source": "a.txt"}
    new = override(BASE, changes)
    assert {path: value for path, (_, value) in diff(BASE, new).items()} == changes
    assert diff(BASE, new)["model.n_layers"] == (12, 2)
    assert override(new, {path: old for path, (old, _) in diff(BASE, new).items()}) == BASE
    assert diff(BASE, BASE) == {}


def test_json_gives_an_equal_configuration_back():
    every = override(
        BASE,
        {
            "name": "naïve_α",
            "model.norm_eps": 1e-7,
            "model.compute_dtype": "bfloat16",
            "model.unroll_layers": True,
            "data.source": 'a "quoted" \\ folder\n',
            "optim.peak_lr": 0.1 + 0.2,  # no short decimal
            "train.seed": 2**31,
            "mesh.data": 4,
            "mesh.fsdp": -1,
            "sample.top_p": 0.5,
        },
    )
    assert from_json(to_json(every)) == every
    assert json.loads(to_json(every))["optim"]["peak_lr"] == 0.30000000000000004
    assert from_json('{"name": "old", "train": {"steps": 900}}') == Config(name="old", train=TrainConfig(steps=900))  # the rest by default


def test_json_that_is_no_configuration_is_refused_by_file_and_field():
    assert message(from_json, "{", where="run/config.json").startswith("run/config.json: not JSON (")
    for text in ("[1]", "{}"):
        assert message(from_json, text, where="c.json") == (
            "c.json: not the configuration of a run: it has no name. Restore the file, or start the run in a new directory."
        )
    unknown = '{"name": "x", "optim": {"peek_lr": 1}}'
    assert message(from_json, unknown, where="c.json").startswith(
        "c.json: optim.peek_lr: OptimConfig has no field 'peek_lr'. Did you mean 'peak_lr'?"
    )
    assert message(from_json, '{"name": "x", "model": {"d_model": 10}}', where="c.json").startswith("c.json: model.d_model = 10: model.n_heads = 12 ")
    assert "expected ModelConfig, got int" in message(from_json, '{"name": "x", "model": 3}')


def test_a_choice_is_checked_by_name():
    one_of("kind", "b", "ab")
    assert message(one_of, "kind", "z", "ab") == "kind = z: unknown. Choose from: a, b."


def test_an_input_error_is_one_line_whatever_it_is_about():
    assert str(InputError("f", "a\nb", "bad", "mend it")) == "f = a b: bad. mend it."
    assert str(InputError("f", 3, "bad.", "mend it.")) == "f = 3: bad. mend it."  # no second full stop
    assert str(InputError("f", "", "bad", "mend it")) == "f: bad. mend it."
    assert str(InputError("f", "", "bad. Did you mean 'g'?", "mend it")) == "f: bad. Did you mean 'g'? mend it."


def test_a_wrong_setting_inside_a_configuration_is_named_from_the_top():
    with pytest.raises(InputError, match=r"^sample\.top_p = 2\.0: not a probability"):
        override(Config(name="x"), {"sample.top_p": 2.0})
    with pytest.raises(InputError, match=r"^config\.json: sample\.stop = '': expected a sequence of str|^config\.json: sample\.stop = 'ab'"):
        from_json(to_json(Config(name="x")).replace('"stop": []', '"stop": "ab"'))


def test_sequences_survive_json_and_the_command_line():
    changed = override(Config(name="x"), parse_set(["sample.stop=('a', 'b')", "sample.banned=[1, 2]"]))
    assert changed.sample.stop == ("a", "b") and changed.sample.banned == (1, 2)
    assert from_json(to_json(changed)) == changed
    with pytest.raises(InputError, match=r"^sample\.banned = 'x': expected int, got str"):
        override(Config(name="x"), {"sample.banned": (1, "x")})


def test_either_all_sources_of_a_mixture_have_a_weight_or_none():
    with pytest.raises(InputError, match=r"data\.mixture\.weight = 0\.0: b has none, and others have\. Give each source a weight, or none"):
        DataConfig(mixture=(MixedSourceConfig(source="a.txt", weight=1), MixedSourceConfig(source="b.txt")))
