import gzip
import itertools
import json
import random
import re
import string

import numpy as np
import pytest

from experiments import bench_clean
from mlm_jax.config import InputError
from mlm_jax.data.document import Document, Dropped
from mlm_jax.data.rules import overlap

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
IN_SET = Dropped("in evaluation set held-out")


def rule(*passages, n_words: int = 13, name: str = "held-out"):
    return overlap.decontaminate((name,), n_words, lambda source: iter(passages))


def test_a_run_of_thirteen_words_is_found_and_one_of_twelve_is_not():
    check = rule(" ".join(WORDS))
    for first in range(4):
        assert check.apply(Document(f"x {' '.join(WORDS[first : first + 13])} y", "")) == IN_SET
        assert isinstance(check.apply(Document(f"x {' '.join(WORDS[first : first + 12])} y", "")), Document)
    assert isinstance(check.apply(Document(" ".join([*WORDS[:6], "x", *WORDS[6:]]), "")), Document)
    assert isinstance(check.apply(Document("", "")), Document)


def test_capitals_punctuation_and_line_breaks_hide_nothing():
    check = rule("It's a long day, and the well-known old river does not reach the town's wall.")
    for text in (
        "IT’S A LONG DAY AND THE WELL KNOWN OLD RIVER DOES NOT REACH THE TOWNS WALL",
        "its a — long — day—and\nthe (well-known) 'old' river; does not\treach the town's wall",
    ):
        assert check.apply(Document(text, "")) == IN_SET


def test_an_apostrophe_is_no_end_of_a_word():
    check = rule("one two three four five six we don't nine ten eleven twelve thirteen")
    for word in ("dont", "don’t", "DON'T"):
        assert check.apply(Document(f"one two three four five six we {word} nine ten eleven twelve thirteen", "")) == IN_SET


def test_a_passage_shorter_than_a_run_counts_as_a_whole_from_eight_words_on():
    for n in (8, 10, 12):
        check = rule(" ".join(WORDS[:n]))
        assert check.apply(Document(f"x {' '.join(WORDS[:n])} y", "")) == IN_SET
        assert isinstance(check.apply(Document(f"x {' '.join(WORDS[1:n])} y", "")), Document)
    check = rule(" ".join(WORDS), " ".join(WORDS[7::-1]), " ".join(WORDS[9::-1]))
    for words in (WORDS[:13], WORDS[7::-1], WORDS[9::-1]):
        assert check.apply(Document(" ".join(words), "")) == IN_SET
    check = rule(" ".join(WORDS[:7]), " ".join(WORDS[3:]))
    assert isinstance(check.apply(Document(" ".join(WORDS[:7]), "")), Document)
    assert rule("one two three", n_words=3).apply(Document("one two three four", "")) == IN_SET


def test_a_run_across_the_end_of_a_prompt_is_found():
    assert rule(" ".join(WORDS)).apply(Document(" ".join(WORDS[8:]), "", prompt=" ".join(WORDS[:8]))) == IN_SET


def test_every_text_of_a_record_counts_at_any_depth():
    record = {"id": 7, "question": "short", "answers": {"text": [" ".join(WORDS)], "start": [1, None, True]}}
    assert rule(record).apply(Document(" ".join(WORDS), "")) == IN_SET


def test_runs_are_those_of_a_plain_search():
    draw = random.Random(0)

    def text(n: int) -> str:
        return " ".join(draw.choices("ab", k=n))

    passages = [text(draw.randrange(1, 30)) for _ in range(20)]
    check = rule(*passages, n_words=11)

    def runs(words: list[str], n: int) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    verdicts = []
    for _ in range(400):
        document = text(draw.randrange(5, 60))
        wanted = any(runs(document.split(), n) & runs(p.split(), n) for p in passages if len(p.split()) >= 8 for n in [min(11, len(p.split()))])
        verdicts.append(wanted)
        assert isinstance(check.apply(Document(document, "")), Dropped) == wanted
    assert 50 < sum(verdicts) < 350


