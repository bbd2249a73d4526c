"""Documents from addresses that a list names are dropped."""

import re
from pathlib import Path

from mlm_jax.config import InputError
from mlm_jax.data.document import Document, Dropped, Rule

_SCHEME = re.compile(r"\A(?:[A-Za-z][A-Za-z0-9+.-]*:)?//")
_HOST = re.compile(r"(?=.{1,253}\Z)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)+[a-z0-9-]{2,63}|(?:\d{1,3}\.){3}\d{1,3}")


def blocked(path: str) -> Rule:
    """Drops documents whose address the file blocks; it has one entry to a line, and # begins a comment.

    `example.com` blocks that domain and all below it; `example.com/ads` the pages of this host, with and without "www.", whose address goes on
    from there: example.com/ads, example.com/ads/1 and example.com/ads?x=1, not example.com/adsorption. Scheme, port and user do not matter.

    Raises:
      InputError: the file cannot be read, holds something that is no address, or nothing.
    """
    domains, addresses = _read(path)

    def apply(document: Document) -> Document | Dropped:
        host, rest = _split(document.url)
        labels = host.split(".")
        if host and any(".".join(labels[i:]) in domains for i in range(len(labels))):
            return Dropped("blocked domain")
        for start in addresses.get(host.removeprefix("www."), ()):
            if rest.startswith(start) and (start.endswith("/") or rest[len(start) : len(start) + 1] in ("", "/", "?", "#")):
                return Dropped("blocked address")
        return document

    return Rule("urls", apply)


def _read(path: str) -> tuple[set[str], dict[str, list[str]]]:
    """The domains, and the beginnings of paths by host."""
    field = "data.clean.blocked_urls"
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as e:
        raise InputError(field, path, f"cannot be read: {e.strerror}", "Name a file with one domain or address to a line") from e
    except UnicodeDecodeError as e:
        raise InputError(field, path, f"not UTF-8 at byte {e.start}", "Save it as plain UTF-8 text") from e
    domains: set[str] = set()
    addresses: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        entry = re.sub(r"(?:\A|\s)#.*", "", line).strip()
        if not entry:
            continue
        host, rest = _split(entry if _SCHEME.match(entry) else f"//{entry}")
        if not _HOST.fullmatch(host) or re.search(r"\s", entry):
            raise InputError(field, path, f"line {number} is no domain or address: {line.strip()[:80]}", "Write, for example, example.com")
        if rest in ("", "/"):
            domains.add(host)
        else:
            addresses.setdefault(host.removeprefix("www."), []).append(rest)
    if not domains and not addresses:
        raise InputError(field, path, "names no domain and no address", "Write one to a line, or leave the field empty")
    return domains, addresses


def _split(url: str) -> tuple[str, str]:
    """The host of an address in small letters, international ones in their ASCII form, and what follows it."""
    after = _SCHEME.sub("", url.strip(), count=1)
    place = re.search(r"[/?#\\]", after)
    authority, rest = (after[: place.start()], after[place.start() :]) if place else (after, "")
    host = authority.rpartition("@")[2].lower().rstrip(".")
    host = re.sub(r":\d*\Z", "", host).rstrip(".")
    if not host.isascii():
        try:
            host = host.encode("idna").decode("ascii")
        except UnicodeError:
            return "", ""
    return host, rest
