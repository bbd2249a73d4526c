"""The search, with plans that are made up: what is compiled is tested in test_tpu.py."""

import json

import pytest

from experiments import gpt2_124m
from mlm_jax.config import InputError, override
from mlm_jax.plan import search, topology

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
    assert len(asked) < len(every) / 8 and len({json.dumps(one, sort_keys=True) for one in asked}) == len(asked), "nothing is asked twice"
    assert [one.step_s is None for one in found] == sorted(one.step_s is None for one in found), "what does not fit comes last"


def test_only_meshes_that_the_model_and_the_batch_can_be_split_over_are_tried():
    """XL: 1600 = 2^6 x 25 and 25 heads, so FSDP in 64 parts at most of 256 devices, and no split of the heads."""
    config = override(CONFIG, {"model.d_model": 1600, "model.n_heads": 25, "model.d_ff": 6400})
    found = search.meshes(config, topology.parse("v5e:16x16"))
    assert {(mesh["mesh.fsdp"], mesh["mesh.data"]) for mesh in found} == {(f, 256 // f) for f in (1, 2, 4, 8, 16, 32, 64)}
    assert {mesh["mesh.tensor"] for mesh in found} == {1}
    assert search.meshes(override(config, {"train.batch_size": 12}), topology.parse("v5e:16x16")) == []


def test_the_three_cheapest_remedies_fit_and_come_in_the_order_of_their_cost():
    attempt, _ = attempts(made_up)
    assert made_up(CONFIG) is None
    found = search.remedies(CONFIG, SLICE, attempt)
    assert len(found) == 3 and [one.step_s for one in found] == sorted(one.step_s for one in found)
    assert all(made_up(override(CONFIG, one.changes)) is not None for one in found)


def test_where_nothing_fits_one_line_says_so():
    attempt, _ = attempts(lambda config: None)
    assert search.remedies(CONFIG, SLICE, attempt) == []
    with pytest.raises(InputError, match=r"--search: neither as it is nor with .*model\.remat=full.* does it fit v5e:2x4\. Take a larger slice"):
        search.search(CONFIG, SLICE, attempt)


def test_a_plan_is_found_again_only_where_nothing_that_it_depends_on_has_changed():
    found = [
        search.fingerprint(CONFIG, {}, SLICE),
        search.fingerprint(override(CONFIG, {"model.remat": "full"}), {}, SLICE),
        search.fingerprint(CONFIG, {}, topology.parse("v5e:2x4", 2)),
        search.fingerprint(CONFIG, {}, topology.parse("v5e:4x4")),
    ]
    assert len(set(found)) == 4
    assert search.fingerprint(override(CONFIG, {"name": "other"}), {}, SLICE) == found[0], "a name changes no plan"
