"""Every test runs on eight simulated CPU devices and without a network."""

import contextlib
import dataclasses
import io
import os
import random
import shutil
import tempfile
from pathlib import Path

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

jax.config.update("jax_num_cpu_devices", 8)
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:  # the tests mostly compile: this halves their time; child processes compile as users do
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"])


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
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """`mlm-jax run` of a small experiment, on all eight devices."""
    from mlm_jax import cli

    folder = tmp_path_factory.mktemp("tiny_run")
    experiment, text = write_experiment(folder)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert cli.main(["run", str(experiment), "--out", str(folder / "run"), "--json", "--traceback"]) == 0
    return TinyRun(experiment, text, folder / "run", out.getvalue(), err.getvalue())


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
