"""Documents -> token shards on disk: train_000000.bin, val_000000.bin, manifest.json and the tokenizer, memory-mapped afterwards.

A shard is llm.c's file: 256 int32 of header (magic, version, number of tokens, zeros), then the tokens. Up to 65,536 ids are uint16 under
GPT-2's header, more are uint32 under Llama 3's, so that both kinds can be exchanged. Each document is `<|endoftext|>` and then its tokens.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from mlm_jax.config import DataConfig, InputError, diff
from mlm_jax.data import text, tokenizer
from mlm_jax.data.clean import Audit, clean, digest_of

SPLITS = ("train", "val")
SHARD_TOKENS = 100_000_000  # Source: karpathy/llm.c, dev/data/fineweb.py, shard_size
HASH_SPLIT_DOCUMENTS = 100  # from so many documents on the split goes by hash; fewer are too coarse for a fraction

# Source: karpathy/llm.c, dev/data/data_common.py, HEADERS_INFO: "gpt-2" and "llama-3".
_HEADER_INTS = 256
_FORMATS = {2: (20240520, 1, np.dtype("<u2")), 4: (20240801, 7, np.dtype("<u4"))}

_ENCODE_CHARACTERS = 1 << 22  # encoded at once: bounds the memory of the library's token objects
_HASH_BYTES = 1 << 30  # shards up to this size in all are hashed again before `prepare` reuses them: about a second


@dataclasses.dataclass(frozen=True)
class Shard:
    """One .bin file."""

    file: str
    tokens: int
    sha256: str  # of the whole file


@dataclasses.dataclass(frozen=True)
class Split:
    """One part of the text; bytes are UTF-8, and like characters leave out `<|endoftext|>`, which tokens include, one per document."""

    tokens: int
    bytes: int
    characters: int
    documents: int
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of token shards holds; nothing in it depends on when or where it was made."""

    config: DataConfig
    source_detail: str
    tokenizer: str
    vocab_size: int
    eot_id: int
    split_by: str  # hash or position
    splits: dict[str, Split]
    audit: dict[str, Any]

    @property
    def token_bytes(self) -> int:
        """2 or 4: bytes of one token in the shards."""
        return 2 if self.vocab_size <= 1 << 16 else 4


