"""Copies are found over the whole corpus, and nothing else is taken for one."""

import hashlib
import random

import pytest

from experiments import bench_clean
from mlm_jax.config import CleanConfig, InputError
from mlm_jax.data import duplicates
from mlm_jax.data.document import Document


def test_the_hash_of_a_document_is_that_of_its_text_and_prompt():
    assert duplicates.digest_of(Document("naïve", "a")) == hashlib.sha256("naïve".encode()).digest() == duplicates.digest_of(Document("naïve", "b"))
    assert len({duplicates.digest_of(Document(text, "a", prompt)) for text, prompt in (("ab", ""), ("b", "a"), ("", "ab"), ("a", "b"))}) == 4


def test_paragraphs_are_lines_of_some_length_whatever_the_space_around_them():
    found = list(duplicates.paragraphs("short\n  a line of more \nother line\na line of more", 8))
    assert [line for line, _ in found] == [1, 2, 3]
    assert found[0][1] == found[2][1] != found[1][1]
    assert found[0][1] == hashlib.sha256(b"a line of more").digest()[:16]


def test_near_copies_are_found_as_minhash_promises_and_the_first_stays():
    """1 - (1 - s^8)^14, s the share of 5-grams that two texts have in common: 0.9998 at 1 % of the words changed, 0.30 at 5 %, 0.002 at a half."""
    found = bench_clean.near_copies(random.Random(0), 60)
    one, _, five = found.values()
    assert one.recall >= 0.96 and one.precision >= 0.96
    assert 0.1 <= five.recall <= 0.55


def test_near_copies_without_the_library_that_finds_them_are_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "datatrove.pipeline.dedup", None)
    with pytest.raises(InputError, match=r"data\.clean\.near_duplicates = True: needs a package .* pip install \"mlm_jax\[data\]\""):
        duplicates.minhash_steps(CleanConfig(near_duplicates=True), tmp_path, print)
