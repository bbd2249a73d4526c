from mlm_jax.data.clean import Audit, Count, clean
from mlm_jax.data.text import Document


def cleaned(*texts: str) -> tuple[list[str], Audit]:
    audit = Audit()
    return [document.text for document in clean([Document(text, f"doc:{i}") for i, text in enumerate(texts)], audit)], audit


def test_newlines_of_every_system_become_one_kind():
    texts, audit = cleaned("a\r\nb\rc\nd\r\n")
    assert texts == ["a\nb\nc\nd\n"]
    assert audit.newlines_changed == Count(1, 2)


def test_control_characters_go_and_tab_and_newline_stay():
    texts, audit = cleaned("".join(map(chr, range(0xA1))) + "é\ud800")
    assert texts == ["\t\n\n" + "".join(map(chr, range(0x20, 0x7F))) + "\xa0é"]  # \r has become \n
    assert audit.control_characters_removed == Count(1, 29 + 1 + 2 * 32 + 3)


def test_text_becomes_nfc():
    texts, audit = cleaned("e\u0301", "\u212b", "fine", "e\x00\u0301x")
    assert texts == ["é", "Å", "fine", "éx"]
    assert audit.nfc_changed == Count(3, 1 + 1 + 1)


def test_empty_documents_and_exact_duplicates_are_dropped_and_the_first_stays():
    texts, audit = cleaned("one", "", " \n\t", "two", "one", "on\x00e", "One")
    assert texts == ["one", "two", "One"]
    assert audit.empty_dropped == Count(2, 3)
    assert audit.duplicates_dropped == Count(2, 6)


def test_the_audit_accounts_for_every_document_and_byte():
    texts, audit = cleaned("a\r\nb", "", "e\u0301\x07", "a\nb", "\x00\x01", "naïve 🙂", "\u0958")  # NFC makes the last one longer
    rules = [audit.newlines_changed, audit.control_characters_removed, audit.nfc_changed, audit.empty_dropped, audit.duplicates_dropped]
    assert audit.read.documents == 7
    assert audit.kept == Count(len(texts), sum(len(text.encode()) for text in texts))
    assert audit.read.documents - audit.empty_dropped.documents - audit.duplicates_dropped.documents == audit.kept.documents
    assert audit.read.bytes - sum(rule.bytes for rule in rules) == audit.kept.bytes
    assert audit.to_dict()["kept"] == {"documents": audit.kept.documents, "bytes": audit.kept.bytes}


def test_a_document_keeps_its_place():
    assert list(clean([Document("a\x00", "notes.txt:7")], Audit())) == [("a", "notes.txt:7")]