def test_hashes_are_the_same_in_every_process_and_written_down():
    # What `printf one | b2sum -l 64` of the GNU coreutils prints, and so on; then Python's whole numbers.
    words = [int.from_bytes(bytes.fromhex(printed), "little") for printed in ("34f2ddaa8b7615c9", "f5ee556c794a0703", "32b5d0aefab6439e")]
    base = 0x9E3779B97F4A7C15
    assert overlap._word_hashes("One, two -- three!").tolist() == words
    assert overlap._runs(np.array(words, np.uint64), 2).tolist() == [(a * base + b) % 2**64 for a, b in itertools.pairwise(words)]


def test_the_index_has_ten_bytes_for_each_different_run():
    passage = " ".join(f"w{i}" for i in range(500))
    hashes = overlap._runs(overlap._word_hashes(passage), 13)
    runs, owners = overlap._index([(hashes, 0), (hashes, 1)])
    assert len(runs) == 488 and runs.nbytes + owners.nbytes == 10 * 488 and not owners.any()


def test_the_first_set_that_has_a_run_is_named_and_names_that_are_the_same_are_written_out(tmp_path):
    sets = {"a/test.jsonl": " ".join(WORDS[:13]), "b/test.jsonl": " ".join(WORDS[:14]), "other.txt": " ".join(WORDS)}
    check = overlap.decontaminate((*sets,), 13, lambda source: iter([sets[source]]))
    for first, name in ((0, "a/test.jsonl"), (1, "b/test.jsonl"), (2, "other")):
        assert check.apply(Document(" ".join(WORDS[first : first + 13]), "")) == Dropped(f"in evaluation set {name}")


def test_files_and_folders_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("whole\nfile", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"question": "é"}\n\n{"x": ["y"]}\n', encoding="utf-8")
    (tmp_path / "deep").mkdir()
    with gzip.open(tmp_path / "deep/c.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"line": 1}) + "\n")
    (tmp_path / "d.png").write_bytes(b"\x89PNG")
    assert [*overlap.records_of(str(tmp_path))] == ["whole\nfile", {"question": "é"}, {"x": ["y"]}, {"line": 1}]


def test_the_split_of_a_data_set_is_named_behind_an_at(monkeypatch):
    asked = []
    monkeypatch.setattr(overlap.sources, "records", lambda source: asked.append((source.source, source.split)) or iter(()))
    for name in ("tfds:squad/v1.1@validation", "hf:lambada", "a@b.txt"):
        assert [*overlap.records_of(name)] == []
    assert asked == [("tfds:squad/v1.1", "validation"), ("hf:lambada", "test"), ("a@b.txt", "test")]


def test_sets_that_are_of_no_use_are_refused(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "é"}\n{"te\n', encoding="utf-8")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"a": "b"}\n' * 1000)[:-20])
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / "short.txt").write_text("only a few words", encoding="utf-8")
    for name, reason in (
        ("gone", "no such file"),
        ("bad.jsonl:2", "not JSON"),
        ("cut.jsonl.gz", "cut short"),
        ("latin.txt", "not UTF-8"),
        ("short.txt", "no passage has 8 words or more"),
    ):
        with pytest.raises(InputError, match=f"data.clean.evaluation_sets = .*{re.escape(name)}: .*{reason}"):
            overlap.decontaminate((str(tmp_path / name.partition(":")[0]),), 13)


def test_leaked_passages_are_found_and_near_misses_are_not():
    for form, score in bench_clean.leaks(random.Random(1), 100).items():
        assert score.precision >= 0.95 and score.recall >= 0.95, (form, score)


def test_words_of_every_script_count():
    words = [random.Random(0).choice(string.ascii_lowercase) + c for c in "абвгдежзиклмн"]
    assert rule(" ".join(words)).apply(Document("x " + " ".join(words).upper() + "!", "")) == IN_SET