def prepare(config: DataConfig, folder: Path, *, shard_tokens: int = SHARD_TOKENS) -> Manifest:
    """The manifest of the token shards in `folder`, which are written unless they are there already.

    The folder appears whole or not at all: it is filled under another name and renamed.

    Raises:
      InputError: the source is bad (see `text.documents`), empty or all validation; or the folder holds something else.
    """
    config = _what_matters(config)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return _reuse(config, folder)
    partial = folder.with_name(f".{folder.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        manifest = _write(config, partial, shard_tokens)
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / "manifest.json").is_file():
                raise
            return _reuse(config, folder)  # another process was first
        return manifest
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder that `prepare` wrote.

    Raises:
      InputError: there is none, or it is damaged.
    """
    path = folder / "manifest.json"
    remedy = "Delete the folder and prepare the tokens again, or name another one"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        splits = {name: Split(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])}) for name, split in values["splits"].items()}
        manifest = Manifest(**{**values, "config": DataConfig(**values["config"]), "splits": splits})
        names = [shard.file for split in splits.values() for shard in split.shards]
        if set(splits) != set(SPLITS) or any(Path(name).name != name for name in names):
            raise ValueError("splits or shard names are not ours")
    except FileNotFoundError as e:
        raise InputError("data.tokens", str(folder), "there is no manifest.json, so these are no token shards", remedy) from e
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise InputError("data.tokens", str(path), f"not a manifest of token shards ({type(e).__name__}: {e})", remedy) from e
    return manifest


class Tokens:
    """The tokens of one split as one circle over its memory-mapped shards."""

    def __init__(self, shards: Sequence[Integer[np.ndarray, "_"]]) -> None:
        self._shards = list(shards)
        self._ends = list(itertools.accumulate(len(shard) for shard in shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int, length: int) -> Integer[np.ndarray, "T"]:
        """`length` tokens from `start` on, uint16 or uint32; after the last comes the first again."""
        start %= self._ends[-1]
        index = bisect.bisect_right(self._ends, start)
        shard, offset = self._shards[index], start - (self._ends[index] - len(self._shards[index]))
        part = shard[offset : offset + length]
        if len(part) == length:  # nearly always
            return part
        return np.concatenate([part, self.read(start + len(part), length - len(part))])


def open_tokens(folder: Path, split: str) -> Tokens:
    """The tokens of a split ("train" or "val") in a folder that `prepare` wrote, checked against header and manifest.

    Raises:
      InputError: no such tokens, or a shard is missing, truncated or foreign; the message names the file, both sizes and the remedy.
    """
    manifest = read_manifest(folder)
    if not manifest.splits[split].tokens:
        reason = f"{folder} has no {split} tokens"
        raise InputError("data.val_fraction", manifest.config.val_fraction, reason, "Prepare with another fraction or more text")
    return Tokens([_open_shard(folder / shard.file, shard.tokens, manifest.token_bytes) for shard in manifest.splits[split].shards])


def _what_matters(config: DataConfig) -> DataConfig:
    """`config` without what has no effect on the shards: their place, and the size of a BPE that is not trained."""
    default = DataConfig()
    return dataclasses.replace(
        config, tokens=default.tokens, bpe_vocab_size=config.bpe_vocab_size if config.tokenizer == "bpe" else default.bpe_vocab_size
    )


def _reuse(config: DataConfig, folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    differing = ", ".join(f"data.{field} {there!r} there, {asked!r} asked" for field, (there, asked) in diff(manifest.config, config).items())
    remedy = "Name another folder, or delete this one to prepare anew"
    if differing:
        raise InputError("data.tokens", str(folder), f"holds tokens of another configuration: {differing}", remedy)
    # Tokens outlive their source: a file that is gone, or another Python, changes nothing in them.
    if text.is_there(config.source) and (now := text.source_detail(config)) != manifest.source_detail:
        raise InputError("data.tokens", str(folder), f"{config.source} has changed since: {manifest.source_detail} then, {now} now", remedy)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    for shard in shards:
        _open_shard(folder / shard.file, shard.tokens, manifest.token_bytes)
    if sum(shard.tokens for shard in shards) * manifest.token_bytes <= _HASH_BYTES:
        for shard in shards:
            with (folder / shard.file).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                    raise InputError("data.tokens", str(folder / shard.file), "its SHA-256 is not the one in manifest.json", remedy)
    tokenizer.Tokenizer.load(folder / "tokenizer")
    return manifest


def _write(config: DataConfig, folder: Path, shard_tokens: int) -> Manifest:
    audit = Audit()
    texts = [document.text for document in clean(text.documents(config), audit)]
    if not texts:
        reason = f"no text: {audit.read.documents} documents, {audit.read.bytes} bytes, nothing left after cleaning"
        raise InputError("data.source", config.source, reason, "Name a source that holds text")
    split_by = "hash" if len(texts) >= HASH_SPLIT_DOCUMENTS else "position"
    parts = _split_by_hash(texts, config.val_fraction) if split_by == "hash" else _split_by_position(texts, config.val_fraction)
    if not parts["train"]:
        raise InputError("data.val_fraction", config.val_fraction, "leaves no text to train on", "Hold out less, or give more text")
    made = tokenizer.make(config.tokenizer, parts["train"], texts, config)
    made.save(folder / "tokenizer")
    manifest = Manifest(
        config=config,
        source_detail=text.source_detail(config),
        tokenizer=config.tokenizer,
        vocab_size=made.vocab_size,
        eot_id=made.eot_id,
        split_by=split_by,
        splits={},
        audit=audit.to_dict(),
    )
    for name in SPLITS:
        shards = _write_shards(_encoded(parts[name], made), folder, name, manifest.token_bytes, shard_tokens)
        manifest.splits[name] = Split(
            tokens=sum(shard.tokens for shard in shards),
            bytes=sum(len(part.encode("utf-8")) for part in parts[name]),
            characters=sum(map(len, parts[name])),
            documents=len(parts[name]),
            shards=tuple(shards),
        )
    (folder / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n", encoding="utf-8")
    return manifest


def _split_by_hash(texts: list[str], val_fraction: float) -> dict[str, list[str]]:
    """A document's split depends on its text alone: more documents never move one."""
    parts: dict[str, list[str]] = {name: [] for name in SPLITS}
    for document in texts:
        draw = int.from_bytes(digest_of(document)[:8], "big") / 2**64
        parts["val" if draw < val_fraction else "train"].append(document)
    return parts


