"""Web archives: pages of HTML in WARC files, their text in WET files.

Source: ISO 28500:2017 (WARC 1.1). Frames are read here and not by warcio, which takes a file that was cut short for a whole one.
"""

import io
import re
import zlib
from collections.abc import Iterable, Iterator

from mlm_jax.data.document import Document, Fault
from mlm_jax.data.sources.base import MAX_DOCUMENT, Damaged, fault, not_text, printable, too_long
from mlm_jax.data.sources.html import decoded
from mlm_jax.data.sources.streams import Bytes

_LINE = 1 << 16  # bytes of a header at most
_HEADERS = 1000  # of a record at most
_PAGES = ("text/html", "application/xhtml+xml")


def pages(chunks: Iterable[bytes], name: str) -> Iterator[Document | Fault]:
    """Each response of HTTP status 200 that is HTML, as a page, and each conversion, as text; other responses are faults, the rest is about these.

    Raises:
      Damaged: what comes next is no whole record.
    """
    data, number = Bytes(chunks), 0
    while line := data.line(_LINE):
        if not line.strip():
            continue
        number += 1
        where = f"{name}:{number}"
        if not line.startswith(b"WARC/"):
            raise Damaged("damaged WARC", f"record {number} begins with {line[:20]!r}")
        headers = _headers(data, number)
        if not re.fullmatch("[0-9]{1,18}", headers.get("content-length", "")):
            raise Damaged("damaged WARC", f"record {number} does not say how long it is")
        length = int(headers["content-length"])
        kind, url = headers.get("warc-type", ""), printable(headers.get("warc-target-uri", "").strip("<>"))
        if kind not in ("response", "conversion") or length > MAX_DOCUMENT:
            if data.skip(length) < length:
                raise Damaged("damaged WARC", f"record {number} is cut short")
            if kind in ("response", "conversion"):
                yield too_long(where, length)
            continue
        raw = data.read(length)
        if len(raw) < length:
            raise Damaged("damaged WARC", f"record {number} is cut short")
        yield _response(raw, where, url, headers) if kind == "response" else _conversion(raw, where, url)


def _headers(data: Bytes, number: int) -> dict[str, str]:
    """The fields of a record by their names in small letters."""
    headers: dict[str, str] = {}
    for _ in range(_HEADERS):
        line = data.line(_LINE)
        if not line.endswith(b"\n"):
            raise Damaged("damaged WARC", f"record {number} is cut short")
        if not line.strip():
            return headers
        key, _, value = line.decode("utf-8", "replace").partition(":")
        headers[key.strip().lower()] = value.strip()
    raise Damaged("damaged WARC", f"record {number} has no end of its headers")


def _conversion(raw: bytes, where: str, url: str) -> Document | Fault:
    try:
        return Document(raw.decode("utf-8"), where, url=url)
    except UnicodeDecodeError as e:
        return not_text(where, "UTF-8", e, 0, len(raw))


def _response(raw: bytes, where: str, url: str, headers: dict[str, str]) -> Document | Fault:
    from warcio.exceptions import ArchiveLoadFailed
    from warcio.recordloader import ArcWarcRecord
    from warcio.statusandheaders import StatusAndHeadersParser, StatusAndHeadersParserException

    stream = io.BytesIO(raw)
    try:
        http = StatusAndHeadersParser(["HTTP/1.0", "HTTP/1.1", "HTTP/2", "HTTP/2.0"], verify=False).parse(stream)
        status, content_type = http.get_statuscode(), http.get_header("content-type") or headers.get("warc-identified-payload-type", "")
        if status != "200":
            return fault(where, "not a page", f"HTTP status {status}", len(raw))
        if content_type.partition(";")[0].strip().lower() not in _PAGES:
            return fault(where, "not a page", content_type or "no content type", len(raw))
        # Undoes what the server did for the way: chunks, gzip, brotli.
        content = ArcWarcRecord("warc", "response", None, stream, http, None, len(raw)).content_stream()
        found, size = [], 0
        while size <= MAX_DOCUMENT and (chunk := content.read(1 << 16)):
            found.append(chunk)
            size += len(chunk)
    except (ArchiveLoadFailed, StatusAndHeadersParserException, EOFError, ValueError, zlib.error) as e:
        return fault(where, "damaged page", e, len(raw))
    return too_long(where, size) if size > MAX_DOCUMENT else decoded(b"".join(found), where, header=content_type, url=url)
