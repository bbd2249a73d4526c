"""Token shards -> batches: the batch at step s is a pure function of (tokens, seed, s), so nothing has to be saved to resume."""

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Float, Int

from mlm_jax.config import Config, InputError, MixedSourceConfig
from mlm_jax.data.packing import Packing, Stretch
from mlm_jax.data.shards import read_manifest
from mlm_jax.data.tokens import Part, Tokens, fill, open_sources
from mlm_jax.storage import Place

BLOCK = 1024  # rows in which each source of a mixture has its share
_ROUNDS = 4  # of shuffles


class Share(NamedTuple):
    """What one source is to a run."""

    name: str
    share: float  # of the rows
    rows: int
    epochs: float  # how often each of its rows is met
    fill: float  # the share of its rows that is text and not padding

    def __str__(self) -> str:
        padding = f"; {self.fill:.1%} of its rows is text, the rest padding" if self.fill < 1 else ""
        return f"{self.name + ': ' if self.name else ''}{self.share:.2%} of the rows, {self.rows:,}, {self.epochs:.3g} epochs{padding}"


class Rows:
    """The rows of one source, each of which is met once per epoch, in an order of the epoch's own. A row is so many stretches of its tokens.

    Windows: an epoch cuts the tokens, taken as a circle, into n // T windows of T tokens and the one after; the grid of windows is shifted
    anew for each epoch, so that the cuts, and the up to T - 1 tokens between the last window and the first, differ too. With a `packing`
    the rows are its rows.
    """

    def __init__(self, tokens: Tokens, context_len: int, key: Callable[[int], np.random.SeedSequence], packing: Packing | None) -> None:
        """`key` gives what the order of an epoch is drawn from."""
        self.tokens, self.packing = tokens, packing
        self.per_epoch = packing.n_rows if packing else len(tokens) // context_len
        self._context_len, self._key = context_len, key
        self._drawn = -1, 0, 0

    def stretches(self, rank: int) -> list[Stretch]:
        """What stands in a row; `rank` counts the rows of all epochs."""
        epoch, position = divmod(rank, self.per_epoch)
        drawn_epoch, order_seed, shift = self._drawn
        if drawn_epoch != epoch:
            order_seed, shift = self._draw(epoch)
        # Not MapDataset.shuffle, which calls this function with seed + epoch: seed 1 would begin where seed 0 has its second epoch.
        index = index_shuffle(position, max_index=self.per_epoch - 1, seed=order_seed, rounds=_ROUNDS)
        return self.packing.row(index) if self.packing else [Stretch(shift + index * self._context_len, self._context_len + 1)]

    def _draw(self, epoch: int) -> tuple[int, int]:
        """The seed of an epoch's order, and the shift of its grid of windows in [0, T); kept for its next rows."""
        order_seed, shift = self._key(epoch).generate_state(2)
        self._drawn = epoch, int(order_seed), int(shift) % self._context_len
        return self._drawn[1:]


class Mixture:
    """Which source each row of a run is of, and the how many-th of its rows it is: both a pure function of (weights, seed, row).

    Rows come in blocks of `BLOCK`, of a power of two times that where a source has less than one row in `BLOCK`. After each block every source
    has had its share of all rows so far, rounded up or down: the sum is made whole by the largest remainders. In a block the rows are shuffled,
    so the epochs of a source overlap by less than a block. As a source has at least one row in a block, no rounding makes it lose one again.
    """

    def __init__(self, weights: Sequence[float | Fraction], seed: int) -> None:
        """Raises: InputError: the weights are so far apart that a source would be met in less than one of 2^32 rows."""
        exact = [Fraction(weight) for weight in weights]
        self.shares = [weight / sum(exact) for weight in exact]
        denominator = math.lcm(*(share.denominator for share in self.shares))
        self._numerators, self._denominator = [int(share * denominator) for share in self.shares], denominator
        self.block = BLOCK
        while min(self.shares) * self.block < 1:
            self.block *= 2
        if self.block > 1 << 32:
            reason = f"the smallest share would be {float(min(self.shares)):.2g} of the rows"
            raise InputError("data.mixture.weight", "", reason, "Raise it, or leave that source out")
        self._seed = seed
        self._drawn: tuple[int, list[int], list[int], list[int]] = -1, [], [], []

    def counts(self, blocks: int) -> list[int]:
        """How many rows each source has in the first so many blocks."""
        rows = blocks * self.block
        found, remainders = zip(*(divmod(rows * n, self._denominator) for n in self._numerators), strict=True)
        first = sorted(range(len(found)), key=lambda source: -remainders[source])[: rows - sum(found)]
        return [n + (source in first) for source, n in enumerate(found)]

    def __call__(self, row: int) -> tuple[int, int]:
        """The source of a row, and its rank among the rows of that source."""
        block, position = divmod(row, self.block)
        _, before, ends, keys = self._draw(block)
        place = permuted(position, self.block, keys)
        source = bisect.bisect_right(ends, place)
        return source, before[source] + place - (ends[source - 1] if source else 0)

    def _draw(self, block: int) -> tuple[int, list[int], list[int], list[int]]:
        """The block, the rows of each source before it, the ends of the sources in it before it is shuffled, and the keys of the shuffle."""
        drawn = self._drawn
        if drawn[0] != block:
            before, after = self.counts(block), self.counts(block + 1)
            ends = list(itertools.accumulate(b - a for a, b in zip(before, after, strict=True)))
            keys = np.random.SeedSequence([self._seed, block], spawn_key=(0,)).generate_state(2 * _ROUNDS)
            self._drawn = drawn = block, before, ends, keys.tolist()
        return drawn


