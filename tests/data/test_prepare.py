import dataclasses
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlm_jax.config import CleanConfig, DataConfig, InputError, MixedSourceConfig
from mlm_jax.data import duplicates, prepare, shards, tokenizer, tokens
from mlm_jax.data.tokenizer import Tokenizer


def llm_c_reader(path: Path, magic: int = 20240520, version: int = 1, dtype: str = "<u2") -> list[int]:
    """As llm.c reads a shard: 256 int32, then the tokens to the end of the file."""
    header = np.fromfile(path, "<i4", count=256)
    assert header[:2].tolist() == [magic, version]
    body = np.fromfile(path, dtype, offset=1024)
    assert header[2] == len(body)
    return body.tolist()


def text_file(folder: Path, text: str, name: str = "text.txt") -> DataConfig:
    (folder / name).write_text(text)
    return DataConfig(source=str(folder / name), tokenizer="byte")


def many(folder: Path, n: int, **fields) -> DataConfig:
    lines = [json.dumps({"text": f"Document {i} says é{i * i}."}) for i in range(n)]
    (folder / f"{n}.jsonl").write_text("\n".join(lines))
    return DataConfig(source=str(folder / f"{n}.jsonl"), **{"tokenizer": "byte", "val_fraction": 0.2, **fields})


def prepared_documents(folder: Path, split: str) -> set[str]:
    """The documents of a split of byte tokens, read back from the shards without our reader."""
    stream = [t for file in sorted(folder.glob(f"{split}_*.bin")) for t in llm_c_reader(file)]
    assert not stream or stream[0] == 256
    documents: list[bytearray] = []
    for token in stream:
        if token == 256:
            documents.append(bytearray())
        else:
            documents[-1].append(token)
    return {document.decode() for document in documents}


def test_a_text_file_is_split_by_position_and_every_part_begins_with_end_of_text(tmp_path):
    text = "".join(chr(ord("a") + i % 26) for i in range(1003))
    config = text_file(tmp_path, text)
    manifest = prepare.prepare(config, tmp_path / "out")
    assert llm_c_reader(tmp_path / "out" / "train_000000.bin") == [256, *text[:902].encode()]
    assert llm_c_reader(tmp_path / "out" / "val_000000.bin") == [256, *text[902:].encode()]
    assert manifest.sources[0].split_by == "position"
    assert dataclasses.astuple(manifest.splits["val"])[:4] == (102, 101, 101, 1)


def test_a_document_across_the_cut_is_cut_in_two(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "aaaa"}\n{"text": "bbéé"}\n{"text": "cc"}\n')
    manifest = prepare.prepare(DataConfig(source=str(tmp_path / "a.jsonl"), tokenizer="byte", val_fraction=0.3), tmp_path / "out")
    assert prepared_documents(tmp_path / "out", "train") == {"aaaa", "bbé"}
    assert prepared_documents(tmp_path / "out", "val") == {"é", "cc"}
    assert dataclasses.astuple(manifest.splits["train"])[:4] == (2 + 8, 8, 7, 2)


def test_the_shakespeare_split_is_that_of_nanogpt(tmp_path):
    """nanoGPT, data/shakespeare_char/readme.md: 1,003,854 tokens to train on and 111,540 held out, of 1,115,394 characters."""
    manifest = prepare.prepare(text_file(tmp_path, "x" * 1_115_394), tmp_path / "out")
    assert [manifest.splits[name].characters for name in ("train", "val")] == [1_003_854, 111_540]


def test_from_a_hundred_documents_on_the_split_goes_by_hash(tmp_path):
    config = many(tmp_path, 200)
    manifest = prepare.prepare(config, tmp_path / "out")
    expected = {f"Document {i} says é{i * i}." for i in range(200)}
    val = {text for text in expected if int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < 0.2}
    assert 20 < len(val) < 60
    assert prepared_documents(tmp_path / "out", "val") == val
    assert prepared_documents(tmp_path / "out", "train") == expected - val
    assert manifest.sources[0].split_by == "hash"
    assert prepare.prepare(many(tmp_path, 100), tmp_path / "100").sources[0].split_by == "hash"
    assert prepare.prepare(many(tmp_path, 99), tmp_path / "99").sources[0].split_by == "position"


