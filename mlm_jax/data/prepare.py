"""Sources -> a folder of token shards, with its manifest, its tokenizer and the audit of what became of every document.

The work is done in parts of about `TASK_BYTES`, whose borders depend on the sources alone, so that any number of workers writes the same
shards. It is kept in .NAME.partial beside the folder until that is whole, and goes on from there when it was cut off.
"""

import array
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from mlm_jax import lock, storage
from mlm_jax.config import FILTERS, CleanConfig, Config, DataConfig, InputError, SourceConfig, diff, from_json, to_json
from mlm_jax.data import duplicates, published, rules, sources, tokenizer
from mlm_jax.data.audit import Audit, merged, size
from mlm_jax.data.document import Document, Dropped, Fault, Rule
from mlm_jax.data.duplicates import digest_of
from mlm_jax.data.executor import Executor
from mlm_jax.data.shards import (
    BIN,
    REMEDY,
    SHARD_TOKENS,
    SPLITS,
    Manifest,
    SourceTokens,
    Split,
    open_shard,
    read_manifest,
    write_manifest,
    write_shards,
)
from mlm_jax.storage import Place

TASK_BYTES = 64 << 20  # of a source, that are cleaned and tokenised at once
HASH_SPLIT_DOCUMENTS = 100  # of a source, from which on its split goes by hash; fewer are too coarse for a fraction

_ENCODE_CHARACTERS = 1 << 22  # encoded at once
_HASH_BYTES = 1 << 30  # shards up to this size in all are hashed again before `prepare` reuses them: about a second
_SAMPLE_BYTES = 1 << 20  # of held-out text, on which tokenizers are compared
_COPY_TOKENS = 1 << 22  # copied at once
_SAMPLED = 1 << 16  # characters that a sample has all or nothing of


