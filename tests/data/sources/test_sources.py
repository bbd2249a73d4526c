import gzip
import json
import sys
from pathlib import Path

import pytest

from mlm_jax.config import DataConfig, InputError, SourceConfig
from mlm_jax.data import sources
from mlm_jax.data.document import Document
from mlm_jax.data.sources import files


def detail(source: Path | str) -> str:
    return sources.detail(SourceConfig(source=str(source)))


def test_a_folder_is_read_in_sorted_order_without_hidden_files_links_and_other_endings(tmp_path, read):
    outside = tmp_path / "outside.txt"
    outside.write_text("outside")
    root = tmp_path / "root"
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "a.txt", ".hidden.txt", ".git/d.txt", "e.pdf", "f.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "link.txt").symlink_to(outside)
    assert read(root).texts == ["a.txt", "b.txt", "f.md", "a/z.txt", "a/b/c.txt"]
    assert detail(root) == "5 files, 30 bytes"


def test_a_pattern_names_files_and_follows_no_link(tmp_path, read, refused):
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "a.jsonl", ".hidden/d.txt", "a/.e.txt", "B.TXT"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for i in range(3):  # three at one level would be 3^40 paths
        (tmp_path / "a" / f"loop{i}").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "a" / "link.txt").symlink_to(tmp_path / "b.txt")
    for pattern, found in {
        "*.txt": ["b.txt"],
        "*.[tT]*": ["B.TXT", "b.txt"],
        "**/*.txt": ["a/b/c.txt", "a/z.txt", "b.txt"],
        "*/*.txt": ["a/z.txt"],
        "a/**": ["a/b/c.txt", "a/z.txt"],
        "?/b/../?.txt": ["a/b/../z.txt"],
        ".hid*/*": [".hidden/d.txt"],
        "**/**/c.txt": ["a/b/c.txt"],
    }.items():
        assert [Path(d.where).relative_to(tmp_path).as_posix() for d in read(tmp_path / pattern).documents] == found, pattern
        assert sources.is_there(str(tmp_path / pattern))
    assert detail(tmp_path / "**/*.txt") == "3 files, 21 bytes"
    assert "no file matches" in refused(tmp_path / "*.html")
    assert not sources.is_there(str(tmp_path / "*.html"))


def test_a_file_whose_name_is_a_pattern_is_that_file(tmp_path, read):
    (tmp_path / "[a]*.txt").write_text("this")
    (tmp_path / "a.txt").write_text("that")
    assert read(tmp_path / "[a]*.txt").texts == ["this"]


def test_a_missing_path_is_named(tmp_path, refused):
    assert "nowhere.txt: no such file or folder" in refused(tmp_path / "nowhere.txt")


def test_an_unsupported_ending_is_named_with_those_that_work(tmp_path, refused):
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "README").write_text("x")
    message = refused(tmp_path / "a.pdf")
    assert "cannot read .pdf. Name a file (.txt, .md," in message
    for ending in files.ENDINGS:
        assert ending in message
    assert "cannot read a file without an ending" in refused(tmp_path / "README")


def test_a_folder_or_pattern_without_text_files_is_refused(tmp_path, refused):
    (tmp_path / "a.pdf").write_text("x")
    assert "the folder holds no .txt" in refused(tmp_path)
    assert "the pattern holds no .txt" in refused(tmp_path / "*")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, refused, monkeypatch):
    def walk(root, onerror):
        onerror(PermissionError(13, "Permission denied", str(root)))
        return iter(())

    monkeypatch.setattr(files.os, "walk", walk)
    assert f"{tmp_path}: cannot be read (Permission denied)" in refused(tmp_path)


def test_a_folder_whose_files_must_not_be_looked_at_is_named(tmp_path, refused, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr(Path, "is_file", refuse)
    assert f"{tmp_path}/a.txt: cannot be read (Permission denied)" in refused(tmp_path)


@pytest.mark.parametrize(("library", "name"), [("zstandard", "a.txt.zst"), ("pyarrow", "a.parquet"), ("warcio", "a.warc.gz")])
def test_without_the_library_that_reads_a_file_the_extra_is_named(tmp_path, refused, monkeypatch, library, name):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, library, None)
    assert f'({library}). pip install "mlm_jax[data]"' in refused(tmp_path)


def test_the_first_record_must_have_the_fields(tmp_path, refused):
    file = tmp_path / "a.jsonl"
    file.write_text('\n[1]\nnot json\n{"texts": "x", "id": 3, "deep": {"er": "y"}}\n')
    message = refused(file)
    assert f"{file}:4: data.text_field = text: unknown. Did you mean 'texts'? Choose from: texts, id, deep.er." in message
    assert "Did you mean 'deep.er'?" in refused(file, text_field="deep.err")
    assert "data.prompt_field = promt: unknown" in refused(file, text_field="texts", prompt_field="promt")
    assert f"{file}:4: data.text_field = id: holds int, not text" in refused(file, text_field="id")


def test_the_fields_are_looked_for_where_there_are_records(tmp_path, refused):
    for name, raw in {"a.txt": b"text", "b.jsonl": b'{"txt": "x"}\n'}.items():
        for compression, pack in {"": bytes, ".gz": gzip.compress}.items():
            folder = tmp_path / f"folder{compression}"
            folder.mkdir(exist_ok=True)
            (folder / (name + compression)).write_bytes(pack(raw))
    for compression in ("", ".gz"):
        assert "Did you mean 'txt'?" in refused(tmp_path / f"folder{compression}")


