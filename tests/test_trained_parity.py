"""A model that PyTorch has trained to sort goes on here as it does there, from the file that each code base saves it in."""

import functools
import itertools
import runpy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

import mlm_jax
from mlm_jax import huggingface
from mlm_jax.config import SampleConfig
from mlm_jax.data import tokenizer
from mlm_jax.decode.loop import Decoding

pytestmark = pytest.mark.parity

GOLDEN = Path(__file__).parent / "golden"
LETTERS, LENGTH, STEPS = "abcd", 6, 120
V, T, D, N, L = len(LETTERS) + 1, 2 * LENGTH, 48, 3, 2  # a token for each letter, and the end of text
PROMPTS = list(itertools.product(range(len(LETTERS)), repeat=LENGTH))[::32]  # 128 of 4,096
FILES = {  # what saved the model, and where
    "transformers": "model.safetensors",
    "transformers, in shards": "model.safetensors.index.json",
    "transformers before safetensors": "pytorch_model.bin",
    "nanoGPT": "ckpt.pt",
    "nanoGPT without biases": "ckpt.pt",
    "minGPT": "model.pt",
}


def new_model(kind: str) -> Any:
    if kind == "transformers":
        sizes = {"vocab_size": V, "n_positions": T, "n_embd": D, "n_layer": L, "n_head": N, "bos_token_id": V - 1, "eos_token_id": V - 1}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    gpt = runpy.run_path(str(GOLDEN / "torch_gpt.py"))["GPT"]
    kind, _, without = kind.lower().partition(" ")
    model = gpt(kind, vocab_size=V, context_len=T, n_layers=L, n_heads=N, width=D, bias=not without)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 0.25  # to where training starts: they are made wide, for logits that are far from zero untrained
    return model


@functools.cache
def trained(kind: str) -> tuple[Any, Any]:
    """(a model of the code base `kind` that sorts LENGTH letters, its optimizer); tests only read them."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other, long where other tests use the cores
    rng, model = np.random.RandomState(0), new_model(kind).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(STEPS):
        letters = rng.randint(0, len(LETTERS), (64, LENGTH))
        tokens = torch.from_numpy(np.concatenate([letters, np.sort(letters)], axis=1))
        out = model(tokens[:, :-1])
        answers = getattr(out, "logits", out)[:, LENGTH - 1 :]
        loss = torch.nn.functional.cross_entropy(answers.flatten(0, 1), tokens[:, LENGTH:].flatten())
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / STEPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return model.eval(), optimizer


def save(what: str, folder: Path) -> tuple[Any, Path, dict[str, Any]]:
    """Saves the trained model as its code base does: (it, where it is, the settings that the file leaves out)."""
    torch = pytest.importorskip("torch")
    kind = "transformers" if what.startswith("transformers") else what
    model, optimizer = trained(kind)
    file, state = folder / FILES[what], model.state_dict()
    if kind == "transformers":
        model.save_pretrained(folder, max_shard_size="50KB" if what.endswith("shards") else "5GB")
        if file.suffix == ".bin":
            (folder / "model.safetensors").unlink()
            torch.save(state, file)
        assert file.exists()
        return model, folder, {}
    if kind == "minGPT":
        torch.save(state, file)
        return model, file, {"n_heads": N, "activation": "gelu_tanh"}
    args = {"n_layer": L, "n_head": N, "n_embd": D, "block_size": T, "bias": kind == "nanoGPT", "vocab_size": V, "dropout": 0.0}
    torch.save({"model": state, "model_args": args, "optimizer": optimizer.state_dict(), "iter_num": STEPS, "config": {"out_dir": "out"}}, file)
    return model, file, {}


def their_greedy(model: Any) -> list[list[int]]:
    """What the model itself writes after each prompt."""
    import torch

    ids = torch.tensor(PROMPTS)
    if isinstance(model, transformers.GPT2LMHeadModel):
        how = {"do_sample": False, "eos_token_id": None, "pad_token_id": V - 1}
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, **how)[:, LENGTH:].tolist()
    for _ in range(LENGTH):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    return ids[:, LENGTH:].tolist()


@pytest.mark.parametrize("what", FILES)
def test_a_model_trained_in_pytorch_sorts_here_token_for_token_as_there_and_goes_back_byte_for_byte(tmp_path: Path, what: str) -> None:
    import torch

    (tmp_path / "tokenizer").mkdir()
    tokenizer.characters([LETTERS]).save(tmp_path / "tokenizer")
    (tmp_path / "theirs").mkdir()
    theirs, where, settings = save(what, tmp_path / "theirs")
    model, params, letters = mlm_jax.load(where, settings=settings, tokenizer=tmp_path / "tokenizer")

    their_rows = their_greedy(theirs)
    right = sum(row == sorted(prompt) for row, prompt in zip(their_rows, PROMPTS, strict=True))
    assert right >= 0.9 * len(PROMPTS), "it has not learned to sort"
    decoding = Decoding(model, params, PROMPTS, SampleConfig(max_tokens=LENGTH, temperature=0.0), letters.eot_id)
    decoding.advance(LENGTH)
    assert [row.tolist() for row, _ in decoding.rows()] == their_rows
    texts = mlm_jax.generate(model, params, letters, [letters.decode(prompt) for prompt in PROMPTS], max_tokens=LENGTH, temperature=0.0)
    assert [text for (text,) in texts] == [letters.decode(row) for row in their_rows]

    tokens_BT = np.array([[*prompt, *row] for prompt, row in zip(PROMPTS, their_rows, strict=True)], np.int32)
    with torch.no_grad():
        out = theirs(torch.from_numpy(tokens_BT).long())
    theirs_BTV = getattr(out, "logits", out).numpy()
    logits_BTV = np.asarray(jax.jit(model.apply)({"params": params}, tokens_BT))
    print(f"{what}: {right} of {len(PROMPTS)} sorted; logits {np.abs(logits_BTV - theirs_BTV).max():.1e} of {np.abs(theirs_BTV).max():.1f}")
    np.testing.assert_allclose(logits_BTV, theirs_BTV, rtol=0, atol=5e-5)

    back = load_file(huggingface.export_weights(model.config, jax.tree.map(np.asarray, params), tmp_path / "ours") / "model.safetensors")
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight") if not what.startswith("transformers") else ()  # (out, in) there
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items() if not name.endswith(".attn.bias")}
    state = {name: tensor.T if name.endswith(linear) else tensor for name, tensor in state.items()}
    if model.config.tied_head:
        assert state.pop("lm_head.weight").tobytes() == state["transformer.wte.weight"].tobytes()
    assert all(back[name].tobytes() == tensor.tobytes() for name, tensor in state.items())
    zeros = [name for name in back if name not in state]  # the biases that a model without them gets
    assert bool(zeros) == (what == "nanoGPT without biases") and not any(back[name].any() for name in zeros)
