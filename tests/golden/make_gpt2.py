"""Makes tests/golden/gpt2: a tiny random GPT-2 with the logits and the loss that Hugging Face's PyTorch code gives.

Run `python tests/golden/make_gpt2.py` where torch and transformers are installed.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers


def random_gpt2(*, seed: int = 0, std: float = 0.3, **config) -> transformers.GPT2LMHeadModel:
    """A GPT-2 in evaluation mode with every tensor random, biases and gains too, so that no mistake hides behind a zero or a one."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    rng = np.random.RandomState(seed)  # its stream never changes between versions of numpy
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # the tied head is not named a second time
            gain = ".ln_" in name and name.endswith("weight")
            values = rng.standard_normal(tuple(parameter.shape)) * std + gain
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    return model


def make(folder: Path) -> None:
    """Writes the model, and golden.npz with tokens_BT, logits_BTV and the mean loss in nats per token."""
    config = {"vocab_size": 97, "n_positions": 24, "n_embd": 20, "n_layer": 3, "n_head": 4, "bos_token_id": 96, "eos_token_id": 96}
    model = random_gpt2(seed=0, **config)
    model.save_pretrained(folder)
    tokens_BT = np.random.RandomState(1).randint(0, 97, (2, 24))
    with torch.no_grad():
        out = model(torch.from_numpy(tokens_BT), labels=torch.from_numpy(tokens_BT))
    np.savez(folder / "golden.npz", tokens_BT=tokens_BT.astype(np.int32), logits_BTV=out.logits.numpy(), loss=out.loss.numpy())


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "gpt2")