def permuted(index: int, size: int, keys: Sequence[int]) -> int:
    """Where `index` goes in a random permutation of the numbers below `size`, a power of two; each pair of `keys`, below 2^32, is a round of it.

    `index_shuffle` would need about 2^16 / size tries, as it permutes 16 bits at least.
    """
    half = size.bit_length() // 2
    for factor, more in zip(keys[::2], keys[1::2], strict=True):
        index = (index * (2 * factor + 1) + more) % size  # odd, so that it can be undone, as can the next line
        index ^= index >> half
    return index


class Batches:
    """Random access to the training batches: `batches(step)`, or some of its rows, without the steps before.

    Of one source the rows are met as `Rows` says; of several, `Mixture` says which is of which. What a batch costs depends neither on
    how many tokens there are nor on the step.
    """

    def __init__(
        self,
        tokens: Tokens | Sequence[Tokens],
        *,
        context_len: int,
        batch_size: int,
        seed: int,
        rows_before: Callable[[int], int] | None = None,
        mixture: Sequence[MixedSourceConfig] = (),
        padding: int | None = None,
    ) -> None:
        """Where batches grow, `rows_before` says how many rows the first so many steps read; else `batch_size` times the steps.

        Of several sources `mixture` has the weights, in the same order. With `padding`, the id of `<|endoftext|>`, rows hold whole documents
        (`Packing`); after the last stands one that is learned, as where a document follows, and then others that are not.

        Raises:
          InputError: a source has fewer tokens than one window, context_len + 1, or no documents.
          NotReached: where documents start is to be read from a bucket that cannot be reached.
        """
        sources = [tokens] if isinstance(tokens, Tokens) else list(tokens)
        for source in sources:
            if len(source) < (context_len + 1 if padding is None else 1):
                of = f" of {source.name}" if source.name else ""
                reason = f"the text{of} is shorter than one window: {len(source)} training tokens, a window takes {context_len} + 1"
                raise InputError("model.context_len", context_len, reason, "Give more text (data.source) or a smaller model.context_len")
        self.context_len, self.batch_size = context_len, batch_size
        self._rows_before = rows_before or (lambda step: step * batch_size)
        self._padding = padding
        self._sources = [
            Rows(one, context_len, _key(seed, i, len(sources)), None if padding is None else _packing(one, context_len, seed, i, padding))
            for i, one in enumerate(sources)
        ]
        self._mixture = Mixture(self._weights(mixture), seed) if len(sources) > 1 else None

    def _weights(self, mixture: Sequence[MixedSourceConfig]) -> list[float | Fraction]:
        """Of each source; without one given as many as its tokens, or packed rows, times its epochs."""
        sizes = [len(rows.tokens) if rows.packing is None else rows.per_epoch for rows in self._sources]
        return [source.weight or size * Fraction(source.epochs) for source, size in zip(mixture, sizes, strict=True)]

    def __call__(self, step: int) -> Int[np.ndarray, "B W"]:
        """The batch of `step`, int32: a row holds T tokens and the one after, so inputs are [:, :-1] and targets [:, 1:].

        A token that is not learned stands there as its complement, as `data.tokens` says.
        """
        return self.rows(step, 0, self._rows_before(step + 1) - self._rows_before(step))

    def rows(self, step: int, start: int, stop: int) -> Int[np.ndarray, "B W"]:
        """Rows `start` up to, not including, `stop` of the batch of `step`: what one host feeds its devices."""
        batch = np.empty((stop - start, self.context_len + 1), np.int32)
        padding = self._padding  # an id wherever there are rests
        if padding is not None:
            batch[:] = ~padding
        parts: list[Part] = []
        rests: list[Any] = []
        for row, (source, stretches) in zip(batch, self._located(step, start, stop), strict=True):
            column = 0
            for first, n, is_rest in stretches:
                if is_rest:
                    row[column] = padding  # pyright: ignore[reportArgumentType, reportCallIssue]
                    column += 1
                    rests.append(row[column : column + 1])
                parts.append((source.tokens, first, row[column : column + n]))
                column += n
            if padding is not None:
                row[column : column + 1] = padding
        fill(parts)
        for token in rests:
            np.minimum(token, ~token, out=token)
        return batch

    def starts(self, step: int, start: int, stop: int) -> list[Any]:
        """Where these rows begin: tokens from the start of the split, which is read as a circle; after "NAME:" where there are several sources."""
        found = [(source.tokens.name, stretches[0].first) for source, stretches in self._located(step, start, stop)]
        return [f"{name}:{first}" if self._mixture else first for name, first in found]

    def _located(self, step: int, start: int, stop: int) -> list[tuple[Rows, list[Stretch]]]:
        """The source of each of these rows, and the stretches of its tokens that the row is."""
        found, first = [], self._rows_before(step)
        for row in range(first + start, first + stop):
            source, rank = self._mixture(row) if self._mixture else (0, row)
            found.append((self._sources[source], self._sources[source].stretches(rank)))
        return found

    def shares(self, steps: int) -> list[Share]:
        """What each source is to the first so many steps."""
        n, found = self._rows_before(steps), []
        for source, share in zip(self._sources, self._mixture.shares if self._mixture else [Fraction(1)], strict=True):
            filled = source.packing.fill if source.packing else 1.0
            found.append(Share(source.tokens.name, float(share), round(n * share), float(n * share / source.per_epoch), filled))
        return found


