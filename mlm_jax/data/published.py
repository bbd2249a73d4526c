"""Token shards that others made, in the layouts of llm.c and nanoGPT, used where they lie."""

import hashlib
import re
from pathlib import Path

import numpy as np
from jaxtyping import Int

from mlm_jax.config import DataConfig, InputError, SourceConfig
from mlm_jax.data import sources
from mlm_jax.data.shards import SPLITS, Shard, Split, kind_of, open_shard
from mlm_jax.data.tokenizer import Tokenizer

_CHUNK = 1 << 24  # tokens looked at at once


def files(source: SourceConfig) -> dict[str, list[Path]]:
    """The shards of each split, sorted by name: those in which a word begins with "val" are held out.

    Raises:
      InputError: nothing is there, or no file is for one of the splits.
    """
    found = sources.token_files(source.source)
    held_out = [bool(re.search("(?<![a-z])val", file.name)) for file in found]
    splits = {name: [file.resolve() for file, val in zip(found, held_out, strict=True) if val == (name == "val")] for name in SPLITS}
    for name, held in splits.items():
        if not held:
            which = 'with "val" in its name' if name == "val" else 'without "val" in its name'
            raise InputError("data.source", source.source, f"no file {which}, so there are no {name} tokens", "Name the folder that has both")
    return splits


def check(source: SourceConfig, config: DataConfig) -> None:
    """Raises InputError, as `read_splits` does, where the heads of the files alone tell that they cannot be used."""
    if config.tokenizer not in ("gpt2", "byte"):
        remedy = "Set data.tokenizer to the one that they were made with, gpt2 or byte"
        raise InputError("data.tokenizer", config.tokenizer, f"is made anew, and {source.source} holds tokens already", remedy)
    for path in (path for paths in files(source).values() for path in paths):
        header, count = kind_of(path, 2)
        open_shard(path, Shard(file=str(path), tokens=count, sha256="", header=header), 2)


def read_splits(source: SourceConfig, tokenizer: Tokenizer, folder: Path, prefix: str) -> dict[str, Split]:
    """What each split holds, counted token by token; where documents start is written into `folder`.

    Raises:
      InputError: as `files`; or a file is of another kind, cut short, or has ids that the tokenizer does not.
    """
    spelled = tokenizer.spelled()
    return {name: _split(paths, tokenizer, spelled, folder / f"{prefix}{name}.starts") for name, paths in files(source).items()}


def _split(paths: list[Path], tokenizer: Tokenizer, spelled: Int[np.ndarray, "V 2"], starts: Path) -> Split:
    token_bytes = 2 if tokenizer.vocab_size <= 1 << 16 else 4
    shards, n_tokens, n_documents, sums, digest = [], 0, 0, np.zeros(2, np.int64), hashlib.sha256()
    with starts.open("wb") as file:
        for path in paths:
            header, count = kind_of(path, token_bytes)
            with path.open("rb") as raw:
                sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
            shard = Shard(file=str(path), tokens=count, sha256=sha256, header=header)
            ids = open_shard(path, shard, token_bytes)
            for first in range(0, len(ids), _CHUNK):
                part = ids[first : first + _CHUNK]
                if part.max() >= tokenizer.vocab_size:
                    reason = f"holds token {part.max()}, and the tokenizer has {tokenizer.vocab_size}"
                    raise InputError("data.source", str(path), reason, "Name the tokenizer that it was made with as data.tokenizer")
                where = np.flatnonzero(part == tokenizer.eot_id)
                begun: list[int] = [] if n_tokens + first or (len(where) and where[0] == 0) else [0]
                found = (n_tokens + first + np.concatenate([np.array(begun, np.int64), where])).astype("<u8").tobytes()
                file.write(found)
                digest.update(found)
                n_documents += len(found) // 8
                sums += np.bincount(part, minlength=tokenizer.vocab_size) @ spelled
            shards.append(shard)
            n_tokens += count
    return Split(n_tokens, int(sums[0]), int(sums[1]), n_documents, tuple(shards), starts.name, digest.hexdigest())