def test_more_documents_never_move_one_to_the_other_split(tmp_path):
    prepare.prepare(many(tmp_path, 150), tmp_path / "few")
    prepare.prepare(many(tmp_path, 300), tmp_path / "more")
    for split in ("train", "val"):
        assert prepared_documents(tmp_path / "few", split) < prepared_documents(tmp_path / "more", split)


def test_no_document_is_in_both_splits(tmp_path):
    lines = [json.dumps({"text": f"Document {i % 120}\r\n" if i % 2 else f"Document {i % 120}\n"}) for i in range(600)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    manifest = prepare.prepare(DataConfig(source=str(tmp_path / "a.jsonl"), tokenizer="byte", val_fraction=0.5), tmp_path / "out")
    train, val = (prepared_documents(tmp_path / "out", split) for split in ("train", "val"))
    assert not train & val
    assert len(train | val) == 120 == manifest.audit["sources"]["a"]["kept"]["documents"]


def test_shards_are_filled_to_their_size_and_read_as_one_circle(tmp_path):
    config = text_file(tmp_path, "".join(map(chr, range(33, 127))) * 3)
    manifest = prepare.prepare(config, tmp_path / "out", shard_tokens=100)
    train = manifest.splits["train"]
    assert [shard.tokens for shard in train.shards] == [100, 100, train.tokens - 200]
    assert [shard.file for shard in train.shards] == ["train_000000.bin", "train_000001.bin", "train_000002.bin"]
    stream = [t for shard in train.shards for t in llm_c_reader(tmp_path / "out" / shard.file)]
    opened = tokens.open_tokens(tmp_path / "out", "train")
    assert len(opened) == len(stream) == train.tokens
    for start in (0, 1, 99, 100, 101, 199, 250, len(stream) - 1, len(stream), 10 * len(stream) + 7):
        for length in (0, 1, 2, 60, 101, 230, 3 * len(stream) + 5):
            assert opened.read(start, length).tolist() == [stream[(start + i) % len(stream)] for i in range(length)]


def test_the_last_shard_is_never_empty(tmp_path):
    config = dataclasses.replace(text_file(tmp_path, "x" * 199), val_fraction=0.0)
    manifest = prepare.prepare(config, tmp_path / "out", shard_tokens=100)
    assert [shard.tokens for shard in manifest.splits["train"].shards] == [100, 100]


def test_more_than_65536_ids_are_written_as_uint32_under_the_other_header(tmp_path):
    alphabet = "".join(chr(i) for i in range(0xF0000, 0xF0000 + 66_000))
    config = dataclasses.replace(text_file(tmp_path, alphabet), tokenizer="char", val_fraction=0.0)
    manifest = prepare.prepare(config, tmp_path / "out")
    assert (manifest.vocab_size, manifest.token_bytes) == (66_001, 4)
    assert llm_c_reader(tmp_path / "out" / "train_000000.bin", 20240801, 7, "<u4") == [66_000, *range(66_000)]
    opened = tokens.open_tokens(tmp_path / "out", "train")
    assert opened.read(65_999, 3).tolist() == [65_998, 65_999, 66_000]


def test_65536_ids_still_fit_two_bytes(tmp_path):
    config = dataclasses.replace(text_file(tmp_path, "".join(chr(i) for i in range(0xF0000, 0xF0000 + 65_535))), tokenizer="char", val_fraction=0.0)
    manifest = prepare.prepare(config, tmp_path / "out")
    assert (manifest.vocab_size, manifest.token_bytes) == (65_536, 2)
    assert llm_c_reader(tmp_path / "out" / "train_000000.bin") == [65_535, *range(65_535)]


def test_the_tokenizer_lies_beside_the_tokens(tmp_path):
    config = dataclasses.replace(text_file(tmp_path, "Some text to learn from. " * 30), tokenizer="bpe", bpe_vocab_size=270)
    manifest = prepare.prepare(config, tmp_path / "out")
    made = Tokenizer.load(tmp_path / "out" / "tokenizer")
    assert (made.vocab_size, made.eot_id) == (manifest.vocab_size, manifest.eot_id) == (270, 269)
    train = tokens.open_tokens(tmp_path / "out", "train")
    assert made.decode(train.read(0, len(train))) == "<|endoftext|>" + ("Some text to learn from. " * 30)[:675]


def test_bpe_learns_nothing_from_the_validation_text(tmp_path):
    config = dataclasses.replace(text_file(tmp_path, "abcabc " * 90 + "zqzqzq " * 10), tokenizer="bpe", bpe_vocab_size=400)
    prepare.prepare(config, tmp_path / "out")
    assert "zq" not in (tmp_path / "out" / "tokenizer" / "merges.txt").read_text().replace(" ", "")


def test_preparing_twice_in_two_places_gives_the_same_files(tmp_path):
    config = many(tmp_path, 120, tokenizer="bpe", bpe_vocab_size=300)
    for name in ("a", "b"):
        prepare.prepare(dataclasses.replace(config, tokens=f"folder {name}"), tmp_path / name)
    files = sorted(file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*") if file.is_file())
    assert len(files) == 9
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_the_manifest_is_read_back_as_it_was_written(tmp_path):
    manifest = prepare.prepare(many(tmp_path, 120), tmp_path / "out", shard_tokens=1000)
    assert shards.read_manifest(tmp_path / "out") == manifest
    assert len(manifest.splits["train"].shards) > 1
    assert manifest.sources[0].detail == f"1 file, {(tmp_path / '120.jsonl').stat().st_size} bytes"


def test_tokens_that_are_there_are_used_again(tmp_path):
    config = text_file(tmp_path, "Some text. " * 50)
    manifest = prepare.prepare(config, tmp_path / "out")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    assert prepare.prepare(dataclasses.replace(config, tokens="elsewhere", bpe_vocab_size=999), tmp_path / "out") == manifest
    (tmp_path / "text.txt").unlink()  # the tokens outlive their source
    assert prepare.prepare(config, tmp_path / "out") == manifest
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == before


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    prepare.prepare(text_file(tmp_path, "Some text. " * 50), tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_the_folder_appears_under_its_name_only_when_whole(tmp_path, monkeypatch):
    config = text_file(tmp_path, "Some text. " * 50)
    write_shards, seen = prepare.write_shards, []

    def watched(*args, **kwargs):
        seen.append((tmp_path / "out").exists())
        return write_shards(*args, **kwargs)

    monkeypatch.setattr(prepare, "write_shards", watched)
    prepare.prepare(config, tmp_path / "out")
    assert seen == [False, False]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "text.txt"]


def test_of_two_that_prepare_at_once_the_second_is_told_by_whom_the_folder_is_in_use(tmp_path, monkeypatch):
    config = text_file(tmp_path, "Some text. " * 50)
    write_shards, messages = prepare.write_shards, []

    def meanwhile(*args, **kwargs):
        messages.append(error(prepare.prepare, config, tmp_path / "out"))
        return write_shards(*args, **kwargs)

    monkeypatch.setattr(prepare, "write_shards", meanwhile)
    prepare.prepare(config, tmp_path / "out")
    assert f"data.tokens = {tmp_path / '.out.partial'}: in use by process {os.getpid()}" in messages[0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "text.txt"]


def test_any_number_of_workers_writes_the_same_files(tmp_path):
    config = dataclasses.replace(several(tmp_path), tokenizer="bpe", bpe_vocab_size=300, clean=CleanConfig(duplicates="paragraphs"))
    for workers in (1, 2, 4):
        prepare.prepare(dataclasses.replace(config, workers=workers), tmp_path / str(workers), shard_tokens=700, task_bytes=2000)
    files = sorted(file.relative_to(tmp_path / "1") for file in (tmp_path / "1").rglob("*") if file.is_file())
    assert len([file for file in files if file.suffix == ".bin"]) > 3
    for workers in ("2", "4"):
        assert all((tmp_path / "1" / file).read_bytes() == (tmp_path / workers / file).read_bytes() for file in files)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # Ray's own processes, which are another program at once
def test_ray_writes_the_files_that_processes_of_this_machine_write(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    config = dataclasses.replace(several(tmp_path), workers=2, clean=CleanConfig(duplicates="paragraphs", near_duplicates=True))
    for name in ("local", "ray"):
        prepare.prepare(dataclasses.replace(config, executor=name), tmp_path / name, shard_tokens=700, task_bytes=2000)
    files = sorted(file.relative_to(tmp_path / "local") for file in (tmp_path / "local").rglob("*") if file.is_file())
    assert len(files) == 9
    assert all((tmp_path / "local" / file).read_bytes() == (tmp_path / "ray" / file).read_bytes() for file in files)


def several(folder: Path) -> DataConfig:
    """A folder of six files with 40 documents each, some of them copies of those of the file before."""
    (folder / "texts").mkdir()
    for n in range(6):
        lines = [
            f"Document {i} says é{i * i}.\nIt stands in a file of many, and says no more than that.\nSo {i}." for i in range(n * 30, n * 30 + 40)
        ]
        (folder / "texts" / f"{n}.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return DataConfig(source=str(folder / "texts"), tokenizer="byte", val_fraction=0.2)


def test_a_prepare_that_was_killed_goes_on_and_does_nothing_twice(tmp_path):
    config = several(tmp_path)
    prepare.prepare(config, tmp_path / "whole", task_bytes=2000)
    code = f"""
import os, signal
from pathlib import Path
from mlm_jax.config import DataConfig
from mlm_jax.data import prepare
tokenise = prepare.Tokenise.__call__
def die(self, data, task, n_tasks):
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    tokenise(self, data, task, n_tasks)
prepare.Tokenise.__call__ = die
config = DataConfig(source={config.source!r}, tokenizer="byte", val_fraction=0.2, workers=1)
prepare.prepare(config, Path({str(tmp_path / "killed")!r}), task_bytes=2000)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    work = tmp_path / ".killed.partial" / "work"
    before = {path: path.stat().st_mtime_ns for name in ("clean", "documents", "tokens") for path in (work / name).glob("[0-2].*")}
    assert len(before) == 3 * (2 + 1 + 7)
    seen = {}

    def watched(work, *args, **kwargs):
        seen.update({path: path.stat().st_mtime_ns for path in before})
        return assemble(work, *args, **kwargs)

    assemble, prepare._assemble = prepare._assemble, watched
    try:
        manifest = prepare.prepare(config, tmp_path / "killed", task_bytes=2000)
    finally:
        prepare._assemble = assemble
    assert seen == before
    assert manifest == shards.read_manifest(tmp_path / "whole")
    assert all((tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in manifest.files)
    assert not (tmp_path / ".killed.partial").exists()


def test_a_source_that_changed_since_the_kill_is_begun_anew(tmp_path, monkeypatch):
    config = several(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_assemble", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare.prepare(config, tmp_path / "out", task_bytes=2000)
    with (tmp_path / "texts" / "0.jsonl").open("a") as file:
        file.write('\n{"text": "One more document."}')
    prepare.prepare(config, tmp_path / "out", task_bytes=2000)
    assert "One more document." in prepared_documents(tmp_path / "out", "train") | prepared_documents(tmp_path / "out", "val")


def test_exact_copies_go_over_the_whole_corpus_and_the_first_stays(tmp_path):
    config = several(tmp_path)
    manifest = prepare.prepare(config, tmp_path / "out", task_bytes=2000)
    counts = manifest.audit["sources"]["texts"]
    assert counts["read"]["documents"] == 240
    assert counts["kept"]["documents"] == 190 == sum(split.documents for split in manifest.splits.values())
    lost = counts["rules"]["copies"]["dropped"]["a copy of an earlier document"]
    assert lost["documents"] == 50
    assert lost["examples"][0]["where"].endswith("1.jsonl:1")  # of documents 30 to 39, which stand in 0.jsonl first
    assert manifest.audit["groups"]["documents"] == {"2": 50}


def test_paragraphs_that_stood_before_go_and_short_ones_stay(tmp_path):
    long = "This line is long enough to be a paragraph of its own."
    texts = [f"One.\n{long}\nShort.", f"Two.\nShort.\n  {long} ", long, "Four."]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = DataConfig(source=str(tmp_path / "a.jsonl"), tokenizer="byte", val_fraction=0.0, clean=CleanConfig(duplicates="paragraphs"))
    manifest = prepare.prepare(config, tmp_path / "out")
    assert prepared_documents(tmp_path / "out", "train") == {f"One.\n{long}\nShort.", "Two.\nShort.", "Four."}
    rule = manifest.audit["sources"]["a"]["rules"]["copies"]
    assert rule["changed"] == {"documents": 1, "bytes": len(long) + 4}
    assert rule["dropped"]["all of its paragraphs stood before"]["documents"] == 1


def test_copies_are_the_same_in_one_part_of_hashes_and_in_many(tmp_path, monkeypatch):
    config = dataclasses.replace(several(tmp_path), clean=CleanConfig(duplicates="paragraphs", min_paragraph=5))
    prepare.prepare(config, tmp_path / "one", task_bytes=2000)
    monkeypatch.setattr(duplicates, "PART_BYTES", 500)
    manifest = prepare.prepare(config, tmp_path / "many", task_bytes=2000)
    assert manifest == shards.read_manifest(tmp_path / "one")
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes() for name in manifest.files)


def test_bytes_read_are_those_kept_dropped_and_lost_by_changes(tmp_path):
    texts = ["a\r\nb", "", "e\u0301 and more words\x07", "a\nb", "\x00\x01", "naïve 🙂", "\u0958"]  # NFC makes the last one longer
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    manifest = prepare.prepare(DataConfig(source=str(tmp_path / "a.jsonl"), tokenizer="byte", val_fraction=0.0), tmp_path / "out")
    counts = manifest.audit["sources"]["a"]
    changed = sum(rule["changed"]["bytes"] for rule in counts["rules"].values())
    dropped = [lost for rule in counts["rules"].values() for lost in rule["dropped"].values()]
    assert counts["read"] == {"documents": 7, "bytes": sum(len(text.encode()) for text in texts)}
    assert counts["kept"] == {"documents": 4, "bytes": manifest.splits["train"].bytes}
    assert counts["read"]["bytes"] == counts["kept"]["bytes"] + changed + sum(lost["bytes"] for lost in dropped)
    assert counts["read"]["documents"] == counts["kept"]["documents"] + sum(lost["documents"] for lost in dropped)


def test_each_source_of_a_mixture_has_shards_and_an_audit_of_its_own_and_copies_are_found_across_them(tmp_path):
    for name, numbers in (("a", range(120)), ("b", range(100, 130))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"Document {i} says é{i * i}."}) for i in numbers))
    sources = (
        MixedSourceConfig(source=str(tmp_path / "a.jsonl"), weight=2),
        MixedSourceConfig(source=str(tmp_path / "b.jsonl"), name="second", weight=1),
    )
    config = DataConfig(mixture=sources, tokenizer="byte", val_fraction=0.2)
    manifest = prepare.prepare(config, tmp_path / "out")
    assert [source.name for source in manifest.sources] == ["a", "second"]
    assert [source.split_by for source in manifest.sources] == ["hash", "position"]
    assert manifest.sources[1].splits["train"].shards[0].file == "second_train_000000.bin"
    assert [manifest.audit["sources"][name]["kept"]["documents"] for name in ("a", "second")] == [120, 10]
    assert prepared_documents(tmp_path / "out", "second_train") | prepared_documents(tmp_path / "out", "second_val") >= {"Document 121 says é14641."}
    assert manifest.splits["train"].tokens == sum(source.splits["train"].tokens for source in manifest.sources)
    heavier = dataclasses.replace(config, mixture=(dataclasses.replace(sources[0], weight=9, epochs=2), sources[1]))
    assert prepare.prepare(heavier, tmp_path / "out") == manifest  # how they are mixed is no matter of the shards


def test_where_documents_start_is_written_down(tmp_path):
    prepare.prepare(many(tmp_path, 130), tmp_path / "out", shard_tokens=500)
    for split in ("train", "val"):
        stream = [t for file in sorted((tmp_path / "out").glob(f"{split}_*.bin")) for t in llm_c_reader(file)]
        assert np.fromfile(tmp_path / "out" / f"{split}.starts", "<u8").tolist() == [i for i, token in enumerate(stream) if token == 256]


def test_shards_that_others_made_are_read_where_they_are(tmp_path):
    made = tokenizer.gpt2()
    documents = {"train": ["Ein Satz — naïve 🙂.", "Two."], "val": ["Three é."]}
    streams = {name: np.concatenate([[made.eot_id, *made.encode(text)] for text in texts]).astype("<u2") for name, texts in documents.items()}
    (tmp_path / "nanogpt").mkdir()
    (tmp_path / "llm_c").mkdir()
    for name, stream in streams.items():
        (tmp_path / "nanogpt" / f"{name}.bin").write_bytes(stream.tobytes())
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(stream)
        (tmp_path / "llm_c" / f"fineweb_{name}_000001.bin").write_bytes(header.tobytes() + stream.tobytes())
    for kind in ("nanogpt", "llm_c"):
        manifest = prepare.prepare(DataConfig(source=f"bin:{tmp_path / kind}"), tmp_path / f"out {kind}")
        assert shards.read_manifest(tmp_path / f"out {kind}") == manifest
        for name, texts in documents.items():
            opened, split = tokens.open_tokens(tmp_path / f"out {kind}", name), manifest.splits[name]
            assert opened.read(0, len(opened)).tolist() == streams[name].tolist()
            assert (split.documents, split.characters) == (len(texts), sum(map(len, texts)))
            assert split.bytes == sum(len(text.encode()) for text in texts)
            starts = np.fromfile(tmp_path / f"out {kind}" / f"{name}.starts", "<u8").tolist()
            assert starts == np.flatnonzero(streams[name] == made.eot_id).tolist()
        assert not list((tmp_path / f"out {kind}").glob("*.bin"))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "no .bin file in it"),
        ({"train.bin": b"\0\0"}, 'no file with "val" in its name'),
        ({"val.bin": b"\0\0"}, 'no file without "val" in its name'),
        ({"train.bin": b"\0\0\0", "val.bin": b"\0\0"}, "3 bytes are no whole number of tokens of 2 bytes"),
        ({"train.bin": b"\xff\xff", "val.bin": b"\0\0"}, "holds token 65535, and the tokenizer has 50257"),
        ({"train.bin": np.array([20240801, 7, 1, 0], "<i4").tobytes(), "val.bin": b"\0\0"}, "holds ids of 4 bytes"),
        ({"train.bin": np.array([20240520, 1, 9, 0], "<i4").tobytes(), "val.bin": b"\0\0"}, "cut short: 16 bytes"),
    ],
)
def test_shards_that_cannot_be_used_are_named(tmp_path, files, expected):
    (tmp_path / "shards").mkdir()
    for name, raw in files.items():
        (tmp_path / "shards" / name).write_bytes(raw)
    assert expected in error(prepare.prepare, DataConfig(source=f"bin:{tmp_path / 'shards'}"), tmp_path / "out")


def test_files_that_are_not_read_are_counted_and_named_in_the_audit(tmp_path):
    config = several(tmp_path)
    (tmp_path / "texts" / "table.csv").write_text("a,b\n")
    (tmp_path / "texts" / "link.txt").symlink_to(tmp_path / "texts" / "0.jsonl")
    faults = prepare.prepare(config, tmp_path / "out").audit["sources"]["texts"]["faults"]
    assert faults == {
        "a link": {"documents": 1, "bytes": 0, "examples": [str(tmp_path / "texts" / "link.txt")]},
        "an ending that is not read": {"documents": 1, "bytes": 4, "examples": [str(tmp_path / "texts" / "table.csv")]},
    }


def test_other_rules_in_the_same_process_are_those_of_their_own_configuration(tmp_path):
    (tmp_path / "a.txt").write_text("Write to someone@example-mail.com today. " * 20)
    config = DataConfig(source=str(tmp_path / "a.txt"), tokenizer="byte", val_fraction=0.0)
    for pii, kept in (("keep", True), ("mask", False)):
        prepare.prepare(dataclasses.replace(config, clean=CleanConfig(pii=pii)), tmp_path / "out")
        assert ("someone@example-mail.com" in next(iter(prepared_documents(tmp_path / "out", "train")))) == kept
        shutil.rmtree(tmp_path / "out")


def test_parts_of_unknown_size_are_tasks_of_their_own():
    parts = [prepare.sources.Part("tfds:x", i, i + 1) for i in range(3)] + [prepare.sources.Part("a", size=4), prepare.sources.Part("b", size=6)]
    assert [len(held) for held in prepare._sliced(parts, 10)] == [1, 1, 1, 2]


def test_a_list_that_cleaning_reads_and_that_has_changed_is_noticed(tmp_path):
    (tmp_path / "blocked.txt").write_text("example.com\n")
    config = dataclasses.replace(text_file(tmp_path, "Some text. " * 50), clean=CleanConfig(blocked_urls=str(tmp_path / "blocked.txt")))
    prepare.prepare(config, tmp_path / "out")
    (tmp_path / "blocked.txt").write_text("example.org\n")
    assert f"{tmp_path / 'blocked.txt'}, which cleaning reads, has changed since" in error(prepare.prepare, config, tmp_path / "out")
    (tmp_path / "blocked.txt").unlink()
    prepare.prepare(config, tmp_path / "out")  # as tokens outlive their source


def test_a_document_with_a_prompt_is_not_cut(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"q": f"Q{i}?", "text": str(i) * 100}) for i in range(3)))
    config = DataConfig(source=str(tmp_path / "a.jsonl"), prompt_field="q", tokenizer="byte", val_fraction=0.5)
    manifest = prepare.prepare(config, tmp_path / "out")
    assert prepared_documents(tmp_path / "out", "train") == {"Q0?" + "0" * 100, "Q1?" + "1" * 100}
    assert prepared_documents(tmp_path / "out", "val") == {"Q2?" + "2" * 100}
    val = manifest.splits["val"]
    assert (val.tokens, val.bytes, val.characters, val.prompt_tokens) == (104, 100, 100, 3)
    assert list((tmp_path / "out" / "val_000000.mask").read_bytes()) == [1, 0, 0, 0, *[1] * 100]


def test_a_folder_that_is_a_link_is_filled_where_it_leads(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk", target_is_directory=True)
    prepare.prepare(text_file(tmp_path, "Some text. " * 50), tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "manifest.json").is_file()


def error(call, *args) -> str:
    with pytest.raises(InputError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tokens_of_another_configuration_stay_and_the_differing_fields_are_named(tmp_path):
    config = text_file(tmp_path, "Some text. " * 50)
    prepare.prepare(config, tmp_path / "out")
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    message = error(prepare.prepare, dataclasses.replace(config, tokenizer="char", val_fraction=0.25), tmp_path / "out")
    assert "data.tokenizer 'byte' there, 'char' asked" in message
    assert "data.val_fraction 0.1 there, 0.25 asked" in message
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == before


def test_a_changed_source_is_noticed(tmp_path):
    config = text_file(tmp_path, "Some text. " * 50)
    prepare.prepare(config, tmp_path / "out")
    text_file(tmp_path, "Some more text. " * 50)
    assert "has changed since: 1 file, 550 bytes then, 1 file, 800 bytes now" in error(prepare.prepare, config, tmp_path / "out")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    config = text_file(tmp_path, "Some text. " * 50)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    assert "there is no manifest.json" in error(prepare.prepare, config, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["", " \n\n ", "\x07\x01"])
def test_empty_text_is_refused(tmp_path, text):
    assert "data.source" in (message := error(prepare.prepare, text_file(tmp_path, text), tmp_path / "out"))
    assert "nothing left after cleaning" in message
    assert not (tmp_path / "out").exists()


def test_text_that_is_all_held_out_is_refused(tmp_path):
    config = dataclasses.replace(text_file(tmp_path, "short"), val_fraction=0.99)
    assert "data.val_fraction = 0.99: leaves no text to train on" in error(prepare.prepare, config, tmp_path / "out")


def test_a_damaged_source_leaves_no_folder(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text" * 99)[:-4])
    error(prepare.prepare, DataConfig(source=str(tmp_path / "a.txt.gz")), tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt.gz"]


def test_a_split_without_tokens_is_named(tmp_path):
    config = dataclasses.replace(text_file(tmp_path, "Some text. " * 50), val_fraction=0.0)
    prepare.prepare(config, tmp_path / "out")
    assert "data.val_fraction = 0.0" in (message := error(tokens.open_tokens, tmp_path / "out", "val"))
    assert "has no val tokens" in message


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda raw: raw[:-3], "cut short: 2013 bytes, 2016 expected (496 tokens)"),
        (lambda raw: raw[:500], "cut short: 500 bytes, 2016 expected"),
        (lambda raw: b"", "cut short: 0 bytes"),
        (lambda raw: raw + b"\0\0", "too long: 2018 bytes, 2016 expected"),
        (lambda raw: b"\x89PNG" + raw[4:], "not a token shard of this kind: it starts with 1196314761 1, 20240520 1 expected"),
        (lambda raw: raw[:4] + b"\x02" + raw[5:], "it starts with 20240520 2, 20240520 1 expected"),
        (lambda raw: raw[:8] + b"\x01" + raw[9:], "its header says 257 tokens, manifest.json 496"),
        (None, "the shard is missing, manifest.json names it with 2016 bytes"),
    ],
)
def test_a_damaged_shard_is_named_with_its_sizes(tmp_path, damage, expected):
    config = text_file(tmp_path, "Some text. " * 50)
    prepare.prepare(config, tmp_path / "out")
    shard = tmp_path / "out" / "train_000000.bin"
    raw = shard.read_bytes()
    shard.unlink()
    if damage:
        shard.write_bytes(damage(raw))
    for message in (error(tokens.open_tokens, tmp_path / "out", "train"), error(prepare.prepare, config, tmp_path / "out")):
        assert f"{shard}: " in message
        assert expected in message
        assert "prepare the tokens again" in message


def test_a_changed_token_is_noticed_before_tokens_are_used_again(tmp_path):
    config = text_file(tmp_path, "Some text. " * 50)
    prepare.prepare(config, tmp_path / "out")
    shard = tmp_path / "out" / "train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"z\0")
    assert "its SHA-256 is not the one in manifest.json" in error(prepare.prepare, config, tmp_path / "out")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"splits": {}}', '{"splits": {"train": 3}}', "\udcff"])
def test_a_damaged_manifest_is_named(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text, errors="surrogateescape")
    assert f"{tmp_path / 'manifest.json'}: not a manifest of token shards" in error(shards.read_manifest, tmp_path)


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path):
    prepare.prepare(text_file(tmp_path, "Some text. " * 50), tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("train_000000.bin", "../train_000000.bin"))
    assert "not a manifest of token shards" in error(shards.read_manifest, tmp_path / "out")