def _key(seed: int, source: int, n_sources: int) -> Callable[[int], np.random.SeedSequence]:
    """What the order of each epoch of a source is drawn from: another one for each of several."""
    how: dict[str, Any] = {"spawn_key": (1, source)} if n_sources > 1 else {}
    return lambda epoch: np.random.SeedSequence([seed, epoch], **how)


def _packing(tokens: Tokens, context_len: int, seed: int, source: int, eot_id: int) -> Packing:
    order_seed = np.random.SeedSequence([seed], spawn_key=(2, source)).generate_state(1, np.uint64)[0]
    return Packing(tokens.starts, len(tokens), context_len + 1, int(order_seed), is_begun=bool(tokens.read(0, 1)[0] == eot_id))


def training_batches(config: Config, folder: Place) -> Batches:
    """The batches of a run over the token shards in `folder`.

    Raises:
      InputError: there is too little text, the shards are of other sources, or damaged; see `Batches` and `open_sources`.
      NotReached: they are in a bucket that cannot be read.
    """
    c, sources = config.train, open_sources(folder, "train")
    if len(sources) != len(config.data.sources):
        reason = f"{folder} has tokens of {len(sources)} sources, data.mixture names {len(config.data.sources)}"
        raise InputError("data.tokens", str(folder), reason, "Prepare the tokens of this mixture in another folder")
    return Batches(
        sources,
        context_len=config.model.context_len,
        batch_size=c.batch_size,
        seed=c.seed,
        rows_before=c.rows_before,
        mixture=config.data.sources,
        padding=read_manifest(folder).eot_id if config.data.packing == "first_fit" else None,
    )


class ValidationWindows:
    """Consecutive windows over a split: every token but the first is a target exactly once; the last window is padded, weight 0.

    They are windows over the documents end to end, whatever `data.packing` says. Targets that are not learned have weight 0.
    """

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
        return self.rows(range(index * batch_size, (index + 1) * batch_size))

    def rows(self, windows: Sequence[int]) -> tuple[Int[np.ndarray, "B W"], Float[np.ndarray, "B T"]]:
        """These windows, as in `batch`; from a bucket they are fetched at once."""
        tokens = np.zeros((len(windows), self.context_len + 1), np.int32)
        weights = np.zeros((len(windows), self.context_len), np.float32)
        parts: list[Part] = []
        for row, window in enumerate(windows):
            first = window * self.context_len
            n = min(self.context_len, self.n_targets - first)
            if n > 0:
                parts.append((self._tokens, first, tokens[row, : n + 1]))
                weights[row, :n] = 1
        fill(parts)
        unlearned = tokens < 0
        weights[unlearned[:, 1:]] = 0
        return np.where(unlearned, ~tokens, tokens), weights


def validation_windows(tokens: Tokens, context_len: int) -> ValidationWindows:
    """The windows of T tokens that evaluation reads, in order.

    Raises:
      InputError: there are fewer than two tokens.
    """
    return ValidationWindows(tokens, context_len)
