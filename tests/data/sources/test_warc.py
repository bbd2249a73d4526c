import gc
import gzip
import io
import warnings
from pathlib import Path

import pytest
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from mlm_jax.data.document import Document

HTML = ("text/html; charset=utf-8",)


def write(path: Path, records: list[tuple[str, str, bytes, list[tuple[str, str]] | None, str]]) -> Path:
    """Records (type, address, payload, HTTP headers or None, HTTP status), as warcio writes them."""
    with path.open("wb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # warcio leaves the closing of its temporary files to the end of its records
        writer = WARCWriter(file, gzip=path.name.endswith(".gz"))
        writer.write_record(writer.create_warcinfo_record("x.warc", {"software": "test"}))
        for kind, url, payload, headers, status in records:
            http = StatusAndHeaders(status, headers, protocol="HTTP/1.1") if headers is not None else None
            content_type = "text/plain" if kind == "conversion" else None
            writer.write_record(writer.create_warc_record(url, kind, io.BytesIO(payload), http_headers=http, warc_content_type=content_type or ""))
        gc.collect()
    return path


def page(url: str, payload: bytes, content_type: str = "text/html", status: str = "200 OK", **more: str):
    return "response", url, payload, [("Content-Type", content_type), *((key.replace("_", "-"), value) for key, value in more.items())], status


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_pages_come_out_with_their_addresses(tmp_path, read, name):
    many = [page(f"http://x/{i}", f"<p>Seite {i} é".encode()) for i in range(50)]
    found = read(write(tmp_path / name, many))
    assert found.documents == [Document(f"<p>Seite {i} é", f"{tmp_path}/{name}:{i + 2}", url=f"http://x/{i}", is_html=True) for i in range(50)]
    assert not found.faults


@pytest.mark.parametrize("name", ["a.warc.wet", "a.warc.wet.gz", "a.wet.gz"])
def test_conversions_are_plain_text(tmp_path, read, name):
    found = read(write(tmp_path / name, [("conversion", "http://x/", "Text é\n".encode(), None, "")]))
    assert found.documents == [Document("Text é\n", f"{tmp_path}/{name}:2", url="http://x/")]


def test_what_is_no_page_is_a_fault(tmp_path, read):
    records = [
        page("http://x/1", b"gone", status="404 Not Found"),
        page("http://x/2", b"\x89PNG\0", content_type="image/png"),
        page("http://x/3", b"<p>fine", content_type="Text/HTML;charset=utf-8"),
        page("http://x/4", b"<p>fine too", content_type="application/xhtml+xml"),
        ("request", "http://x/4", b"", [("Host", "x")], "GET / HTTP/1.1"),
        page("http://x/5", b"moved", status="301 Moved"),
    ]
    found = read(write(tmp_path / "a.warc.gz", records))
    assert found.texts == ["<p>fine", "<p>fine too"]
    assert [(fault.kind, fault.detail) for fault in found.faults] == [("not a page", d) for d in ("HTTP status 404", "image/png", "HTTP status 301")]


def test_chunks_and_compression_of_the_transfer_are_undone(tmp_path, read):
    text = "<p>compressed é".encode()
    packed = gzip.compress(text)
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(packed[i : i + 7]), packed[i : i + 7]) for i in range(0, len(packed), 7)) + b"0\r\n\r\n"
    records = [page("http://x/1", packed, Content_Encoding="gzip"), page("http://x/2", chunked, Content_Encoding="gzip", Transfer_Encoding="chunked")]
    found = read(write(tmp_path / "a.warc.gz", records))
    assert found.texts == [text.decode()] * 2


def test_the_encoding_is_that_of_the_header_or_the_page(tmp_path, read):
    records = [
        page("http://x/1", "é “".encode("cp1252"), content_type="text/html; charset=ISO-8859-1"),
        page("http://x/2", '<meta charset="koi8-r">да'.encode("koi8-r")),
        page("http://x/3", b"caf\xe9"),
        page("http://x/4", b"a\0b"),
    ]
    found = read(write(tmp_path / "a.warc", records))
    assert found.texts == ["é “", '<meta charset="koi8-r">да']
    assert found.kinds == ["not UTF-8", "binary"]


def test_a_page_longer_than_16_mib_is_a_fault(tmp_path, read):
    long = b"<p>" + b"x " * (9 << 20)
    records = [page("http://x/1", long), page("http://x/2", gzip.compress(long), Content_Encoding="gzip"), page("http://x/3", b"<p>after")]
    found = read(write(tmp_path / "a.warc", records))
    assert found.kinds == ["longer than 16 MiB"] * 2
    assert found.texts == ["<p>after"]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_the_pages_before_damage_are_kept(tmp_path, read, name):
    raw = write(tmp_path / name, [page(f"http://x/{i}", b"<p>%d" % i * 400) for i in range(50)]).read_bytes()
    whole = len(raw)
    ends = set()
    for at in range(whole // 2, whole // 2 + 300, 7):  # in headers, in contents, between records
        (tmp_path / name).write_bytes(raw[:at])
        found = read(tmp_path)
        assert found.texts == [f"<p>{i}" * 400 for i in range(len(found.texts))]
        assert 15 < len(found.texts) < 35
        ends |= set(found.kinds)
        assert len(found.faults) <= 1
    assert ends <= {"damaged WARC", "damaged gzip"}
    assert ends


@pytest.mark.parametrize(
    ("raw", "detail"),
    [
        (b"nonsense\r\n", "record 1 begins with b'nonsense"),
        (b"WARC/1.0\r\nWARC-Type: response\r\n\r\n", "record 1 does not say how long it is"),
        (b"WARC/1.0\r\nContent-Length: -3\r\n\r\n", "record 1 does not say how long it is"),
        (b"WARC/1.0\r\nContent-Length: 3", "record 1 is cut short"),
        (b"WARC/1.0\r\nContent-Length: 30\r\n\r\nabc", "record 1 is cut short"),
        (b"WARC/1.0\r\n" + b"a: b\r\n" * 2000, "record 1 has no end of its headers"),
        (b"WARC/1.0\r\na: " + b"b" * 100_000, "record 1 is cut short"),
    ],
)
def test_every_kind_of_damage_is_named(tmp_path, read, raw, detail):
    (tmp_path / "a.warc").write_bytes(raw)
    ((_, kind, said, _),) = read(tmp_path).faults
    assert kind == "damaged WARC"
    assert said.startswith(detail)


def test_a_response_that_is_no_http_is_a_fault(tmp_path, read):
    (tmp_path / "a.warc").write_bytes(b"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: 0\r\n\r\n\r\n\r\n" * 2)
    assert read(tmp_path).kinds == ["damaged page"] * 2
