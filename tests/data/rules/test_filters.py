import functools
import random

import pytest

from experiments import bench_clean
from mlm_jax.config import FILTERS
from mlm_jax.data.document import Document, Dropped
from mlm_jax.data.rules import filters


def corpus() -> list[str]:
    """Documents of which each filter keeps some and drops some for most of its reasons."""
    draw = random.Random(0)
    prose = [bench_clean.prose(draw, n) for n in (1, 4, 12, 30, 30)]
    words = prose[3].split()
    return [
        *prose,
        "\n".join(bench_clean._BOILERPLATE),
        " ".join([bench_clean.sentence(draw)] * 30),
        "\n\n".join([prose[2]] * 4),
        "\n".join("- " + line for line in prose[3].split("\n")),
        prose[3].replace(".", "..."),
        prose[3].replace("The", "# # #"),
        prose[3] + " Lorem ipsum dolor sit amet.",
        prose[3] + " A { bracket.",
        prose[3].replace("\n", " You need Javascript.\n") + "\nWe use cookies and a privacy policy, as you know.",
        prose[3] + " [1] [edit]\nno mark at the end\n" + "x" * 1001 + " is a long word.",
        "".join(words),
        " ".join(c for c in prose[3]),
        "\n".join(words),
        " ".join(str(draw.random()) for _ in range(100)),
        "Ein deutscher Satz ohne englische Wörter steht hier. " * 3 + bench_clean.OTHERS["de"],
        "IS_ALPHA " + prose[2],
        bench_clean.OTHERS["ja"],
        "\n".join(f"Line {i} is short." for i in range(40)),
        "\n".join(f"{'word' * 9}{i} end." for i in range(40)),
    ]


class Reasons:
    """What datatrove's filters write dropped documents to, in place of a folder."""

    def __init__(self):
        self.of: dict[str, str] = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def write(self, document, rank):
        self.of[document.id] = document.metadata["filter_reason"]


def theirs(block) -> list[str]:
    """What datatrove's own pipeline makes of the documents: a text, or the reason it notes."""
    from datatrove.data import Document as Theirs

    dropped = Reasons()
    kept = {d.id: d.text for d in block(exclusion_writer=dropped).run(Theirs(text=text, id=str(i)) for i, text in enumerate(corpus()))}
    return [kept.get(str(i), dropped.of.get(str(i), "")) for i in range(len(corpus()))]


@pytest.mark.parametrize("name", FILTERS)
def test_texts_and_reasons_are_those_of_datatroves_own_pipeline(name):
    from datatrove.pipeline import filters as blocks

    c4 = functools.partial(blocks.C4QualityFilter, min_num_sentences=3, min_words_per_line=5)
    block = dict(zip(FILTERS, (blocks.GopherRepetitionFilter, blocks.GopherQualityFilter, c4, blocks.FineWebQualityFilter), strict=True))
    rule = filters.quality(name)
    after = [rule.apply(Document(text, "a", url="b")) for text in corpus()]
    ours = [document.reason if isinstance(document, Dropped) else document.text for document in after]
    assert ours == theirs(block[name])
    reasons = {document.reason for document in after if isinstance(document, Dropped)}
    assert len(reasons) >= 3 and any(isinstance(document, Document) for document in after)
    assert all(document.where == "a" and document.url == "b" for document in after if isinstance(document, Document))


def test_short_pages_of_c4_itself_are_kept():
    page = "Three whole sentences are enough for C4. The paper asks for five of them. Its code asks for three only."
    rule = filters.quality("c4")
    assert rule.apply(Document(page, "")) == Document(page, "")
    assert rule.apply(Document(page.partition("Its")[0], "")) == Dropped("too_few_sentences")
    assert rule.apply(Document(f"{page}\nOnly four words here.", "")).text == page


def test_a_filter_says_the_same_again_whatever_came_between():
    chain = [filters.quality(name) for name in FILTERS]
    first = [[rule.apply(Document(text, "")) for rule in chain] for text in corpus()]
    assert [[rule.apply(Document(text, "")) for rule in chain] for text in reversed(corpus())] == first[::-1]


@pytest.mark.parametrize("sign", ["(", "'s", "%", "\u2026", "&"])
def test_a_megabyte_of_signs_is_dropped_before_it_takes_hours(sign):
    for name in FILTERS:
        assert filters.quality(name).apply(Document(sign * (1_000_000 // len(sign)), "")) == Dropped("too many signs in a row")


def test_rulers_and_long_words_are_not_too_many_signs():
    for text in ("=" * 80 + "\n" + bench_clean.prose(random.Random(0), 30), "漢字" * 5000, "x" * 10_000, ("-" * 80 + "\n") * 600):
        assert filters._signs(text) <= filters.MAX_SIGNS


def test_datatrove_says_nothing_on_its_own():
    from datatrove.pipeline.filters.base_filter import BaseFilter
    from loguru import logger

    class Warned(BaseFilter):  # datatrove warns of a batch size where nothing works in batches
        def __init__(self):
            super().__init__(batch_size=2)

        def filter(self, doc):
            return True

    filters.quality("c4")
    said: list[str] = []
    sink = logger.add(said.append)
    Warned()
    logger.remove(sink)
    assert said == []


def test_poor_pages_are_told_from_prose():
    (score,) = bench_clean.poor_pages(random.Random(1), 25).values()
    assert score.precision >= 0.95 and score.recall >= 0.95, score
