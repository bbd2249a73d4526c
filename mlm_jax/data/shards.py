"""Token shards on disk: train_000000.bin, val_000000.bin, manifest.json.

A shard is llm.c's file: 256 int32 of header (magic, version, number of tokens, zeros), then the tokens. Up to 65,536 ids are uint16 under
GPT-2's header, more are uint32 under Llama 3's, so that both kinds can be exchanged. Each document is `<|endoftext|>` and then its tokens.
nanoGPT's files, which are tokens and nothing else, can be read too. Beside train_000000.bin may lie train_000000.mask, a byte for each
token: 0 where it is not learned; and train.starts, a uint64 for each document: the tokens before it.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from mlm_jax import storage
from mlm_jax.config import Config, DataConfig, InputError, override
from mlm_jax.storage import Place

SPLITS = ("train", "val")
BIN = "bin:"  # what the name of a source begins with that holds shards, which stay where they are
SHARD_TOKENS = 100_000_000  # Source: karpathy/llm.c, dev/data/fineweb.py, shard_size

# Source: karpathy/llm.c, dev/data/data_common.py, HEADERS_INFO: "gpt-2" and "llama-3".
HEADER_INTS = 256
_FORMATS = {2: (20240520, 1, np.dtype("<u2")), 4: (20240801, 7, np.dtype("<u4"))}

REMEDY = "Delete the folder and prepare the tokens again, or copy the file again"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One .bin file."""

    file: str  # in the folder; of a source bin: the whole path, as such files stay where they are
    tokens: int
    sha256: str  # of the whole file
    mask_sha256: str = ""  # of the .mask beside it; empty: all tokens are learned
    header: bool = True  # False: nanoGPT's file, tokens and nothing else

    @property
    def mask(self) -> str:
        return self.file.removesuffix(".bin") + ".mask"


@dataclasses.dataclass(frozen=True)
class Split:
    """One part of the text; bytes are UTF-8, and like characters leave out prompts and `<|endoftext|>`, which tokens include."""

    tokens: int
    bytes: int
    characters: int
    documents: int
    shards: tuple[Shard, ...]
    starts: str = ""  # the file with where each document starts, and its SHA-256
    starts_sha256: str = ""
    prompt_tokens: int = 0  # that are not learned