def _split_by_position(texts: list[str], val_fraction: float) -> dict[str, list[str]]:
    """The last characters are held out; a document across the cut becomes one on each side."""
    left = int(sum(map(len, texts)) * (1 - val_fraction))  # characters still to train on
    parts: dict[str, list[str]] = {name: [] for name in SPLITS}
    for document in texts:
        cut = min(left, len(document))
        left -= cut
        parts["train"] += [document[:cut]] if cut else []
        parts["val"] += [document[cut:]] if cut < len(document) else []
    return parts


def _encoded(texts: list[str], made: tokenizer.Tokenizer) -> Iterator[Integer[np.ndarray, "_"]]:
    """The ids of each document, `<|endoftext|>` first."""
    eot = np.array([made.eot_id], np.int32)
    for group in _groups(texts):
        for ids in made.encode_batch(group):
            yield np.concatenate([eot, ids])


def _groups(texts: list[str]) -> Iterator[list[str]]:
    """Consecutive documents of about `_ENCODE_CHARACTERS` in all."""
    group: list[str] = []
    size = 0
    for document in texts:
        group.append(document)
        size += len(document)
        if size >= _ENCODE_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _write_shards(documents: Iterator[Integer[np.ndarray, "_"]], folder: Path, name: str, token_bytes: int, limit: int) -> list[Shard]:
    """Writes the documents end to end into files of at most `limit` tokens; a document may go on in the next file."""
    shards: list[Shard] = []
    held: list[np.ndarray] = []
    room = limit
    for ids in documents:
        while len(ids):
            held.append(ids[:room])
            room -= len(held[-1])
            ids = ids[len(held[-1]) :]
            if not room:
                shards.append(_write_shard(held, folder, f"{name}_{len(shards):06d}.bin", token_bytes))
                held, room = [], limit
    if held:
        shards.append(_write_shard(held, folder, f"{name}_{len(shards):06d}.bin", token_bytes))
    return shards


def _write_shard(parts: list[np.ndarray], folder: Path, file: str, token_bytes: int) -> Shard:
    magic, version, dtype = _FORMATS[token_bytes]
    body = np.concatenate(parts).astype(dtype)
    header = np.zeros(_HEADER_INTS, "<i4")
    header[:3] = magic, version, len(body)
    raw = header.tobytes() + body.tobytes()
    (folder / file).write_bytes(raw)
    return Shard(file=file, tokens=len(body), sha256=hashlib.sha256(raw).hexdigest())


def _open_shard(path: Path, n_tokens: int, token_bytes: int) -> Integer[np.ndarray, "T"]:
    magic, version, dtype = _FORMATS[token_bytes]
    remedy = "Delete the folder and prepare the tokens again, or copy the file again"
    expected = _HEADER_INTS * 4 + n_tokens * token_bytes
    if not path.is_file():
        raise InputError("data.tokens", str(path), f"the shard is missing, manifest.json names it with {expected} bytes", remedy)
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", count=_HEADER_INTS)
    if len(header) >= 2 and tuple(header[:2]) != (magic, version):
        reason = f"not a token shard of this kind: it starts with {header[0]} {header[1]}, {magic} {version} expected"
        raise InputError("data.tokens", str(path), reason, remedy)
    if size != expected:
        reason = f"{'cut short' if size < expected else 'too long'}: {size} bytes, {expected} expected ({n_tokens} tokens)"
        raise InputError("data.tokens", str(path), reason, remedy)
    if header[2] != n_tokens:
        raise InputError("data.tokens", str(path), f"its header says {header[2]} tokens, manifest.json {n_tokens}", remedy)
    # A plain view of the map: slices of np.memmap itself cost several times more.
    return np.asarray(np.memmap(path, dtype, mode="r", offset=_HEADER_INTS * 4))
