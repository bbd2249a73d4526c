"""Pages of HTML, decoded as they say that they are."""

import codecs
import re

from mlm_jax.data.document import Document, Fault
from mlm_jax.data.sources.base import MAX_DOCUMENT, fault, not_text, too_long
from mlm_jax.data.sources.streams import UTF16, Bytes

_DECLARED = (
    re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w:.-]+)""", re.I),
    re.compile(rb"""<\?xml[^>]{0,200}?encoding\s*=\s*["']([\w:.-]+)""", re.I),
)
_DECLARED_WITHIN = 4096  # bytes
# What browsers read where a page declares the key. Source: WHATWG Encoding Standard, section 4.2, names and labels.
_AS_BROWSERS = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
}
_ENCODINGS = (
    "utf-8",
    "cp",
    "iso8859",
    "iso2022",
    "koi8",
    "mac",
    "gb",
    "big5",
    "euc_",
    "shift_jis",
    "tis-620",
)  # Python knows stranger ones; what declares UTF-16 so that it can be read is not


def page(stream: Bytes, where: str) -> Document | Fault:
    """The file as one page."""
    raw = stream.read(MAX_DOCUMENT + 1)
    if len(raw) > MAX_DOCUMENT:
        return too_long(where, len(raw) + stream.skip(1 << 62))
    return decoded(raw, where)


def decoded(raw: bytes, where: str, *, header: str = "", url: str = "") -> Document | Fault:
    """The page; its encoding is by its byte order mark, the HTTP header Content-Type, or its own declaration, else UTF-8."""
    if raw.startswith(UTF16):
        encoding = "utf-16"
    elif raw.startswith(codecs.BOM_UTF8):
        encoding = "utf-8-sig"
    else:
        if b"\0" in raw:
            return fault(where, "binary", f"NUL at offset {raw.index(0)}", len(raw))
        encoding = _encoding(raw, header)
    try:
        return Document(raw.decode(encoding), where, url=url, is_html=True)
    except UnicodeDecodeError as e:
        return not_text(where, encoding.removesuffix("-sig").upper().replace("CP125", "windows-125"), e, 0, len(raw))


def _encoding(raw: bytes, header: str) -> str:
    labels = re.findall(r"""charset\s*=\s*["']?\s*([\w:.-]+)""", header, re.I)
    labels += [found[1].decode("latin-1") for pattern in _DECLARED if (found := pattern.search(raw, 0, _DECLARED_WITHIN))]
    for label in labels:
        try:
            name = codecs.lookup(label).name
        except LookupError:
            continue
        name = _AS_BROWSERS.get(name, name)
        if name.startswith(_ENCODINGS):
            return name
    return "utf-8"
