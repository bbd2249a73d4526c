"""Every test runs on eight simulated CPU devices and without a network."""

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Set before anything imports jax or transformers; child processes inherit these, and see one device.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads outlive a fork, of which it warns
# Many tests train the same small model anew: what took long to compile is compiled once. A folder for each process with its children, as JAX
# does not write whole files at once: one that another process were still writing would be read as damaged, with a warning, here an error.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mlm_jax_compiled_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax
import numpy as np
import pytest

from tests import compilation

jax.config.update("jax_num_cpu_devices", 8)
compilation.be_quick()
pytest.register_assert_rewrite("tests.doctor.shared")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"])


Documents = list[tuple[np.ndarray, np.ndarray]]  # of each the ids, and whether they are learned; <|endoftext|> is not among them

# Everything small: a run of it takes seconds. {source} is the text.
TINY_EXPERIMENT = """from mlm_jax.config import Config, DataConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig

CONFIG = Config(
    name="test",
    model=ModelConfig(n_layers=2, n_heads=2, d_model=32, d_ff=64, context_len=16),
    data=DataConfig(source={source!r}, tokenizer="bpe", bpe_vocab_size=300),
    optim=OptimConfig(peak_lr=1e-2, end_lr=1e-3, warmup_steps=2),
    train=TrainConfig(steps=20, batch_size=8, eval_every=10, eval_windows=8, save_every=5),
    sample=SampleConfig(num=2, max_tokens=8),
)
"""


@dataclasses.dataclass(frozen=True)
class TinyRun:
    """A finished run: do not write into it, other tests read it."""

    experiment: Path  # the experiment file
    text: Path  # what it was trained on
    folder: Path
    stdout: str
    stderr: str


def write_experiment(folder: Path) -> tuple[Path, Path]:
    """Writes an experiment and its text, 20 kB of words, into `folder`; returns the two paths."""
    draw = random.Random(0)
    words = "the a model reads writes text and learns from it in steps of one token".split()
    text, experiment = folder / "text.txt", folder / "tiny_test.py"
    text.write_text("".join(draw.choice(words) + draw.choice([" ", " ", " ", ".\\n"]) for _ in range(4000)), encoding="utf-8")
    experiment.write_text(TINY_EXPERIMENT.format(source=str(text)), encoding="utf-8")
    return experiment, text


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all of pytest's processes have."""
    folder = tmp_path_factory.getbasetemp()
    return folder if worker_id == "master" else folder.parent


@pytest.fixture(scope="session")
def once(shared: Path) -> Callable[[str, Callable[[], Any]], Any]:
    """(name, make) -> the JSON that `make` gives, called by the first of pytest's processes that asks: what takes long is made for all."""

    def made(name: str, make: Callable[[], Any]) -> Any:
        file = shared / f"{name}.json"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                part = file.with_suffix(".part")
                part.write_text(json.dumps(make()))
                part.rename(file)
        return json.loads(file.read_text())

    return made


@pytest.fixture(scope="session")
def tiny_run(shared: Path, once: Callable[[str, Callable[[], Any]], Any]) -> TinyRun:
    """`mlm-jax run` of a small experiment, on all eight devices."""
    from mlm_jax import cli

    folder = shared / "tiny_run"

    def make() -> tuple[str, str]:
        shutil.rmtree(folder, ignore_errors=True)  # of one that failed
        folder.mkdir()
        experiment, _ = write_experiment(folder)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert cli.main(["run", str(experiment), "--out", str(folder / "run"), "--json", "--traceback"]) == 0
        return out.getvalue(), err.getvalue()

    stdout, stderr = once("tiny_run", make)
    return TinyRun(folder / "tiny_test.py", folder / "text.txt", folder / "run", stdout, stderr)


@pytest.fixture
def tiny_experiment(tmp_path: Path) -> Path:
    """An experiment file and its text, tiny_test.py and text.txt, alone in a fresh folder."""
    folder = tmp_path / "experiment"
    folder.mkdir()
    return write_experiment(folder)[0]


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of two thousand words, a token for each byte: do not write into them."""
    from mlm_jax.config import DataConfig
    from mlm_jax.data.prepare import prepare

    folder = tmp_path_factory.mktemp("tokens")
    words = np.random.default_rng(0).choice(["the ", "model ", "reads ", "a ", "text\n", "and ", "learns "], 2000)
    (folder / "text.txt").write_text("".join(words))
    prepare(DataConfig(source=str(folder / "text.txt"), tokenizer="byte"), folder / "tokens")
    return folder / "tokens"


def write_tokens(folder: Path, sources: Mapping[str, Documents], val: Documents | None = None, *, shard_tokens: int = 40, eot_id: int = 256) -> Path:
    """Token shards of these documents as `prepare` would leave them, one source after the other; without `val` the last
    five of each are held out too."""
    from mlm_jax.config import DataConfig, MixedSourceConfig
    from mlm_jax.data import shards
    from mlm_jax.data.tokenizer import byte_level

    folder.mkdir(parents=True)
    made = []
    for name, train in sources.items():
        splits = {}
        for split, documents in {"train": train, "val": train[-5:] if val is None else val}.items():
            prefix = f"{name}_{split}" if name else split
            pieces = [np.concatenate([[eot_id], ids]) for ids, _ in documents]
            learned = [np.concatenate([[1], mask]).astype(np.uint8) for _, mask in documents]
            n = sum(map(len, pieces))
            written = shards.write_shards(pieces, n, folder, prefix, token_bytes=2, limit=shard_tokens)
            if not all(mask.all() for mask in learned):
                masks = shards.write_shards(learned, n, folder, prefix, token_bytes=2, limit=shard_tokens, ending=".mask")
                written = [dataclasses.replace(s, mask_sha256=m.sha256) for s, m in zip(written, masks, strict=True)]
            np.cumsum([0, *map(len, pieces)])[:-1].astype("<u8").tofile(folder / f"{prefix}.starts")
            prompts = sum(int((~np.asarray(mask, bool)).sum()) for mask in learned)
            splits[split] = shards.Split(n, n - prompts, n - prompts, len(documents), tuple(written), f"{prefix}.starts", "-", prompts)
        made.append(shards.SourceTokens(name=name, detail="", split_by="hash", splits=splits))
    mixture = tuple(MixedSourceConfig(source=f"{name}.txt", name=name) for name in sources) if len(sources) > 1 else ()
    config = DataConfig(mixture=mixture, tokenizer="byte")
    manifest = shards.Manifest(config=config, tokenizer="byte", vocab_size=257, eot_id=eot_id, sources=tuple(made), audit={}, lists={})
    shards.write_manifest(manifest, folder)
    byte_level().save(folder / "tokenizer")
    return folder


def documents(seed: int, n: int, *, longest: int = 30, prompts: bool = False) -> Documents:
    """`n` documents of random bytes, of 1 to `longest` tokens; with `prompts` the first part of some is not learned."""
    draw = np.random.default_rng(seed)
    made = []
    for length in draw.integers(1, longest + 1, n).tolist():
        learned = np.arange(length) >= (draw.integers(0, length) if prompts else 0)
        made.append((draw.integers(0, 256, length), learned))
    return made


@pytest.fixture(scope="module")
def running():
    """An emulator of Google Cloud Storage with the bucket `bucket`, for all tests of a module."""
    from tests.gcs_emulator import serve

    with serve() as server:
        yield server


@pytest.fixture
def server(running):
    """`running`, which answers as it should again after the test."""
    yield running
    running.answer = lambda method, name: None
