"""Rows of whole documents: packed as the plain first-fit packs, and every token is in one row."""

import itertools

import numpy as np
import pytest

from mlm_jax.config import InputError, MixedSourceConfig
from mlm_jax.data.batches import Batches
from mlm_jax.data.packing import Packing, first_fit, shuffled
from mlm_jax.data.tokens import open_sources, open_tokens
from tests.conftest import documents, write_tokens

EOT = 256


def plain_first_fit(lengths, room):
    left, found = [], []
    for length in lengths:
        where = next((i for i, space in enumerate(left) if space >= length), len(left))
        if where == len(left):
            left.append(room)
        left[where] -= length
        found.append(where)
    return found


@pytest.mark.parametrize("room", [1, 2, 7, 30, 1025])
@pytest.mark.parametrize("n", [0, 1, 2, 5, 64, 65, 700])
def test_packing_is_that_of_the_plain_first_fit(n, room, monkeypatch):
    monkeypatch.setattr("mlm_jax.data.packing._CHUNK", 50)
    for seed, most in itertools.product(range(3), {room, max(room // 3, 1), max(room // 10, 1)}):
        lengths = np.random.default_rng([n, seed]).integers(1, most + 1, n)
        assert first_fit(lengths, room).tolist() == plain_first_fit(lengths.tolist(), room)


def test_an_example_by_hand():
    assert first_fit(np.array([6, 5, 4, 2, 5, 3, 5]), 10).tolist() == [0, 1, 0, 1, 2, 1, 2]


def test_the_random_order_has_every_number_once_and_stays_what_it_is():
    # The first five numbers that splitmix64 makes of seed 1234567, as Rosetta Code has them ("Pseudo-random numbers/Splitmix64").
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert shuffled(5, 1234567).tolist() == np.argsort(np.array(published, np.uint64)).tolist()
    assert sorted(shuffled(1000, 5).tolist()) == list(range(1000))
    assert shuffled(1000, 5).tolist() != shuffled(1000, 6).tolist()
    assert shuffled(3, 2**64 - 1).shape == (3,)


def starts_of(lengths):
    return np.cumsum([0, *lengths])[:-1].astype(np.uint64)


@pytest.mark.parametrize("longest", [1, 5, 16, 17, 18, 70])
@pytest.mark.parametrize("is_begun", [True, False])
def test_every_token_of_every_document_is_in_one_row_and_only_long_documents_are_cut(longest, is_begun):
    room, lengths = 17, np.random.default_rng(longest).integers(1, longest + 1, 300)
    packing, ends = Packing(starts_of(lengths), int(lengths.sum()), room, 3, is_begun=is_begun), np.cumsum(lengths)
    rows = [packing.row(i) for i in range(packing.n_rows)]
    seen = [token for row in rows for first, n, _ in row for token in range(first, first + n)]
    assert sorted(seen) == list(range(lengths.sum()))
    assert all(0 < sum(n + is_rest for _, n, is_rest in row) <= room for row in rows)
    for row in rows:
        for first, n, is_rest in row:
            document = int(np.searchsorted(ends, first, side="right"))
            start, end = ends[document] - lengths[document], ends[document]
            if lengths[document] <= room:
                assert (first, n, is_rest) == (start, lengths[document], document == 0 and not is_begun and n < room)
            else:  # full rows from its start on, and what remains
                assert (first - start) % room == 0 and n == min(room, end - first) and is_rest is (n < room)
    assert packing.fill == pytest.approx(sum(n for row in rows for _, n, _ in row) / (packing.n_rows * room))


def test_documents_that_fill_a_row_leave_nothing_to_pack():
    packing = Packing(starts_of([17, 34, 17]), 68, 17, 0)
    assert sorted(first for i in range(packing.n_rows) for first, *_ in packing.row(i)) == [0, 17, 34, 51] and packing.fill == 1


def test_neighbours_do_not_share_rows_more_often_than_others_and_sorted_documents_pack_well():
    lengths = np.sort(np.random.default_rng(0).integers(1, 100, 2000))
    packing = Packing(starts_of(lengths), int(lengths.sum()), 128, 0)
    assert packing.fill > 0.97 > lengths.sum() / (128 * (first_fit(lengths, 128).max() + 1))
    neighbours = sum(abs(a - b) == n for i in range(packing.n_rows) for (a, n, _), (b, *_) in itertools.pairwise(sorted(packing.row(i))))
    assert neighbours < 20


@pytest.mark.parametrize("starts", [[], [1, 5], [0, 5, 5], [0, 7, 4], [0, 9]])
def test_starts_that_cannot_be_are_refused(starts):
    with pytest.raises(InputError, match=r"data\.tokens: where documents start is damaged: \d of them in 9 tokens"):
        Packing(np.array(starts, np.uint64), 9, 4, 0)


# ---- batches of packed rows ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("packed") / "tokens", {"": documents(0, 60, longest=60, prompts=True)})


def batches(folder, **how):
    return Batches(open_tokens(folder, "train"), **{"context_len": 16, "batch_size": 5, "seed": 1, "padding": EOT} | how)


def pieces(folder, room=17):
    """What each document becomes in rows: itself, or full rows and a rest behind an end of text, whose first token is not learned."""
    stored = open_tokens(folder, "train")
    for document in np.split(stored.read_many([0], len(stored))[0], stored.starts.astype(int)[1:]):
        cut = [document[i : i + room].tolist() for i in range(0, len(document), room)]
        if len(cut) > 1 and len(cut[-1]) < room:
            cut[-1] = [EOT, min(cut[-1][0], ~cut[-1][0]), *cut[-1][1:]]
        yield from map(tuple, cut)


def test_an_epoch_has_each_document_once_its_end_is_learned_and_padding_is_not(folder):
    made, wanted = batches(folder, batch_size=1), sorted(pieces(folder))
    assert any(min(piece) < 0 for piece in wanted) and any(len(piece) == 17 and piece[0] != EOT for piece in wanted)
    per_epoch, orders = made._sources[0].per_epoch, []
    for epoch in range(3):
        found, rows = [], np.concatenate([made(step) for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)])
        for row in rows.tolist():
            length = next((i for i, token in enumerate(row) if token == ~EOT), 18) - 1  # of the documents; behind them stands their end
            assert row[length:] in ([], [EOT, *[~EOT] * (16 - length)]) or (length == 17 and row[-1] != EOT)
            if length == 17 and row[-1] == EOT:
                length = 16
            at = [0, *(i for i in range(1, length) if row[i] == EOT), length]
            found += [tuple(row[a:b]) for a, b in itertools.pairwise(at)]
        assert sorted(found) == wanted
        orders.append(rows.tolist())
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_packed_rows_are_slices_of_the_batch_whatever_came_before(folder):
    made = batches(folder)
    for step in (0, 7, 10**9):
        whole = batches(folder)(step)
        for start, stop in ((0, 5), (1, 3), (4, 5), (2, 2)):
            np.testing.assert_array_equal(made.rows(step, start, stop), whole[start:stop])
    assert made.starts(3, 1, 2) == [made._sources[0].stretches(16)[0].first]


def test_the_first_packed_batch_of_a_seed_stays_what_it_is(folder):
    """A run resumed with a newer release must see the same batches: these are written down, not computed."""
    assert batches(folder).starts(0, 0, 5) == FIRST and batches(folder).starts(100, 0, 5) == LATER
    assert batches(folder, seed=2).starts(0, 0, 5) != FIRST


FIRST, LATER = [984, 70, 726, 175, 1806], [1823, 776, 709, 382, 692]


def test_a_mixture_of_packed_sources_has_the_rows_of_each(tmp_path):
    sources = {"a": documents(0, 40), "b": documents(1, 80)}
    opened = open_sources(write_tokens(tmp_path / "tokens", sources), "train")
    mixture = [MixedSourceConfig(name="a", epochs=2.0), MixedSourceConfig(name="b")]
    made = Batches(opened, context_len=16, batch_size=8, seed=0, padding=EOT, mixture=mixture)
    a, b = made.shares(1000)
    assert a.epochs == pytest.approx(2 * b.epochs) and a.rows + b.rows == 8000
    assert 0.5 < a.fill < 1 and f"a: {a.share:.2%} of the rows, {a.rows:,}, " in str(a) and str(a).endswith("of its rows is text, the rest padding")
