"""Reading tokens gives what was written, learned or not, from disk and from a bucket."""

import shutil

import numpy as np
import pytest

from mlm_jax import storage
from mlm_jax.config import InputError
from mlm_jax.data import tokens
from mlm_jax.data.tokens import Tokens, open_sources, open_tokens
from tests.conftest import documents, write_tokens

SOURCES = {"web": documents(0, 12, prompts=True), "books": documents(1, 9), "chat": documents(2, 7, prompts=True)}


def written(sources, eot_id=256):
    """(ids, learned) of the documents end to end."""
    ids = [part for one in sources for document, _ in one for part in ([eot_id], document)]
    learned = [part for one in sources for _, mask in one for part in ([True], mask)]
    return np.concatenate(ids), np.concatenate(learned)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("written") / "tokens", SOURCES)


def check(opened, ids, learned, starts):
    """Rows of many lengths, across shards and around the circle, are those of the circle in one piece."""
    n = len(ids)
    assert len(opened) == n
    encoded = np.where(learned, ids, ~ids)
    draw = np.random.default_rng(0)
    for length in (1, 7, 41, n, 2 * n + 3):
        first = draw.integers(0, 3 * n, 6).tolist()
        rows = opened.read_many(first, length)
        assert rows.dtype == np.int32
        np.testing.assert_array_equal(rows, encoded[(np.array(first)[:, None] + np.arange(length)) % n])
        np.testing.assert_array_equal(opened.read(first[0], length), ids[(first[0] + np.arange(length)) % n])
    np.testing.assert_array_equal(opened.starts, starts)
    assert (ids[opened.starts.astype(int)] == 256).all()


def check_folder(place):
    found = open_sources(place, "train")
    assert [one.name for one in found] == list(SOURCES)
    for one, source in zip(found, SOURCES.values(), strict=True):
        ids, learned = written([source])
        check(one, ids, learned, np.cumsum([0, *(len(document) + 1 for document, _ in source)])[:-1])
    ids, learned = written(SOURCES.values())
    assert not learned.all()
    check(open_tokens(place, "train"), ids, learned, np.flatnonzero(ids == 256))


def test_rows_are_the_tokens_that_were_written_and_those_that_are_not_learned_their_complement(folder):
    check_folder(folder)


def test_a_source_without_prompts_needs_no_masks(folder):
    (books,) = (one for one in open_sources(folder, "train") if one.name == "books")
    assert not list(folder.glob("books*.mask")) and list(folder.glob("web*.mask")) and (books.read_many([0], 100) >= 0).all()


def test_nanogpt_shards_elsewhere_are_read_where_they_lie(folder, tmp_path):
    moved = tmp_path / "tokens"
    shutil.copytree(folder, moved)
    text = (moved / "manifest.json").read_text()
    for path in sorted(moved.glob("books_train*.bin")):
        (tmp_path / path.name).write_bytes(path.read_bytes()[1024:])
        path.unlink()
        before, file, after = text.partition(f'"file": "{path.name}"')
        text = before + file.replace(path.name, str(tmp_path / path.name)) + after.replace('"header": true', '"header": false', 1)
    (moved / "manifest.json").write_text(text.replace('"source": "books.txt"', f'"source": "bin:{tmp_path}"'))
    (books,) = (one for one in open_sources(moved, "train") if one.name == "books")
    ids, _ = written([SOURCES["books"]])
    np.testing.assert_array_equal(books.read_many([3], 500), ids[(3 + np.arange(500)) % len(ids)][None])


def damage(folder, tmp_path, name, content):
    copy = tmp_path / name.replace(".", "_")
    shutil.copytree(folder, copy)
    (copy / name).unlink() if content is None else (copy / name).write_bytes(content((copy / name).read_bytes()))
    return copy


