import gzip
import io
import random
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import zstandard

from mlm_jax.config import SourceConfig
from mlm_jax.data import sources
from mlm_jax.data.sources import archives

MEMBERS = [
    ("b.txt", b"two"),
    ("a/c.jsonl", b'{"text": "three"}\n{"text": "four"}\n'),
    ("a.html", b"<p>one"),
    ("image.png", b"\0"),
    ("d.txt.gz", gzip.compress(b"five")),
]


def write_zip(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.mkdir("folder.txt")
        for name, raw in members:
            archive.writestr(name, raw)
    return path


def tar_of(members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w", format=format) as archive:
        folder = tarfile.TarInfo("folder.txt")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, raw in members:
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return held.getvalue()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_file_is_read_in_sorted_order(tmp_path, read, method):
    found = read(write_zip(tmp_path / "x.zip", MEMBERS, method))
    assert [(d.text, d.where.removeprefix(f"{tmp_path}/x.zip/"), d.is_html) for d in found.documents] == [
        ("<p>one", "a.html", True),
        ("three", "a/c.jsonl:1", False),
        ("four", "a/c.jsonl:2", False),
        ("two", "b.txt", False),
        ("five", "d.txt.gz", False),
    ]
    assert [(fault.where, fault.kind) for fault in found.faults] == [(f"{tmp_path}/x.zip/image.png", "an ending that is not read")]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.TGZ", "x.tar.zst"])
def test_a_tar_file_is_read_as_it_comes(tmp_path, read, name, format):
    pack = gzip.compress if name.lower().endswith("gz") else zstandard.compress if name.endswith("zst") else bytes
    members = [*MEMBERS, ("f/" * 40 + "e.txt", b"six"), *([] if format == tarfile.USTAR_FORMAT else [("é" * 200 + ".txt", b"seven")])]
    (tmp_path / name).write_bytes(pack(tar_of(members, format)))
    found = read(tmp_path)
    assert found.texts == ["two", "three", "four", "<p>one", "five", "six", *["seven"] * (format != tarfile.USTAR_FORMAT)]
    assert found.documents[1].where == f"{tmp_path}/{name}/a/c.jsonl:1"
    assert [(fault.where, fault.kind) for fault in found.faults] == [(f"{tmp_path}/{name}/image.png", "an ending that is not read")]


def test_of_two_members_of_one_name_both_are_read(tmp_path, read):
    with pytest.warns(UserWarning, match="Duplicate name"):
        write_zip(tmp_path / "a.zip", [("a.txt", b"one"), ("a.txt", b"two")])
    (tmp_path / "b.tar").write_bytes(tar_of([("a.txt", b"three"), ("a.txt", b"four")]))
    found = read(tmp_path)
    assert [(d.text, d.where) for d in found.documents] == [
        ("one", f"{tmp_path}/a.zip/a.txt"),
        ("two", f"{tmp_path}/a.zip/a.txt#2"),
        ("three", f"{tmp_path}/b.tar/a.txt"),
        ("four", f"{tmp_path}/b.tar/a.txt#2"),
    ]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_lead_outside_are_faults_and_nothing_is_written(tmp_path, read, kind):
    inside = tmp_path / "in"
    inside.mkdir()
    names = ["../up.txt", "/absolute.txt", "a/../../up.txt", "C:\\windows.txt", "a\\..\\..\\up.txt", "fine..txt"]
    members = [(name, b"text") for name in names]
    if kind == "zip":
        write_zip(inside / "x.zip", members)
    else:
        (inside / "x.tar").write_bytes(tar_of(members))
    before = sorted(tmp_path.rglob("*"))
    found = read(inside)
    assert found.kinds == ["a name that leads outside"] * 5
    assert len(found.documents) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_links_and_devices_in_archives_are_faults(tmp_path, read):
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("a.txt")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    (tmp_path / "a.tar").write_bytes(held.getvalue())
    link = zipfile.ZipInfo("a.txt")
    link.external_attr = 0o120777 << 16
    link.create_system = 3
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    assert read(tmp_path).kinds == ["a link or no file"] * 5


def lines(count: int, seed: int = 0) -> bytes:
    draw = random.Random(seed)
    return b"".join(b'{"text": "%d %x"}\n' % (i, draw.getrandbits(2000)) for i in range(count))


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tar.zst"])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_of_a_tar_file_that_is_cut_short_the_members_before_are_kept(tmp_path, read, name, keep):
    pack = gzip.compress if name.endswith("gz") else zstandard.compress if name.endswith("zst") else bytes
    raw = pack(tar_of([(f"{i}.jsonl", lines(100, i)) for i in range(10)]))
    (tmp_path / name).write_bytes(raw[: int(len(raw) * keep)])
    found = read(tmp_path)
    assert len(found.documents) > 1000 * (keep - 0.15)
    assert found.kinds == ["damaged " + {"x.tar": "tar", "x.tar.gz": "gzip", "x.tar.zst": "zstd"}[name]]


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path, read):
    raw = bytearray(tar_of([(f"{i}.txt", b"text") for i in range(4)]))
    at = raw.index(b"2.txt")
    raw[at] ^= 1
    (tmp_path / "a.tar").write_bytes(raw)
    (tmp_path / "b.tar").write_bytes(raw[: at - at % 512])
    (tmp_path / "c.tar").write_bytes(b"no tar at all" * 100)
    found = read(tmp_path)
    assert found.kinds == ["damaged tar"] * 3
    assert len(found.documents) == 4
    assert [fault.detail for fault in found.faults] == ["bad checksum", "cut short", "invalid header"]


def test_a_header_that_would_fill_the_memory_is_damage(tmp_path, read):
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 1 << 33
    (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    assert read(tmp_path).faults[0].detail == f"a header of {1 << 33} bytes"


def test_a_sparse_member_is_no_file(tmp_path, read):
    member = tarfile.TarInfo("a.txt")
    member.type = tarfile.GNUTYPE_SPARSE
    raw = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    raw[483:495] = b"77777777777\0"  # as large as the octal digits can say
    raw[148:156] = b"%06o\0 " % (sum(raw[:148]) + sum(raw[156:512]) + 8 * 32)
    (tmp_path / "a.tar").write_bytes(bytes(raw) + bytes(1024))
    found = read(tmp_path)
    assert found.kinds == ["a link or no file"]


def test_a_damaged_member_of_a_zip_file_does_not_end_the_others(tmp_path, read):
    write_zip(tmp_path / "a.zip", [("a.jsonl", lines(50, 1)), ("b.jsonl", lines(50, 2)), ("c.txt", b"fine")])
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        info = archive.getinfo("b.jsonl")
    at = info.header_offset + info.compress_size * 3 // 4
    raw[at : at + 30] = bytes(30)
    (tmp_path / "a.zip").write_bytes(raw)
    found = read(tmp_path)
    assert "damaged zip" in found.kinds
    assert [text for text in found.texts if text == "fine"]
    assert sum(document.where.startswith(f"{tmp_path}/a.zip/a.jsonl:") for document in found.documents) == 50


def test_a_wrong_sum_in_a_zip_file_is_a_fault(tmp_path, read):
    write_zip(tmp_path / "a.zip", [("a.txt", b"some text"), ("b.txt", b"more")], zipfile.ZIP_STORED)
    raw = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(raw.replace(b"some text", b"some tent"))
    found = read(tmp_path)
    assert found.texts == ["more"]
    assert [(fault.where, fault.kind) for fault in found.faults] == [(f"{tmp_path}/a.zip/a.txt", "damaged zip")]


@pytest.mark.parametrize("damage", [lambda raw: raw[:-30], lambda raw: raw[:50], lambda raw: b"no zip", lambda raw: raw[:-40] + b"\xff" * 40])
def test_a_zip_file_without_its_list_of_members_is_a_fault(tmp_path, read, damage):
    write_zip(tmp_path / "a.zip", MEMBERS)
    (tmp_path / "a.zip").write_bytes(damage((tmp_path / "a.zip").read_bytes()))
    assert read(tmp_path).kinds == ["damaged zip"]


def test_an_encrypted_member_is_a_fault(tmp_path, read):
    write_zip(tmp_path / "a.zip", [("a.txt", b"secret")])
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        at = archive.getinfo("a.txt").header_offset
    raw[at + 6] |= 1
    raw[raw.rindex(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(raw)
    found = read(tmp_path)
    assert found.kinds == ["damaged zip"]
    assert "encrypted" in found.faults[0].detail


def test_an_archive_that_expands_too_far_ends_there(tmp_path, read, monkeypatch):
    monkeypatch.setattr(archives, "EXPANDS_TO", 1 << 20)
    monkeypatch.setattr(archives, "EXPANDS_BY", 100)
    write_zip(tmp_path / "a.zip", [("a.txt", b"fine"), *((f"{i}.txt", b" " * (1 << 18)) for i in range(9))])
    found = read(tmp_path)
    assert found.kinds == ["expands too far"]
    assert len(found.documents) == 4


def test_an_archive_without_text_is_a_fault(tmp_path, read):
    write_zip(tmp_path / "a.zip", [("a.png", b"x")])
    (tmp_path / "b.tar").write_bytes(tar_of([]))
    assert read(tmp_path).kinds == ["an ending that is not read", "no text in it", "no text in it"]


def test_damage_inside_a_member_is_its_own(tmp_path, read):
    cut = gzip.compress(b"some text")[:-4]
    write_zip(tmp_path / "a.zip", [("a.txt.gz", cut), ("b.txt", b"fine"), ("c.warc", b"nonsense"), ("d.txt", b"good")])
    (tmp_path / "b.tar").write_bytes(tar_of([("a.txt.gz", cut), ("b.txt", b"fine"), ("c.warc", b"nonsense"), ("d.txt", b"good")]))
    found = read(tmp_path)
    assert found.texts == ["fine", "good"] * 2
    assert found.kinds == ["damaged gzip", "damaged WARC"] * 2


def test_fields_are_looked_for_in_archives(tmp_path, refused):
    write_zip(tmp_path / "a.zip", [("a.jsonl", b'{"txt": "one"}\n')])
    assert "Did you mean 'txt'?" in refused(tmp_path)


def test_an_archive_is_one_part(tmp_path):
    assert "tensorflow" not in sys.modules
    write_zip(tmp_path / "a.zip", MEMBERS)
    assert sources.parts(SourceConfig(source=str(tmp_path))) == [sources.Part(f"{tmp_path}/a.zip", size=(tmp_path / "a.zip").stat().st_size)]
