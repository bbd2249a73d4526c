import re

import pytest

from mlm_jax.config import InputError
from mlm_jax.data.document import Document, Dropped
from mlm_jax.data.rules import urls

LIST = """# what we do not want
example.com   # and all below it
https://Path.org/ads
path.org/a/
//user@port.net:8080/x
bücher.de
203.0.113.5
"""


@pytest.fixture
def rule(tmp_path):
    (tmp_path / "list").write_text(LIST, encoding="utf-8")
    return urls.blocked(str(tmp_path / "list"))


@pytest.mark.parametrize(
    "url",
    ["http://example.com", "https://EXAMPLE.com/a?b", "http://a.b.example.com:80/", "example.com.", "//u:p@example.com/x", "https://xn--bcher-kva.de/",
     "https://www.Bücher.de/x", "http://203.0.113.5/x", "http://evil.org@example.com/", "http://example.com\\@good.org/"],
)  # fmt: skip
def test_a_blocked_domain_blocks_itself_and_all_below_it(rule, url):
    assert rule.apply(Document("a", "", url=url)) == Dropped("blocked domain")


@pytest.mark.parametrize(
    "url",
    ["https://path.org/ads", "http://www.path.org/ads/1", "path.org/ads?x=1", "https://path.org/ads#x", "http://path.org/a/b", "http://port.net/x/y"],
)
def test_a_blocked_address_blocks_what_goes_on_from_it(rule, url):
    assert rule.apply(Document("a", "", url=url)) == Dropped("blocked address")


@pytest.mark.parametrize(
    "url",
    ["", "http://notexample.com/", "http://example.com.org/", "http://good.org/example.com", "http://good.org/?u=http://example.com/", "http://com/",
     "https://path.org/", "https://path.org/adsorption", "https://sub.path.org/ads", "https://path.org/b/a/", "http://port.net/", "no address", "http://[::1]/"],
)  # fmt: skip
def test_other_addresses_pass(rule, url):
    assert rule.apply(Document("a", "", url=url)) == Document("a", "", url=url)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"good.com\nnot a domain\n", "line 2 is no domain or address: not a domain"),
        (b"0.0.0.0 ads.example.com", "line 1 is no domain"),
        (b"http://\n", "line 1 is no domain"),
        (b"com", "line 1 is no domain"),
        (b"a..b", "line 1 is no domain"),
        (b"a.com\xff", "not UTF-8 at byte 5"),
        (b"# nothing\n\n", "names no domain and no address"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_broken_list_is_refused_with_its_line(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "list").write_bytes(content)
    with pytest.raises(InputError, match=f"data.clean.blocked_urls = .*{re.escape(reason)}"):
        urls.blocked(str(tmp_path / "list"))
