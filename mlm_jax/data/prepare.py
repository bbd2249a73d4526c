"""Documents -> a folder of token shards, with its manifest and its tokenizer."""

import hashlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from mlm_jax.config import DataConfig, InputError, diff
from mlm_jax.data import text, tokenizer
from mlm_jax.data.clean import Audit, clean, digest_of
from mlm_jax.data.shards import SHARD_TOKENS, SPLITS, Manifest, SourceTokens, Split, open_shard, read_manifest, write_manifest, write_shards

HASH_SPLIT_DOCUMENTS = 100  # from so many documents on the split goes by hash; fewer are too coarse for a fraction

_ENCODE_CHARACTERS = 1 << 22  # encoded at once: bounds the memory of the library's token objects
_HASH_BYTES = 1 << 30  # shards up to this size in all are hashed again before `prepare` reuses them: about a second


def prepare(config: DataConfig, folder: Path, *, shard_tokens: int = SHARD_TOKENS) -> Manifest:
    """The manifest of the token shards in `folder`, which are written unless they are there already.

    The folder appears whole or not at all: it is filled under another name and renamed.

    Raises:
      InputError: the source is bad (see `text.documents`), empty or all validation; or the folder holds something else.
    """
    config = config.for_tokens
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


def _reuse(config: DataConfig, folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    differing = ", ".join(f"data.{field} {there!r} there, {asked!r} asked" for field, (there, asked) in diff(manifest.config, config).items())
    remedy = "Name another folder, or delete this one to prepare anew"
    if differing:
        raise InputError("data.tokens", str(folder), f"holds tokens of another configuration: {differing}", remedy)
    # Tokens outlive their source: a file that is gone, or another Python, changes nothing in them.
    for source in manifest.sources:
        if text.is_there(config.source) and (now := text.source_detail(config)) != source.detail:
            raise InputError("data.tokens", str(folder), f"{config.source} has changed since: {source.detail} then, {now} now", remedy)
    shards = manifest.splits["train"].shards + manifest.splits["val"].shards
    for shard in shards:
        open_shard(folder / shard.file, shard, manifest.token_bytes)
    if sum(shard.tokens for shard in shards) * manifest.token_bytes <= _HASH_BYTES:
        for name, sha256 in manifest.files.items():
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise InputError("data.tokens", str(folder / name), "its SHA-256 is not the one in manifest.json", remedy)
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
    splits = {}
    for name in SPLITS:
        encoded = list(_encoded(parts[name], made))
        n_tokens = sum(map(len, encoded))
        shards = write_shards(encoded, n_tokens, folder, name, token_bytes=2 if made.vocab_size <= 1 << 16 else 4, limit=shard_tokens)
        starts = np.cumsum([0, *map(len, encoded)])[:-1].astype("<u8").tobytes() if encoded else b""
        (folder / f"{name}.starts").write_bytes(starts)
        splits[name] = Split(
            tokens=n_tokens,
            bytes=sum(len(part.encode("utf-8")) for part in parts[name]),
            characters=sum(map(len, parts[name])),
            documents=len(parts[name]),
            shards=tuple(shards),
            starts=f"{name}.starts",
            starts_sha256=hashlib.sha256(starts).hexdigest(),
        )
    manifest = Manifest(
        config=config,
        tokenizer=config.tokenizer,
        vocab_size=made.vocab_size,
        eot_id=made.eot_id,
        split_by=split_by,
        sources=(SourceTokens(name="", detail=text.source_detail(config), splits=splits),),
        audit=audit.to_dict(),
    )
    write_manifest(manifest, folder)
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
