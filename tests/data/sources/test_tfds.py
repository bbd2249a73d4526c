import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from mlm_jax.config import InputError, SourceConfig
from mlm_jax.data import sources
from mlm_jax.data.document import Document
from mlm_jax.data.sources import local_text
from mlm_jax.data.sources import tfds as reader
from mlm_jax.data.sources.local_text import write_local_text

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 2,500 lines."""
    folder = tmp_path_factory.mktemp("written")
    (folder / "a.txt").write_text("".join(f"line {i} é\n" for i in range(2500)))
    return write_local_text(SourceConfig(source=str(folder / "a.txt"), separator="\n"), folder / "out")


@pytest.mark.parametrize(
    ("name", "field", "feature"),
    [
        ("wikipedia", "text", "text"),
        ("c4", "text", "text"),
        ("lm1b", "text", "text"),
        ("cnn_dailymail", "highlights", "highlights"),
        ("squad", "context", "context"),
        ("wmt14_translate/de-en", "de", "de"),
        ("pg19", "book_text", "book_text"),
        ("ag_news_subset", "description", "description"),
    ],
)
def test_a_data_set_gives_the_text_of_its_field(read, name, field, feature):
    with tfds.testing.mock_data(num_examples=3):
        found = read(f"tfds:{name}", text_field=field)
        examples = tfds.data_source(name, split="train")
        assert found.documents == [Document(str(e[feature]), f"tfds:{name}:{i}", url=str(e.get("url", ""))) for i, e in enumerate(examples)]
    assert len(found.documents) == 3
    assert not found.faults


def test_lists_prompts_and_splits_are_read(read):
    with tfds.testing.mock_data(num_examples=3):
        found = read("tfds:squad", text_field="answers.text", prompt_field="question", split="validation")
        examples = list(tfds.data_source("squad", split="validation"))
    assert found.texts == ["\n".join(e["answers"]["text"]) for e in examples]
    assert [document.prompt for document in found.documents] == [e["question"] for e in examples]


def test_the_wrong_field_is_refused_with_the_closest(refused):
    with tfds.testing.mock_data(num_examples=3):
        assert "Did you mean 'answers.text'? Choose from: answers.answer_start, answers.text, context" in refused(
            "tfds:squad", text_field="answer.text"
        )
        assert "holds ndarray, not text" in refused("tfds:squad", text_field="answers.answer_start")


def test_tensorflow_is_never_imported(written):
    code = (
        "import sys, tensorflow_datasets as tfds\nfrom mlm_jax.config import SourceConfig\nfrom mlm_jax.data import sources\n"
        "def read(source, field):\n"
        "    config = SourceConfig(source=source, text_field=field)\n"
        "    return [item.text for part in sources.parts(config) for item in sources.read(config, part)]\n"
        "with tfds.testing.mock_data(num_examples=3):\n"
        "    for name, field in (('wikipedia', 'text'), ('c4', 'text'), ('lm1b', 'text'), ('cnn_dailymail', 'article'), ('squad', 'context'),\n"
        "                        ('wmt14_translate/de-en', 'en'), ('pg19', 'book_text')):\n"
        "        assert len(read('tfds:' + name, field)) == 3\n"
        f"assert len(read({'tfds:' + str(written)!r}, 'text')) == 2500\n"
        "print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_a_data_set_of_ours_is_read_back_in_order(written, read):
    found = read(f"tfds:{written}")
    assert found.documents == [Document(f"line {i} é", f"tfds:{written}:{i}") for i in range(2500)]
    assert not found.faults
    assert sources.is_there(f"tfds:{written}")
    assert not sources.is_there(f"tfds:{written.parent}")
    assert sources.detail(SourceConfig(source=f"tfds:{written}")) == f"tensorflow_datasets {tfds.__version__}, local_text/1.0.0, 2500 examples"


def test_slices_and_parts_are_runs_of_examples(written, read, monkeypatch):
    monkeypatch.setattr(reader, "PART_EXAMPLES", 70)
    source = SourceConfig(source=f"tfds:{written}", split="train[:10%]")
    assert [(part.start, part.stop) for part in sources.parts(source)] == [(0, 70), (70, 140), (140, 210), (210, 250)]
    assert read(f"tfds:{written}", split="train[:10%]").texts == [f"line {i} é" for i in range(250)]


def test_prompts_addresses_and_places_are_written(tmp_path, read):
    (tmp_path / "a.jsonl").write_text('{"q": "Why?", "text": "So.", "url": "http://x"}\n{"q": "", "text": "Yes."}\n')
    folder = write_local_text(SourceConfig(source=str(tmp_path / "a.jsonl"), prompt_field="q"), tmp_path / "out")
    found = read(f"tfds:{folder}", prompt_field="prompt")
    assert [(d.prompt, d.text, d.url) for d in found.documents] == [("Why?", "So.", "http://x"), ("", "Yes.", "")]
    assert read(f"tfds:{folder}", text_field="where").texts == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:2"]
    with pytest.raises(InputError, match="holds a data set already"):
        write_local_text(SourceConfig(source=str(tmp_path / "a.jsonl")), tmp_path / "out")


def test_a_source_with_a_fault_is_not_written(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\nnot json\n')
    with pytest.raises(InputError, match=r"a\.jsonl:2: not JSON"):
        write_local_text(SourceConfig(source=str(tmp_path / "a.jsonl")), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.array_record*"))


def test_bytes_become_text_and_those_that_are_none_are_faults(read, monkeypatch):
    examples = [{"text": "é".encode()}, {"text": b"\xe9"}, {"text": 3}, {"text": [b"a", b"b"]}, {"body": b"c"}]
    monkeypatch.setattr(reader, "_examples", lambda source: examples)
    found = read("tfds:any")
    assert found.documents == [Document("é", "tfds:any:0"), Document("a\nb", "tfds:any:3")]
    assert [(fault.where, fault.kind) for fault in found.faults] == [
        ("tfds:any:1", "not UTF-8"),
        ("tfds:any:2", "field text is not text"),
        ("tfds:any:4", "no field text"),
    ]


def test_an_example_that_cannot_be_read_is_a_fault(tmp_path, read):
    (tmp_path / "a.txt").write_text("".join(f"line {i} {'x' * 500}\n" for i in range(300)))
    folder = write_local_text(SourceConfig(source=str(tmp_path / "a.txt"), separator="\n"), tmp_path / "out")
    (file,) = folder.glob("*.array_record*")
    raw = bytearray(file.read_bytes())
    middle = len(raw) // 8  # of the examples, that fill a third; what comes behind them, from the half on, is an index
    raw[middle : middle + 200] = bytes(200)
    file.write_bytes(raw)
    found = read(f"tfds:{folder}")
    assert set(found.kinds) == {"damaged example"}
    assert len(found.documents) + len(found.faults) == 300 and 0 < len(found.faults) < 10, "the others are read"


def test_a_data_set_that_lost_examples_is_a_fault(written):
    source = SourceConfig(source=f"tfds:{written}", split="train[:10]")
    items = list(sources.read(source, sources.Part(source.source, 5, 20)))
    assert [getattr(item, "kind", "") for item in items] == ["changed while being read", "", "", "", "", ""]


@pytest.mark.parametrize("name", ["no_such_dataset", "ag_news_subset/no_such_config"])
def test_an_unknown_data_set_is_one_line(refused, name):
    message = refused(f"tfds:{name}")
    assert f"data.source = tfds:{name}" in message
    assert len(message) < 500


def test_an_unknown_split_or_folder_is_one_line(tmp_path, written, refused):
    assert "Unknown split 'test'. Should be one of ['train']" in refused(f"tfds:{written}", split="test")
    assert "no folder with a dataset_info.json" in refused(f"tfds:{tmp_path}")
    assert "0 length" in refused(f"tfds:{written}", split="train[:0]")
    (tmp_path / "dataset_info.json").write_text("{")
    assert "cannot be read" in refused(f"tfds:{tmp_path}")


def test_a_data_set_for_tensorflow_alone_is_refused(written, tmp_path, refused):
    for file in written.iterdir():
        text = file.read_bytes()
        (tmp_path / file.name.replace("array_record", "tfrecord")).write_bytes(text.replace(b"array_record", b"tfrecord"))
    assert "Prepare it anew with file_format='array_record'" in refused(f"tfds:{tmp_path}")


def test_without_tensorflow_datasets_the_extra_is_named(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert 'pip install "mlm_jax[data]"' in refused("tfds:ag_news_subset")
    monkeypatch.delitem(sys.modules, local_text.__name__)
    with pytest.raises(InputError, match="mlm_jax"):
        import mlm_jax.data.sources.local_text  # noqa: F401
