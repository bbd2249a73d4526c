import codecs
import errno
import gzip
import json
import os
import random
from pathlib import Path

import pytest
import zstandard

from mlm_jax.config import SourceConfig
from mlm_jax.data import sources
from mlm_jax.data.document import Document
from mlm_jax.data.sources import files, html, streams

PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}


def words(count: int, seed: int = 0) -> str:
    """Lines of random words, which do not compress to nothing."""
    draw = random.Random(seed)
    return "".join(f"{draw.getrandbits(60):x}{draw.choice(' é  ')}{draw.choice(['', '', chr(10)])}" for _ in range(count))


def test_a_text_file_is_one_document_with_its_final_newline_and_without_its_byte_order_mark(tmp_path, read):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfOne.\r\n\r\nTwo \xc3\xa9.\n")
    assert read(file).documents == [Document("One.\r\n\r\nTwo é.\n", str(file))]


def test_a_json_line_is_one_document_named_by_its_line(tmp_path, read):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "One\\n", "id": 1}\n\n{"text": "Two \xe2\x80\xa8 still two"}')
    assert read(file).documents == [Document("One\n", f"{file}:1"), Document("Two \u2028 still two", f"{file}:3")]


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_compressed_files_hold_the_same_documents(tmp_path, read, compression):
    # As the library of each format writes them, in members and frames one after the other.
    pack, text = PACK[compression], words(100_000)
    (tmp_path / f"a.txt{compression}").write_bytes(pack(text[:7].encode()) + pack(b"") + pack(text[7:].encode()))
    (tmp_path / f"b.JSONL{compression.upper()}").write_bytes(pack(b'{"text": "One"}\n{"text": "T') + pack(b'wo"}\n'))
    found = read(tmp_path)
    assert found.texts == [text, "One", "Two"]
    assert not found.faults


def test_gzip_may_be_padded_with_zeros(tmp_path, read):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one ") + b"\0" * 512 + gzip.compress(b"two") + b"\0" * 512)
    assert read(tmp_path) == ([Document("one two", f"{tmp_path}/a.txt.gz")], [])


def test_a_separator_divides_a_text_file(tmp_path, read):
    file = tmp_path / "a.txt"
    file.write_text("one\n\ntwo\nstill two\n\n\n\n  \n\nthree\n")
    found = read(file, separator="\n\n")
    assert [(d.text, d.where) for d in found.documents] == [("one", f"{file}:1"), ("two\nstill two", f"{file}:2"), ("three\n", f"{file}:5")]
    assert read(file, separator="é").texts == [file.read_text()]


