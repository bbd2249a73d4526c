"""The decoding loop: one pass over the prompts fills a key/value cache, then all rows go on by one token at a time.

Prompts of different lengths share a batch by padding on the left, which nothing sees. A row draws from (seed, its prompt, its number,
the position), so that its text does not depend on the rows beside it.
"""

import functools
import weakref
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mlm_jax.config import InputError, ModelConfig, SampleConfig, Sampling
from mlm_jax.decode.sampling import Seen, adjust, choose
from mlm_jax.model import gpt2
from mlm_jax.sharding import constrain

Ids = Sequence[int] | Int[np.ndarray, "_"]


class State(NamedTuple):
    """The text of every row so far."""

    n: Int[Array, ""]  # tokens chosen; the last of them is not in the cache yet
    tokens_BT: Int[Array, "B T"]
    logprobs_BT: Float[Array, "B T"]  # of the model itself, before penalties and temperature, in nats
    ended_B: Bool[Array, "B"]
    seen: Any
    keys_B: Array


@functools.partial(jax.jit, static_argnames=("model", "cache_len"))
def prefill(
    model: gpt2.Model, params: Any, prompt_BT: Int[Any, "B T"], padding_B: Int[Any, "B"], *, cache_len: int
) -> tuple[Float[Array, "B V"], Any]:
    """(logits_BV after the prompts, the cache that they filled); row b of the prompts begins with `padding_B[b]` positions of padding."""
    logits_B1V, filled = model.apply({"params": params}, prompt_BT, padding_B=padding_B, cache_len=cache_len, only_last=True, mutable=["cache"])
    return logits_B1V[:, 0], filled["cache"]


def take(state: State, logits_BV: Float[Array, "B V"], sampling: Sampling, eot_id: int) -> State:
    """The state after choosing a token of every row from the logits; rows that have ended are filled with `eot_id`."""
    n = state.n
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(state.keys_B, n)
    tokens_B = choose(adjust(logits_BV, state.seen, n, eot_id, sampling), keys_B, sampling)
    tokens_B = jnp.where(state.ended_B, max(eot_id, 0), tokens_B)
    logprobs_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits_BV, axis=-1)
    return State(
        n + 1,
        jax.lax.dynamic_update_slice_in_dim(state.tokens_BT, tokens_B[:, None], n, axis=1),
        jax.lax.dynamic_update_slice_in_dim(state.logprobs_BT, logprobs_B[:, None], n, axis=1),
        state.ended_B | (tokens_B == eot_id),
        Seen.add(state.seen, tokens_B),
        state.keys_B,
    )


@functools.partial(jax.jit, static_argnames=("sampling", "eot_id"))
def begin(state: State, logits_BV: Float[Array, "B V"], *, sampling: Sampling, eot_id: int) -> State:
    """`take`, after a prefill."""
    return take(state, logits_BV, sampling, eot_id)


@functools.partial(jax.jit, static_argnames=("model", "sampling", "eot_id"), donate_argnames=("cache", "state"))
def advance(
    model: gpt2.Model, params: Any, cache: Any, state: State, cached: Any, padding_B: Any, until: Any, *, sampling: Sampling, eot_id: int
) -> tuple[Any, State]:
    """(cache, state) with `until` tokens chosen, or fewer where every row has ended; `cached` positions are in the cache."""
    first = state.n

    def going(carry: Any) -> Array:
        _, state = carry
        return (state.n < until) & ~state.ended_B.all()

    def step(carry: Any) -> Any:
        cache, state = carry
        last_B1 = jax.lax.dynamic_slice_in_dim(state.tokens_BT, state.n - 1, 1, axis=1)
        start = cached + state.n - first
        logits_B1V, grown = model.apply({"params": params, "cache": cache}, last_B1, start=start, padding_B=padding_B, mutable=["cache"])
        return grown["cache"], take(state, logits_B1V[:, 0], sampling, eot_id)

    cache, state = jax.lax.while_loop(going, step, (cache, state))
    whole = {name: constrain(getattr(state, name), "..") for name in ("tokens_BT", "logprobs_BT")}  # on every device: each process reads them
    return cache, state._replace(**whole, ended_B=constrain(state.ended_B, "."))


