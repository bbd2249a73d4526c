import pytest

from experiments import bench_clean
from mlm_jax.data.document import Document, Dropped
from mlm_jax.data.rules import language


@pytest.mark.parametrize("code", [*bench_clean.OTHERS])
def test_the_language_of_a_text_is_known(code):
    found, score = language.language_of(bench_clean.OTHERS[code])
    assert found == code and 0.65 < score <= 1


def test_the_whole_text_counts_not_its_beginning():
    english = "The town lies at a wide river and has a long history. " * 3
    assert language.language_of(english + bench_clean.OTHERS["ru"] * 20)[0] == "ru"


def test_a_document_in_a_wanted_language_notes_it_and_others_are_dropped():
    rule = language.only(("de", "fr"), 0.65)
    for code, text in bench_clean.OTHERS.items():
        wanted = Document(text, "a", language=code) if code in ("de", "fr") else Dropped(f"language: {code}")
        assert rule.apply(Document(text, "a")) == wanted


def test_a_language_that_is_not_sure_enough_is_named_by_none():
    text = "12345 67890 ok"
    code, score = language.language_of(text)
    for languages in ((code,), ("xx",)):
        assert language.only(languages, min(score + 0.01, 0.99)).apply(Document(text, "")) == Dropped("language unsure")
    assert language.only((code,), max(score - 0.01, 0)).apply(Document(text, "")).language == code


def test_languages_are_told_apart():
    (score,) = bench_clean.languages(bench_clean.random.Random(1), 100).values()
    assert score.precision >= 0.95 and score.recall >= 0.95, score