@dataclasses.dataclass(frozen=True)
class SourceTokens:
    """What became of one source."""

    name: str  # empty for one that is alone
    detail: str  # what stood behind it
    split_by: str  # hash, position, or file: by the names of published shards
    splits: dict[str, Split]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of token shards holds; nothing in it depends on when or where it was made."""

    config: DataConfig
    tokenizer: str
    vocab_size: int
    eot_id: int
    sources: tuple[SourceTokens, ...]
    audit: dict[str, Any]
    lists: dict[str, str]  # the files and sets that cleaning read, with what stood behind them

    @property
    def token_bytes(self) -> int:
        """2 or 4: bytes of one token in the shards."""
        return 2 if self.vocab_size <= 1 << 16 else 4

    @property
    def splits(self) -> dict[str, Split]:
        """Each split of all sources, one after the other."""
        return {name: _joined([source.splits[name] for source in self.sources]) for name in SPLITS}

    @property
    def files(self) -> dict[str, str]:
        """The files of the folder by name, with their SHA-256; those of a source bin: are not in it."""
        found = {}
        for split in (split for source in self.sources for split in source.splits.values()):
            found |= {split.starts: split.starts_sha256} if split.starts else {}
            for shard in split.shards:
                found |= {shard.file: shard.sha256} if Path(shard.file).name == shard.file else {}
                found |= {shard.mask: shard.mask_sha256} if shard.mask_sha256 else {}
        return found


def _joined(splits: list[Split]) -> Split:
    names = ("tokens", "bytes", "characters", "documents", "prompt_tokens")
    sums: dict[str, Any] = {name: sum(getattr(split, name) for split in splits) for name in names}
    return Split(**sums, shards=tuple(shard for split in splits for shard in split.shards))


def write_manifest(manifest: Manifest, folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Place) -> Manifest:
    """The manifest of a folder that `prepare` wrote.

    Raises:
      InputError: there is none, or it is damaged.
      NotReached: it is in a bucket that cannot be read.
    """
    path = folder / "manifest.json"
    remedy = "Delete the folder and prepare the tokens again, or name another one"
    if not path.exists():
        raise InputError("data.tokens", str(folder), "there is no manifest.json, so these are no token shards", remedy)
    try:
        values = json.loads(storage.read_text(path))
        config = override(Config(name="tokens"), {f"data.{field}": value for field, value in values["config"].items()}).data
        sources = tuple(_source(source) for source in values["sources"])
        manifest = Manifest(**{**values, "config": config, "sources": sources})
        for source, stated in zip(sources, config.sources, strict=True):
            if set(source.splits) != set(SPLITS):
                raise ValueError("the splits are not ours")
            names = [name for split in source.splits.values() for name in (split.starts, *(shard.file for shard in split.shards)) if name]
            if any(Path(name).name != name for name in names) and not stated.source.startswith(BIN):
                raise ValueError("a file is outside of the folder")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise InputError("data.tokens", str(path), f"not a manifest of token shards ({type(e).__name__}: {e})", remedy) from e
    return manifest


def _source(values: dict[str, Any]) -> SourceTokens:
    splits = {name: Split(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])}) for name, split in values["splits"].items()}
    return SourceTokens(**{**values, "splits": splits})


def write_shards(
    parts: Iterable[Integer[np.ndarray, "_"]], n_tokens: int, folder: Path, name: str, *, token_bytes: int, limit: int, ending: str = ".bin"
) -> list[Shard]:
    """Writes `n_tokens` tokens, given in parts, end to end into files of at most `limit`; a document may go on in the next file.

    The ending .mask is for the bytes that say which tokens are learned: such files are without a header.
    """
    magic, version, dtype = _FORMATS[token_bytes] if ending == ".bin" else (0, 0, np.dtype("u1"))
    shards: list[Shard] = []
    left, room, head = n_tokens, 0, b""
    with contextlib.ExitStack() as stack:
        for part in parts:
            while len(part):
                if not room:
                    size = room = min(left, limit)
                    path, digest = folder / f"{name}_{len(shards):06d}{ending}", hashlib.sha256()
                    file = stack.enter_context(path.open("wb"))
                    header = np.zeros(HEADER_INTS, "<i4")
                    header[:3] = magic, version, size
                    head = header.tobytes() if ending == ".bin" else b""
                raw = head + part[:room].astype(dtype).tobytes()
                file.write(raw)
                digest.update(raw)
                written, part, head = min(room, len(part)), part[room:], b""
                left, room = left - written, room - written
                if not room:
                    file.close()
                    shards.append(Shard(file=path.name, tokens=size, sha256=digest.hexdigest()))
    return shards


def open_shard(path: Path, shard: Shard, token_bytes: int) -> Integer[np.ndarray, "T"]:
    """The tokens of a shard on disk, memory-mapped; uint16 or uint32.

    Raises:
      InputError: it is missing, truncated or foreign; the message names the file, both sizes and the remedy.
    """
    header_bytes = HEADER_INTS * 4 if shard.header else 0
    expected = header_bytes + shard.tokens * token_bytes
    if not path.is_file():
        raise InputError("data.tokens", str(path), f"the shard is missing, manifest.json names it with {expected} bytes", REMEDY)
    header = np.fromfile(path, "<i4", count=HEADER_INTS) if shard.header else None
    check_shard(str(path), shard, token_bytes, path.stat().st_size, header)
    # A plain view of the map: slices of np.memmap itself cost several times more.
    return np.asarray(np.memmap(path, _FORMATS[token_bytes][2], mode="r", offset=header_bytes))


def check_shard(name: str, shard: Shard, token_bytes: int, size: int, header: Integer[np.ndarray, "_"] | None) -> None:
    """Raises InputError unless a file of `size` bytes with this header, None where it should have none, is the shard of the manifest."""
    magic, version, _ = _FORMATS[token_bytes]
    expected = (HEADER_INTS * 4 if shard.header else 0) + shard.tokens * token_bytes
    if header is not None and len(header) >= 2 and tuple(header[:2]) != (magic, version):
        reason = f"not a token shard of this kind: it starts with {header[0]} {header[1]}, {magic} {version} expected"
        raise InputError("data.tokens", name, reason, REMEDY)
    if size != expected:
        reason = f"{'cut short' if size < expected else 'too long'}: {size} bytes, {expected} expected ({shard.tokens} tokens)"
        raise InputError("data.tokens", name, reason, REMEDY)
    if header is not None and header[2] != shard.tokens:
        raise InputError("data.tokens", name, f"its header says {header[2]} tokens, manifest.json {shard.tokens}", REMEDY)


def kind_of(path: Path, token_bytes: int) -> tuple[bool, int]:
    """Whether a file that others made has a header, and how many tokens are in it.

    Raises:
      InputError: it is a shard of ids of another width, empty, or no whole number of tokens.
    """
    size, magic = path.stat().st_size, np.fromfile(path, "<i4", count=1)
    remedy = "Fetch the file again, or name the tokenizer that it was made with as data.tokenizer"
    for width, (known, _, _) in _FORMATS.items():
        if len(magic) and magic[0] == known:
            if width != token_bytes:
                raise InputError("data.source", str(path), f"holds ids of {width} bytes, and those of the tokenizer have {token_bytes}", remedy)
            header = np.fromfile(path, "<i4", count=3)
            if len(header) < 3 or header[2] <= 0:
                raise InputError("data.source", str(path), "its header says that it holds no tokens", remedy)
            return True, int(header[2])
    if not size or size % token_bytes:
        raise InputError("data.source", str(path), f"{size} bytes are no whole number of tokens of {token_bytes} bytes", remedy)
    return False, size // token_bytes
