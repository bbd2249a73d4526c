"""Token shards -> batches: the batch at step s is a pure function of (tokens, seed, s), so nothing has to be saved to resume."""

from collections.abc import Callable

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Float, Int

from mlm_jax.config import InputError
from mlm_jax.data.tokens import Tokens


class Batches:
    """Random access to the training batches: `batches(step)`, or some of its rows, without the steps before.

    One epoch cuts the tokens, taken as a circle, into n // T windows and visits each once in a shuffled order; the grid of windows is
    shifted anew for each epoch, so that the cuts, and the up to T - 1 tokens between the last window and the first, differ too.
    """

    def __init__(self, tokens: Tokens, *, context_len: int, batch_size: int, seed: int, rows_before: Callable[[int], int] | None = None) -> None:
        """Where batches grow, `rows_before` says how many rows the first so many steps read; else `batch_size` times the steps.

        Raises:
          InputError: there are fewer tokens than one window, context_len + 1.
        """
        if len(tokens) < context_len + 1:
            reason = f"the text is shorter than one window: {len(tokens)} training tokens, a window takes {context_len} + 1"
            raise InputError("model.context_len", context_len, reason, "Give more text (data.source) or a smaller model.context_len")
        self._tokens, self._seed = tokens, seed
        self.context_len, self.batch_size = context_len, batch_size
        self._rows_before = rows_before or (lambda step: step * batch_size)
        self.windows_per_epoch: int = len(tokens) // context_len

    def __call__(self, step: int) -> Int[np.ndarray, "B W"]:
        """The batch of `step`, int32: a row holds T tokens and the one after, so inputs are [:, :-1] and targets [:, 1:]."""
        return self.rows(step, 0, self._rows_before(step + 1) - self._rows_before(step))

    def rows(self, step: int, start: int, stop: int) -> Int[np.ndarray, "B W"]:
        """Rows `start` up to, not including, `stop` of the batch of `step`: what one host feeds its devices."""
        batch = np.empty((stop - start, self.context_len + 1), np.int32)
        for row, first in enumerate(self.starts(step, start, stop)):
            batch[row] = self._tokens.read(first, self.context_len + 1)
        return batch

    def starts(self, step: int, start: int, stop: int) -> list[int]:
        """Where these rows begin: tokens from the start of the split, which is read as a circle."""
        out = []
        first = self._rows_before(step) + start
        epoch, (order_seed, shift) = -1, (0, 0)
        for row in range(stop - start):
            row_epoch, position = divmod(first + row, self.windows_per_epoch)
            if row_epoch != epoch:
                epoch, (order_seed, shift) = row_epoch, self._draw(row_epoch)
            # Not MapDataset.shuffle, which calls this function with seed + epoch: seed 1 would begin where seed 0 has its second epoch.
            window = index_shuffle(position, max_index=self.windows_per_epoch - 1, seed=order_seed, rounds=4)
            out.append(shift + window * self.context_len)
        return out

    def _draw(self, epoch: int) -> tuple[int, int]:
        """The seed of the epoch's order, and the shift of its grid of windows in [0, T)."""
        order_seed, shift = np.random.SeedSequence([self._seed, epoch]).generate_state(2)
        return int(order_seed), int(shift) % self.context_len


class ValidationWindows:
    """Consecutive windows over a split: every token but the first is a target exactly once; the last window is padded, weight 0."""

    def __init__(self, tokens: Tokens, context_len: int) -> None:
        """Raises: InputError: there are fewer than two tokens, so nothing to predict."""
        if len(tokens) < 2:
            raise InputError("data.val_fraction", "", f"the validation split has {len(tokens)} tokens, nothing to predict", "Hold out more text")
        self._tokens = tokens
        self.context_len = context_len
        self.n_targets: int = len(tokens) - 1

    def __len__(self) -> int:
        return -(-self.n_targets // self.context_len)

    def batch(self, index: int, batch_size: int) -> tuple[Int[np.ndarray, "B W"], Float[np.ndarray, "B T"]]:
        """Windows index * batch_size and on: tokens, int32, and for each target 1.0 or, in padding and rows past the end, 0.0."""
        return self.rows(index * batch_size, (index + 1) * batch_size)

    def rows(self, start: int, stop: int) -> tuple[Int[np.ndarray, "B W"], Float[np.ndarray, "B T"]]:
        """Windows `start` up to, not including, `stop`, as in `batch`."""
        tokens = np.zeros((stop - start, self.context_len + 1), np.int32)
        weights = np.zeros((stop - start, self.context_len), np.float32)
        for row, window in enumerate(range(start, stop)):
            first = window * self.context_len
            n = min(self.context_len, self.n_targets - first)
            if n > 0:
                tokens[row, : n + 1] = self._tokens.read(first, n + 1)
                weights[row, :n] = 1
        return tokens, weights


def validation_windows(tokens: Tokens, context_len: int) -> ValidationWindows:
    """The windows of T tokens that evaluation reads, in order.

    Raises:
      InputError: there are fewer than two tokens.
    """
    return ValidationWindows(tokens, context_len)
