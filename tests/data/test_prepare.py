import dataclasses
import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from mlm_jax.config import DataConfig, InputError
from mlm_jax.data import prepare, shards, tokens
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
    assert manifest.split_by == "position"
    assert dataclasses.astuple(manifest.splits["val"])[:4] == (102, 101, 101, 1)


def test_a_document_across_the_cut_is_cut_in_two(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "aaaa"}\n{"text": "bbéé"}\n{"text": "cc"}\n')
    manifest = prepare.prepare(DataConfig(source=str(tmp_path / "a.jsonl"), tokenizer="byte", val_fraction=0.3), tmp_path / "out")
    assert prepared_documents(tmp_path / "out", "train") == {"aaaa", "bbé"}
    assert prepared_documents(tmp_path / "out", "val") == {"é", "cc"}
    assert dataclasses.astuple(manifest.splits["train"])[:4] == (2 + 8, 8, 7, 2)


def test_the_shakespeare_split_is_that_of_nanogpt():
    """nanoGPT, data/shakespeare_char/readme.md: 1,003,854 tokens to train on and 111,540 held out, of 1,115,394 characters."""
    parts = prepare._split_by_position(["x" * 1_115_394], 0.1)
    assert [len("".join(parts[name])) for name in ("train", "val")] == [1_003_854, 111_540]


def test_from_a_hundred_documents_on_the_split_goes_by_hash(tmp_path):
    config = many(tmp_path, 200)
    manifest = prepare.prepare(config, tmp_path / "out")
    expected = {f"Document {i} says é{i * i}." for i in range(200)}
    val = {text for text in expected if int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < 0.2}
    assert 20 < len(val) < 60
    assert prepared_documents(tmp_path / "out", "val") == val
    assert prepared_documents(tmp_path / "out", "train") == expected - val
    assert manifest.split_by == "hash"
    assert prepare.prepare(many(tmp_path, 100), tmp_path / "100").split_by == "hash"
    assert prepare.prepare(many(tmp_path, 99), tmp_path / "99").split_by == "position"


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
    assert len(train | val) == 120 == manifest.audit["kept"]["documents"]


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
    assert len(files) == 7
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_the_manifest_is_read_back_as_it_was_written(tmp_path):
    manifest = prepare.prepare(many(tmp_path, 120), tmp_path / "out", shard_tokens=1000)
    assert shards.read_manifest(tmp_path / "out") == manifest
    assert len(manifest.splits["train"].shards) > 1
    assert manifest.source_detail == f"1 file, {(tmp_path / '120.jsonl').stat().st_size} bytes"


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


def test_a_prepare_that_fails_leaves_nothing(tmp_path, monkeypatch):
    config = text_file(tmp_path, "Some text. " * 50)
    monkeypatch.setattr(tokens, "_write_shard", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare.prepare(config, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]


def test_the_folder_appears_under_its_name_only_when_whole(tmp_path, monkeypatch):
    config = text_file(tmp_path, "Some text. " * 50)
    write_shard, seen = tokens._write_shard, []

    def watched(*args):
        seen.append((tmp_path / "out").exists())
        return write_shard(*args)

    monkeypatch.setattr(tokens, "_write_shard", watched)
    prepare.prepare(config, tmp_path / "out")
    assert seen == [False, False]


def test_of_two_that_prepare_at_once_the_second_uses_what_the_first_wrote(tmp_path, monkeypatch):
    config = text_file(tmp_path, "Some text. " * 50)
    write, calls = tokens._write, []

    def slow(*args):
        calls.append(args)
        if len(calls) == 1:
            prepare.prepare(config, tmp_path / "out")
        return write(*args)

    monkeypatch.setattr(tokens, "_write", slow)
    prepare.prepare(config, tmp_path / "out")
    assert len(calls) == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "text.txt"]


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


@pytest.mark.parametrize("text", ["", " \n\n ", "\x00\x01"])
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
