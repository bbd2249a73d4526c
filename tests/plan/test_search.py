"""The search, with plans that are made up: what is compiled is tested in test_tpu.py."""

import os

import pytest

from experiments import gpt2_124m
from mlm_jax.config import InputError, override, to_json
from mlm_jax.plan import search, topology, tpu

CONFIG = override(gpt2_124m.CONFIG, {"train.batch_size": 512})
SLICE = topology.parse("v5e:2x4")


def attempts(seconds):
    """Plans of which `seconds`, a function of a configuration, says the length of the step, or None where it does not fit; and what was asked."""
    asked = []

    def attempt(several):
        asked.extend(several)
        found = [(changes, seconds(override(CONFIG, changes))) for changes in several]
        return [search.Found(dict(changes), s, "" if s is not None else "too much", 1.0) for changes, s in found]

    return attempt, asked


def made_up(config):
    """As on a real slice: what saves memory costs time, splitting parameters does too, and what saves too little does not fit."""
    m, t = config.model, config.train
    gib = 40 / t.micro_batches * {"none": 1, "dots": 0.6, "attention": 0.4, "full": 0.3}[m.remat] + 20 / t.loss_chunks / t.micro_batches
    gib += 5 / config.mesh.fsdp
    slow = {"none": 0, "dots": 4, "attention": 12, "full": 15}[m.remat] + t.micro_batches + config.mesh.fsdp / 2 + config.mesh.tensor * 9
    slow += 3 * (m.attention == "blocked") + (m.attention == "flash") + abs(t.loss_chunks - 4) / 10
    return None if gib > 16 else (100 + slow) / 1e3


def test_the_search_comes_within_a_percent_of_the_best_of_all_that_there_is_in_a_few_tries():
    attempt, asked = attempts(made_up)
    found = search.search(CONFIG, SLICE, attempt)
    every = [{}]
    for options in (search.meshes(CONFIG, SLICE), *(choice(CONFIG, SLICE) for choice in search.CHOICES[1:])):
        every = [one | option for one in every for option in options]
    least = min(s for changes in every if (s := made_up(override(CONFIG, changes))) is not None)
    assert least <= found[0].step_s < 1.01 * least and override(CONFIG, found[0].changes) != CONFIG
    assert len(asked) < len(every) / 8
    meshes = [{f"mesh.{axis}": size for axis, size in search.sizes(override(CONFIG, one), SLICE).items()} for one in asked]
    different = {to_json(override(CONFIG, {**one, **mesh})) for one, mesh in zip(asked, meshes, strict=True)}
    assert len(different) == len(asked), "nothing is asked twice"
    assert [one.step_s is None for one in found] == sorted(one.step_s is None for one in found), "what does not fit comes last"


