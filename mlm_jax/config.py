"""Every knob of a run, as frozen dataclasses: words here, letters in tensors.

An experiment file builds one `Config`; `override` and `--set path=value` change it, `diff` compares two, and `to_json` and
`from_json` carry one through a run directory. Each check names the field, its value, the reason and the remedy.
"""

import ast
import dataclasses
import difflib
import json
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

POSITIONS = ("learned", "rotary", "none")
NORMS = ("layer", "rms")
ACTIVATIONS = ("gelu_tanh", "gelu_erf", "relu2", "swiglu")
ATTENTIONS = ("auto", "reference", "blocked", "xla", "cudnn", "splash", "flash")
MATMULS = ("full", "int8", "fp8")
REMATS = ("none", "full", "dots", "attention", "offload")
OPTIMIZERS = {  # name -> the fields of OptimConfig that it reads and not all do
    "adamw": ("b1", "b2", "eps"),
    "adafactor": (),
    "lion": ("b1", "b2"),
    "muon": ("b1", "b2", "eps", "muon_momentum"),
}
FILTERS = ("gopher_repetition", "gopher_quality", "c4", "fineweb")
PII_KINDS = ("email", "ip", "phone", "card", "id")
SCHEDULES = ("cosine", "linear", "wsd", "inverse_sqrt", "constant")
SEEDS = 2**32  # as many as jax.random.key tells apart without 64-bit types: beyond it drops the higher bits


class InputError(ValueError):
    """Bad input, in one line: which field, its value, what is wrong with it, and what to do. The commands exit with status 2."""

    def __init__(self, field: str, value: object, reason: str, remedy: str) -> None:
        self.field, self.value, self.reason, self.remedy = field, value, reason, remedy
        shown = value if isinstance(value, str) else repr(value)
        reason = reason if reason.endswith("?") else reason.rstrip(".") + "."
        message = f"{field}{f' = {shown}' if shown else ''}: {reason} {remedy.rstrip('.')}."
        super().__init__(" ".join(message.splitlines()))


def _check(ok: bool, field: str, value: object, reason: str, remedy: str) -> None:
    if not ok:
        raise InputError(field, value, reason, remedy)


def _check_types(config: object, prefix: str) -> None:
    """Raises InputError unless every field holds its type; an int where a float is due becomes one."""
    for name, kind in typing.get_type_hints(type(config)).items():
        object.__setattr__(config, name, _typed(kind, getattr(config, name), prefix + name))


def _typed(kind: Any, value: Any, path: str) -> Any:
    """`value` as a field of type `kind`: an int where a float is due becomes one."""
    if kind is float and type(value) is int:
        return float(value)
    if typing.get_origin(kind) is tuple:  # of any length; a list where JSON has no tuple
        one, _ = typing.get_args(kind)
        if not isinstance(value, tuple | list):
            example = "{'source': 'a.txt'}" if dataclasses.is_dataclass(one) else "0" if one is int else repr("text")
            raise InputError(path, repr(value), f"expected a sequence of {getattr(one, '__name__', one)}", f"Write, for example, {path}=({example},)")
        return tuple(_typed(one, item, path) for item in value)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):  # one in a sequence, as JSON and the command line write it
        return _build(kind, value, f"{path}.")
    if type(value) is not kind:
        reason = "a single value, it has no fields" if isinstance(value, Mapping) else f"expected {kind.__name__}, got {type(value).__name__}"
        raise InputError(path, repr(value), reason, f"Write a value of type {kind.__name__}")
    return value


def _at_least(config: object, prefix: str, **minima: int) -> None:
    for name, minimum in minima.items():
        value = getattr(config, name)
        reason = f"below the least that makes sense, {minimum}" if value == value else "not a number"
        _check(value >= minimum and value < math.inf, f"{prefix}.{name}", value, reason, f"Give a finite value of {minimum} or more")