class Decoding:
    """Continuations under way: `num` rows for each prompt, which `advance` makes longer."""

    def __init__(self, model: gpt2.Model, params: Any, prompts: Sequence[Ids], config: SampleConfig, eot_id: int) -> None:
        """Raises: InputError: a prompt or a setting that the model cannot follow."""
        self.prompts = [np.asarray(prompt, np.int32) for prompt in prompts for _ in range(config.num)]
        self.config, self.sampling, self.eot_id = config, config.sampling, eot_id
        check(model.config, self.prompts, config)
        self._model, self._params = model.clone(stacked=False), flat(params)
        B, V = len(self.prompts), model.config.padded_vocab_size
        limit = model.config.context_len
        self._visible = [prompt if len(prompt) <= limit else prompt[-limit // 2 :] for prompt in self.prompts]  # what each row sees, at the prefill
        prompt_BT, padding_B = pad_left(self._visible, limit)
        room = bucket(config.max_tokens)
        self.state = State(
            jnp.int32(0),
            jnp.full((B, room), max(eot_id, 0), jnp.int32),
            jnp.zeros((B, room), jnp.float32),
            jnp.zeros(B, bool),
            Seen.start(self.sampling, jnp.asarray(prompt_BT), jnp.asarray(padding_B), V),
            row_keys(self.prompts, config.num, config.seed),
        )
        self._n = 0
        self._prefill(repeat=config.num)

    @property
    def n(self) -> int:
        """Tokens chosen in every row that has not ended."""
        return self._n

    @property
    def ended(self) -> bool:
        """Nothing is left to do."""
        return self._n >= self.config.max_tokens or bool(np.asarray(self.state.ended_B).all())

    def _prefill(self, repeat: int = 1) -> None:
        """Fills a new cache with what each row sees, of which `repeat` neighbours are the same, and chooses one token."""
        limit = self._model.config.context_len
        prompt_BT, padding_B = pad_left(self._visible, limit)
        self._room = min(self.config.max_tokens - self._n, limit + 1 - max(map(len, self._visible)))  # tokens until a row sees too much
        cache_len = bucket(prompt_BT.shape[1] + self._room)
        logits_BV, cache = prefill(self._model, self._params, prompt_BT[::repeat], padding_B[::repeat], cache_len=cache_len)
        check_finite(logits_BV)
        if repeat > 1:
            logits_BV, cache = jax.tree.map(lambda x: jnp.repeat(x, repeat, axis=0), (logits_BV, cache))
        self._cache, self._padding_B, self._cached, self._prefilled = cache, padding_B, prompt_BT.shape[1], self._n
        self.state = begin(self.state, logits_BV, sampling=self.sampling, eot_id=self.eot_id)
        self._n += 1

    def advance(self, until: int) -> None:
        """Goes on until `until` tokens are chosen, or max_tokens, or every row has ended."""
        until = min(until, self.config.max_tokens)
        while self._n < until and not self.ended:
            if self._n - self._prefilled >= self._room:
                self._slide()
                continue
            stop, before = min(until, self._prefilled + self._room), self._n
            self._cache, self.state = advance(
                self._model,
                self._params,
                self._cache,
                self.state,
                np.int32(self._cached),
                self._padding_B,
                np.int32(stop),
                sampling=self.sampling,
                eot_id=self.eot_id,
            )
            self._n = int(self.state.n)
            self._cached += self._n - before

    def _slide(self) -> None:
        """Rows that see as much as the model can go on from the last half of it; the others keep what they see."""
        limit, tokens_BT = self._model.config.context_len, np.asarray(self.state.tokens_BT)
        rows = [np.concatenate([seen, tokens_BT[b, self._prefilled : self._n]]) for b, seen in enumerate(self._visible)]
        self._visible = [row if len(row) <= limit else row[-(limit // 2) :] for row in rows]
        self._prefill()

    def end(self, rows: Sequence[int]) -> None:
        """Marks rows as ended: nothing more is chosen for them."""
        self.state = self.state._replace(ended_B=self.state.ended_B.at[jnp.array(rows, jnp.int32)].set(True))

    def rows(self) -> list[tuple[Int[np.ndarray, "_"], Float[np.ndarray, "_"]]]:
        """(token ids without the end of text, log-probabilities in nats with it) of each row so far."""
        tokens_BT, logprobs_BT = np.asarray(self.state.tokens_BT)[:, : self._n], np.asarray(self.state.logprobs_BT)[:, : self._n]
        lengths = [next(iter(np.flatnonzero(row == self.eot_id)), self._n) for row in tokens_BT]
        return [(tokens_BT[b, :n], logprobs_BT[b, : n + 1]) for b, n in enumerate(lengths)]


def check(config: ModelConfig, prompts: Sequence[Int[np.ndarray, "_"]], settings: SampleConfig) -> None:
    """Raises InputError unless the model can go on from every prompt as the settings ask."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise InputError("prompt", "", "holds no token", "Give at least one, for example the end of text")
    remedies = {"prompt": "Use the model's own tokenizer", **dict.fromkeys(("banned", "forced"), f"Give ids below {config.vocab_size}")}
    for field, ids in {"prompt": np.concatenate(prompts), "banned": settings.banned, "forced": settings.forced}.items():
        outside = [int(i) for i in ids if not 0 <= i < config.vocab_size]
        if outside:
            raise InputError(field, f"token {outside[0]}", f"outside the model's vocabulary of {config.vocab_size}", remedies[field])
    longest = max(map(len, prompts))
    if settings.overflow == "refuse" and longest + settings.max_tokens > config.context_len:
        most = config.context_len - longest
        remedy = f"Ask for at most {most}" if most > 0 else f"Shorten the prompt to fewer than {config.context_len} tokens"
        reason = f"with {longest} prompt tokens more than model.context_len = {config.context_len}"
        raise InputError("max_tokens", settings.max_tokens, reason, f'{remedy}, or set overflow to "window"')


@jax.jit
def _finite(logits_BV: Float[Array, "B V"]) -> Bool[Array, ""]:
    return constrain(jnp.isfinite(jax.nn.logsumexp(logits_BV, axis=-1)).all(), "")  # the padding of a vocabulary is -inf


def check_finite(logits_BV: Float[Array, "B V"]) -> None:
    """Raises InputError where the logits of a row are no distribution, as those of a model that diverged in training."""
    if not _finite(logits_BV):
        reason = "the logits that the model computes with them are not finite"
        raise InputError("params", "", reason, "Use a checkpoint from before the training diverged")


def row_keys(prompts: Sequence[Int[np.ndarray, "_"]], num: int, seed: int) -> Array:
    """A random key for each row: of the seed, its prompt, and its number among the continuations of that prompt."""
    hashes = np.array([zlib.crc32(np.asarray(prompt, "<i4").tobytes()) for prompt in prompts], np.uint32)
    numbers = np.arange(len(prompts), dtype=np.uint32) % num
    fold = jax.vmap(lambda key, data: jax.random.fold_in(key, data), (None, 0))
    return jax.vmap(jax.random.fold_in)(fold(jax.random.key(seed), hashes), numbers)


def pad_left(rows: Sequence[Int[np.ndarray, "_"]], limit: int) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """(rows of one length, a `bucket` of at most `limit`; how many positions of each are padding)."""
    T = min(bucket(max(map(len, rows))), limit)
    padded_BT = np.zeros((len(rows), T), np.int32)
    for b, row in enumerate(rows):
        padded_BT[b, T - len(row) :] = row
    return padded_BT, np.array([T - len(row) for row in rows], np.int32)


def bucket(n: int) -> int:
    """`n` rounded up to 16, 24, 32, 48, 64, 96, ...: a few compiled shapes serve every length, at most half as much again."""
    power = 16
    while power < n:
        power *= 2
    return power * 3 // 4 if power > 16 and power * 3 // 4 >= n else power


_flat: list[tuple[list[weakref.ref], Any, gpt2.Params]] = []  # (the leaves, their tree, it unstacked) of the last two trees: a model and its draft


def flat(params: gpt2.Params) -> gpt2.Params:
    """`gpt2.unstack` of the parameters, kept for as long as all of them live: a copy of them all would cost more than some tokens do.

    NumPy arrays can be written into, so that what was made of them is not kept.
    """
    if "blocks" not in params:
        return params
    leaves, tree = jax.tree.flatten(params)
    for entry in _flat:
        refs, known, unstacked = entry
        if known == tree and all(ref() is leaf for ref, leaf in zip(refs, leaves, strict=True)):
            _flat[:] = [*(other for other in _flat if other is not entry), entry]  # the last used last
            return unstacked
    unstacked = jax.jit(gpt2.unstack)(params)
    if all(isinstance(leaf, jax.Array) for leaf in leaves):
        _flat.append(([weakref.ref(leaf, _forget) for leaf in leaves], tree, unstacked))
        del _flat[:-2]
    return unstacked


def _forget(dead: weakref.ref) -> None:
    _flat[:] = [entry for entry in _flat if all(ref is not dead for ref in entry[0])]
