import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlm_jax.config import SourceConfig
from mlm_jax.data import sources
from mlm_jax.data.document import Document

README = """---
configs:
- config_name: en
  data_files:
  - {split: train, path: english.jsonl}
  - {split: test, path: few.jsonl}
- config_name: de
  data_files:
  - {split: train, path: german/*.jsonl}
---
"""


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of three Parquet files."""
    for i in range(3):
        table = pa.table({"text": [f"{i}-{j} é" for j in range(4)], "answers": [{"text": ["a", f"{j}"]} for j in range(4)], "n": [1, 2, 3, 4]})
        pq.write_table(table, tmp_path / f"train-{i:05d}-of-00003.parquet")
    return tmp_path


@pytest.fixture
def configured(tmp_path: Path) -> Path:
    """A folder whose README names two configurations."""
    (tmp_path / "german").mkdir()
    (tmp_path / "README.md").write_text(README)
    for name, texts in {"english": ["one", "two"], "few": ["three"], "german/a": ["eins"], "german/b": ["zwei"]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text, "url": f"http://{text}"}) + "\n" for text in texts))
    return tmp_path


def test_a_folder_gives_what_the_library_gives_shard_by_shard(shards, read):
    source = f"hf:{shards}"
    assert [(part.start, part.stop) for part in sources.parts(SourceConfig(source=source))] == [(0, 1), (1, 2), (2, 3)]
    found = read(source)
    assert found.texts == [row["text"] for row in datasets.load_dataset("parquet", data_dir=str(shards), split="train", streaming=True)]
    assert found.documents[5] == Document("1-1 é", f"{source}:1:1")
    assert not found.faults
    assert read(source, text_field="answers.text").texts[:2] == ["a\n0", "a\n1"]


def test_configurations_and_splits_are_chosen(configured, read, refused):
    assert read(f"hf:{configured}/en").documents == [Document(t, f"hf:{configured}/en:{i}", url=f"http://{t}") for i, t in enumerate(("one", "two"))]
    assert read(f"hf:{configured}/en", split="test").texts == ["three"]
    assert read(f"hf:{configured}/de").texts == ["eins", "zwei"]
    assert "BuilderConfig 'fr' not found. Available: ['en', 'de']" in refused(f"hf:{configured}/fr")
    assert "Bad split: dev. Available splits: ['train', 'test']" in refused(f"hf:{configured}/en", split="dev")
    assert "Config name is missing" in refused(f"hf:{configured}")


def test_the_wrong_field_is_refused_with_the_closest(shards, refused):
    assert f"hf:{shards}:0:0: data.text_field = txt: unknown. Did you mean 'text'? Choose from: text, answers.text, n." in refused(
        f"hf:{shards}", text_field="txt"
    )
    assert "holds int, not text" in refused(f"hf:{shards}", text_field="n")


def test_a_folder_is_there_and_told_with_its_files(shards):
    size = sum(path.stat().st_size for path in shards.iterdir())
    assert sources.is_there(f"hf:{shards}")
    assert not sources.is_there(f"hf:{shards}/no/such")
    assert sources.detail(SourceConfig(source=f"hf:{shards}")) == f"datasets {datasets.__version__}, 3 files, {size} bytes"
    assert sources.detail(SourceConfig(source="hf:openai/gsm8k/main")) == f"datasets {datasets.__version__}"


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:200]), Path.unlink])
def test_a_damaged_or_lost_shard_does_not_end_the_others(shards, damage):
    source = SourceConfig(source=f"hf:{shards}")
    parts = sources.parts(source)
    damage(shards / "train-00001-of-00003.parquet")
    items = [item for part in parts for item in sources.read(source, part)]
    kinds = [item.kind for item in items if not isinstance(item, Document)]
    assert len(kinds) == 1
    assert kinds[0] in ("damaged shard", "changed while being read")
    assert len([item for item in items if isinstance(item, Document)]) == 8


def test_a_name_on_the_hub_without_a_network_is_one_line():
    code = (
        "from mlm_jax.config import InputError, SourceConfig\nfrom mlm_jax.data import sources\n"
        "for name in ('squad', 'wikimedia/wikipedia', 'wikimedia/wikipedia/20231101.en'):\n"
        "    try:\n        sources.parts(SourceConfig(source='hf:' + name))\n"
        "    except InputError as e:\n        print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(": cannot be opened")[0] for line in lines] == [
        "data.source = hf:squad",
        "data.source = hf:wikimedia/wikipedia",
        "data.source = hf:wikimedia/wikipedia/20231101.en",
    ]
    assert all("HF_HUB_OFFLINE" in line for line in lines)
    assert all("on the Hub" in line for line in lines)


def test_without_datasets_the_extra_is_named(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert 'pip install "mlm_jax[data]"' in refused("hf:squad")