def prepare(
    config: DataConfig,
    folder: Place,
    *,
    scratch: Path | None = None,
    shard_tokens: int = SHARD_TOKENS,
    task_bytes: int = TASK_BYTES,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> Manifest:
    """The manifest of the token shards in `folder`, which are written unless they are there already.

    The folder appears whole or not at all. One in a bucket is made in `scratch`, a folder of this machine, and sent, its manifest last.

    Raises:
      InputError: a source cannot be used, is empty or all validation; the folder holds something else, or another process prepares it.
      TaskFailed: a part of the work failed twice; the others are kept for the next start.
      NotReached: the folder is in a bucket that cannot be reached.
    """
    if not isinstance(folder, Path):
        name = f"mlm_jax_{folder.name}_{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"
        scratch = scratch or Path(tempfile.gettempdir()) / name
        with lock.hold(scratch.with_name(f".{scratch.name}.sent"), field="data.tokens"):  # to the end, in which it is taken away
            return _prepare_in_bucket(config, folder, scratch, shard_tokens, task_bytes, say)
    wanted, folder = config.for_tokens, folder.resolve()  # a link stays where it is
    if os.path.ismount(folder) and not any(folder.iterdir()):
        raise InputError("data.tokens", str(folder), "is where a file system is mounted, and is made under another name first", "Name a folder in it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return _reuse(wanted, folder)
    partial = folder.with_name(f".{folder.name}.partial")
    with lock.hold(partial, field="data.tokens"):
        if (folder / "manifest.json").is_file():  # another process was first
            return _reuse(wanted, folder)
        work = _enter(config, partial / "work", task_bytes)
        try:
            with Executor(config, work.folder) as executor:
                manifest = _make(work, executor, shard_tokens, say)
        except InputError:
            if len(work.slices) < 2:  # more may have taken long, and what of it is of no use any more the next start finds out
                work.delete()
            raise
        if folder.is_dir():
            folder.rmdir()
        work.made.rename(folder)
        work.delete()
    with contextlib.suppress(OSError):  # another process waits in it
        partial.rmdir()
    return manifest


def _prepare_in_bucket(config: DataConfig, folder: Any, scratch: Path, shard_tokens: int, task_bytes: int, say: Callable[[str], None]) -> Manifest:
    there = storage.files(folder)
    if "manifest.json" in there:
        manifest = read_manifest(folder)
        _check_same(config.for_tokens, manifest, str(folder))
        for name in manifest.files:
            if name not in there:
                raise InputError("data.tokens", str(folder / name), "is missing, manifest.json names it", REMEDY)
        return manifest
    if foreign := [name for name in there if not name.endswith((".bin", ".starts", ".mask", ".html")) and not name.startswith("tokenizer/")]:
        raise InputError("data.tokens", str(folder), f"holds {foreign[0]} and no token shards", "Name another folder")
    storage.check_writable(folder, field="data.tokens")
    manifest = prepare(config, scratch, shard_tokens=shard_tokens, task_bytes=task_bytes, say=say)
    names = [*manifest.files, "tokenizer"]
    say(f"prepare: sends {len(manifest.files)} files to {folder}")
    storage.send(scratch, names, folder)
    storage.send(scratch, ["manifest.json"], folder)  # last: with a manifest it is whole
    shutil.rmtree(scratch)
    return manifest


def _check_same(config: DataConfig, manifest: Manifest, folder: str) -> None:
    """Raises InputError where the shards are of another configuration, or their sources have changed since."""
    differing = ", ".join(f"data.{field} {there!r} there, {asked!r} asked" for field, (there, asked) in diff(manifest.config, config).items())
    remedy = "Name another folder, or delete this one to prepare anew"
    if differing:
        raise InputError("data.tokens", folder, f"holds tokens of another configuration: {differing}", remedy)
    # Tokens outlive their source: a file that is gone, or another Python, changes nothing in them.
    for source, made in zip(config.sources, manifest.sources, strict=True):
        if sources.is_there(source.source) and (now := sources.detail(source)) != made.detail:
            raise InputError("data.tokens", folder, f"{source.source} has changed since: {made.detail} then, {now} now", remedy)
    for name, then in manifest.lists.items():
        if sources.is_there(name) and _behind(name) != then:
            raise InputError("data.tokens", folder, f"{name}, which cleaning reads, has changed since", remedy)


def _reuse(config: DataConfig, folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    _check_same(config, manifest, str(folder))
    shards = [shard for name in SPLITS for shard in manifest.splits[name].shards]
    for shard in shards:
        open_shard(folder / shard.file, shard, manifest.token_bytes)
    if sum(shard.tokens for shard in shards) * manifest.token_bytes <= _HASH_BYTES:
        for name, sha256 in (manifest.files | {shard.file: shard.sha256 for shard in shards}).items():
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    remedy = "Name another folder, or delete this one to prepare anew"
                    raise InputError("data.tokens", str(folder / name), "its SHA-256 is not the one in manifest.json", remedy)
    tokenizer.Tokenizer.load(folder / "tokenizer")
    return manifest


def plain_texts(source: SourceConfig) -> list[str]:
    """The texts of a source that has to be whole, with nothing done to them but what is done to all.

    Raises:
      InputError: it cannot be used, or some of it cannot be read.
    """
    chain, audit = rules.rules(CleanConfig()), Audit()
    return [clean.text for document in sources.documents(source) if (clean := _through(document, chain, audit)) is not None]


class Slice(NamedTuple):
    """What one task reads."""

    source: int  # its place among the sources
    parts: list[sources.Part]


@dataclasses.dataclass(frozen=True)
class Work:
    """The folder of what is made on the way; tasks, in whatever process, know of each other by it alone."""

    folder: Path

    @functools.cached_property
    def config(self) -> DataConfig:
        return from_json((self.folder / "config.json").read_text(encoding="utf-8")).data

    def delete(self) -> None:
        for folder in (self.folder, self.made):
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def made(self) -> Path:
        """The folder that will be that of the shards."""
        return self.folder.parent / "made"

    @property
    def prompts(self) -> bool:
        """Some documents have a part that is not learned."""
        return any(source.prompt_field for source in self.config.sources)

    @functools.cached_property
    def slices(self) -> list[Slice]:
        found = json.loads((self.folder / "slices.json").read_text(encoding="utf-8"))
        return [Slice(source, [sources.Part(*part) for part in parts]) for source, parts in found]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def file(self, folder: str, name: str) -> Path:
        """A file to write or read; its folder is made where it is missing."""
        (self.folder / folder).mkdir(exist_ok=True)
        return self.folder / folder / name

    def found(self, kind: str) -> Path:
        """Where the places of copies of documents or paragraphs are."""
        return self.folder / f"copies of {kind}"

    def of(self, source: int) -> list[int]:
        """The tasks that read a source."""
        return [task for task, part in enumerate(self.slices) if part.source == source]


def _enter(config: DataConfig, folder: Path, task_bytes: int) -> Work:
    """The work on these sources as they are now: what is there of it, or a new one. What can be found to be wrong at once is found here."""
    details = [sources.detail(source) for source in config.sources]
    for source in config.sources:
        if source.source.startswith(BIN):
            published.check(source, config)
    tokenizer.byte_level().with_special(config.special_tokens)
    _CHAINS.clear()
    rules.rules(config.clean)
    if config.clean.near_duplicates:
        duplicates.minhash_steps(config.clean, folder, None)
    slices = [
        Slice(i, parts)
        for i, source in enumerate(config.sources)
        if not source.source.startswith(BIN)
        for parts in _sliced(sources.parts(source), task_bytes)
    ]
    state = {
        "for_tokens.json": to_json(Config(name="prepare", data=config.for_tokens)),
        "details.json": json.dumps(details),
        "lists.json": json.dumps(_lists(config.clean)),
        "slices.json": json.dumps(slices),
    }
    work = Work(folder)
    if not all((folder / name).is_file() and (folder / name).read_text(encoding="utf-8") == text for name, text in state.items()):
        work.delete()
        folder.mkdir()
    shutil.rmtree(work.made, ignore_errors=True)
    work.made.mkdir()
    for name, text in (state | {"config.json": to_json(Config(name="prepare", data=config))}).items():
        (folder / name).write_text(text, encoding="utf-8")
    return work


def _lists(config: CleanConfig) -> dict[str, str]:
    """What stands behind the lists and evaluation sets that cleaning reads."""
    return {name: _behind(name) for name in (config.blocked_urls, *config.evaluation_sets) if name}


def _behind(name: str) -> str:
    """The SHA-256 of a file, of other sources `sources.detail`."""
    path = Path(os.path.expanduser(name))
    if not path.is_file():
        return sources.detail(SourceConfig(source=name.partition("@")[0]))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sliced(parts: list[sources.Part], task_bytes: int) -> Iterator[list[sources.Part]]:
    """Consecutive parts of about `task_bytes` in all; one whose size nobody knows is alone."""
    held: list[sources.Part] = []
    total = 0
    for part in parts:
        n_bytes = part.size or task_bytes
        if held and total + n_bytes > task_bytes:
            yield held
            held, total = [], 0
        held.append(part)
        total += n_bytes
    if held:
        yield held


def _make(work: Work, executor: Executor, shard_tokens: int, say: Callable[[str], None]) -> Manifest:
    config, n_tasks = work.config, len(work.slices)

    def run(name: str, steps: list[Any], n: int) -> None:
        executor.run(name, steps, n, _Progress(name, n, say))

    run("clean", [Clean(work)], n_tasks)
    for kind in _copies_sought(config.clean):
        hashes = work.folder / kind
        run(f"copies of {kind}", [duplicates.FindCopies(hashes, work.found(kind), n_tasks)], duplicates.n_parts(hashes))
    groups = {kind: duplicates.group_sizes(work.found(kind)) for kind in _copies_sought(config.clean)}
    if config.clean.near_duplicates and n_tasks:
        near = work.folder / "near"
        for name, steps, n in duplicates.minhash_steps(config.clean, near, Kept(work)):
            run(f"near copies: {name}", steps, n or n_tasks)
        groups["near"] = duplicates.keep_first(near, n_tasks)
    cuts = [_cut(work, i) for i in range(len(config.sources))]
    (work.folder / "cuts.json").write_text(json.dumps(cuts), encoding="utf-8")
    made = _tokenizer(work)
    made.save(work.made / "tokenizer")
    run("tokens", [Tokenise(work)], n_tasks)

    token_bytes = 2 if made.vocab_size <= 1 << 16 else 4
    tokens, audits = [], {}
    for i, source in enumerate(config.sources):
        name = source.label if config.mixture else ""
        if source.source.startswith(BIN):
            splits = published.read_splits(source, made, work.made, f"{name}_" if name else "")
        else:
            splits = {split: _assemble(work, i, split, f"{name}_{split}" if name else split, token_bytes, shard_tokens) for split in SPLITS}
            audits[source.label] = _audit(work, i)
        detail = json.loads((work.folder / "details.json").read_text(encoding="utf-8"))[i]
        tokens.append(SourceTokens(name=name, detail=detail, split_by="file" if source.source.startswith(BIN) else _split_by(cuts[i]), splits=splits))
    audit = {"sources": audits, "groups": groups, "tokenizers": _compared(work, made)}
    manifest = Manifest(
        config=config.for_tokens,
        tokenizer=config.tokenizer,
        vocab_size=made.vocab_size,
        eot_id=made.eot_id,
        sources=tuple(tokens),
        audit=audit,
        lists=_lists(config.clean),
    )
    _check_any(manifest)
    write_manifest(manifest, work.made)
    return manifest


def _copies_sought(config: CleanConfig) -> list[str]:
    return {"keep": [], "documents": ["documents"], "paragraphs": ["documents", "paragraphs"]}[config.duplicates]


class _Progress:
    """Says how many parts of a stage are done and how long the rest may take, every ten seconds."""

    def __init__(self, name: str, n: int, say: Callable[[str], None]) -> None:
        self._name, self._n, self._say = name, n, say
        self._started = self._said = time.monotonic()
        self._before: int | None = None

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        self._before = done if self._before is None else self._before
        if now - self._said > 10 and done > self._before:
            left = (now - self._started) / (done - self._before) * (self._n - done)
            self._said = now
            self._say(f"prepare: {self._name}: {done} of {self._n} parts, {left:.0f} s left")


@dataclasses.dataclass(frozen=True)
class Clean:
    """A step: the documents of a task through the rules, as clean/{task}.jsonl, with their hashes."""

    work: Work

    def __call__(self, data: Any, task: int, n_tasks: int) -> None:
        config, audit = self.work.config, Audit()
        source = config.sources[self.work.slices[task].source]
        chain = [rule for rule in _rules(self.work) if source.filtered or rule.name not in FILTERS]
        count, digests = 0, bytearray()  # 16 bytes of each
        lines, places = bytearray(), array.array("I")
        with self.work.file("clean", f"{task}.jsonl").open("w", encoding="utf-8") as file:
            for document in _read(source, self.work.slices[task].parts, audit):
                document = _through(document, chain, audit)
                if document is None:
                    continue
                if config.clean.duplicates == "paragraphs" and not document.prompt:  # what answers two questions stays in both
                    for n, digest in duplicates.paragraphs(document.text, config.clean.min_paragraph):
                        lines += digest
                        places.extend((count, n))
                digest = digest_of(document)
                digests += digest[:16]
                count += 1
                file.write(json.dumps([*document[:-1], digest.hex()], ensure_ascii=False) + "\n")
        hashes = np.zeros(count, duplicates.DOCUMENT)
        hashes["high"], hashes["low"] = np.frombuffer(digests, "<u8").reshape(-1, 2).T
        np.save(self.work.file("documents", f"{task}.npy"), hashes)
        if config.clean.duplicates == "paragraphs":
            found = np.zeros(len(places) // 2, duplicates.PARAGRAPH)
            found["high"], found["low"] = np.frombuffer(lines, "<u8").reshape(-1, 2).T
            found["document"], found["line"] = np.array(places, np.uint32).reshape(-1, 2).T
            np.save(self.work.file("paragraphs", f"{task}.npy"), found)
        self.work.file("clean", f"{task}.json").write_text(json.dumps(audit.counts), encoding="utf-8")


_CHAINS: dict[tuple[Path, CleanConfig], list[Rule]] = {}


def _rules(work: Work) -> list[Rule]:
    """The rules, built once in a process: some read models and lists."""
    key = work.folder, work.config.clean
    if key not in _CHAINS:
        _CHAINS.clear()
        _CHAINS[key] = rules.rules(work.config.clean)
    return _CHAINS[key]


def _read(source: SourceConfig, parts: list[sources.Part], audit: Audit) -> Iterator[Document]:
    for part in parts:
        for found in _tried(sources.read(source, part)):
            if isinstance(found, Fault):
                audit.fault(found)
            else:
                audit.read(found)
                yield found


def _tried(found: Iterator[Document | Fault]) -> Iterator[Document | Fault]:
    """Of a source that could be read when the work began, what stops it now may pass: it is no bad input."""
    try:
        yield from found
    except InputError as e:
        raise RuntimeError(str(e)) from e


def _through(document: Document, chain: list[Rule], audit: Audit) -> Document | None:
    """The document as it leaves the rules; None where one dropped it."""
    for rule in chain:
        after = rule.apply(document)
        audit.rule(rule.name, document, after)
        if isinstance(after, Dropped):
            return None
        document = after
    return document


@dataclasses.dataclass(frozen=True)
class Kept:
    """A step: (place, document) of what is left of a task after exact copies are gone."""

    work: Work

    def __call__(self, data: Any, task: int, n_tasks: int) -> Iterator[tuple[int, Document]]:
        for place, (document, _) in enumerate(_without_copies(self.work, task, Audit())):
            yield place, document


def _without_copies(work: Work, task: int, audit: Audit) -> Iterator[tuple[Document, bytes]]:
    """The clean documents of a task, without exact copies of documents and paragraphs, and the hash of each as it was before that."""
    config = work.config.clean
    sought = _copies_sought(config)
    copies = set(duplicates.copies_of(work.found("documents"), task)["document"].tolist()) if sought else set()
    lines: dict[int, set[int]] = {}
    for row in duplicates.copies_of(work.found("paragraphs"), task) if "paragraphs" in sought else ():
        lines.setdefault(int(row["document"]), set()).add(int(row["line"]))
    with work.file("clean", f"{task}.jsonl").open(encoding="utf-8") as file:
        for place, line in enumerate(file):
            *fields, digest = json.loads(line)
            document = Document(*fields)
            after: Document | Dropped = document
            if place in copies:
                after = Dropped("a copy of an earlier document")
            elif place in lines:
                kept = [text for n, text in enumerate(document.text.split("\n")) if n not in lines[place]]
                after = document._replace(text="\n".join(kept)) if "".join(kept).strip() else Dropped("all of its paragraphs stood before")
            audit.rule("copies", document, after)
            if not isinstance(after, Dropped):
                yield after, bytes.fromhex(digest)


def _kept(work: Work, task: int, audit: Audit) -> Iterator[tuple[Document, bytes]]:
    """What becomes tokens of a task."""
    near = set(np.load(work.folder / "near" / f"{task}.npy").tolist()) if work.config.clean.near_duplicates else set()
    for place, (document, digest) in enumerate(_without_copies(work, task, audit)):
        if near:
            audit.rule("near copies", document, Dropped("nearly a copy of an earlier document") if place in near else document)
        if place not in near:
            audit.keep(document)
            yield document, digest


Cut = list[int] | None  # of a source that is split by position: [task, place of the document, characters of it that are trained on]


def _split_by(cut: Cut) -> str:
    return "hash" if cut is None else "position"


def _cut(work: Work, source: int) -> Cut:
    """Where the held-out part of a source of few documents begins; None where a document's split depends on its text alone."""
    lengths: list[tuple[int, int, int, bool]] = []
    for task in work.of(source):
        for place, (document, _) in enumerate(_kept(work, task, Audit())):
            lengths.append((task, place, len(document.text), bool(document.prompt)))
            if len(lengths) >= HASH_SPLIT_DOCUMENTS:
                return None
    left = int(sum(length for _, _, length, _ in lengths) * (1 - work.config.val_fraction))  # characters still to train on
    for task, place, length, whole in lengths:
        if left < length:
            return [task, place, length if whole else left]  # one with a prompt is not cut
        left -= length
    return [len(work.slices), 0, 0]


def _documents_of(work: Work, task: int, audit: Audit) -> Iterator[tuple[str, Document]]:
    """The documents of a task with the split of each; one across the cut of its source becomes one on each side."""
    config = work.config
    cut: Cut = json.loads((work.folder / "cuts.json").read_text(encoding="utf-8"))[work.slices[task].source]
    for place, (document, digest) in enumerate(_kept(work, task, audit)):
        if cut is None:
            # More documents never move one.
            draw = int.from_bytes(digest[:8], "big") / 2**64
            yield "val" if draw < config.val_fraction else "train", document
        elif (task, place) != (cut[0], cut[1]):
            yield "train" if (task, place) < (cut[0], cut[1]) else "val", document
        else:
            for split, text in (("train", document.text[: cut[2]]), ("val", document.text[cut[2] :])):
                if text:
                    yield split, document._replace(text=text)


def _texts(work: Work, *splits: str) -> Iterator[str]:
    """The texts of these splits of all sources."""
    for task in range(len(work.slices)):
        for split, document in _documents_of(work, task, Audit()):
            if split in splits:
                yield from (text for text in (document.prompt, document.text) if text)


def _tokenizer(work: Work) -> tokenizer.Tokenizer:
    """The one that the configuration asks for; one that learns does so from a sample of the training text, if that is longer."""
    config = work.config

    def sample() -> Iterator[str]:
        total = sum(work.file("clean", f"{task}.jsonl").stat().st_size for task in range(len(work.slices)))
        share = config.bpe_sample_mb * 1_000_000 / max(total, 1)
        pieces = (text[i : i + _SAMPLED] for text in _texts(work, "train") for i in range(0, len(text), _SAMPLED))
        for n, piece in enumerate(pieces):
            if n == 0 or share >= 1 or int.from_bytes(hashlib.sha256(piece.encode()).digest()[8:16], "big") / 2**64 < share:
                yield piece

    return tokenizer.make(config.tokenizer, sample(), _texts(work, *SPLITS), config)


@dataclasses.dataclass(frozen=True)
class Tokenise:
    """A step: the clean documents of a task as ids, tokens/{task}.{split}.ids, with their lengths and which of them are learned."""

    work: Work

    def __call__(self, data: Any, task: int, n_tasks: int) -> None:
        made, audit = tokenizer.Tokenizer.load(self.work.made / "tokenizer"), Audit()
        local = self.work.config.executor == "local" and not multiprocessing.parent_process()
        threads = 0 if local else 1  # a worker has one core
        dtype, prompts = "<u2" if made.vocab_size <= 1 << 16 else "<u4", self.work.prompts
        counts = {split: dict.fromkeys(("bytes", "characters", "prompt_tokens"), 0) for split in SPLITS}
        lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
        with contextlib.ExitStack() as stack:
            ids, learned = (
                {split: stack.enter_context(self.work.file("tokens", f"{task}.{split}.{kind}").open("wb")) for split in SPLITS}
                for kind in ("ids", "learned")
            )
            for group in _groups(_documents_of(self.work, task, audit)):
                encoded = iter(made.encode_batch([text for _, document in group for text in (document.prompt, document.text)], threads=threads))
                for split, document in group:
                    prompt, text = next(encoded), next(encoded)
                    counts[split]["bytes"] += size(document.text)
                    counts[split]["characters"] += len(document.text)
                    counts[split]["prompt_tokens"] += len(prompt)
                    lengths[split].append(1 + len(prompt) + len(text))
                    ids[split].write(np.concatenate([[made.eot_id], prompt, text]).astype(dtype).tobytes())
                    if prompts:
                        learned[split].write(b"\1" + bytes(len(prompt)) + b"\1" * len(text))
        for split in SPLITS:
            np.save(self.work.file("tokens", f"{task}.{split}.lengths.npy"), np.array(lengths[split], np.int64))
        self.work.file("tokens", f"{task}.json").write_text(json.dumps({"audit": audit.counts, "splits": counts}), encoding="utf-8")


def _groups(documents: Iterable[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    """Consecutive documents of about `_ENCODE_CHARACTERS` in all."""
    group: list[tuple[str, Document]] = []
    size = 0
    for split, document in documents:
        group.append((split, document))
        size += len(document.prompt) + len(document.text)
        if size >= _ENCODE_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _assemble(work: Work, source: int, split: str, name: str, token_bytes: int, shard_tokens: int) -> Split:
    """The ids of a source's tasks, one after the other, as shards in the folder beside the work."""
    folder, tasks = work.made, work.of(source)

    def flow(kind: str, dtype: str) -> Iterator[Integer[np.ndarray, "_"]]:
        for task in tasks:
            with work.file("tokens", f"{task}.{split}.{kind}").open("rb") as file:
                while len(part := np.fromfile(file, dtype, _COPY_TOKENS)):
                    yield part

    counts = [json.loads(work.file("tokens", f"{task}.json").read_text(encoding="utf-8"))["splits"][split] for task in tasks]
    n_tokens, n_documents, digest = 0, 0, hashlib.sha256()
    with (folder / f"{name}.starts").open("wb") as file:
        for task in tasks:
            ends = n_tokens + np.cumsum(np.load(work.file("tokens", f"{task}.{split}.lengths.npy")))
            raw = np.concatenate([[n_tokens], ends])[: len(ends)].astype("<u8").tobytes()
            file.write(raw)
            digest.update(raw)
            n_tokens, n_documents = int(ends[-1]) if len(ends) else n_tokens, n_documents + len(ends)
    write = functools.partial(write_shards, folder=folder, name=name, token_bytes=token_bytes, limit=shard_tokens)
    shards = write(flow("ids", f"<u{token_bytes}"), n_tokens)
    if work.config.sources[source].prompt_field:
        masks = write(flow("learned", "u1"), n_tokens, ending=".mask")
        shards = [dataclasses.replace(shard, mask_sha256=mask.sha256) for shard, mask in zip(shards, masks, strict=True)]
    return Split(
        tokens=n_tokens,
        documents=n_documents,
        **{name: sum(count[name] for count in counts) for name in ("bytes", "characters", "prompt_tokens")},
        shards=tuple(shards),
        starts=f"{name}.starts",
        starts_sha256=digest.hexdigest(),
    )


def _audit(work: Work, source: int) -> dict[str, Any]:
    """The counts of all tasks of a source, and what there was beside its parts."""
    whole = Audit()
    for found in sources.passed_over(work.config.sources[source]):
        whole.fault(found)
    total = whole.counts
    for task in work.of(source):
        total = merged(total, json.loads(work.file("clean", f"{task}.json").read_text(encoding="utf-8")))
        total = merged(total, json.loads(work.file("tokens", f"{task}.json").read_text(encoding="utf-8"))["audit"])
    return total


def _compared(work: Work, made: tokenizer.Tokenizer) -> dict[str, Any]:
    """What a text of the source costs in tokens, of the tokenizer and of GPT-2's; of held-out text, where there is some."""
    for split in ("val", "train"):
        texts = list(_first(_texts(work, split), _SAMPLE_BYTES))
        if texts:
            own = {work.config.tokenizer: tokenizer.efficiency(made, texts)}
            return {"text": split, **({"gpt2": tokenizer.efficiency(tokenizer.gpt2(), texts)} | own)}
    return {}


def _first(texts: Iterable[str], n_bytes: int) -> Iterator[str]:
    """The first of them, up to so many bytes in all."""
    total = 0
    for text in texts:
        total += size(text)
        yield text
        if total >= n_bytes:
            return


def _check_any(manifest: Manifest) -> None:
    """Raises InputError where a source has no text to train on."""
    for stated, made in zip(manifest.config.sources, manifest.sources, strict=True):
        if made.splits["train"].tokens:
            continue
        if made.splits["val"].tokens and stated.label in manifest.audit["sources"]:
            raise InputError("data.val_fraction", manifest.config.val_fraction, "leaves no text to train on", "Hold out less, or give more text")
        if stated.label not in manifest.audit["sources"]:
            raise InputError("data.source", stated.source, "has no tokens to train on", "Name shards that hold some")
        counts = manifest.audit["sources"][stated.label]
        lost = dict(counts["faults"])
        lost |= {f"{rule}: {reason}": entry for rule, entries in counts["rules"].items() for reason, entry in entries["dropped"].items()}
        why = ", ".join(f"{entry['documents']} x {reason}" for reason, entry in lost.items())
        first = next((str(entry["examples"][0]) for entry in counts["faults"].values()), "")
        reason = f"no text: {counts['read']['documents']} documents, {counts['read']['bytes']} bytes, nothing left after cleaning"
        reason += f" ({why}{f'; the first: {first}' if first else ''})" if why else ""
        raise InputError("data.source", stated.source, reason, "Name a source that holds text")
