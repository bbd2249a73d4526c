import pytest

from experiments import bench_clean
from mlm_jax.data.document import Document
from mlm_jax.data.rules import mojibake


def mended(text: str) -> str:
    return mojibake.mend().apply(Document(text, "")).text


@pytest.mark.parametrize(
    ("broken", "right"),
    [  # Source: the documentation of ftfy, "ftfy: fixes text for you"; the curly quotes stay here
        ("âœ” No problems", "✔ No problems"),
        ("The Mona Lisa doesnÃƒÂ¢Ã¢â€šÂ¬Ã¢â€žÂ¢t have eyebrows.", "The Mona Lisa doesn’t have eyebrows."),
        ("l’humanitÃ©", "l’humanité"),
        ("Ã\xa0 perturber la rÃ©flexion", "à perturber la réflexion"),
        ("&lt;em&gt;schÃ¶n&lt;/em&gt;", "<em>schön</em>"),
    ],
)
def test_known_examples_are_mended(broken, right):
    assert mended(broken) == right


def test_what_is_right_stays_as_it_is():
    for text in (
        "“Ja”, sagte sie – ‘so’ …",
        "ﬁne ﬂow",
        "ＬＯＵＤ　ＮＯＩＳＥＳ「漢字」",
        "e\u0301",
        "a\r\nb\x07",
        "Ã",
        "naïve café £5 10 µm",
        "¯\\_(ツ)_/¯",
        "IL Y MARQUÉ…",
    ):
        assert mended(text) == text


def test_mojibake_is_found_and_mended_and_right_text_is_not_touched():
    (score,) = bench_clean.wrong_encodings(bench_clean.random.Random(1), 100).values()
    assert score.precision >= 0.95 and score.recall >= 0.95, score
