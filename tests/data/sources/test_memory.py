import itertools
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import zstandard

READ = """
import resource, sys
import mlm_jax.data.sources.archives, mlm_jax.data.sources.parquet, zstandard
from mlm_jax.config import SourceConfig
from mlm_jax.data import sources

def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

source, before = SourceConfig(source=sys.argv[1]), most()
for part in sources.parts(source):
    for item in sources.read(source, part):
        print(getattr(item, "kind", "") or item[0][:9].strip())
print(most() - before)
"""


def read(path: Path) -> tuple[list[str], int]:
    """The beginnings of the documents and the kinds of the faults, and the MiB that reading them took at most, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    *items, mib = done.stdout.splitlines()
    return items, int(mib)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_line_of_300_mb_is_passed_over_with_little_memory(tmp_path, name):
    with (tmp_path / name).open("wb") as file:
        file.write(b'{"text":\n' if name == "a.txt" else b'{"text": "before"}\n')
        file.writelines(itertools.repeat(b"x" * (1 << 20), 300))
        file.write(b'\n{"text": "after"}\n')
    items, mib = read(tmp_path)
    assert items == (["before", "longer than 16 MiB", "after"] if name == "a.jsonl" else ['{"text":', "longer than 16 MiB", '{"text":'])
    assert mib < 100


LINE, NEWLINES = b"x" * (1 << 20), b"\n" * (1 << 20)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "block"),
    [("a.txt.gz", LINE), ("a.jsonl.gz", NEWLINES), ("a.jsonl.zst", NEWLINES), ("a.zip", LINE)],
    ids=["txt.gz line", "jsonl.gz newlines", "jsonl.zst newlines", "zip line"],
)
def test_what_expands_to_more_than_a_gigabyte_is_passed_over_with_little_memory(tmp_path, name, block):
    first = b'{"text": "before"}\n'
    if name.endswith(".zip"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.jsonl", "w") as file:
            file.writelines(itertools.chain([first], itertools.repeat(block, 1100)))
    elif name.endswith(".zst"):
        with zstandard.open(tmp_path / name, "wb") as file:
            for one in itertools.chain([first], itertools.repeat(block, 1100)):
                file.write(one)
    else:  # after a full flush nothing refers to what came before: the same bytes again are the same block again; it is never read to its end
        deflate = zlib.compressobj(wbits=31)
        begin, again = (deflate.compress(data) + deflate.flush(zlib.Z_FULL_FLUSH) for data in (first, block * 100))
        (tmp_path / name).write_bytes(begin + again * 11)
    items, mib = read(tmp_path)
    assert items[-1] == "expands too far"
    assert len(items) < 100
    if "txt" not in name:
        assert items[0] == "before"
    assert mib < 100
