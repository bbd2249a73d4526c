import gzip
import json
import sys
from pathlib import Path

import pytest

from mlm_jax.config import DataConfig, InputError
from mlm_jax.data import text


def read(source: Path | str, **fields) -> list[tuple[str, str]]:
    return [tuple(document) for document in text.documents(DataConfig(source=str(source), **fields))]


def error(source: Path | str, **fields) -> str:
    with pytest.raises(InputError) as caught:
        read(source, **fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_text_file_is_one_document_with_its_final_newline_and_without_its_byte_order_mark(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfOne.\r\n\r\nTwo \xc3\xa9.\n")
    assert read(file) == [("One.\r\n\r\nTwo é.\n", str(file))]


def test_a_json_line_is_one_document_named_by_its_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "One\\n", "id": 1}\n\n{"text": "Two \xe2\x80\xa8 still two"}')
    assert read(file) == [("One\n", f"{file}:1"), ("Two \u2028 still two", f"{file}:3")]
    assert read(file, text_field="text") == read(file)


def test_gzip_holds_the_same_documents(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"body": "One"}\n{"body": "Two"}\n'))
    (tmp_path / "b.TXT.GZ").write_bytes(gzip.compress(b"Three\n"))
    assert [document for document, _ in read(tmp_path, text_field="body")] == ["One", "Two", "Three\n"]


def test_a_folder_is_read_in_sorted_order_without_hidden_files_links_and_other_endings(tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("outside")
    root = tmp_path / "root"
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "a.txt", ".hidden.txt", ".git/d.txt", "e.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "link.txt").symlink_to(outside)
    assert [document for document, _ in read(root)] == ["a.txt", "b.txt", "a/z.txt", "a/b/c.txt"]
    assert text.source_detail(DataConfig(source=str(root))) == "4 files, 26 bytes"


def test_a_missing_path_is_named(tmp_path):
    assert "nowhere.txt: no such file or folder" in error(tmp_path / "nowhere.txt")


def test_an_unsupported_ending_is_named_with_those_that_work(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "README").write_text("x")
    assert "cannot read .pdf. Name a .txt, .jsonl, .txt.gz or .jsonl.gz file" in error(tmp_path / "a.pdf")
    assert "cannot read a file without an ending" in error(tmp_path / "README")


def test_a_folder_without_text_files_is_refused(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    assert "the folder holds no .txt, .jsonl, .txt.gz, .jsonl.gz file" in error(tmp_path)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    def walk(root, onerror):
        onerror(PermissionError(13, "Permission denied", str(root)))
        return iter(())

    monkeypatch.setattr(text.os, "walk", walk)
    assert f"{tmp_path}: cannot be read (Permission denied)" in error(tmp_path)


def test_a_file_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    def fail(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr(Path, "open", fail)
    assert "a.txt: cannot be read (Permission denied)" in error(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.gz"])
def test_invalid_utf8_is_named_by_file_and_byte_offset(tmp_path, name):
    raw = b'\xef\xbb\xbf{"text": "good"}\n{"text": "caf\xe9"}\n'
    assert raw[33] == 0xE9
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    message = error(tmp_path / name)
    assert str(tmp_path / name) in message
    assert "not UTF-8: byte 0xe9 at offset 33" in message
    assert (f"{name}:2" in message) == ("jsonl" in name)


@pytest.mark.parametrize("line", ['{"text": "cut', "[" * 100_000, "not json"], ids=["cut short", "too deep", "no JSON"])
def test_a_bad_json_line_is_named_by_file_and_line(tmp_path, line):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n")
    assert f"{file}:2: not a JSON line" in error(file)


def test_a_json_line_that_is_no_object_is_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n["text"]\n')
    assert f"{file}:2: holds a list, not an object" in error(file)


def test_a_missing_field_is_named_with_the_fields_there_and_the_closest(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n{"texts": "x", "id": 3}\n')
    message = error(file)
    assert f"{file}:2: data.text_field = text" in message
    assert "Did you mean 'texts'?" in message
    assert "texts, id" in message


def test_a_field_that_holds_no_text_is_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": null, "id": 3}\n')
    message = error(file)
    assert f"{file}:1: data.text_field = text: holds NoneType, not text" in message
    assert "fields: text, id" in message


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: b"plain text", lambda raw: raw[:10] + b"\xff" * 20 + raw[30:]])
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    file = tmp_path / "a.txt.gz"
    file.write_bytes(damage(gzip.compress(b"some text that is long enough " * 9)))
    assert f"{file}: the gzip file is damaged or cut short" in error(file)


def test_the_python_documentation_is_large_and_imports_nothing_it_reads():
    before = set(sys.modules)
    docs = read("python-docs")
    assert {name.partition(".")[0] for name in set(sys.modules) - before} <= {"pydoc_data"}
    assert 1_500_000 < sum(len(document) for document, _ in docs) < 4_000_000
    where = {place: document for document, place in docs}
    assert where["json/__init__.py: dumps"] == json.dumps.__doc__.strip().replace("\n    ", "\n")
    assert "if_stmt" in where["pydoc_data.topics: if"]
    assert not [place for place in where if place.startswith(("site-packages", "test/", "idlelib", "unittest/test"))]
    assert text.source_detail(DataConfig(source="python-docs")) == f"Python {sys.version.split()[0]}"


def test_a_library_file_that_does_not_parse_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text('"""Never read."""\nprint "Python 2"\n')
    (tmp_path / "nul.py").write_bytes(b'"""Never read."""\n\x00')
    (tmp_path / "good.py").write_text('"""Read."""\nPATTERN = "\\d"\ndef f():\n    """Also\n    read."""\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('"""Never read."""\n')
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    docs = [document for document in read("python-docs") if not document[1].startswith("pydoc_data")]
    assert docs == [("Read.", "good.py: module"), ("Also\nread.", "good.py: f")]


def test_a_python_without_its_documentation_is_told_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "this Python came without its documentation" in error("python-docs")


def test_a_tensorflow_dataset_is_read_without_tensorflow():
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=3):
        docs = read("tfds:ag_news_subset", text_field="description")
        assert "Choose from: description, label, title" in error("tfds:ag_news_subset").replace("'", "")
        assert "holds ndarray, not text" in error("tfds:ag_news_subset", text_field="label")
    assert [where for _, where in docs] == [f"tfds:ag_news_subset:{i}" for i in range(3)]
    assert all(type(document) is str and document for document, _ in docs)
    assert "tensorflow" not in sys.modules
    assert text.source_detail(DataConfig(source="tfds:ag_news_subset")) == f"tensorflow_datasets {tfds.__version__}"


def test_tensorflow_dataset_bytes_become_text(monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(tfds, "data_source", lambda name, split: [{"text": "é".encode()}, {"text": b"\xe9"}])
    documents = text.documents(DataConfig(source="tfds:any"))
    assert next(documents) == ("é", "tfds:any:0")
    with pytest.raises(InputError, match=r"tfds:any:1: not UTF-8: byte 0xe9 at offset 0"):
        next(documents)


@pytest.mark.parametrize("name", ["no_such_dataset", "ag_news_subset/no_such_config"])
def test_an_unknown_tensorflow_dataset_is_one_line(name):
    pytest.importorskip("tensorflow_datasets")
    message = error(f"tfds:{name}")
    assert f"data.source = tfds:{name}" in message
    assert len(message) < 500


def test_without_tensorflow_datasets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert 'pip install "mlm_jax[data]"' in error("tfds:ag_news_subset")