def test_fields_of_fields_and_lists_become_text(tmp_path, read):
    record = {
        "translation": {"en": "one"},
        "answers": {"text": ["a", "b"]},
        "turns": [{"say": "x"}, {"say": "y"}],
        "a.b": "flat",
        "none": [],
        "url": "u",
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    for field, text in {"translation.en": "one", "answers.text": "a\nb", "turns.say": "x\ny", "a.b": "flat", "none": ""}.items():
        assert read(tmp_path, text_field=field).documents == [Document(text, f"{tmp_path}/a.jsonl:1", url="u")]


def test_prompt_and_address_come_along(tmp_path, read):
    lines = [{"q": "Why?", "a": "So.", "at": "http://x"}, {"q": "Why\ud800", "a": "So.", "at": 3}, {"a": "So."}, {"q": None, "a": "So."}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read(tmp_path, text_field="a", prompt_field="q", url_field="at")
    assert [(d.text, d.prompt, d.url) for d in found.documents] == [("So.", "Why?", "http://x"), ("So.", "Why?", "")]
    assert found.kinds == ["no field q", "field q is not text"]


def test_where_a_schema_changes_midway_the_records_with_the_field_go_on(tmp_path, read):
    lines = [{"text": "one"}, {"body": "two"}, {"text": "three", "more": 1}, {"text": 4}, {"text": None}, {"text": {"x": "y"}}, {"text": ["f", "g"]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read(tmp_path)
    assert found.texts == ["one", "three", "f\ng"]
    assert found.kinds == ["no field text"] + ["field text is not text"] * 3
    assert found.faults[0].detail == "fields: body"
    assert [fault.bytes for fault in found.faults] == [len(json.dumps(lines[i])) for i in (1, 3, 4, 5)]


def test_a_source_that_must_be_whole_is_refused_at_its_first_fault(tmp_path):
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_text("")  # nothing is lost by this one
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    documents = sources.documents(SourceConfig(source=str(tmp_path)))
    assert next(documents).text == "good"
    with pytest.raises(InputError, match=r"c.txt: not UTF-8 \(byte 0xe9 at offset 3 \(unexpected end of data\)\)\. Mend it"):
        next(documents)


def test_tokens_are_no_text(tmp_path, refused):
    (tmp_path / "a.bin").write_bytes(b"12345678")
    assert f"data.source = bin:{tmp_path}: holds tokens, not text" in refused(f"bin:{tmp_path}")
    for source in (f"bin:{tmp_path}", f"bin:{tmp_path}/a.bin", f"bin:{tmp_path}/*.bin"):
        assert sources.is_there(source)
        assert detail(source) == "1 file, 8 bytes"
    assert not sources.is_there(f"bin:{tmp_path}/b.bin")
    with pytest.raises(InputError, match="no such file"):
        detail(f"bin:{tmp_path}/b.bin")


def test_what_comes_with_a_package_is_not_there(tmp_path):
    assert [sources.is_there(source) for source in ("python-docs", "tfds:wikipedia", "hf:openai/gsm8k", str(tmp_path))] == [False, False, False, True]


def test_parts_pass_through_json(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    config = SourceConfig(source=str(tmp_path))
    (part,) = sources.parts(config)
    assert list(sources.read(config, sources.Part(*json.loads(json.dumps(part))))) == [Document("x", str(tmp_path / "a.txt"))]


def test_the_python_documentation_is_large_and_imports_nothing_it_reads(read):
    before = set(sys.modules)
    found = read("python-docs")
    assert {name.partition(".")[0] for name in set(sys.modules) - before} <= {"pydoc_data"}
    assert not found.faults
    assert 1_500_000 < sum(map(len, found.texts)) < 4_000_000
    where = {document.where: document.text for document in found.documents}
    assert where["json/__init__.py: dumps"] == json.dumps.__doc__.strip().replace("\n    ", "\n")
    assert "if_stmt" in where["pydoc_data.topics: if"]
    assert not [place for place in where if place.startswith(("site-packages", "test/", "idlelib", "unittest/test"))]
    assert detail("python-docs") == f"Python {sys.version.split()[0]}"


def test_a_library_file_that_does_not_parse_is_left_out(tmp_path, read, monkeypatch):
    (tmp_path / "bad.py").write_text('"""Never read."""\nprint "Python 2"\n')
    (tmp_path / "nul.py").write_bytes(b'"""Never read."""\n\x00')
    (tmp_path / "good.py").write_text('"""Read."""\nPATTERN = "\\d"\ndef f():\n    """Also\n    read."""\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('"""Never read."""\n')
    from mlm_jax.data.sources import python_docs

    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda name: str(tmp_path))
    found = [document for document in read("python-docs").documents if not document.where.startswith("pydoc_data")]
    assert found == [Document("Read.", "good.py: module"), Document("Also\nread.", "good.py: f")]


def test_a_python_without_its_documentation_is_told_so(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "this Python came without its documentation" in refused("python-docs")


def test_a_whole_configuration_is_a_source_too(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert [d.text for d in sources.documents(DataConfig(source=str(tmp_path)))] == ["x"]
