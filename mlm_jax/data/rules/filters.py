"""The filters of well-known corpora, by datatrove. They are made for English: their stop words and their marks of a sentence's end are."""

import re
from typing import Any

from mlm_jax.data.document import Document, Dropped, Rule
from mlm_jax.data.rules.basic import not_installed

# spaCy, which counts the words, peels signs off both ends of what stands between spaces, in time that grows with the square of its length:
# some 0.25 microseconds for each unit of the sum of squares. Rulers of 80 signs come to the limit when there are 625 of them.
MAX_SIGNS = 4_000_000
_LONG = re.compile(r"\S{64,}")

# The numbers by which C4 was made, and which its paper gives as 5 and 3. With the paper's, which are datatrove's, one page in seven of C4 itself is
# dropped. Source: tensorflow_datasets/text/c4_utils.py, _MIN_NUM_SENTENCES and _MIN_WORDS_PER_LINE.
C4_SENTENCES = 3  # of a page, at least
C4_WORDS = 5  # of a line, at least


def quality(name: str) -> Rule:
    """A filter of datatrove under a name of `config.FILTERS`; the thresholds, but for those of c4, and the reasons are datatrove's.

    gopher_repetition, gopher_quality: Rae et al. 2021, appendix A. c4: Raffel et al. 2020, section 2.2, which also drops lines; without the
    list of words, which datatrove downloads. fineweb: Penedo et al. 2024, section 3.6.
    """
    keeps, make = _filter(name)

    def apply(document: Document) -> Document | Dropped:
        if _signs(document.text) > MAX_SIGNS:
            return Dropped("too many signs in a row")
        theirs = make(text=document.text, id="")
        verdict = keeps(theirs)
        kept, reason = verdict if isinstance(verdict, tuple) else (verdict, name)
        return document._replace(text=theirs.text) if kept else Dropped(reason)

    return Rule(name, apply)


def _signs(text: str) -> int:
    """The sum of squares of the lengths of what stands between spaces, is long and consists of signs by half or more."""
    return sum(len(word) ** 2 for word in _LONG.findall(text) if 2 * sum(map(str.isalnum, word)) <= len(word))


def _filter(name: str) -> tuple[Any, Any]:
    """datatrove's filter, and its class of documents."""
    try:
        from datatrove.data import Document as Theirs
        from datatrove.pipeline import filters
        from loguru import logger
    except ImportError as e:
        raise not_installed("data.clean.filters", name, e) from e
    logger.disable("datatrove")
    makes = {
        "gopher_repetition": filters.GopherRepetitionFilter,
        "gopher_quality": filters.GopherQualityFilter,
        "c4": lambda: filters.C4QualityFilter(min_num_sentences=C4_SENTENCES, min_words_per_line=C4_WORDS),
        "fineweb": filters.FineWebQualityFilter,
    }
    try:
        keeps = makes[name]().filter
        keeps(Theirs(text="A few words of English to load spaCy. " * 60, id=""))
    except ImportError as e:
        raise not_installed("data.clean.filters", name, e) from e
    return keeps, Theirs
