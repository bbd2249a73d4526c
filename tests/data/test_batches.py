import numpy as np
import pytest

from mlm_jax.config import DataConfig, InputError
from mlm_jax.data import tokens
from mlm_jax.data.batches import Batches, validation_windows
from mlm_jax.data.prepare import prepare
from mlm_jax.data.tokens import Tokens


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
        np.testing.assert_array_equal(windows.rows(start, stop)[0], rows[start:stop])
        np.testing.assert_array_equal(windows.rows(start, stop)[1], weights[start:stop])


def test_a_validation_split_with_nothing_to_predict_is_refused():
    with pytest.raises(InputError, match=r"data\.val_fraction: the validation split has 1 tokens"):
        validation_windows(numbered(1), 8)
