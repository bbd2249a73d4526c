import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from mlm_jax.data.document import Document, Dropped
from mlm_jax.data.rules import basic


def after(rule, text: str) -> str:
    changed = rule.apply(Document(text, "", prompt=text))
    assert changed.prompt == changed.text  # what a model reads of a prompt is no other text
    return changed.text


def test_newlines_of_every_system_become_one_kind():
    assert after(basic.NEWLINES, "a\r\nb\rc\nd\r\n") == "a\nb\nc\nd\n"


def test_control_characters_go_and_tab_and_newline_stay():
    text = "".join(map(chr, range(0xA1))) + "é\ud800"
    assert after(basic.CONTROL_CHARACTERS, text) == "\t\n" + "".join(map(chr, range(0x20, 0x7F))) + "\xa0é"


@given(st.text(st.characters()))
def test_what_control_characters_leaves_is_no_other_category_and_can_be_written(text):
    left = after(basic.CONTROL_CHARACTERS, text)
    assert {unicodedata.category(c) for c in left if c not in "\t\n"}.isdisjoint({"Cc", "Cs"})
    assert left.encode("utf-8").decode("utf-8") == left


def test_text_becomes_nfc():
    assert [after(basic.NFC, text) for text in ("e\u0301", "\u212b", "fine", "\u0958")] == ["é", "Å", "fine", "\u0915\u093c"]


def test_a_document_with_nothing_but_space_is_dropped_as_empty():
    for text in ("", " \n\t", "\u3000\u2003"):
        assert basic.EMPTY.apply(Document(text, "")) == Dropped("empty")
    assert basic.EMPTY.apply(Document(" a", "")) == Document(" a", "")


def test_more_than_a_tenth_of_control_characters_is_binary():
    rule = basic.binary(c1=True)
    for sign in "\x00\x08\x1b\x7f\x9d\ufffd\udc80":
        assert rule.apply(Document("word " * 18 + sign * 10, "")) == Document("word " * 18 + sign * 10, "")
        assert rule.apply(Document("word " * 18 + sign * 11, "")) == Dropped("binary")
    assert isinstance(rule.apply(Document("\t\r\n\f" * 100, "")), Document)
    assert isinstance(rule.apply(Document("", "")), Document)


def test_characters_that_mending_needs_are_not_binary_before_it():
    russian = "рыбы рыбу ест".encode().decode("latin-1")
    assert basic.binary(c1=True).apply(Document(russian, "")) == Dropped("binary")
    assert basic.binary(c1=False).apply(Document(russian, "")).text == russian