DAMAGES = {
    "missing shard": ("web_train_000001.bin", None, r"web_train_000001\.bin: .*missing"),
    "short shard": ("web_train_000001.bin", lambda raw: raw[:-1], r"web_train_000001\.bin: cut short: 1103 bytes, 1104 expected"),
    "long shard": ("web_train_000001.bin", lambda raw: raw + b"0", r"web_train_000001\.bin: too long: 1105 bytes"),
    "shard of another kind": ("web_train_000001.bin", lambda raw: b"1234" + raw[4:], r"web_train_000001\.bin: not a token shard"),
    "shard of another length": ("web_train_000001.bin", lambda raw: raw[:8] + b"\7" + raw[9:], r"its header says 7 tokens"),
    "less than a header": ("web_train_000001.bin", lambda raw: raw[:6], r"web_train_000001\.bin: .*6 bytes"),
    "missing mask": ("web_train_000001.mask", None, r"web_train_000001\.mask: is missing, manifest\.json tells of 40 bytes"),
    "short mask": ("web_train_000001.mask", lambda raw: raw[:-1], r"web_train_000001\.mask: cut short: 39 bytes, 40 expected"),
    "short starts": ("web_train.starts", lambda raw: raw[:-8], r"web_train\.starts: cut short: 88 bytes, 96 expected"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_named_in_one_line(folder, tmp_path, name):
    file, content, message = DAMAGES[name]
    with pytest.raises(InputError, match=message):
        _ = open_tokens(damage(folder, tmp_path, file, content), "train").starts


def test_tokens_of_which_nobody_wrote_down_where_documents_start_say_so():
    with pytest.raises(InputError, match="nothing tells where the documents start"):
        _ = Tokens([np.arange(3)]).starts


# ---- in a bucket ----


def sent(folder, name):
    place = storage.place(f"gs://bucket/{name}")
    storage.send(folder, [path.name for path in folder.iterdir()], place)
    return place


@pytest.fixture(scope="module")
def there(running, folder):
    return sent(folder, "written")


def test_a_bucket_gives_the_same_rows_masks_and_starts_as_the_disk(there):
    check_folder(there)


def test_only_the_tokens_that_are_asked_for_are_fetched_and_all_at_once(there, server, monkeypatch):
    opened, asked = open_tokens(there, "train"), []
    plain = storage.read_ranges
    monkeypatch.setattr(storage, "read_ranges", lambda parts: (asked.append(list(parts)), plain(parts))[1])
    requests = []
    server.answer = lambda method, name: requests.append(name)
    opened.read_many([0, 90, 200], 20)
    assert len(asked) == 1 and len(requests) == len(asked[0])
    shards = [part for part in asked[0] if part[0].suffix == ".bin"]
    assert sum(stop - start for _, start, stop in shards) == 3 * 20 * 2
    assert all(start >= 1024 for _, start, _ in shards) and len(shards) < len(asked[0])  # behind the header, and masks
    asked.clear()
    tokens.fill([(one, 0, np.empty(5, np.int32)) for one in open_sources(there, "val")])
    assert len({part[0].name.partition("_")[0] for part in asked[-1]}) == 3  # of all sources together


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_in_a_bucket_is_named_in_one_line(folder, server, tmp_path, name):
    file, content, message = DAMAGES[name]
    place = sent(damage(folder, tmp_path, file, content), f"damaged_{name.replace(' ', '_')}")
    with pytest.raises(InputError, match=message):
        _ = open_tokens(place, "train").starts


def test_a_bucket_that_fails_for_a_while_is_asked_again_and_one_that_goes_on_failing_is_named(there, server, monkeypatch):
    import gcsfs.retry

    opened, expected, seen = open_tokens(there, "train"), open_tokens(there, "train").read_many([0], 10), []

    async def at_once(seconds):
        pass

    monkeypatch.setattr(gcsfs.retry.asyncio, "sleep", at_once)
    server.answer = lambda method, name: (seen.append(name), 503 if len(seen) <= 3 else None)[1]
    np.testing.assert_array_equal(opened.read_many([0], 10), expected)
    seen.clear()
    server.answer = lambda method, name: (seen.append(name), 503)[1]
    with pytest.raises(storage.NotReached, match=r"^gs://bucket/written cannot be reached: "):
        opened.read_many([0], 10)
    assert 0 < len(seen) <= 2 * 6  # of a shard and of its mask


def test_an_object_that_has_become_shorter_is_named(there, server, folder):
    opened = open_tokens(there, "train")
    shard = there / "web_train_000000.bin"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:1030])
    try:
        with pytest.raises(storage.NotReached, match=r"web_train_000000\.bin cannot be read: 6 bytes came of 20 from byte 1024 on"):
            opened.read_many([0], 10)
    finally:
        shard.write_bytes(raw)
