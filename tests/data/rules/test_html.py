import pytest

from experiments import bench_clean
from mlm_jax.data.document import Document, Dropped
from mlm_jax.data.rules import html

PARAGRAPHS = [f"This is sentence {i} of a paragraph that has enough words in it to be the main text of a page, and more." for i in range(6)]
MAIN = "".join(f"<p>{paragraph}</p>" for paragraph in PARAGRAPHS)
PAGE = f"<html><body><nav><a href='/'>Home</a><a href='/x'>Log in</a></nav><article>{MAIN}</article><footer>Cookie policy</footer></body></html>"


def main_text(page: str) -> str:
    """What the rule makes of a page, or why it drops it."""
    after = html.main_text(every=False).apply(Document(page, "a", url="b", is_html=True))
    return after.reason if isinstance(after, Dropped) else after.text


def test_the_main_text_of_a_page_stays_and_its_menu_and_footer_go():
    assert main_text(PAGE) == "\n".join(PARAGRAPHS)
    after = html.main_text(every=False).apply(Document(PAGE, "a", url="b", is_html=True))
    assert after == Document("\n".join(PARAGRAPHS), "a", url="b")


def test_the_main_text_is_what_datatroves_extractor_takes():
    from datatrove.pipeline.extractors import Trafilatura

    theirs = Trafilatura(deduplicate=False)
    more = (
        f"<html><body><table><tr><td>{PARAGRAPHS[0]}</td></tr></table><ul><li>{PARAGRAPHS[1]}</li></ul><div class=comments>{MAIN}</div></body></html>"
    )
    for page in (PAGE, more, PAGE.replace("<p>", "<div>").replace("</p>", "</div>"), PAGE.replace("article", "span")):
        assert main_text(page) == theirs.extract(page)


def test_only_pages_are_pages_unless_all_documents_are():
    assert html.main_text(every=False).apply(Document(PAGE, "")).text == PAGE
    assert html.main_text(every=True).apply(Document(PAGE, "")).text == "\n".join(PARAGRAPHS)


def test_what_becomes_of_a_page_does_not_depend_on_pages_before_it():
    assert {main_text(PAGE) for _ in range(8)} == {"\n".join(PARAGRAPHS)}


def test_a_page_without_a_text_is_dropped():
    for page in ("", "   ", "<html></html>", "<html><body><script>let x = 1;</script></body></html>", "no page at all", "<", "<!--", "\x00\x01"):
        assert main_text(page) == "no main text"


@pytest.mark.parametrize("tag", ["div", "span", "b", "ul", "table", "blockquote", "font"])
def test_deep_nesting_is_no_crash(tag):
    page = "<html><body>" + f"<{tag}>" * 20_000 + MAIN + f"</{tag}>" * 20_000 + "</body></html>"
    assert main_text(page) == "no main text"


def test_a_page_of_too_many_elements_is_dropped_unread():
    assert main_text(PAGE + "<br>" * html.MAX_TAGS) == "page of too many elements"


def test_characters_that_xml_cannot_hold_and_a_declared_encoding_do_no_harm():
    assert main_text(PAGE.replace("sentence", "sen\x00ten\x0bce\ud800")) == "\n".join(PARAGRAPHS)
    assert main_text('<?xml version="1.0" encoding="latin-1"?>\n' + PAGE.replace("sentence", "Sätze")) == "\n".join(PARAGRAPHS).replace(
        "sentence", "Sätze"
    )


def test_an_error_inside_the_library_is_a_page_without_a_text(monkeypatch):
    import trafilatura

    def broken(*_, **__):
        raise RecursionError

    monkeypatch.setattr(trafilatura, "extract", broken)
    assert main_text(PAGE) == "no main text"


def test_nothing_is_said_about_pages_without_a_text(caplog):
    main_text("<html></html>")
    assert caplog.records == []


def test_main_texts_are_told_from_boilerplate():
    (score,) = bench_clean.pages(bench_clean.random.Random(1), 20).values()
    assert score.precision >= 0.95 and score.recall >= 0.95, score
