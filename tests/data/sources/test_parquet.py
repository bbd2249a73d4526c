import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlm_jax.config import SourceConfig
from mlm_jax.data import sources
from mlm_jax.data.document import Document
from mlm_jax.data.sources import parquet


def texts(count: int) -> list[str]:
    return [f"{i} é {random.Random(i).getrandbits(3000):x}" for i in range(count)]


@pytest.mark.parametrize("compression", ["snappy", "zstd", "gzip", "none"])
def test_the_rows_are_those_that_pyarrow_reads(tmp_path, read, compression):
    table = pa.table({"id": list(range(500)), "text": texts(500), "url": [f"http://x/{i}" for i in range(500)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=70, compression=compression)
    found = read(tmp_path)
    assert found.texts == pq.read_table(tmp_path / "a.parquet")["text"].to_pylist()
    assert found.documents[71] == Document(texts(72)[-1], f"{tmp_path}/a.parquet:72", url="http://x/71")
    assert not found.faults


def test_row_groups_are_parts(tmp_path, read, monkeypatch):
    monkeypatch.setattr(parquet, "PART_BYTES", 200_000)
    pq.write_table(pa.table({"text": texts(1000)}), tmp_path / "a.parquet", row_group_size=70)
    found = sources.parts(SourceConfig(source=str(tmp_path)))
    assert [(part.start, part.stop) for part in found] == [(0, 3), (3, 6), (6, 9), (9, 12), (12, 0)]
    assert read(tmp_path).texts == texts(1000)
    assert [document.where for document in read(tmp_path).documents] == [f"{tmp_path}/a.parquet:{i + 1}" for i in range(1000)]


def test_nested_columns_and_all_kinds_of_text_are_read(tmp_path, read):
    table = pa.table(
        {
            "translation": [{"en": "one", "de": "eins"}],
            "answers": [{"text": ["a", "b"]}],
            "large": pa.array(["l"], pa.large_string()),
            "dictionary": pa.array(["d"]).dictionary_encode(),
            "binary": pa.array(["é".encode()], pa.binary()),
            "view": pa.array(["v"], pa.string()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    for field, text in {"translation.de": "eins", "answers.text": "a\nb", "large": "l", "dictionary": "d", "binary": "é", "view": "v"}.items():
        assert read(tmp_path, text_field=field).texts == [text]


def test_a_missing_column_is_named_with_the_closest(tmp_path, refused):
    pq.write_table(pa.table({"txt": ["a"], "n": [{"x": 1}]}), tmp_path / "a.parquet")
    assert f"{tmp_path}/a.parquet:1: data.text_field = text: unknown. Did you mean 'txt'? Choose from: txt, n.x." in refused(tmp_path)
    assert "holds int, not text" in refused(tmp_path, text_field="n.x")


def test_of_files_with_other_columns_those_without_are_faults(tmp_path, read):
    pq.write_table(pa.table({"text": ["a", None, "c"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"body": ["d", "e", "f"]}), tmp_path / "b.parquet", row_group_size=2)
    found = read(tmp_path)
    assert found.texts == ["a", "c"]
    assert found.kinds == ["field text is not text", "no field text", "no field text"]
    assert [(fault.where, fault.detail) for fault in found.faults[1:]] == [(f"{tmp_path}/b.parquet:{row}", "fields: body") for row in (1, 3)]


def test_bytes_that_are_not_utf8_are_faults(tmp_path, read):
    values = pa.array([b"good", b"caf\xe9", b"more"])
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 3, values.buffers())}), tmp_path / "b.parquet")
    found = read(tmp_path)
    assert found.texts == ["good", "more"] * 2
    assert [(f.where, f.kind, f.detail) for f in found.faults] == [
        (f"{tmp_path}/{name}.parquet:2", "not UTF-8", "byte 0xe9 at offset 3 (unexpected end of data)") for name in "ab"
    ]


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"no parquet", lambda raw: raw[:-8] + bytes(4) + raw[-4:]])
def test_a_file_without_its_footer_is_a_fault(tmp_path, read, damage):
    pq.write_table(pa.table({"text": texts(100)}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes(damage((tmp_path / "a.parquet").read_bytes()))
    assert read(tmp_path).kinds == ["damaged parquet"]


@pytest.mark.parametrize("sums", [True, False])
def test_a_damaged_row_group_does_not_end_the_others(tmp_path, read, sums):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts(300)}), file, row_group_size=100, compression="zstd", write_page_checksum=sums, use_dictionary=False)
    column = pq.read_metadata(file).row_group(1).column(0)
    raw = bytearray(file.read_bytes())
    at = column.data_page_offset + column.total_compressed_size // 2
    raw[at : at + 40] = bytes(40)
    file.write_bytes(raw)
    found = read(tmp_path)
    assert found.texts[:100] == texts(100)
    assert found.texts[-100:] == texts(300)[-100:]
    assert found.kinds == ["damaged parquet"]


def test_the_sum_of_a_page_is_looked_at(tmp_path, read):
    file = tmp_path / "a.parquet"
    settings = {"compression": "none", "use_dictionary": False, "write_statistics": False}  # so that the text stands there once
    pq.write_table(pa.table({"text": texts(10)}), file, write_page_checksum=True, **settings)
    raw = file.read_bytes()
    file.write_bytes(raw.replace(texts(1)[0].encode(), texts(1)[0].upper().encode(), 1))
    assert read(tmp_path).kinds == ["damaged parquet"]


def test_a_file_that_changes_is_a_fault(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts(300)}), file, row_group_size=100)
    config = SourceConfig(source=str(file))
    (part,) = sources.parts(config)
    for count in (250, 90, 301):
        pq.write_table(pa.table({"text": texts(count)}), file, row_group_size=100)
        assert [item.kind for item in sources.read(config, part)] == ["changed while being read"]


def test_a_file_without_rows_is_an_empty_one(tmp_path, read):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"")
    assert read(tmp_path).kinds == ["empty file", "damaged parquet"]


def test_a_cell_longer_than_16_mib_is_a_fault(tmp_path, read):
    pq.write_table(pa.table({"text": ["a", "é" * (9 << 20), "b"]}), tmp_path / "a.parquet")
    found = read(tmp_path)
    assert found.texts == ["a", "b"]
    assert [(fault.kind, fault.bytes) for fault in found.faults] == [("longer than 16 MiB", 18 << 20)]
