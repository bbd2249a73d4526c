import itertools
import sys
from fractions import Fraction

import numpy as np
import pytest

from mlm_jax.config import Config, DataConfig, InputError, MixedSourceConfig, ModelConfig, TrainConfig, override
from mlm_jax.data import tokens
from mlm_jax.data.batches import BLOCK, Batches, Mixture, permuted, training_batches, validation_windows
from mlm_jax.data.prepare import prepare
from mlm_jax.data.tokens import Tokens
from tests.conftest import documents, write_tokens


def numbered(n: int, shard: int = 40) -> Tokens:
    """Tokens whose value is their position, over several shards."""
    return Tokens([np.arange(i, min(i + shard, n), dtype=np.uint16) for i in range(0, n, shard)])


def test_a_batch_is_a_pure_function_of_tokens_seed_and_step(tmp_path):
    (tmp_path / "a.txt").write_text("".join(chr(32 + i * i % 90) for i in range(3000)))
    prepare(DataConfig(source=str(tmp_path / "a.txt"), tokenizer="byte"), tmp_path / "out", shard_tokens=700)
    first = Batches(tokens.open_tokens(tmp_path / "out", "train"), context_len=16, batch_size=5, seed=3)
    forwards = [first(step) for step in range(60)]
    again = Batches(tokens.open_tokens(tmp_path / "out", "train"), context_len=16, batch_size=5, seed=3)
    for step in reversed(range(60)):
        np.testing.assert_array_equal(again(step), forwards[step])
    assert forwards[0].dtype == np.int32
    assert forwards[0].shape == (5, 17)


def test_the_first_batch_of_a_seed_stays_what_it_is():
    """A run resumed with a newer release must see the same batches: these are written down, not computed."""
    batches = Batches(numbered(1000), context_len=8, batch_size=6, seed=1)
    assert batches(0)[:, 0].tolist() == [133, 261, 165, 29, 893, 861]
    assert batches(100)[:, 0].tolist() == [872, 856, 152, 728, 848, 824]


def test_a_row_is_consecutive_tokens_around_the_circle():
    batches = Batches(numbered(100), context_len=9, batch_size=7, seed=0)
    for step in range(20):
        rows = batches(step)
        np.testing.assert_array_equal(rows, (rows[:, :1] + np.arange(10)) % 100)


@pytest.mark.parametrize(("n", "context_len"), [(96, 8), (101, 8), (9, 8), (17, 16)])
def test_an_epoch_makes_no_token_a_first_input_twice_and_leaves_out_less_than_one_window(n, context_len):
    batches = Batches(numbered(n), context_len=context_len, batch_size=1, seed=5)
    per_epoch = n // context_len
    for epoch in range(4):
        seen = np.concatenate([batches(step)[0, :-1] for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)])
        assert len(set(seen.tolist())) == len(seen) == n - n % context_len


def test_epochs_differ_in_order_and_in_where_they_cut():
    batches = Batches(numbered(800), context_len=8, batch_size=100, seed=0)
    starts = [batches(epoch)[:, 0].tolist() for epoch in range(8)]
    assert len({tuple(epoch) for epoch in starts}) == 8
    cuts = [{start % 8 for start in epoch} for epoch in starts]
    assert all(len(cut) == 1 for cut in cuts)
    assert len(set.union(*cuts)) > 3
    assert all(epoch != sorted(epoch) for epoch in starts)


