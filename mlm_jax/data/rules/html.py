"""The main text of a page of HTML, without its menus, adverts and footers, by trafilatura."""

import logging
from typing import Any

from mlm_jax.data.document import Document, Dropped, Rule
from mlm_jax.data.rules.basic import not_installed, without_control_characters

# Trafilatura needs time that grows with the square of the number of elements: some 5 s for as many. datatrove ends that by a clock, on which a
# corpus must not depend.
MAX_TAGS = 50_000


def main_text(*, every: bool) -> Rule:
    """Takes the main text of pages; of all documents if `every` is set, else of those that are known to be pages.

    The settings are those of datatrove's Trafilatura extractor except `deduplicate`, which remembers paragraphs of earlier documents: what
    became of a document would depend on those that its process saw before.
    """
    if every:  # else it is needed where a page comes along
        _library()

    def apply(document: Document) -> Document | Dropped:
        if not (every or document.is_html):
            return document
        if document.text.count("<") > MAX_TAGS:
            return Dropped("page of too many elements")
        text = _extract(document.text)
        return document._replace(text=text, is_html=False) if text and text.strip() else Dropped("no main text")

    return Rule("html", apply)


def _extract(page: str) -> str | None:
    library = _library()
    try:
        return library.extract(without_control_characters(page), favor_precision=True, include_comments=False, deduplicate=False)
    except Exception:  # whatever breaks it, also RecursionError: libraries for pages meet anything, and name no exceptions of theirs
        return None


def _library() -> Any:
    try:
        import trafilatura
    except ImportError as e:
        raise not_installed("data.clean.html", "", e) from e
    for name in ("trafilatura", "readability"):  # they report every page without a text on stderr
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    return trafilatura