def test_only_meshes_that_the_model_and_the_batch_can_be_split_over_are_tried():
    """XL: 1600 = 2^6 x 25 and 25 heads, so FSDP in 64 parts at most of 256 devices, and no split of the heads."""
    config = override(CONFIG, {"model.d_model": 1600, "model.n_heads": 25, "model.d_ff": 6400})
    found = search.meshes(config, topology.parse("v5e:16x16"))
    assert {(mesh["mesh.fsdp"], mesh["mesh.data"]) for mesh in found} == {(f, 256 // f) for f in (1, 2, 4, 8, 16, 32, 64)}
    assert {mesh["mesh.tensor"] for mesh in found} == {1}
    assert search.meshes(override(config, {"train.batch_size": 12}), topology.parse("v5e:16x16")) == []


def test_meshes_leave_room_for_split_positions_and_keep_the_tensors_in_as_many_parts_as_asked():
    """Eight devices, positions in two: four are left for all else."""
    config = override(CONFIG, {"mesh.context": 2, "mesh.fsdp": -1, "mesh.data": 1, "mesh.tensor": 4})
    assert search.sizes(config, SLICE) == {"data": 1, "fsdp": 1, "tensor": 4, "context": 2}
    found = search.meshes(config, SLICE)
    assert {mesh["mesh.tensor"] for mesh in found} == {1, 2, 4}
    assert all(mesh["mesh.data"] * mesh["mesh.fsdp"] * mesh["mesh.tensor"] == 4 for mesh in found)
    assert search.parts(config, SLICE) == [1, 2, 4, 8, 16], "512 rows, not split over devices"


def test_what_a_configuration_forbids_is_not_tried():
    """A batch that grows from 8 rows on 8 devices cannot be cut into parts on its way."""
    config = override(CONFIG, {"train.batch_size": 64, "train.ramp_from": 8, "train.ramp_steps": 10, "model.context_len": 1000})
    attempt, asked = attempts(made_up)
    search.search(config, SLICE, attempt)
    search.remedies(config, SLICE, attempt)
    assert asked
    for changes in asked:
        override(config, changes)


def test_a_compilation_that_fails_for_another_reason_is_one_that_does_not_do(monkeypatch, tmp_path):
    def fails(config, build, topology):
        if config.model.attention == "flash":
            raise ValueError("Mosaic failed to compile TPU kernel")
        raise tpu.DoesNotFit(20 * 2**30, 16 * 2**30, [])

    monkeypatch.setattr(tpu, "plan", fails)
    job = ("experiments/gpt2_124m.py", {"model.attention": "flash"}, "v5e:2x4", 1, tmp_path)
    assert search._planned(job) == (None, "ValueError: Mosaic failed to compile TPU kernel", 0.0)
    assert not list(tmp_path.iterdir()), "it may do with another version"
    found = search._planned((*job[:1], {}, *job[2:]))
    assert found[0] is None and found[2] == 20.0 and len(list(tmp_path.iterdir())) == 1


def test_a_process_that_is_ended_while_it_compiles_ends_the_search_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(search, "_planned", end)
    with pytest.raises(search.Ended, match=r"ended from outside.*the same command goes on"):
        search.attempts("experiments/gpt2_124m.py", {}, "v5e:2x4", 1, tmp_path)([{}])


def end(job) -> None:
    os._exit(9)


def test_the_three_cheapest_remedies_fit_and_come_in_the_order_of_their_cost():
    attempt, _ = attempts(made_up)
    assert made_up(CONFIG) is None
    found = search.remedies(CONFIG, SLICE, attempt)
    assert len(found) == 3 and [one.step_s for one in found] == sorted(one.step_s for one in found)
    assert all(made_up(override(CONFIG, one.changes)) is not None for one in found)
    assert len({to_json(override(CONFIG, one.changes)) for one in found}) == 3


def test_no_remedy_is_what_is_there_already():
    config = override(CONFIG, {"model.remat": "full", "train.loss_chunks": 8})
    attempt, asked = attempts(lambda changed: None)
    assert search.remedies(config, SLICE, attempt) == []
    assert asked and all(override(config, {path: value}) != config for changes in asked for path, value in changes.items())


def test_where_nothing_fits_one_line_says_so():
    attempt, _ = attempts(lambda config: None)
    assert search.remedies(CONFIG, SLICE, attempt) == []
    with pytest.raises(InputError, match=r"--search: neither as it is nor with .*model\.remat=full.* does it fit v5e:2x4\. Take a larger slice"):
        search.search(CONFIG, SLICE, attempt)


def test_where_nothing_can_be_compiled_the_reason_is_told():
    def attempt(several):
        return [search.Found(dict(changes), None, "libtpu is not installed.", 0.0) for changes in several]

    with pytest.raises(InputError, match=r"^--search: nothing can be compiled: libtpu is not installed\. Mend that first\.$"):
        search.search(CONFIG, SLICE, attempt)


def test_a_plan_is_found_again_only_where_nothing_that_it_depends_on_has_changed(monkeypatch):
    found = [
        search.fingerprint(CONFIG, {}, SLICE),
        search.fingerprint(override(CONFIG, {"model.remat": "full"}), {}, SLICE),
        search.fingerprint(CONFIG, {}, topology.parse("v5e:2x4", 2)),
        search.fingerprint(CONFIG, {}, topology.parse("v5e:4x4")),
    ]
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=65536")
    found.append(search.fingerprint(CONFIG, {}, SLICE))
    monkeypatch.delenv("LIBTPU_INIT_ARGS")
    assert len(set(found)) == 5
    assert search.fingerprint(override(CONFIG, {"name": "other"}), {}, SLICE) == found[0], "a name changes no plan"