def _fraction(config: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _check(0 <= value < 1, f"{prefix}.{name}", value, "not a fraction", "Give a value from 0 up to, not including, 1")


def one_of(field: str, value: str, choices: Iterable[str]) -> None:
    """Raises InputError, with the closest choice named, unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise InputError(field, value, f"unknown{_did_you_mean(value, choices)}", f"Choose from: {', '.join(choices)}")


def _did_you_mean(word: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f". Did you mean {close[0]!r}?" if close else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a GPT-2; the defaults are the 124M model (Radford et al. 2019, table 2). Every other default is GPT-2 itself."""

    vocab_size: int = 0  # 0: as many as the tokenizer has
    vocab_multiple: int = 1  # the embedding has rows up to a multiple of this; TPUs and meshes like 128. The rest are never predicted
    context_len: int = 1024  # T: the most positions the model can embed
    n_layers: int = 12
    n_heads: int = 12
    n_kv_heads: int = 0  # K; 0: as many as n_heads. Fewer: query heads share keys and values (Ainslie et al. 2023)
    d_model: int = 768
    d_ff: int = 3072
    dropout: float = 0.0  # on embeddings, attention probabilities and both residual branches
    position: str = "learned"  # learned, rotary (Su et al. 2021), none (Kazemnejad et al. 2023)
    rotary_base: float = 10_000.0
    norm: str = "layer"  # layer (Ba et al. 2016), rms (Zhang & Sennrich 2019)
    activation: str = "gelu_tanh"  # gelu_tanh, gelu_erf (Hendrycks & Gimpel 2016), relu2 (So et al. 2021), swiglu (Shazeer 2020)
    biases: bool = True  # False: neither projections nor norms have biases
    tied_head: bool = True  # False: the logits have a matrix of their own
    qk_norm: bool = False  # RMSNorm with a gain on the queries and keys of each head (Henry et al. 2020)
    logit_softcap: float = 0.0  # c > 0: logits become c tanh(logits / c) (Gemma Team 2024, section 2)
    mup_base_width: int = 0  # muP (Yang et al. 2022): the d_model whose learning rate and init_std carry over to this width; 0: off
    norm_eps: float = 1e-5
    init_std: float = 0.02
    compute_dtype: str = "float32"  # of activations and matrix products; parameters, softmax, norms and logits stay float32
    # The products with the weights of the blocks, forward and backward: full: in compute_dtype; int8: rounded to 8 bits with a scale for each token
    # and each output channel; fp8: likewise to e4m3, gradients to e5m2 (Micikevicius et al. 2022). The weights of all three are the same kind.
    matmul: str = "full"
    attention: str = "auto"  # the implementation; auto takes the fastest that this machine, dtype and shape allow
    unroll_layers: bool = False  # True: a faster step for few layers, and a longer compilation for many
    # What the backward pass computes again to save memory (Chen et al. 2016). Of each block are kept: none: all, nothing is computed again; full:
    # its input alone; dots: also the products with weights; attention: also the outputs of attention; offload: the same, in the host's memory.
    remat: str = "none"

    def __post_init__(self) -> None:
        _check_types(self, "model.")
        sizes = dict.fromkeys(("vocab_multiple", "context_len", "n_layers", "n_heads", "d_model", "d_ff"), 1)
        _at_least(self, "model", vocab_size=0, **sizes, n_kv_heads=0, rotary_base=1, logit_softcap=0, mup_base_width=0, norm_eps=0, init_std=0)
        _fraction(self, "model", "dropout")
        one_of("model.compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
        one_of("model.position", self.position, POSITIONS)
        one_of("model.norm", self.norm, NORMS)
        one_of("model.activation", self.activation, ACTIVATIONS)
        one_of("model.attention", self.attention, ATTENTIONS)
        one_of("model.matmul", self.matmul, MATMULS)
        one_of("model.remat", self.remat, REMATS)
        narrower = self.d_model // self.n_heads
        _check(
            self.d_model % self.n_heads == 0,
            "model.d_model",
            self.d_model,
            f"model.n_heads = {self.n_heads} does not divide it, a head would be {self.d_model / self.n_heads:.2f} wide",
            f"Nearest that fit: {' and '.join(str(n * self.n_heads) for n in (narrower, narrower + 1) if n)}",
        )
        _check(
            self.n_heads % self.n_keys == 0,
            "model.n_kv_heads",
            self.n_kv_heads,
            f"does not divide model.n_heads = {self.n_heads}, so the query heads cannot share evenly",
            f"Choose from: {', '.join(str(k) for k in range(1, self.n_heads + 1) if self.n_heads % k == 0)}",
        )
        _check(
            self.position != "rotary" or self.head_dim % 2 == 0,
            "model.position",
            self.position,
            f"turns pairs of numbers, and a head is {self.head_dim} wide",
            "Choose d_model and n_heads so that a head is of even width",
        )

    @property
    def head_dim(self) -> int:
        """H, the width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def n_keys(self) -> int:
        """K, the number of key and value heads."""
        return self.n_kv_heads or self.n_heads

    @property
    def padded_vocab_size(self) -> int:
        """V, the rows of the embedding: `vocab_size` up to a multiple of `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def width_multiplier(self) -> float:
        """muP's m: how many times wider than the base this model is; 1 where muP is off."""
        return self.d_model / self.mup_base_width if self.mup_base_width else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of text, and which of its parts are documents."""

    # python-docs (the documentation inside every Python); files: a file, a folder or a pattern such as web/*.jsonl.gz; tfds:NAME[/CONFIG] or
    # tfds:FOLDER (TensorFlow Datasets); hf:USER/NAME[/CONFIG] (Hugging Face, streamed); bin:FOLDER (token shards of llm.c or nanoGPT, as they are)
    source: str = "python-docs"
    split: str = "train"  # of tfds: and hf:
    text_field: str = "text"  # the field, column or feature that holds the document; a.b is field b of field a
    prompt_field: str = ""  # one whose text comes before the document and is not learned; empty: none
    url_field: str = "url"  # one that holds the address of the document, where it has one
    separator: str = ""  # what divides a text file into documents; empty: a file is one document

    def __post_init__(self) -> None:
        _check_types(self, "data.")
        _check(bool(self.source), "data.source", self.source, "empty", "Name a text file, a folder, tfds:NAME or python-docs")
        _check(bool(self.text_field), "data.text_field", self.text_field, "empty", "Name the field that holds the text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedSourceConfig(SourceConfig):
    """One of several sources."""

    name: str = ""  # of its shards and in the audit; empty: the last part of `source`
    weight: float = 0.0  # its share of the rows, relative to those of the others; 0: as its number of tokens times `epochs`
    epochs: float = 1.0  # how often it is read while a source of 1 is read once
    filtered: bool = True  # False: without data.clean.filters, which are made for pages of the web

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, "data.mixture", weight=0, epochs=0)
        _check(self.epochs > 0, "data.mixture.epochs", self.epochs, "never read", "Give a value above 0, or leave the source out")
        _check(
            all(c.isascii() and (c.isalnum() or c in "-") for c in self.name),
            "data.mixture.name",
            self.name,
            "not usable in the name of a file",
            "Use letters, digits and '-'",
        )

    @property
    def label(self) -> str:
        """`name`, or what is made of `source`."""
        path = self.source if self.source.startswith(("tfds:", "hf:")) else self.source.rstrip("/").rpartition("/")[2].partition(".")[0]
        words = re.findall("[A-Za-z0-9]+", path.partition(":")[2] or path)
        return self.name or "-".join(words) or "source"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """What is done to documents before they become tokens. Always: NFC, one kind of newline, no control characters, nothing empty."""

    html: bool = False  # the text is a page of HTML, of which the main text is taken; .html and WARC files are, whatever this says
    mojibake: bool = False  # mends text that was decoded as what it is not (ftfy)
    languages: tuple[str, ...] = ()  # codes such as en, de; documents in others are dropped
    language_threshold: float = 0.65  # how sure of the language one must be; Source: Penedo et al. 2024 (FineWeb), section 3.3
    filters: tuple[str, ...] = ()  # gopher_repetition, gopher_quality (Rae et al. 2021), c4 (Raffel et al. 2020), fineweb (Penedo et al. 2024)
    blocked_urls: str = ""  # a file of domains and addresses, one a line, whose documents are dropped
    pii: str = "keep"  # personal data: keep, mask, or drop the document
    pii_kinds: tuple[str, ...] = PII_KINDS
    duplicates: str = "documents"  # keep; documents: exact copies go; paragraphs: also lines that stood before, in any document
    min_paragraph: int = 40  # characters of a line from which on it is a paragraph, where duplicates = paragraphs
    near_duplicates: bool = False  # MinHash (Broder 1997): of documents that share most of their word 5-grams one stays
    minhash_buckets: int = 14  # documents are near where all hashes of one bucket agree; Source: Penedo et al. 2024, section 3.4
    minhash_hashes: int = 8  # of a bucket: the chance to be found is 1 - (1 - similarity^hashes)^buckets
    # Sources, of tfds: and hf: also NAME@SPLIT (test); a document that shares a run of words with a text field of theirs is dropped.
    evaluation_sets: tuple[str, ...] = ()
    overlap_words: int = 13  # the length of such a run; Source: Brown et al. 2020, appendix C

    def __post_init__(self) -> None:
        _check_types(self, "data.clean.")
        _fraction(self, "data.clean", "language_threshold")
        for name in self.filters:
            one_of("data.clean.filters", name, FILTERS)
        one_of("data.clean.pii", self.pii, ("keep", "mask", "drop"))
        for name in self.pii_kinds:
            one_of("data.clean.pii_kinds", name, PII_KINDS)
        one_of("data.clean.duplicates", self.duplicates, ("keep", "documents", "paragraphs"))
        _at_least(self, "data.clean", min_paragraph=1, minhash_buckets=1, minhash_hashes=1, overlap_words=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(SourceConfig):
    """Where the text comes from, how it is cleaned, becomes tokens and is cut into rows."""

    mixture: tuple[MixedSourceConfig, ...] = ()  # several sources in place of the one that the fields above describe
    clean: CleanConfig = CleanConfig()
    tokenizer: str = "gpt2"  # gpt2, bpe (trained on the text), char, byte
    bpe_vocab_size: int = 2048  # for tokenizer = bpe: tokens, the 256 bytes and <|endoftext|> included, special ones not
    bpe_sample_mb: int = 200  # for tokenizer = bpe: how many megabytes of the training text it learns from, at most
    special_tokens: tuple[str, ...] = ()  # more tokens that no text can produce, such as <|mask|>; their ids follow the others
    val_fraction: float = 0.1  # held out for validation
    tokens: str = ""  # folder of the token shards, also gs://..., shared by runs that name it; empty: tokens/ in the run directory
    packing: str = "concat"  # rows are windows over: concat (documents end to end), first_fit (whole documents, as many as fit, and padding)
    reset_attention: bool = False  # no token sees across the start of a document
    reset_positions: bool = False  # positions count from the start of the document
    workers: int = 0  # processes that clean and tokenise; 0: one for each core
    executor: str = "local"  # where these run: local, ray or slurm; with the last two `tokens` is on a disk that all machines share
    slurm_partition: str = ""
    slurm_time: str = "24:00:00"  # of one part of the work at most

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("data.tokenizer", self.tokenizer, ("gpt2", "bpe", "char", "byte"))
        _at_least(self, "data", bpe_vocab_size=257, bpe_sample_mb=1, workers=0)
        _fraction(self, "data", "val_fraction")
        one_of("data.packing", self.packing, ("concat", "first_fit"))
        one_of("data.executor", self.executor, ("local", "ray", "slurm"))
        _check(self.executor != "slurm" or bool(self.slurm_partition), "data.slurm_partition", "", "Slurm needs one", "Name a partition")
        for token in self.special_tokens:
            _check(bool(token.strip()), "data.special_tokens", repr(token), "no token", "Write, for example, <|mask|>")
        if self.mixture:
            for field in dataclasses.fields(SourceConfig):
                value = getattr(self, field.name)
                _check(value == field.default, f"data.{field.name}", value, "data.mixture names the sources", "Set it for one of them, or leave it")
            labels = [source.label for source in self.mixture]
            without = [source.label for source in self.mixture if not source.weight]
            if without and len(without) < len(self.mixture):
                remedy = "Give each source a weight, or none (then data.mixture.epochs says how often it is read)"
                raise InputError("data.mixture.weight", 0.0, f"{without[0]} has none, and others have", remedy)
            twice = next((label for label in labels if labels.count(label) > 1), "")
            _check(not twice, "data.mixture.name", twice, "two sources have it", "Give each a name of its own")

    @property
    def vocab_size(self) -> int:
        """What the tokenizer will have; 0: that depends on the text."""
        sizes = {"gpt2": 50_257, "bpe": self.bpe_vocab_size, "byte": 257, "char": 0}
        return sizes[self.tokenizer] and sizes[self.tokenizer] + len(self.special_tokens)

    @property
    def sources(self) -> tuple[MixedSourceConfig, ...]:
        """All sources; one that is alone is without a name."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(SourceConfig)}
        return self.mixture or (MixedSourceConfig(**own),)

    @property
    def for_tokens(self) -> "DataConfig":
        """This without what has no effect on the token shards."""
        unused = ["tokens", "packing", "reset_attention", "reset_positions", "workers", "executor", "slurm_partition", "slurm_time"]
        unused += ["bpe_vocab_size", "bpe_sample_mb"] * (self.tokenizer != "bpe")
        mixture = tuple(dataclasses.replace(source, weight=0.0, epochs=1.0) for source in self.mixture)
        return dataclasses.replace(self, mixture=mixture, **{name: getattr(DataConfig, name) for name in unused})


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The step and its schedule: by default AdamW with linear warm-up and cosine decay over `train.steps`."""

    peak_lr: float = 6e-4  # lion: 3 to 10 times less than adamw; adafactor: relative to each parameter's size, 1e-2 in its paper
    end_lr: float = 6e-5  # where cosine, linear and wsd end
    warmup_steps: int = 700
    weight_decay: float = 0.1  # on weights of two or more axes; biases, gains and nothing else go without
    b1: float = 0.9  # adamw, and muon's for what is no hidden matrix: of the mean gradient; lion: of the step
    b2: float = 0.95  # the same: of the mean square; lion: of the mean gradient
    eps: float = 1e-8  # the same: what Adam adds to the root of the mean square
    clip_norm: float = 1.0  # the largest global gradient norm; 0: no clipping
    # adamw (Loshchilov & Hutter 2019), adafactor (Shazeer & Stern 2018: memory of rows and columns), lion (Chen et al. 2023: one moment),
    # muon (Jordan et al. 2024, scaled as in Liu et al. 2025: hidden matrices are orthogonalised, all else is adamw; its lr and decay serve both)
    name: str = "adamw"
    muon_momentum: float = 0.95  # of hidden matrices
    moment_dtype: str = "float32"  # what the optimizer's state is held in between steps; bfloat16 is half the memory, rounded at every step
    schedule: str = "cosine"  # after the warm-up: cosine, linear, wsd (Hu et al. 2024), inverse_sqrt (Vaswani et al. 2017), constant
    decay_fraction: float = 0.2  # of wsd: the last part of the steps, in which peak_lr falls to end_lr (Hägele et al. 2024, section 3: 0.2)
    ema_decay: float = 0.0  # of the average of the weights that is evaluated beside them (Polyak & Juditsky 1992), per step; 0: none

    def __post_init__(self) -> None:
        _check_types(self, "optim.")
        _at_least(self, "optim", peak_lr=0, end_lr=0, warmup_steps=0, weight_decay=0, eps=0, clip_norm=0)
        _fraction(self, "optim", "b1", "b2", "muon_momentum", "ema_decay")
        one_of("optim.name", self.name, OPTIMIZERS)
        one_of("optim.moment_dtype", self.moment_dtype, ("float32", "bfloat16"))
        one_of("optim.schedule", self.schedule, SCHEDULES)
        _check(0 < self.decay_fraction <= 1, "optim.decay_fraction", self.decay_fraction, "not a part", "Give a value above 0, at most 1")
        read = OPTIMIZERS[self.name]
        unread = [(field, f"{self.name} has no use for it") for field in OPTIMIZERS["muon"] if field not in read]
        unread += [("decay_fraction", f"the schedule is {self.schedule}")] * (self.schedule != "wsd")
        for field, reason in unread:
            value, default = getattr(self, field), getattr(OptimConfig, field)
            _check(value == default, f"optim.{field}", value, reason, f"Leave it at {default}")
        if self.moment_dtype == "bfloat16":
            reason = "adafactor forgets ever more slowly, and after 1,000 steps a mean in 8 binary digits would never fall"
            _check(self.name != "adafactor", "optim.moment_dtype", self.moment_dtype, reason, "Leave it at float32: its state is small")
            reason = "each step would change a mean in 8 binary digits by less than half of the last: it would never fall"
            for field in set(read) - {"eps"} - ({"b1"} if self.name == "lion" else set()):  # lion's b1 is of no state
                value, remedy = getattr(self, field), "Give at most 0.996, or set optim.moment_dtype=float32"
                _check(1 - value > 2**-8, f"optim.{field}", value, reason, remedy)

    def decay_steps(self, steps: int) -> int:
        """The steps at the end of `steps` in which wsd decays."""
        return max(round(self.decay_fraction * steps), 1)

    def check_width(self, width_multiplier: float) -> None:
        """Raises InputError where muP would change the step of an optimizer for which it is not defined here."""
        reason = f"muP's rule for a model {width_multiplier:g} times as wide as its base is defined here for adamw alone"
        _check(self.name == "adamw" or width_multiplier == 1, "optim.name", self.name, reason, "Set optim.name=adamw or model.mup_base_width=0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, and what is written on the way."""

    steps: int = 1000
    batch_size: int = 8  # B: windows of context_len tokens in one step, over all devices
    eval_every: int = 250  # steps between validations; 0: only at the end
    eval_windows: int = 64  # validation windows read each time; `mlm-jax evaluate` reads all
    save_every: int = 500  # steps between checkpoints; 0: only at the end
    keep_checkpoints: int = 2  # the newest that stay on disk
    keep_every: int = 0  # those of steps that are a multiple of this stay too; 0: none
    keep_best: int = 0  # so many with the lowest validation loss stay too
    seed: int = 0
    loss_chunks: int = 1  # the logits are made for this many parts of T, one after the other, and again in the backward pass: never B x T x V
    z_loss: float = 0.0  # adds this times the square of log sum exp(logits) (de Brebisson & Vincent 2016; PaLM, section 5: 1e-4)
    micro_batches: int = 1  # parts of the batch whose gradients are added up before a step: less memory, the same step
    ramp_from: int = 0  # the batch size at the start, doubled at even intervals until it is batch_size (Smith et al. 2018, section 3); 0: no ramp
    ramp_steps: int = 0  # the step from which the batch has its full size
    skip_sigmas: float = 6.0  # a step whose loss or log gradient norm is so many deviations above the last 128 is skipped; 0: if not finite
    max_skips: int = 20  # steps skipped in a row after which the run ends
    step_timeout: float = 0.0  # seconds after which a step that is not finished ends the run, with status 76; 0: 20 times a recent step, at least 600
    debug: bool = False  # waits for every step, and says which array of which layer was the first that was not finite
    label_smoothing: float = 0.0  # the share of the target that all of the vocabulary shares evenly (Szegedy et al. 2016, section 7)

    def __post_init__(self) -> None:
        _check_types(self, "train.")
        _at_least(
            self, "train", steps=1, batch_size=1, eval_every=0, eval_windows=1, save_every=0, keep_checkpoints=1, keep_every=0, keep_best=0, seed=0
        )
        _at_least(self, "train", loss_chunks=1, z_loss=0, micro_batches=1, ramp_from=0, ramp_steps=0, skip_sigmas=0, max_skips=1, step_timeout=0)
        _check(
            self.batch_size % self.micro_batches == 0,
            "train.micro_batches",
            self.micro_batches,
            f"does not divide train.batch_size = {self.batch_size}",
            f"Choose from: {', '.join(str(n) for n in range(1, min(self.batch_size, 64) + 1) if self.batch_size % n == 0)}",
        )
        _check(
            not self.keep_best or (self.eval_every > 0 and self.save_every % self.eval_every == 0),
            "train.keep_best",
            self.keep_best,
            f"not every checkpoint's loss is known: train.save_every = {self.save_every} is no multiple of train.eval_every = {self.eval_every}",
            "Make it one, or set train.keep_best to 0",
        )
        self._check_ramp()
        _fraction(self, "train", "label_smoothing")
        _check(self.seed < SEEDS, "train.seed", self.seed, "more than a random key holds", f"Give a seed below {SEEDS}")

    def _check_ramp(self) -> None:
        """Raises InputError unless the batch doubles its way up, in whole micro-batches."""
        if not self.ramp_from:
            _check(self.ramp_steps == 0, "train.ramp_steps", self.ramp_steps, "there is no ramp", "Set train.ramp_from too, or leave both at 0")
            return
        doublings = (self.batch_size // self.ramp_from).bit_length() - 1
        halves = [self.batch_size >> n for n in range(1, self.batch_size.bit_length()) if self.batch_size % (1 << n) == 0]
        _check(
            self.ramp_from in halves,
            "train.ramp_from",
            self.ramp_from,
            f"no doubling of it gives train.batch_size = {self.batch_size}",
            f"Choose from: {', '.join(map(str, halves))}" if halves else "Set it to 0, or choose an even train.batch_size",
        )
        _check(
            doublings <= self.ramp_steps <= self.steps,
            "train.ramp_steps",
            self.ramp_steps,
            f"{doublings} sizes before the last do not fit into so many of train.steps = {self.steps}",
            f"Give a value from {doublings} to {self.steps}" if doublings <= self.steps else "Train for more steps, or begin with a larger batch",
        )
        for size in self.batch_sizes:
            _check(
                size % self.micro_batches_of(size) == 0,
                "train.micro_batches",
                self.micro_batches,
                f"does not share out a batch of {size} rows on the way to train.batch_size = {self.batch_size}",
                "Choose a power of 2",
            )

    @property
    def batch_sizes(self) -> list[int]:
        """Every size that the batch has on its way, the smallest first."""
        sizes = [self.batch_size]
        while self.ramp_from and sizes[0] > self.ramp_from:
            sizes.insert(0, sizes[0] // 2)
        return sizes

    def batch_size_at(self, step: int) -> int:
        """B of the step after `step` steps."""
        sizes = self.batch_sizes
        return sizes[min(step * (len(sizes) - 1) // self.ramp_steps, len(sizes) - 1)] if self.ramp_from else self.batch_size

    def rows_before(self, step: int) -> int:
        """How many rows the first `step` steps read."""
        sizes = self.batch_sizes
        starts = [-(-i * self.ramp_steps // max(len(sizes) - 1, 1)) for i in range(len(sizes))]
        ends = [*starts[1:], step]
        return sum(size * max(min(step, end) - start, 0) for size, start, end in zip(sizes, starts, ends, strict=True))

    def micro_batches_of(self, batch_size: int) -> int:
        """How many parts a batch on the way up has: of as many rows as those of a full one, where it has so many."""
        return -(-self.micro_batches * batch_size // self.batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh; at most one is -1: all that remain."""

    data: int = -1  # copies of the parameters, each with its own rows of the batch; outside of fsdp (hybrid sharding)
    fsdp: int = 1  # parts of D in parameters and moments, gathered for use; the batch is split too (Rajbhandari et al. 2020, stage 3)
    tensor: int = 1  # parts of heads, F and V (Shoeybi et al. 2019)
    context: int = 1  # parts of T: each device has its queries, keys and values are gathered (Dubey et al. 2024, section 3.3.2)
    slices: int = 1  # TPU slices joined by a data-centre network: copies of all the axes above, each with its own rows of the batch

    def __post_init__(self) -> None:
        _check_types(self, "mesh.")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check(value >= 1 or value == -1, f"mesh.{field.name}", value, "not a number of devices", "Give 1 or more, or -1 for all that remain")
        rest = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) == -1]
        if len(rest) > 1:
            raise InputError(f"mesh.{rest[-1]}", -1, f"mesh.{rest[0]} is -1 too", "Let one axis take the devices that remain")


def _help(default: Any, text: str) -> Any:
    """A field that the command line shows with `text`."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from the logits, in this order: penalties, bans, temperature, top_k, top_p, min_p. Another setting compiles anew."""

    temperature: float = _help(1.0, "0 is greedy")
    top_k: int = _help(0, "choose among the K likeliest tokens; 0: all")
    top_p: float = _help(1.0, "choose among the likeliest tokens of mass P; 1: all")
    min_p: float = _help(0.0, "drop the tokens less likely than this share of the likeliest")
    repetition_penalty: float = _help(1.0, "divide the positive logits of tokens in the prompt or the text by this, multiply the negative")
    frequency_penalty: float = _help(0.0, "subtract this from the logit of a token for each time that it was generated")
    min_tokens: int = _help(0, "length of each at least: no end of text before")
    banned: tuple[int, ...] = _help((), "a token id that is never chosen; repeatable")
    forced: tuple[int, ...] = _help((), "a token id that every continuation begins with, in this order; repeatable")

    def __post_init__(self) -> None:
        _check_types(self, "")
        for name, least in {"temperature": 0, "top_k": 0, "min_tokens": 0, "frequency_penalty": -math.inf}.items():
            value = getattr(self, name)
            remedy = f"Give a finite value{f' of {least} or more' if least == 0 else ''}"
            _check(least <= value < math.inf, name, value, "out of range", remedy)
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "not a probability", "Give a value above 0, at most 1")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "not a probability", "Give a value from 0 to 1")
        _check(0 < self.repetition_penalty < math.inf, "repetition_penalty", self.repetition_penalty, "not a factor", "Give a value above 0")
        for name in ("banned", "forced"):
            wrong = [i for i in getattr(self, name) if i < 0]
            _check(not wrong, name, wrong, "not token ids", "Give ids of 0 or more")
        both = sorted(set(self.banned) & set(self.forced))
        _check(not both, "forced", both, "banned too", "Take them out of banned or of forced")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(Sampling):
    """How text is generated: the settings of `mlm_jax.generate`, the flags of `mlm-jax generate` and `chat`, and a run's samples.txt."""

    prompt: str = _help("", "the text to continue; empty: the start of a document")
    num: int = _help(1, "continuations of each prompt")
    max_tokens: int = _help(50, "length of each at most, in tokens")
    stop: tuple[str, ...] = _help((), "end a continuation before this text; repeatable")
    beams: int = _help(1, "above 1: beam search, which draws nothing; its best NUM are returned")
    length_penalty: float = _help(1.0, "for beams: log-probability is divided by length to this power")
    early_stopping: bool = _help(False, "for beams: stop when as many are finished as there are beams")
    overflow: str = _help("refuse", "beyond the context length: refuse, or window (go on from its last half: what penalties see of a long prompt)")
    seed: int = _help(0, "of the random draws")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in {"num": 1, "max_tokens": 1, "beams": 1, "seed": 0}.items():
            value = getattr(self, name)
            _check(value >= least, name, value, f"below {least}", f"Give {least} or more")
        _check(self.seed < SEEDS, "seed", self.seed, "more than a random key holds", f"Give a seed below {SEEDS}")
        _check(-math.inf < self.length_penalty < math.inf, "length_penalty", self.length_penalty, "not a power", "Give a finite number")
        one_of("overflow", self.overflow, ("refuse", "window"))
        _check("" not in self.stop, "stop", "''", "empty, it would end everything", "Give a text")
        if self.beams > 1:
            _check(self.num <= self.beams, "num", self.num, f"more than beams = {self.beams}", "Search with more beams")
            _check(self.overflow == "refuse", "overflow", self.overflow, "beam search does not slide", "Leave it at refuse")
            _check(not self.stop, "stop", self.stop, "beam search compares whole continuations and ends none at a text", "Set beams to 1")
            self._unused("beam search draws nothing", "temperature", "top_k", "top_p", "min_p")
        else:
            self._unused("only beam search has a use for it", "length_penalty", "early_stopping")
            if self.temperature == 0:
                _check(self.num == 1, "num", self.num, "greedy continuations of a prompt are all the same", "Set a temperature, or beams instead")

    def _unused(self, reason: str, *names: str) -> None:
        """Raises InputError where a field that would not be looked at is set."""
        for name in names:
            default = getattr(SampleConfig, name)
            _check(getattr(self, name) == default, name, getattr(self, name), reason, f"Leave it at {default}")

    @property
    def sampling(self) -> Sampling:
        """The part that the decoder is compiled for."""
        return Sampling(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Sampling)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig(SampleConfig):
    """How a conversation is written and answered: the flags of `mlm-jax chat`."""

    prompt: str = _help("", "the text before the first turn")
    temperature: float = _help(0.8, "0 is greedy")
    max_tokens: int = _help(200, "length of an answer at most, in tokens; where it is not given, half the context at most")
    user: str = _help("User", "what your turns begin with")
    assistant: str = _help("Assistant", "what the model's turns begin with")

    def __post_init__(self) -> None:
        for name in ("num", "beams"):
            _check(getattr(self, name) == 1, name, getattr(self, name), "a turn has one answer, written as it is found", "Leave it at 1")
        super().__post_init__()

    @classmethod
    def fitting(cls, context_len: int, **settings: Any) -> "ChatConfig":
        """The settings for a model of this context; an answer is half of it at most where `max_tokens` is not given."""
        return cls(**{"max_tokens": min(cls.max_tokens, max(context_len // 2, 1)), **settings})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment."""

    name: str
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    sample: SampleConfig = SampleConfig(num=3, max_tokens=200, temperature=0.8)

    def __post_init__(self) -> None:
        _check_types(self, "")
        _check(
            bool(self.name) and self.name not in (".", "..") and all(c.isalnum() or c in "._-" for c in self.name),
            "name",
            self.name,
            "not usable as the name of a folder",
            "Use letters, digits, '.', '_' and '-'",
        )
        _check(
            self.optim.warmup_steps <= self.train.steps,
            "optim.warmup_steps",
            self.optim.warmup_steps,
            f"longer than the run, train.steps = {self.train.steps}",
            "Warm up for fewer steps or train for more",
        )
        _check(
            self.optim.schedule != "wsd" or self.optim.warmup_steps + self.optim.decay_steps(self.train.steps) <= self.train.steps,
            "optim.decay_fraction",
            self.optim.decay_fraction,
            f"its {self.optim.decay_steps(self.train.steps)} steps begin before the end of optim.warmup_steps = {self.optim.warmup_steps}",
            "Decay or warm up for fewer of train.steps, or train for more",
        )
        self.optim.check_width(self.model.width_multiplier)


def override(config: T, changes: Mapping[str, Any]) -> T:
    """Returns `config` with dotted fields replaced, e.g. {"optim.peak_lr": 1e-3}; all are replaced before the whole is checked.

    Raises:
      InputError: a path names no field, a value has the wrong type, or the changed configuration is not valid.
    """
    nested: dict[str, Any] = {}
    for path, value in changes.items():
        node, keys = nested, path.split(".")
        for key in keys[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise InputError(path, repr(value), f"{key!r} is set as a whole in the same change", "Set the field or its parts, not both")
        if keys[-1] in node:
            raise InputError(path, repr(value), "set as a whole and in part in the same change", "Set the field or its parts, not both")
        node[keys[-1]] = dict(value) if isinstance(value, Mapping) else value  # a copy: a later change may be written into it
    return _replace(config, nested, "")


def _replace(config: Any, changes: Mapping[str, Any], prefix: str) -> Any:
    types = typing.get_type_hints(type(config))
    new = {}
    for key, value in changes.items():
        _known_field(type(config), types, key, prefix)
        if dataclasses.is_dataclass(types[key]) and isinstance(value, Mapping):
            value = _replace(getattr(config, key), value, f"{prefix}{key}.")
        new[key] = _typed(types[key], value, prefix + key)
    return _made(lambda: dataclasses.replace(config, **new), prefix)


def _made(make: Callable[[], Any], prefix: str) -> Any:
    """What `make` gives; an InputError of it names the field from the top."""
    try:
        return make()
    except InputError as e:
        raise e if e.field.startswith(prefix) else InputError(prefix + e.field, e.value, e.reason, e.remedy) from e


def _known_field(cls: type, types: Mapping[str, Any], key: str, prefix: str) -> None:
    if key not in types:
        raise InputError(prefix + key, "", f"{cls.__name__} has no field {key!r}{_did_you_mean(key, types)}", f"Fields: {', '.join(types)}")


def parse_set(items: Iterable[str]) -> dict[str, Any]:
    """The changes that `--set` items say: ["optim.peak_lr=1e-3"] -> {"optim.peak_lr": 0.001}; what is no literal is a string.

    Raises:
      InputError: an item is not of the form path=value.
    """
    changes: dict[str, Any] = {}
    for item in items:
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise InputError("--set", item, "not of the form path=value", "Write, for example, --set optim.peak_lr=3e-4")
        changes[path] = parse_literal(Config, path, text)
    return changes


def parse_literal(cls: type, path: str, text: str) -> Any:
    """The value that `text` writes for a dotted field of `cls`; what is no literal is a string."""
    field = _field_type(cls, path.split("."))
    if field is str:  # a name such as 1e3 or None stays text
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that it raises on text that is no literal
        return text


def _field_type(cls: type, keys: list[str]) -> Any:
    kind: Any = cls
    for key in keys:
        kind = typing.get_type_hints(kind).get(key) if dataclasses.is_dataclass(kind) else None
    return kind


def diff(a: Any, b: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted fields whose values differ: {path: (value in a, value in b)}."""
    out: dict[str, tuple[Any, Any]] = {}
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if dataclasses.is_dataclass(x):
            out |= diff(x, y, f"{prefix}{field.name}.")
        elif x != y:
            out[prefix + field.name] = (x, y)
    return out


# What may change in a run that goes on: neither what is computed from the same state, nor which rows a step reads, nor what a checkpoint holds.
RESUMABLE = {
    "mesh": None,  # every field
    "sample": None,
    "model": {"compute_dtype", "matmul", "attention", "unroll_layers", "remat"},
    "optim": {field.name for field in dataclasses.fields(OptimConfig)} - {"name", "moment_dtype", "ema_decay"},
    "train": {field.name for field in dataclasses.fields(TrainConfig)} - {"batch_size", "seed", "ramp_from", "ramp_steps"},
}


def may_change(path: str) -> bool:
    """A run goes on with another value of this dotted field; else it would be another run."""
    part, _, field = path.partition(".")
    return part in RESUMABLE and (RESUMABLE[part] is None or field in RESUMABLE[part])


def to_json(config: Config) -> str:
    """The configuration as indented JSON; `from_json` gives it back equal."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, *, where: str = "config.json") -> Config:
    """The configuration that `to_json` wrote.

    Raises:
      InputError: not JSON, an unknown field, a wrong type or an invalid value; `where` names the file.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as e:
        raise InputError(where, "", f"not JSON ({e})", "Restore the file, or start the run in a new directory") from e
    if not isinstance(values, dict) or "name" not in values:
        raise InputError(where, "", "not the configuration of a run: it has no name", "Restore the file, or start the run in a new directory")
    try:
        return _build(Config, values, "")
    except InputError as e:
        raise InputError(f"{where}: {e.field}", e.value, e.reason, e.remedy) from e


def _build(cls: Any, values: Mapping[str, Any], prefix: str) -> Any:
    types = typing.get_type_hints(cls)
    new = {}
    for key, value in values.items():
        _known_field(cls, types, key, prefix)
        if dataclasses.is_dataclass(types[key]) and isinstance(value, Mapping):
            value = _build(types[key], value, f"{prefix}{key}.")
        new[key] = _typed(types[key], value, prefix + key)
    return _made(lambda: cls(**new), prefix)
