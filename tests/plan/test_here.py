"""The plan of the machine at hand, by the command line."""

import json

import pytest

from mlm_jax import cli

EXPERIMENT = """
from mlm_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig

CONFIG = Config(
    name="small",
    model=ModelConfig(context_len=64, n_layers=2, n_heads=2, d_model=64, d_ff=256),
    data=DataConfig(tokenizer="bpe", bpe_vocab_size=512, special_tokens=("<|mask|>",)),
    optim=OptimConfig(warmup_steps=10),
    train=TrainConfig(steps=100, batch_size=8),
)
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(EXPERIMENT)
    return "small.py"


@pytest.mark.slow
def test_a_cpu_is_planned_and_measured(small, capfd):
    """Products of a step are 6 FLOPs a parameter and token, but for embedded positions, biases and gains; and those of attention."""
    assert cli.main(["plan", small, "--topology", "cpu", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    matrices = 2 * 12 * 64**2 + 513 * 64
    assert found["flops"]["float32"] == pytest.approx(8 * 64 * (6 * matrices + 12 * 2 * 64 * 64), rel=0.02)
    assert found["tokens"] == 8 * 64 and found["n_params"] == 137_024 and 0 < found["lower_s"] < found["step_s"] and found["measured_s"] > 0


def refused(capfd, *arguments: str) -> str:
    assert cli.main(["plan", *arguments]) == 2
    return capfd.readouterr().err


def test_bad_input_is_refused_in_one_line(small, capfd):
    assert "--topology = v9:2x2: names none of the TPUs v4, v5e, v5p, v6e, tpu7x." in refused(capfd, small, "--topology", "v9:2x2")
    assert "v5e:2x4 (v5litepod-8)" in refused(capfd, small, "--topology", "v5e:3x3")
    assert "--topology = gpu: the devices of this machine are of kind cpu." in refused(capfd, small, "--topology", "gpu")
    assert "--price = -1.0: no price of a chip-hour in USD." in refused(capfd, small, "--topology", "v5e:2x4", "--price", "-1")
    assert "has neither slices nor a price" in refused(capfd, small, "--topology", "cpu", "--search")
    assert "depends on the text. Set model.vocab_size" in refused(capfd, small, "--topology", "cpu", "--set", "data.tokenizer=char")
    assert "--cache = gs://b/plans: is in a bucket." in refused(capfd, small, "--topology", "v5e:2x4", "--cache", "gs://b/plans")