def test_two_seeds_differ_and_one_is_not_the_other_an_epoch_later():
    epochs = {seed: [Batches(numbered(800), context_len=8, batch_size=100, seed=seed)(epoch)[:, 0] // 8 for epoch in range(3)] for seed in (0, 1, 2)}
    orders = {tuple(order.tolist()) for orders in epochs.values() for order in orders}
    assert len(orders) == 9


@pytest.mark.parametrize("step", [0, 3, 4, 11])  # 3 and 4 lie across the end of an epoch of 100 // 8 = 12 windows
def test_rows_are_slices_of_the_batch(step):
    batches = Batches(numbered(100), context_len=8, batch_size=5, seed=0)
    whole = batches(step)
    for start in range(6):
        for stop in range(start, 6):
            np.testing.assert_array_equal(batches.rows(step, start, stop), whole[start:stop])


def test_a_batch_may_be_larger_than_an_epoch():
    batches = Batches(numbered(20), context_len=8, batch_size=7, seed=0)
    assert batches(0).shape == (7, 9)


def test_a_text_shorter_than_one_window_is_refused_with_its_size():
    assert Batches(numbered(9), context_len=8, batch_size=1, seed=0)(0).shape == (1, 9)
    with pytest.raises(InputError, match=r"model\.context_len = 8: the text is shorter than one window: 8 training tokens"):
        Batches(numbered(8), context_len=8, batch_size=1, seed=0)


@pytest.mark.parametrize("n", [2, 8, 9, 10, 16, 17, 18, 100])
def test_validation_makes_every_token_but_the_first_a_target_exactly_once(n):
    windows = validation_windows(numbered(n), 8)
    assert len(windows) == -(-(n - 1) // 8)
    targets, inputs = [], []
    for i in range(-(-len(windows) // 3)):
        rows, weights = windows.batch(i, 3)
        assert (rows.shape, rows.dtype, weights.shape, weights.dtype) == ((3, 9), np.int32, (3, 8), np.float32)
        assert set(np.unique(weights).tolist()) <= {0.0, 1.0}
        inputs += rows[:, :-1][weights == 1].tolist()
        targets += rows[:, 1:][weights == 1].tolist()
    assert targets == list(range(1, n))
    assert inputs == list(range(n - 1))


def test_validation_rows_are_slices_and_rows_past_the_end_weigh_nothing():
    windows = validation_windows(numbered(30), 8)
    rows, weights = windows.batch(0, 6)
    assert weights.sum(axis=1).tolist() == [8, 8, 8, 5, 0, 0]
    for start, stop in ((0, 2), (3, 6), (2, 2)):
        np.testing.assert_array_equal(windows.rows(range(start, stop))[0], rows[start:stop])
        np.testing.assert_array_equal(windows.rows(range(start, stop))[1], weights[start:stop])
    np.testing.assert_array_equal(windows.rows([3, 0, 3])[0], rows[[3, 0, 3]])


def test_a_validation_split_with_nothing_to_predict_is_refused():
    with pytest.raises(InputError, match=r"data\.val_fraction: the validation split has 1 tokens"):
        validation_windows(numbered(1), 8)


# ---- several sources ----


def huge(n: int, name: str = "", token: int = 0) -> Tokens:
    """`n` times the same token, in the memory of one."""
    return Tokens([np.broadcast_to(np.uint16(token), (n,))], name=name)


def mixed(*stated: dict) -> list[MixedSourceConfig]:
    return [MixedSourceConfig(name=f"s{i}", **one) for i, one in enumerate(stated)]


WEIGHTS = {
    "even": [1, 1],
    "three": [0.7, 0.2, 0.1],
    "thirds": [1, 1, 1],
    "many": [0.31, 0.17, 0.13, 0.11, 0.09, 0.07, 0.05, 0.04, 0.02, 0.01],
    "one small": [1, 1e-3, 1e-4],
    "nearly one row in a block": [1022.5, 1.25, 0.25],
    "tokens": [9_000_000_001, 123_456_789, 77_777],
    "far apart": [1, 2e-8],
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_no_source_is_ever_more_than_a_row_away_from_its_share_and_none_loses_rows(name):
    mixture, exact = Mixture(WEIGHTS[name], 0), [Fraction(w) / sum(map(Fraction, WEIGHTS[name])) for w in WEIGHTS[name]]
    assert (mixture.block == BLOCK) is (min(exact) * BLOCK >= 1)
    before = [0] * len(exact)
    for blocks in [*range(400), *range(10**9, 10**9 + 50), 10**15, 10**15 + 1]:
        counts = mixture.counts(blocks)
        assert sum(counts) == blocks * mixture.block
        assert all(abs(n - share * blocks * mixture.block) < 1 for n, share in zip(counts, exact, strict=True))
        assert all(b >= a for a, b in zip(before, counts, strict=True))
        up = {True: [], False: []}
        for n, share in zip(counts, exact, strict=True):
            quota = share * blocks * mixture.block
            up[n > quota].append(quota % 1)
        assert min(up[True], default=1) >= max(up[False])  # the largest remainders are rounded up
        before = counts


@pytest.mark.parametrize("name", ["even", "many", "nearly one row in a block"])
def test_each_source_has_its_rows_one_by_one_without_gaps(name):
    mixture = Mixture(WEIGHTS[name], 7)
    for first in (0, 5 * mixture.block):
        found = [mixture(row) for row in range(first, first + mixture.block)]
        blocks = first // mixture.block
        for source, (a, b) in enumerate(zip(mixture.counts(blocks), mixture.counts(blocks + 1), strict=True)):
            assert sorted(rank for which, rank in found if which == source) == list(range(a, b))


def test_sources_are_shuffled_among_each_other():
    mixture, other = Mixture([1, 1], 0), Mixture([1, 1], 1)
    sources, others = ([m(row)[0] for row in range(4 * BLOCK)] for m in (mixture, other))
    assert sources != others and sources[:BLOCK] != sources[BLOCK : 2 * BLOCK]
    runs = sum(a != b for a, b in itertools.pairwise(sources))
    assert abs(runs - 2 * BLOCK) < 200  # half of the neighbours are of two sources, as of coins


SOURCES = ({"epochs": 2.0}, {}, {"epochs": 0.5})


def three(**how) -> Batches:
    stored = [Tokens([np.arange(a, a + n)], name=f"s{i}") for i, (a, n) in enumerate(((0, 803), (1000, 1601), (5000, 3207)))]
    return Batches(stored, **{"context_len": 8, "batch_size": 64, "seed": 3, "mixture": mixed(*SOURCES)} | how)


def test_each_window_of_each_source_is_met_once_in_an_epoch_of_its_own():
    made, rows = three(), 4 * BLOCK
    found = np.concatenate([made(step) for step in range(rows // 64)])
    names = np.searchsorted([1000, 5000], found[:, 0], side="right")
    counts = [int((names == i).sum()) for i in range(3)]
    for i, (first, n) in enumerate(((0, 803), (1000, 1601), (5000, 3207))):
        mine = found[names == i]
        np.testing.assert_array_equal((mine - first) % n, (mine[:, :1] - first + np.arange(9)) % n)  # consecutive, around the circle
        ranks = [rank for source, rank in (made._mixture(row) for row in range(rows)) if source == i]
        ordered = mine[np.argsort(ranks)][:, :-1]
        per_epoch = n // 8
        assert counts[i] > 2 * per_epoch
        for epoch in range(counts[i] // per_epoch):
            inputs = ordered[epoch * per_epoch : (epoch + 1) * per_epoch].ravel()
            assert len(set(inputs.tolist())) == len(inputs) == n - n % 8
    shares = np.array([2 * 803, 1601, 0.5 * 3207])
    assert np.abs(counts - rows * shares / shares.sum()).max() < 1
    assert made.shares(rows // 64)[0].epochs == pytest.approx(counts[0] / 100, rel=1e-3)


@pytest.mark.parametrize("step", [0, 15, 16, 10**9])
def test_rows_of_a_mixture_are_slices_of_the_batch_whatever_came_before(step):
    made = three()
    for at in (step, 3, step):
        whole = three()(at)
        assert whole.shape == (64, 9)
        for start, stop in ((0, 64), (5, 9), (63, 64), (7, 7)):
            np.testing.assert_array_equal(made.rows(at, start, stop), whole[start:stop])


def test_the_first_batch_of_a_mixture_stays_what_it_is():
    """A run resumed with a newer release must see the same batches: these are written down, not computed."""
    assert three().starts(0, 0, 6) == ["s2:2165", "s2:2309", "s0:450", "s1:711", "s0:678", "s1:90"]
    assert three().starts(10**6, 0, 3) == ["s1:296", "s0:406", "s2:3100"]


def test_two_seeds_of_a_mixture_differ_and_so_do_the_orders_of_like_sources():
    assert three().starts(0, 0, 64) != three(seed=4).starts(0, 0, 64)
    twins = Batches([huge(8000, "a"), huge(8000, "b")], context_len=8, batch_size=BLOCK, seed=0, mixture=mixed({}, {}))
    a, b = ([first for first in twins.starts(0, 0, BLOCK) if first.startswith(name)] for name in "ab")
    assert {first[2:] for first in a} != {first[2:] for first in b}


def test_a_row_says_its_source_and_where_it_begins_there():
    made = three()
    for row, where in zip(made(5), made.starts(5, 0, 64), strict=True):
        name, _, first = where.partition(":")
        i = int(name[1])
        assert row[0] == (0, 1000, 5000)[i] + int(first) % (803, 1601, 3207)[i]


def test_weights_are_shares_of_the_rows_and_what_has_none_is_as_large_as_its_epochs():
    weighed = three(mixture=mixed({"weight": 3.0}, {"weight": 1.0}, {"weight": 1.0})).shares(1000)
    assert [(one.share, one.rows) for one in weighed] == [(0.6, 38400), (0.2, 12800), (0.2, 12800)]
    assert str(weighed[0]) == "s0: 60.00% of the rows, 38,400, 384 epochs"
    by_size = three().shares(10)
    assert by_size[0].epochs == pytest.approx(2 * by_size[1].epochs, rel=0.01) and by_size[2].epochs == pytest.approx(by_size[1].epochs / 2, rel=0.01)
    (alone,) = Batches(numbered(1000), context_len=8, batch_size=5, seed=0).shares(50)
    assert alone == ("", 1.0, 250, 2.0, 1.0)


REFUSED = {
    "a share of nothing": (
        mixed({"weight": 1.0}, {"weight": 1e-12}, {"weight": 1.0}),
        r"data\.mixture\.weight: the smallest share would be 5e-13 of the rows\. Raise it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mixture_that_cannot_be_is_refused(name):
    mixture, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        three(mixture=mixture)


def test_a_source_shorter_than_a_window_is_named():
    with pytest.raises(InputError, match=r"model\.context_len = 8: the text of b is shorter than one window: 8 training tokens"):
        Batches([huge(9, "a"), huge(8, "b")], context_len=8, batch_size=1, seed=0, mixture=mixed({}, {}))


def test_what_a_batch_costs_depends_neither_on_the_corpus_nor_on_the_step(monkeypatch):
    def cost(n, step):
        """How often a function was called."""
        stored = [huge(n, "a", 1), huge(2 * n, "b", 2), huge(3 * n, "c", 3)]
        made = Batches(stored, context_len=1024, batch_size=64, seed=0, mixture=mixed({}, {}, {}))
        calls = []
        sys.setprofile(lambda frame, event, arg: calls.append(event) if event.endswith("call") else None)
        try:
            batch = made(step)
        finally:
            sys.setprofile(None)
        assert batch.shape == (64, 1025) and set(batch.ravel().tolist()) == {1, 2, 3}
        return len(calls)

    small, large = cost(10**8, 1), cost(10**12, 10**9)
    assert large < 1.2 * small + 200, (small, large)


def test_a_run_is_given_the_batches_of_its_own_weights_and_not_of_those_of_the_tokens(tmp_path):
    folder = write_tokens(tmp_path / "tokens", {"a": documents(0, 30), "b": documents(1, 60)})
    data = DataConfig(mixture=(MixedSourceConfig(source="a.txt", weight=3.0), MixedSourceConfig(source="b.txt", weight=1.0)), tokenizer="byte")
    config = Config(name="test", model=ModelConfig(context_len=16), data=data, train=TrainConfig(batch_size=8, steps=800))
    made = training_batches(config, folder)
    assert [one.share for one in made.shares(10)] == [0.75, 0.25] and made(0).shape == (8, 17)
    packed = training_batches(override(config, {"data.packing": "first_fit"}), folder)
    assert any((packed(step) == ~256).any() for step in range(10)) and not any((made(step) < 0).any() for step in range(10))
    with pytest.raises(InputError, match=r"data\.tokens = .*: .* has tokens of 2 sources, data\.mixture names 1\."):
        training_batches(override(config, {"data.mixture": ()}), folder)


def test_validation_gives_the_ids_of_what_is_not_learned_and_no_weight(tmp_path):
    stored = documents(0, 9, prompts=True)
    windows = validation_windows(tokens.open_tokens(write_tokens(tmp_path / "tokens", {"": stored}, stored), "val"), 8)
    rows, weights = windows.batch(0, len(windows))
    ids = np.concatenate([part for document, _ in stored for part in ([256], document)])
    learned = np.concatenate([part for _, mask in stored for part in ([1], mask)])
    got = rows[:, 1:].ravel()[: len(ids) - 1]
    np.testing.assert_array_equal(got, ids[1:])
    np.testing.assert_array_equal(weights.ravel()[: len(ids) - 1], learned[1:])
    assert 0 < weights.sum() < len(ids) - 1


@pytest.mark.parametrize("size", [1024, 2048, 1 << 14])
def test_a_permutation_has_every_number_once_and_mixes(size):
    orders = []
    for seed in range(20):
        keys = np.random.default_rng(seed).integers(0, 2**32, 8).tolist()
        orders.append([permuted(i, size, keys) for i in range(size)])
        assert sorted(orders[-1]) == list(range(size))
    # As of random orders: neighbours are a third of the size apart on average, each place is drawn evenly, and no order repeats another's steps.
    steps = np.diff(np.array(orders), axis=1)
    assert abs(np.abs(steps).mean() / size - 1 / 3) < 0.02
    assert np.abs(np.mean(orders, axis=0) / size - 0.5).max() < 0.4
    assert all(len(set(row.tolist())) > size / 3 for row in steps)