@pytest.mark.parametrize("separator", ["\n", "<|endoftext|>", "aa"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_a_separator_is_found_across_chunks(separator, chunk):
    draw = random.Random(chunk)
    raw = "".join(draw.choice(["a", "<", "|", separator, "é", "x" * 30]) for _ in range(300)).encode()
    chunks = [raw[i : i + chunk] for i in range(0, len(raw), chunk)]
    pieces = list(streams.divided(chunks, separator.encode(), limit=50))
    expected = raw.split(separator.encode())
    expected = expected[:-1] if not expected[-1] else expected
    places = [sum(len(p) + len(separator) for p in expected[:i]) for i in range(len(expected))]
    expected = [(i, place, part) for i, (place, part) in enumerate(zip(places, expected, strict=True), start=1) if part]
    assert pieces == [(i, place, part if len(part) <= 50 else None, len(part)) for i, place, part in expected]


@pytest.mark.parametrize("chunk", [1, 3, 64, 1000])
def test_a_cut_loses_nothing_but_what_has_no_place_to_cut(chunk):
    draw = random.Random(chunk)
    raw = "".join(draw.choice(["a", "é", " ", "\n", "x" * 30, "y" * 90]) for _ in range(300)).encode()
    pieces = list(streams.cut((raw[i : i + chunk] for i in range(0, len(raw), chunk)), limit=64))
    assert sum(piece.length for piece in pieces) == len(raw)
    assert b"".join(raw[piece.offset : piece.offset + piece.length] for piece in pieces) == raw
    for piece in pieces:
        assert piece.raw == (raw[piece.offset : piece.offset + piece.length] if piece.raw is not None else None)
        if piece.raw is None:
            assert piece.length > 64
            assert not set(raw[piece.offset : piece.offset + min(piece.length - 1, 64)]) & set(b"\n ")
        else:
            piece.raw.decode()
            assert len(piece.raw) <= 64
    assert {piece.raw is None for piece in pieces} == {False, True}


def test_a_long_text_file_is_cut_after_a_newline_every_16_mib(tmp_path, read):
    (tmp_path / "a.md").write_text("a line of text\n" * (3 << 20))
    found = read(tmp_path)
    assert [d.where for d in found.documents] == [f"{tmp_path}/a.md", f"{tmp_path}/a.md#2", f"{tmp_path}/a.md#3"]
    assert "".join(found.texts) == (tmp_path / "a.md").read_text()
    assert all((16 << 20) - 15 < len(text) <= 16 << 20 and text.endswith("\n") for text in found.texts[:-1])


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.html", "a.jsonl.gz", "a.json"])
def test_what_is_longer_than_16_mib_is_a_fault_and_what_comes_after_is_read(tmp_path, read, name):
    long = "x" * (17 << 20)
    text = {"a.txt": f"{long}\nafter", "a.html": long}.get(name, f'{{"text": "before"}}\n{{"text": "{long}"}}\n{{"text": "after"}}')
    (tmp_path / name).write_bytes(PACK[Path(name).suffix if name.endswith(".gz") else ""](text.encode()))
    found = read(tmp_path)
    assert found.kinds == ["longer than 16 MiB"]
    assert found.faults[0].bytes >= 17 << 20
    assert found.texts == {"a.txt": ["after"], "a.html": []}.get(name, ["before", "after"])


@pytest.mark.parametrize("size", [1, 3, 100])  # of a chunk
@pytest.mark.parametrize("gap", [b" ", b"\n"])
def test_what_is_too_long_to_hold_ends_with_the_first_newline_or_space_after_it(size, gap):
    data = b"aaaaaa" + gap + b"bb\ncc"
    pieces = list(streams.cut((data[at : at + size] for at in range(0, len(data), size)), limit=4))
    assert pieces == [(1, 0, None, 7), (2, 7, b"bb\n", 3), (3, 10, b"cc", 2)]


def test_parts_of_a_large_file_hold_each_line_once(tmp_path, read, monkeypatch):
    monkeypatch.setattr(files, "PART_BYTES", 1000)
    file = tmp_path / "a.jsonl"
    lines = [{"text": "é" * random.Random(i).choice([1, 10, 300, 2500])} for i in range(100)]
    file.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    config = SourceConfig(source=str(file))
    parts = sources.parts(config)
    assert len(parts) > 30
    assert [part.stop for part in parts[:-1]] == [part.start for part in parts[1:]]
    assert sum(part.size for part in parts) == file.stat().st_size
    found = read(file)
    assert found.texts == [line["text"] for line in lines]
    for document in found.documents:  # each is named by the byte at which it begins
        offset = int(document.where.removeprefix(f"{file}@"))
        assert json.loads(file.read_bytes()[offset:].partition(b"\n")[0])["text"] == document.text
    assert not found.faults


@pytest.mark.parametrize("separator", ["\n\n", "<|endoftext|>", "é"])
def test_parts_of_a_large_text_file_hold_each_document_once(tmp_path, read, monkeypatch, separator):
    file, texts = tmp_path / "a.txt", [f"{i} " + "x" * random.Random(i).choice([1, 10, 300, 2500]) for i in range(100)]
    file.write_text(separator.join(texts))
    whole = read(file, separator=separator).texts
    monkeypatch.setattr(files, "PART_BYTES", 777)
    monkeypatch.setattr(streams, "CHUNK", 7)
    assert len(sources.parts(SourceConfig(source=str(file), separator=separator))) > 20
    assert read(file, separator=separator).texts == whole == texts
    assert len(sources.parts(SourceConfig(source=str(file)))) == 1  # one document is not divided


def test_utf16_with_its_mark_is_read(tmp_path, read):
    for name, encoding in {"a.txt": "utf-16-le", "b.txt": "utf-16-be"}.items():
        mark = codecs.BOM_UTF16_LE if encoding.endswith("le") else codecs.BOM_UTF16_BE
        (tmp_path / name).write_bytes(mark + "Grüße 🙂\n".encode(encoding))
    (tmp_path / "c.jsonl").write_text('{"text": "é"}\n', encoding="utf-16")
    (tmp_path / "d.html").write_text("<p>é", encoding="utf-16")
    found = read(tmp_path)
    assert found.texts == ["Grüße 🙂\n", "Grüße 🙂\n", "é", "<p>é"]
    assert not found.faults


def test_utf16_is_not_divided_into_parts(tmp_path, read, monkeypatch):
    monkeypatch.setattr(files, "PART_BYTES", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "\u0a0a é"}\n' * 50, encoding="utf-16")  # its bytes have newlines that are none
    assert read(tmp_path) == ([Document("\u0a0a é", f"{tmp_path}/a.jsonl:{i + 1}") for i in range(50)], [])


def test_utf16_that_is_cut_short_is_a_fault(tmp_path, read):
    (tmp_path / "a.txt").write_bytes("Grüße".encode("utf-16")[:-1])
    assert read(tmp_path).kinds == ["not UTF-16"]


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_invalid_utf8_is_named_by_byte_and_offset(tmp_path, read, name, compression):
    raw = b'\xef\xbb\xbf{"text": "good"}\n{"text": "caf\xe9"}\n{"text": "good too"}\n'
    assert raw[33] == 0xE9
    file = tmp_path / (name + compression)
    file.write_bytes(PACK[compression](raw))
    found = read(tmp_path)
    assert found.texts == ([] if name == "a.txt" else ["good", "good too"])
    ((where, kind, detail, n_bytes),) = found.faults
    assert (where, kind) == (f"{file}:2" if name == "a.jsonl" else str(file), "not UTF-8")
    assert detail == "byte 0xe9 at offset 33 (invalid continuation byte)"
    assert n_bytes == (len(raw) if name == "a.txt" else 16)


@pytest.mark.parametrize(
    "line", ['{"text": "cut', "[" * 100_000, "not json", '{"n": ' + "9" * 5000 + "}"], ids=["cut short", "too deep", "no JSON", "huge"]
)
def test_a_bad_json_line_is_a_fault_and_the_others_are_read(tmp_path, read, line):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n' + line + '\n["text"]\n{"text": "good too"}\n')
    found = read(file)
    assert found.texts == ["good", "good too"]
    assert [(fault.where, fault.kind) for fault in found.faults] == [(f"{file}:2", "not JSON"), (f"{file}:3", "not an object")]
    assert found.faults[0].bytes == len(line)


@pytest.mark.parametrize(
    ("text", "texts", "kinds"),
    [
        ('{"text": "a"}\n{"text": "b"}\n', ["a", "b"], []),
        ('{"text": "a"}\nnonsense\n{"text": "b"}\n', ["a", "b"], ["not JSON"]),
        ('[{"text": "a"}, {"text": "b"}]', ["a", "b"], []),
        ('\ufeff [\n{"text": "a,]"},\n{"text": "b"},\n3\n]\n', ["a,]", "b"], ["not an object"]),
        ('{\n "text": "a"\n}\n', ["a"], []),
        ('{"text":\n"a"} {"text": "b"}', ["a", "b"], []),
        ('[{"text": "a"}, {"text": "b"', ["a"], ["not JSON"]),
        ('[{"text": "a"}, nonsense, {"text": "b"}]', ["a"], ["not JSON"]),
        ('[{"text": "a"}]]', ["a"], ["not JSON"]),
        ('[{"text": "a"},\n1234567,\n3]', ["a"], ["not an object"] * 2),
        ("[]", [], []),
        ("[", [], ["not JSON"]),
    ],
)
def test_a_json_file_is_lines_or_a_list_or_objects(tmp_path, read, monkeypatch, text, texts, kinds):
    (tmp_path / "a.json").write_text(text)
    for chunk in (streams.CHUNK, 5, 1):
        monkeypatch.setattr(streams, "CHUNK", chunk)
        found = read(tmp_path)
        assert (found.texts, found.kinds) == (texts, kinds)


def test_a_json_list_of_many_objects_is_read_like_json_reads_it(tmp_path, read):
    rows = [{"text": words(20, seed=i)} for i in range(3000)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    assert (tmp_path / "a.json").stat().st_size > 3 * streams.CHUNK
    assert read(tmp_path).texts == [row["text"] for row in rows]


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_what_comes_before_the_end_of_a_file_cut_short_is_kept(tmp_path, read, name, compression):
    lines = [words(300, seed=i).replace("\n", " ") for i in range(200)]
    raw = "".join(json.dumps({"text": line}) + "\n" for line in lines).encode() if name == "a.jsonl" else "\n".join(lines).encode()
    packed = PACK[compression](raw)
    (tmp_path / (name + compression)).write_bytes(packed[: len(packed) // 2])
    found = read(tmp_path)
    assert found.texts == lines[: len(found.texts)]
    if name == "a.jsonl":
        assert 80 < len(found.texts) < 120
    else:  # half a document is none
        assert not found.texts
    assert found.kinds == ["damaged gzip" if compression == ".gz" else "damaged zstd"]
    assert found.faults[0].detail == "cut short"


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_what_comes_before_damage_is_kept(tmp_path, read, compression):
    lines = [words(300, seed=i).replace("\n", " ") for i in range(200)]
    packed = bytearray(PACK[compression]("".join(json.dumps({"text": line}) + "\n" for line in lines).encode()))
    at = len(packed) * 3 // 4
    packed[at : at + 64] = bytes(64)
    (tmp_path / f"a.jsonl{compression}").write_bytes(packed)
    found = read(tmp_path)
    assert found.kinds[-1] == ("damaged gzip" if compression == ".gz" else "damaged zstd")
    good = [text for text in found.texts if text in set(lines)]
    assert good[:100] == lines[:100]


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["a wrong sum", "no such format", "garbage behind"])
def test_every_kind_of_damage_is_named(tmp_path, read, compression, damage):
    packed = PACK[compression](b'{"text": "one"}\n{"text": "two"}\n')
    sum_at = -8 if compression == ".gz" else -4
    packed = {
        "a wrong sum": packed[:sum_at] + bytes([packed[sum_at] ^ 1]) + packed[sum_at + 1 :] if sum_at + 1 else packed,
        "no such format": b"plain text",
        "garbage behind": packed + b"garbage",
    }[damage]
    (tmp_path / f"a.jsonl{compression}").write_bytes(packed)
    found = read(tmp_path)
    assert found.kinds == ["damaged gzip" if compression == ".gz" else "damaged zstd"]
    if compression == ".gz":  # what Zstandard decodes comes out block by block, its sum with the last
        assert found.texts == ([] if damage == "no such format" else ["one", "two"])


def test_a_gzip_file_is_whole_where_the_gzip_module_says_so(tmp_path, read):
    raw = gzip.compress("".join(json.dumps({"text": words(3, seed=i)}) + "\n" for i in range(30)).encode())
    draw = random.Random(0)
    for _ in range(200):
        at, bit = draw.randrange(len(raw)), 1 << draw.randrange(8)
        damaged = raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1 :]
        (tmp_path / "a.jsonl.gz").write_bytes(damaged)
        try:
            gzip.decompress(damaged)
            whole = True
        except Exception:
            whole = False
        assert ("damaged gzip" not in read(tmp_path).kinds) == whole, (at, bit)


def test_empty_files_and_binary_files_are_faults(tmp_path, read):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "c.txt").write_bytes(b"text\0more")
    (tmp_path / "d.html").write_bytes(b"<p>\0")
    (tmp_path / "e.txt.gz").write_bytes(b"")
    (tmp_path / "f.txt").write_text("fine")
    found = read(tmp_path)
    assert found.kinds == ["empty file", "empty file", "binary", "binary", "empty file"]
    assert found.faults[2] == (f"{tmp_path}/c.txt", "binary", "NUL at offset 4", 9)
    assert found.texts == ["fine"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.zip", "a.tar.gz", "a.warc"])
def test_a_file_that_vanishes_is_a_fault(tmp_path, name):
    (tmp_path / name).write_bytes(b"something" * 20)
    config = SourceConfig(source=str(tmp_path))
    (part,) = sources.parts(config)
    (tmp_path / name).unlink()
    assert list(sources.read(config, part)) == [(str(tmp_path / name), "vanished", "", 180)]


def test_a_file_that_changes_in_size_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART_BYTES", 100)
    file = tmp_path / "a.jsonl"
    text = '{"text": "0123456789"}\n' * 20
    file.write_text(text)
    config = SourceConfig(source=str(file))
    parts = sources.parts(config)
    for changed in (text + text[:30], text[:-1], text[:150], ""):
        file.write_text(changed)
        last = list(sources.read(config, parts[-1]))
        assert [(item.kind, item.bytes) for item in last] == [("changed while being read", parts[-1].size)]
    assert [item.kind for item in sources.read(config, parts[1])] == ["changed while being read"]


def test_a_file_that_is_written_to_while_it_is_read_is_a_fault(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "0123456789"}\n' * 20)
    config = SourceConfig(source=str(file))
    (part,) = sources.parts(config)
    items = sources.read(config, part)
    next(items)
    with file.open("a") as more:
        more.write('{"text": "late"}\n')
    *documents, fault = items
    assert {document.text for document in documents} <= {"0123456789", "late"}
    assert fault.kind == "changed while being read"


def test_a_file_that_vanishes_while_the_folder_is_listed_is_a_fault(tmp_path, read, monkeypatch):
    (tmp_path / "b.txt").write_text("text")
    monkeypatch.setattr(files, "files", lambda source: [tmp_path / f"a{ending}" for ending in (".txt", ".parquet", ".jsonl")] + [tmp_path / "b.txt"])
    found = read(tmp_path)
    assert found.texts == ["text"]
    assert found.kinds == ["vanished"] * 3


def test_a_file_becomes_a_folder(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("x" * 4096)
    config = SourceConfig(source=str(tmp_path))
    (part,) = sources.parts(config)
    file.unlink()
    file.mkdir()
    assert [item.kind for item in sources.read(config, part)] == ["changed while being read"]


def test_a_file_that_must_not_be_read_is_a_fault(tmp_path, read, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").write_text("y")
    open_file = Path.open

    def refuse(path, *args):
        if path.name == "a.txt":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_file(path, *args)

    monkeypatch.setattr(Path, "open", refuse)
    found = read(tmp_path)
    assert found.texts == ["y"]
    assert found.faults == [(f"{tmp_path}/a.txt", "unreadable", "Permission denied", 1)]


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file that fails to be read")
def test_a_file_that_fails_to_be_read_is_a_fault(tmp_path, read):
    (tmp_path / "a.txt").symlink_to("/proc/self/mem")
    found = read(tmp_path / "a.txt")
    assert found.kinds == ["unreadable"]
    assert found.faults[0].detail == os.strerror(errno.EIO)


def test_a_name_that_is_no_text_can_still_be_told(tmp_path, read):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"\xe9")
    (tmp_path / os.fsdecode(b"caf\xe9.md")).write_bytes(b"fine")
    found = read(tmp_path)
    assert found.faults[0].where == f"{tmp_path}/caf?.txt"
    assert found.documents == [Document("fine", f"{tmp_path}/caf?.md")]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("<p>é".encode(), "<p>é"),
        (b"\xef\xbb\xbf<p>\xc3\xa9", "<p>é"),
        ('<meta charset="windows-1252"><p>é “'.encode("cp1252"), '<meta charset="windows-1252"><p>é “'),
        ("<meta charset=ISO-8859-1><p>é “".encode("cp1252"), "<meta charset=ISO-8859-1><p>é “"),
        (
            "<META http-equiv='Content-Type' content='text/html; charset=shift_jis'>日本".encode("cp932"),
            "<META http-equiv='Content-Type' content='text/html; charset=shift_jis'>日本",
        ),
        ('<?xml version="1.0" encoding="koi8-r"?>да'.encode("koi8-r"), '<?xml version="1.0" encoding="koi8-r"?>да'),
        ("<meta charset=no-such-thing>é".encode(), "<meta charset=no-such-thing>é"),
        ("<meta charset=unicode_escape>\\u0041é".encode(), "<meta charset=unicode_escape>\\u0041é"),
        ("<meta charset=utf-16>é".encode(), "<meta charset=utf-16>é"),
    ],
)
def test_a_page_is_decoded_as_it_says(tmp_path, read, raw, text):
    (tmp_path / "a.html").write_bytes(raw)
    assert read(tmp_path).documents == [Document(text, f"{tmp_path}/a.html", is_html=True)]


def test_the_header_goes_before_the_page_and_the_mark_before_the_header():
    page = '<meta charset="windows-1252">é'.encode()
    assert html.decoded(page, "w", header="text/html; charset=UTF-8").text == '<meta charset="windows-1252">é'
    assert html.decoded(page, "w").text == '<meta charset="windows-1252">Ã©'
    assert html.decoded(codecs.BOM_UTF8 + "é".encode(), "w", header='text/html; charset="latin-1"').text == "é"


def test_a_page_that_is_not_what_it_says_is_a_fault(tmp_path, read):
    (tmp_path / "a.htm").write_bytes(b"<p>caf\xe9")
    (tmp_path / "b.htm").write_bytes(b"<meta charset=euc-jp>\xff\xff")
    assert read(tmp_path).kinds == ["not UTF-8", "not EUC_JP"]
