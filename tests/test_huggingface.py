"""Import and export: our parameters against Hugging Face's own files, logits and loss."""

import dataclasses
import filecmp
import json
import os
import pickle
import re
import runpy
import shutil
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mlm_jax import cli, huggingface, objectives, runs, sharding, weights
from mlm_jax.config import DataConfig, InputError, MeshConfig, ModelConfig
from mlm_jax.data import tokenizer
from mlm_jax.model import gpt2

GOLDEN = Path(__file__).parent / "golden" / "gpt2"  # written by Hugging Face: see make_gpt2.py beside it
V, T, D, N, L = 97, 24, 20, 4, 3  # of the golden model
TEXT = "Once upon a time there was a small model."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden model that a test may spoil."""
    shutil.copytree(GOLDEN, tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A folder with a tokenizer of fewer tokens than the golden model embeds."""
    (tmp_path / "tokenizer").mkdir()
    tokenizer.characters([TEXT]).save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    save_file({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    """Sets keys of config.json; None takes one out."""
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if key not in changes or value is not None}))


def logits_and_loss(config: ModelConfig, params: Any, tokens_BT: np.ndarray) -> tuple[np.ndarray, float]:
    logits_BTV = jax.jit(gpt2.GPT2(config).apply)({"params": params}, jnp.asarray(tokens_BT, jnp.int32))
    examples = objectives.causal(jnp.asarray(tokens_BT, jnp.int32))
    nats_BT = objectives.cross_entropy(logits_BTV[:, :-1], examples.targets_BT)
    return np.asarray(logits_BTV), float(objectives.weighted_mean(nats_BT, examples.weights_BT))


def same_params(a: Any, b: Any) -> bool:
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes(), a, b)
    return jax.tree.all(same)


def message(what: pytest.ExceptionInfo[InputError]) -> str:
    text = str(what.value)
    assert "\n" not in text
    return text


# ---- the numbers ----


def test_an_imported_model_gives_hugging_faces_golden_logits_and_loss() -> None:
    golden = np.load(GOLDEN / "golden.npz")
    config, params = huggingface.import_weights(GOLDEN)
    logits_BTV, loss = logits_and_loss(config, params, golden["tokens_BT"])
    assert np.abs(golden["logits_BTV"]).max() > 1
    np.testing.assert_allclose(logits_BTV, golden["logits_BTV"], rtol=0, atol=1e-4)
    assert loss == pytest.approx(float(golden["loss"]), abs=1e-5)


def test_the_configuration_is_read_from_config_json() -> None:
    config, _ = huggingface.import_weights(GOLDEN)
    assert config == ModelConfig(vocab_size=V, context_len=T, n_layers=L, n_heads=N, d_model=D, d_ff=4 * D, dropout=0.1)


def test_what_config_json_leaves_out_is_hugging_faces_default(folder: Path) -> None:
    written = json.loads((folder / "config.json").read_text())
    change_config(folder, **{key: None for key in written if key not in ("model_type", *huggingface.SIZES)})
    config, _ = huggingface.import_weights(folder)
    default = transformers.GPT2Config()
    assert (config.norm_eps, config.init_std, config.dropout) == (default.layer_norm_epsilon, default.initializer_range, default.resid_pdrop)
    assert {key: getattr(default, key) for key in huggingface.FIXED} == huggingface.FIXED
    assert default.n_inner is None and default.tie_word_embeddings and config.tied_head
    assert (default.activation_function, config.activation) == ("gelu_new", "gelu_tanh")


def test_the_columns_of_c_attn_are_queries_then_keys_then_values_head_by_head() -> None:
    _, params = huggingface.import_weights(GOLDEN)
    c_attn = tensors_of(GOLDEN)["transformer.h.1.attn.c_attn.weight"]
    H = D // N
    for part, name in enumerate(("w_q_DNH", "w_k_DKH", "w_v_DKH")):
        for head in range(N):
            start = part * D + head * H
            np.testing.assert_array_equal(params["blocks"]["attention"][name][1][:, head], c_attn[:, start : start + H])


def test_the_table_names_every_parameter_of_the_model_with_its_shape() -> None:
    config, params = huggingface.import_weights(GOLDEN)
    shapes = jax.eval_shape(lambda: gpt2.init(gpt2.GPT2(config), jax.random.key(0)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


# Parameters as transformers counts them, with the sizes of Radford et al. 2019, table 2, and of distilbert/distilgpt2's config.json.
PARAMETERS = [
    (12, 12, 768, 124_439_808),
    (24, 16, 1024, 354_823_168),
    (36, 20, 1280, 774_030_080),
    (48, 25, 1600, 1_557_611_200),
    (6, 12, 768, 81_912_576),
]


@pytest.mark.parametrize(("n_layers", "n_heads", "d_model", "count"), PARAMETERS)
def test_every_size_has_exactly_its_number_of_parameters_in_both_namings(n_layers: int, n_heads: int, d_model: int, count: int) -> None:
    config = ModelConfig(vocab_size=50257, n_layers=n_layers, n_heads=n_heads, d_model=d_model, d_ff=4 * d_model)
    shapes = huggingface.tensor_shapes(config)
    assert len(shapes) == 12 * n_layers + 4
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count
    assert gpt2.n_params(jax.eval_shape(lambda: gpt2.init(gpt2.GPT2(config), jax.random.key(0)))) == count


# ---- the round trips ----


def test_import_followed_by_export_gives_byte_identical_tensors(tmp_path: Path) -> None:
    out = huggingface.export_weights(*huggingface.import_weights(GOLDEN), tmp_path / "out")
    before, after = tensors_of(GOLDEN), tensors_of(out)
    assert sorted(before) == sorted(after)
    for name in before:
        assert (before[name].dtype, before[name].shape, before[name].tobytes()) == (after[name].dtype, after[name].shape, after[name].tobytes()), name


def test_the_exported_weight_file_is_byte_for_byte_the_one_that_hugging_face_writes(tmp_path: Path) -> None:
    out = huggingface.export_weights(*huggingface.import_weights(GOLDEN), tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (GOLDEN / "model.safetensors").read_bytes()


def test_export_followed_by_import_gives_byte_identical_parameters_and_the_same_configuration(tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=11, context_len=7, n_layers=2, n_heads=3, d_model=6, d_ff=10, dropout=0.2, norm_eps=1e-6, init_std=0.03)
    shapes = jax.eval_shape(lambda: gpt2.init(gpt2.GPT2(config), jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)
    params["w_token_VD"][0, :2] = -0.0, 1e-42  # signs of zero and subnormal numbers survive too
    out = huggingface.export_weights(config, jax.tree.map(jnp.asarray, params), tmp_path / "out")
    again, params_again = huggingface.import_weights(out)
    assert again == config
    assert same_params(params_again, params)


def test_parameters_are_float32_numpy_arrays_that_own_their_layout() -> None:
    _, params = huggingface.import_weights(GOLDEN)
    assert all(type(x) is np.ndarray and x.dtype == np.float32 and x.flags.c_contiguous for x in jax.tree.leaves(params))


# ---- the forms that weight files come in ----


def test_a_bare_model_without_the_prefix_gives_the_same_parameters(folder: Path) -> None:
    rewrite(folder, {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(folder).items()})
    assert same_params(huggingface.import_weights(folder)[1], huggingface.import_weights(GOLDEN)[1])


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_mask_buffers_are_dropped_and_the_bias_of_c_attn_is_not(folder: Path, prefix: str) -> None:
    tensors = {prefix + name.removeprefix("transformer."): tensor for name, tensor in tensors_of(folder).items()}
    for layer in range(L):
        tensors[f"{prefix}h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, T, T), np.uint8))
        tensors[f"{prefix}h.{layer}.attn.masked_bias"] = np.full((), -1e4, np.float32)
    rewrite(folder, tensors)
    _, params = huggingface.import_weights(folder)
    assert same_params(params, huggingface.import_weights(GOLDEN)[1])
    assert np.abs(params["blocks"]["attention"]["b_q_NH"]).min() > 0


def test_a_head_that_repeats_the_token_embedding_is_accepted(folder: Path) -> None:
    tensors = tensors_of(folder)
    rewrite(folder, tensors | {"lm_head.weight": tensors["transformer.wte.weight"]})
    assert same_params(huggingface.import_weights(folder)[1], huggingface.import_weights(GOLDEN)[1])


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_weights_become_the_same_numbers_in_float32(folder: Path, dtype: Any) -> None:
    halves = {name: tensor.astype(dtype) for name, tensor in tensors_of(folder).items()}
    rewrite(folder, halves)
    _, params = huggingface.import_weights(folder)
    assert params["w_token_VD"].dtype == np.float32
    shapes, read = huggingface.to_tensors(huggingface.import_weights(folder)[0], params)
    assert {"transformer." + name for name in shapes} == set(halves)
    for name in shapes:
        np.testing.assert_array_equal(read(name).astype(np.float64), halves["transformer." + name].astype(np.float64))


def shard(folder: Path) -> dict[str, str]:
    """Splits the weights over two files with an index; returns the index's weight map."""
    tensors = tensors_of(folder)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return files


def test_sharded_weights_are_read_through_their_index(folder: Path) -> None:
    shard(folder)
    assert same_params(huggingface.import_weights(folder)[1], huggingface.import_weights(GOLDEN)[1])


def test_an_inner_width_that_is_not_four_times_the_outer_is_read(folder: Path) -> None:
    cut = {"c_fc.weight": np.s_[:, :30], "c_fc.bias": np.s_[:30], "c_proj.weight": np.s_[:30]}
    rewrite(folder, {name: tensor[cut.get(name.partition(".mlp.")[2], ...)] for name, tensor in tensors_of(folder).items()})
    change_config(folder, n_inner=30)
    config, params = huggingface.import_weights(folder)
    assert config.d_ff == 30 and params["blocks"]["mlp"]["w_up_DF"].shape == (L, D, 30)


# ---- nanoGPT's and minGPT's layout, and single files ----


def linear(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with the weights of the projections (out, in), as nn.Linear has them."""
    projections = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: tensor.T if name.endswith(projections) else tensor for name, tensor in tensors.items()}


BARE = {"n_heads": N, "activation": "gelu_tanh"}  # what a state dict does not tell


def test_linear_weights_give_the_same_parameters_as_conv1d_weights(folder: Path) -> None:
    assert "Conv1D (in, out)" in huggingface.open_weights(folder).describe()
    rewrite(folder, linear(tensors_of(folder)))
    source = huggingface.open_weights(folder)
    assert "Linear (out, in)" in source.describe()
    assert source.config == huggingface.import_weights(GOLDEN)[0]
    assert same_params(source.params(), huggingface.import_weights(GOLDEN)[1])


@pytest.mark.parametrize("layout", [dict, linear])
def test_a_single_file_gives_the_same_model_once_the_settings_say_what_it_does_not(folder: Path, tmp_path: Path, layout: Any) -> None:
    rewrite(folder, layout(tensors_of(folder)))
    alone = shutil.copy(folder / "model.safetensors", tmp_path / "weights.safetensors")
    config, params = huggingface.import_weights(alone, settings=BARE | {"dropout": 0.1})
    assert config == huggingface.import_weights(GOLDEN)[0]
    assert same_params(params, huggingface.import_weights(GOLDEN)[1])


def test_a_single_file_beside_its_config_json_needs_no_settings(folder: Path) -> None:
    assert huggingface.import_weights(folder / "model.safetensors")[0] == huggingface.import_weights(GOLDEN)[0]


@pytest.mark.parametrize(
    ("given", "asked"), [({}, ("n_heads", "activation")), ({"n_heads": N}, ("activation",)), ({"activation": "gelu_erf"}, ("n_heads",))]
)
def test_what_a_single_file_does_not_tell_is_asked_for_with_the_flag_that_says_it(tmp_path: Path, given: dict, asked: tuple) -> None:
    alone = shutil.copy(GOLDEN / "model.safetensors", tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match=r"do not tell .*--set model\.n_heads=12 --set model\.activation=gelu_erf for nanoGPT, gelu_tanh") as what:
        huggingface.import_weights(alone, settings=given)
    assert what.value.reason == f"the weights alone do not tell {' and '.join('model.' + field for field in asked)}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *{"position": "none", "norm": "rms", "qk_norm": True, "logit_softcap": 3.0, "mup_base_width": 10, "activation": "swiglu"}.items(),
        *{"n_kv_heads": 2, "n_heads": 5, "norm_eps": 0.1}.items(),
        ("activation", "gelu_erf"),
    ],
)
def test_a_setting_that_would_make_another_model_of_the_weights_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^model\.{field} = '?{value}'?: (no model of Hugging Face|the file beside the weights says)"):
        huggingface.open_weights(GOLDEN, settings={field: value})


def test_settings_that_leave_the_model_the_same_are_taken_and_a_wrong_one_is_named() -> None:
    config, _ = huggingface.import_weights(GOLDEN, settings={"activation": "gelu_tanh", "dropout": 0.0, "compute_dtype": "bfloat16"})
    assert (config.activation, config.dropout, config.compute_dtype) == ("gelu_tanh", 0.0, "bfloat16")
    with pytest.raises(InputError, match=r"^model\.n_head: .*Did you mean 'n_heads'"):
        huggingface.import_weights(GOLDEN, settings={"n_head": 4})
    with pytest.raises(InputError, match=r"^model\.n_heads = 'four': expected int"):
        huggingface.import_weights(GOLDEN, settings={"n_heads": "four"})


def test_settings_settle_three_different_dropouts(folder: Path) -> None:
    change_config(folder, resid_pdrop=0.2)
    assert huggingface.import_weights(folder, settings={"dropout": 0.3})[0].dropout == 0.3


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_the_prefixes_of_compiled_and_distributed_models_are_dropped(folder: Path, wrapper: str) -> None:
    rewrite(folder, {wrapper + name: tensor for name, tensor in tensors_of(folder).items()})
    assert same_params(huggingface.import_weights(folder)[1], huggingface.import_weights(GOLDEN)[1])


def test_a_head_of_its_own_is_read_and_written_where_the_configuration_says_so(folder: Path, tmp_path: Path) -> None:
    head = np.random.default_rng(0).standard_normal((V, D)).astype(np.float32)
    rewrite(folder, tensors_of(folder) | {"lm_head.weight": head})
    change_config(folder, tie_word_embeddings=False)
    config, params = huggingface.import_weights(folder)
    assert not config.tied_head and params["w_head_VD"].tobytes() == head.tobytes()
    out = huggingface.export_weights(config, params, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_whether_the_head_of_a_single_file_is_tied_is_seen_from_its_numbers(folder: Path, tmp_path: Path) -> None:
    tensors = tensors_of(folder)
    head = tensors["transformer.wte.weight"].copy()
    for change, tied in ((0, True), (1, False)):
        head[-1, -1] += change
        rewrite(folder, tensors | {"lm_head.weight": head})
        alone = shutil.copy(folder / "model.safetensors", tmp_path / "weights.safetensors")
        assert huggingface.import_weights(alone, settings=BARE)[0].tied_head is tied


def test_a_model_without_biases_is_read_and_exports_with_biases_that_are_zero(folder: Path, tmp_path: Path) -> None:
    kept = {name: tensor for name, tensor in tensors_of(folder).items() if not name.endswith(".bias")}
    rewrite(folder, linear(kept))
    config, params = huggingface.import_weights(folder)
    fresh = jax.eval_shape(lambda: gpt2.init(gpt2.GPT2(config), jax.random.key(0)))
    assert not config.biases and jax.tree.structure(params) == jax.tree.structure(fresh)
    exported = tensors_of(huggingface.export_weights(config, params, tmp_path / "out"))
    assert all(exported[name].tobytes() == kept[name].tobytes() for name in kept)
    zeros = set(exported) - set(kept)
    assert len(zeros) == 6 * L + 1 and not any(exported[name].any() for name in zeros)
    golden = np.load(GOLDEN / "golden.npz")["tokens_BT"]
    ours, again = (logits_and_loss(*model, golden)[0] for model in ((config, params), huggingface.import_weights(tmp_path / "out")))
    np.testing.assert_allclose(ours, again, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("theirs", "ours"), [("gelu", "gelu_erf"), ("relu2", "relu2"), ("gelu_new", "gelu_tanh")])
def test_the_activation_goes_both_ways(folder: Path, tmp_path: Path, theirs: str, ours: str) -> None:
    change_config(folder, activation_function=theirs)
    config, params = huggingface.import_weights(folder)
    assert config.activation == ours
    out = huggingface.export_weights(config, params, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["activation_function"] == theirs


def test_a_weight_file_becomes_a_run_with_the_settings_and_the_tokenizer_that_it_lacks(folder: Path, tmp_path: Path, tokens: Path) -> None:
    rewrite(folder, linear(tensors_of(folder)))
    alone, said = shutil.copy(folder / "model.safetensors", tmp_path / "weights.safetensors"), []
    with pytest.raises(InputError, match=r"tokenizer = .*has neither tokenizer\.json"):
        runs.import_model(str(alone), tmp_path / "run", settings=BARE)
    with pytest.raises(InputError, match=r"tokenizer = gpt2: has 50257 tokens, more than the 97"):
        runs.import_model(str(alone), tmp_path / "run", settings=BARE, tokenizer="gpt2")
    runs.import_model(str(alone), tmp_path / "run", settings=BARE, tokenizer=tokens, say=said.append)
    assert "Linear (out, in)" in said[0] and len(said) == 1
    model, params, made = runs.load(tmp_path / "run")
    assert same_params(jax.tree.map(np.asarray, params), huggingface.import_weights(GOLDEN)[1])
    assert (made.vocab_size, model.config.n_heads) == (tokenizer.Tokenizer.load(tokens).vocab_size, N)
    with pytest.raises(InputError, match="a run, which has a configuration"):
        runs.load(tmp_path / "run", settings=BARE)


def test_weights_of_others_come_straight_onto_the_mesh_that_load_is_given(folder: Path, tokens: Path) -> None:
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    _, params, _ = runs.load(folder, mesh=mesh, settings={"vocab_multiple": 2}, tokenizer=tokens)
    assert jax.tree.map(lambda x: x.sharding, params) == sharding.shardings(mesh, params)
    assert len(params["blocks"]["mlp"]["w_up_DF"].sharding.device_set) == 8


# ---- padding, the mesh, memory ----


def test_the_embedding_is_padded_with_rows_of_zeros_and_exported_without_them(tmp_path: Path) -> None:
    config, params = huggingface.import_weights(GOLDEN, settings={"vocab_multiple": 64})
    assert (config.vocab_size, config.padded_vocab_size, params["w_token_VD"].shape) == (V, 128, (128, D))
    assert params["w_token_VD"][:V].tobytes() == tensors_of(GOLDEN)["transformer.wte.weight"].tobytes() and not params["w_token_VD"][V:].any()
    golden = np.load(GOLDEN / "golden.npz")
    logits_BTV, loss = logits_and_loss(config, params, golden["tokens_BT"])
    np.testing.assert_allclose(logits_BTV[..., :V], golden["logits_BTV"], rtol=0, atol=1e-4)
    assert loss == pytest.approx(float(golden["loss"]), abs=1e-5)
    out = huggingface.export_weights(config, params, tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (GOLDEN / "model.safetensors").read_bytes()
    assert json.loads((out / "config.json").read_text())["vocab_size"] == V


@pytest.mark.parametrize("layout", [dict, linear])
@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 2, 4), (8, 1, 1), (1, 4, 2)])
def test_parameters_on_a_mesh_are_those_of_the_host_and_each_part_is_read_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, axes: tuple[int, int, int], layout: Any
) -> None:
    rewrite(folder, layout(tensors_of(folder)))
    mesh = sharding.make_mesh(MeshConfig(data=axes[0], fsdp=axes[1], tensor=axes[2]))
    source = huggingface.open_weights(folder, settings={"vocab_multiple": 4})
    host, copied, copy = source.params(), [], weights.copy
    monkeypatch.setattr(weights, "copy", lambda out, *rest: copied.append(out.size) or copy(out, *rest))
    params = source.params(mesh)
    assert same_params(jax.tree.map(np.asarray, params), host)
    assert jax.tree.map(lambda x: x.sharding, params) == sharding.shardings(mesh, host)
    assert sum(copied) == gpt2.n_params(host)


def test_a_mesh_that_does_not_divide_the_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"mesh\.tensor = 8"):
        huggingface.import_weights(GOLDEN, mesh=sharding.make_mesh(MeshConfig(data=1, tensor=8)))


def test_import_needs_memory_for_one_copy_of_the_weights_and_export_for_few_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CHUNK", 1 << 16)
    config = ModelConfig(vocab_size=2000, context_len=64, n_layers=8, n_heads=2, d_model=128, d_ff=512)
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), jax.eval_shape(lambda: gpt2.init(gpt2.GPT2(config), jax.random.key(0))))
    size = 4 * gpt2.n_params(params)
    transformers.GPT2Config()  # what transformers loads at its first use is no part of the weights
    monkeypatch.setattr(huggingface, "_write_configs", lambda *_: None)
    tracemalloc.start()
    try:
        huggingface.export_weights(config, params, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 0.2 * size
        shutil.copy(GOLDEN / "config.json", tmp_path / "out")
        sizes = {"vocab_size": 2000, "n_positions": 64, "n_embd": 128, "n_layer": 8, "n_head": 2}
        change_config(tmp_path / "out", **sizes)
        tracemalloc.reset_peak()
        huggingface.import_weights(tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 1.2 * size
        tracemalloc.reset_peak()
        source = huggingface.open_weights(tmp_path / "out")
        huggingface.export_weights(source.config, source.unread(), tmp_path / "again")
        assert tracemalloc.get_traced_memory()[1] < 0.2 * size
        assert filecmp.cmp(tmp_path / "out/model.safetensors", tmp_path / "again/model.safetensors", shallow=False)
    finally:
        tracemalloc.stop()


# ---- bad input: tensors and files ----


def test_every_missing_extra_and_misshapen_tensor_is_named_in_one_line_with_both_shapes(folder: Path) -> None:
    tensors = tensors_of(folder)
    del tensors["transformer.h.2.ln_1.bias"], tensors["transformer.wpe.weight"]
    tensors["transformer.h.0.attn.c_proj.weight"] = np.zeros((D, D + 1), np.float32)
    tensors["transformer.ln_f.bias"] = np.zeros((), np.float32)
    tensors["score.weight"] = np.zeros((2, D), np.float32)
    tensors["transformer.h.3.ln_1.bias"] = np.zeros(D, np.float32)  # a layer too many
    rewrite(folder, tensors)
    with pytest.raises(InputError) as what:
        huggingface.import_weights(folder)
    text = message(what)
    for part in (
        "h.2.ln_1.bias is missing, expected (20,)",
        "wpe.weight is missing, expected (24, 20)",
        "h.0.attn.c_proj.weight is (20, 21), expected (20, 20)",
        "ln_f.bias is (), expected (20,)",
        "score.weight (2, 20) is not expected",
        "h.3.ln_1.bias (20,) is not expected",
    ):
        assert part in text
    assert text.count("expected") == 6


def test_a_transposed_weight_is_refused_and_not_reshaped(folder: Path) -> None:
    tensors = tensors_of(folder)
    tensors["transformer.h.1.mlp.c_fc.weight"] = tensors["transformer.h.1.mlp.c_fc.weight"].T
    rewrite(folder, tensors)
    with pytest.raises(InputError, match=r"h\.1\.mlp\.c_fc\.weight is \(80, 20\), expected \(20, 80\)"):
        huggingface.import_weights(folder)


def test_a_head_of_its_own_is_refused(folder: Path) -> None:
    rewrite(folder, tensors_of(folder) | {"lm_head.weight": np.zeros((V, D), np.float32)})
    with pytest.raises(InputError, match=r"lm_head\.weight differs from wte\.weight.*said to be tied.*tie_word_embeddings"):
        huggingface.import_weights(folder)


def test_an_untied_head_that_is_absent_is_a_missing_tensor(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"lm_head\.weight is missing, expected \(97, 20\)"):
        huggingface.import_weights(folder)


def test_weights_that_float32_cannot_hold_are_refused_by_name(folder: Path) -> None:
    tensors = tensors_of(folder)
    tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"].astype(np.float64)
    rewrite(folder, tensors)
    with pytest.raises(InputError, match=r"ln_f\.bias is F64.*float32, float16 or bfloat16"):
        huggingface.import_weights(folder)


def test_a_tensor_under_both_names_is_refused(folder: Path) -> None:
    tensors = tensors_of(folder)
    rewrite(folder, tensors | {"ln_f.bias": tensors["transformer.ln_f.bias"]})
    with pytest.raises(InputError, match=r"ln_f\.bias is there twice"):
        huggingface.import_weights(folder)


@pytest.mark.parametrize("keep", [0, 5, 3000, -1])
def test_a_truncated_weight_file_is_refused(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors: not a whole safetensors file"):
        huggingface.import_weights(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors.*Give a folder with config\.json and model\.safetensors, or"):
        huggingface.import_weights(folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        huggingface.import_weights(tmp_path / "nothing")


@pytest.mark.parametrize("outside", ["../other.safetensors", "/etc/other.safetensors", "sub/other.safetensors", "..", "model.bin"])
def test_an_index_that_points_out_of_the_folder_is_refused(folder: Path, outside: str) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "other.safetensors")
    files = shard(folder)
    files[max(files)] = outside
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(InputError, match=r"index\.json = .*not a \.safetensors file of this folder"):
        huggingface.import_weights(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors: missing, though the index names it"):
        huggingface.import_weights(folder)


@pytest.mark.parametrize(("text", "reason"), [("{", "not JSON"), ("[]", "not a JSON object"), ('{"weight_map": []}', "no weight_map")])
def test_an_unreadable_index_is_refused(folder: Path, text: str, reason: str) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=rf"index\.json.*{reason}"):
        huggingface.import_weights(folder)


# ---- bad input: all of it through the command line ----


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    rewrite(folder, tensors)


def change_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the header of the weight file and leaves the rest."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


def write(folder: Path, content: bytes | Callable[[bytes], bytes], name: str = "model.safetensors") -> None:
    path = folder / name
    path.write_bytes(content(path.read_bytes()) if callable(content) else content)


def directory(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()


def index(folder: Path, file: str) -> None:
    files = shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files | {max(files): file}}))


def with_tokenizer(folder: Path) -> None:
    tokenizer.byte_level().save(folder)


def save_torch(folder: Path, state: Any = None, **options: Any) -> Path:
    """Writes pytorch_model.bin in place of the safetensors file."""
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors_of(folder).items()} if state is None else state
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin", **options)
    return folder / "pytorch_model.bin"


class Code:
    """Unpickling it makes the marker file."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def pickled_code(folder: Path, *, zipped: bool) -> None:
    if zipped:
        save_torch(folder, {"wte.weight": Code(str(folder / "marker"))})
    else:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Code(str(folder / "marker"))))


def checkpoint(folder: Path, **changes: Any) -> Path:
    """Writes the model as nanoGPT's ckpt.pt alone, model_args changed; None takes a key out."""
    args = {"vocab_size": V, "block_size": T, "n_layer": L, "n_head": N, "n_embd": D, "bias": True, "dropout": 0.0} | changes
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(np.ascontiguousarray(tensor)) for name, tensor in linear(tensors_of(folder)).items()}
    torch.save({"model": state, "model_args": {key: value for key, value in args.items() if value is not None}}, folder / "ckpt.pt")
    return folder / "ckpt.pt"


WTE, C_FC, LN_F = "transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight", "transformer.ln_f.bias"
NOT_WHOLE = r"model\.safetensors: not a whole safetensors file"
NOT_TORCH = r"pytorch_model\.bin: not a whole PyTorch file"
CODE = r"pytorch_model\.bin: not loaded, as it holds code or objects"
# Name -> what spoils the folder (and may return the reference to import), and the line that it gives.
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty file": (lambda f: write(f, b""), NOT_WHOLE),
    "truncated length": (lambda f: write(f, lambda raw: raw[:5]), NOT_WHOLE),
    "truncated header": (lambda f: write(f, lambda raw: raw[:400]), NOT_WHOLE),
    "truncated tensor": (lambda f: write(f, lambda raw: raw[:-1]), NOT_WHOLE),
    "a byte too many": (lambda f: write(f, lambda raw: raw + b"0"), NOT_WHOLE),
    "huge header": (lambda f: write(f, lambda raw: (1 << 60).to_bytes(8, "little") + raw[8:]), NOT_WHOLE),
    "header no JSON": (lambda f: write(f, (8).to_bytes(8, "little") + b"{tensor}"), NOT_WHOLE),
    "overlapping tensors": (lambda f: change_header(f, lambda h: h[LN_F].update(data_offsets=[0, 80])), NOT_WHOLE),
    "offsets beyond the file": (lambda f: change_header(f, lambda h: h[LN_F].update(data_offsets=[1 << 40, (1 << 40) + 80])), NOT_WHOLE),
    "shape unlike its bytes": (lambda f: change_header(f, lambda h: h[LN_F].update(shape=[21])), NOT_WHOLE),
    "unknown dtype": (lambda f: change_header(f, lambda h: h[LN_F].update(dtype="F7")), NOT_WHOLE),
    "directory for the weights": (lambda f: directory(f, "model.safetensors"), NOT_WHOLE),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors and no pytorch_model.bin"),
    "int8": (lambda f: change_tensors(f, lambda t: t.update({LN_F: t[LN_F].astype(np.int8)})), r"ln_f\.bias is I8"),
    "float64": (lambda f: change_tensors(f, lambda t: t.update({LN_F: t[LN_F].astype(np.float64)})), r"ln_f\.bias is F64"),
    "NaN": (lambda f: change_tensors(f, lambda t: t[C_FC].__setitem__((3, 3), np.nan)), r"h\.1\.mlp\.c_fc\.weight: holds NaN"),
    "infinity": (lambda f: change_tensors(f, lambda t: t[WTE].__setitem__((96, 19), -np.inf)), r"wte\.weight: holds NaN or infinite"),
    "missing tensor": (lambda f: change_tensors(f, lambda t: t.pop(LN_F)), r"ln_f\.bias is missing, expected \(20,\)"),
    "extra tensor": (lambda f: change_tensors(f, lambda t: t.update(x=t[LN_F])), r"x \(20,\) is not expected"),
    "misshapen tensor": (lambda f: change_tensors(f, lambda t: t.update({LN_F: t[LN_F][1:]})), r"ln_f\.bias is \(19,\), expected \(20,\)"),
    "transposed weight": (lambda f: change_tensors(f, lambda t: t.update({C_FC: t[C_FC].T})), r"c_fc\.weight is \(80, 20\), expected \(20, 80\)"),
    "tensor of no axes": (lambda f: change_tensors(f, lambda t: t.update({WTE: np.float32(1)})), r"wte\.weight is \(\), expected"),
    "both prefixes": (lambda f: change_tensors(f, lambda t: t.update({"ln_f.bias": t[LN_F]})), r"ln_f\.bias is there twice"),
    "a head that differs": (lambda f: change_tensors(f, lambda t: t.update({"lm_head.weight": t[WTE] + 1})), r"lm_head\.weight differs"),
    "fewer layers": (lambda f: change_config(f, n_layer=4), r"h\.3\.ln_1\.weight is missing"),
    "a billion layers": (lambda f: change_config(f, n_layer=10**9), r"n_layers = 1000000000: the weights have 40 tensors, of 3 layers"),
    "more layers": (lambda f: change_config(f, n_layer=2), r"h\.2\.ln_1\.weight \(20,\) is not expected"),
    "another width": (lambda f: change_config(f, n_embd=24), r"wte\.weight is \(97, 20\), expected \(97, 24\)"),
    "config without a key": (lambda f: change_config(f, n_head=None), "n_head: missing"),
    "config of a wrong type": (lambda f: change_config(f, n_head="4"), "n_head = 4: not an integer"),
    "config of another model": (lambda f: change_config(f, model_type="gpt_neo"), "model_type = gpt_neo: not a GPT-2"),
    "config with cross-attention": (lambda f: change_config(f, add_cross_attention=True), "add_cross_attention = True"),
    "config no JSON": (lambda f: write(f, b"{", "config.json"), "config.json: not JSON"),
    "config too deep": (lambda f: write(f, b"[" * 100_000, "config.json"), "config.json: not JSON"),
    "config binary": (lambda f: write(f, b"\xff\xfe", "config.json"), "config.json: not JSON"),
    "directory for the config": (lambda f: directory(f, "config.json"), "config.json: cannot be read"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
    "smaller than its tokenizer": (with_tokenizer, "the tokenizer beside it has 257 tokens"),
    "missing shard": (lambda f: (shard(f), (f / "model-00002-of-00002.safetensors").unlink()), "missing, though the index names it"),
    "index out of its folder": (lambda f: index(f, "../model.safetensors"), "not a .safetensors file of this folder"),
    "index with an absolute path": (lambda f: index(f, "/etc/passwd"), "not a .safetensors file of this folder"),
    "index no JSON": (lambda f: (shard(f), write(f, b"no", "model.safetensors.index.json")), "not JSON"),
    "file that tells no heads": (lambda f: ((f / "config.json").unlink(), f / "model.safetensors")[1], "do not tell model.n_heads"),
    "file of another model": (
        lambda f: ((f / "config.json").unlink(), change_tensors(f, lambda t: t.pop(WTE)), f / "model.safetensors")[2],
        "no GPT-2",
    ),
    "file that is not there": (lambda f: f / "other.safetensors", "no such folder"),
}
BROKEN_TORCH: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code in a zip": (lambda f: pickled_code(f, zipped=True), CODE),
    "code in a bare pickle": (lambda f: pickled_code(f, zipped=False), CODE),
    "a whole module": (lambda f: save_torch(f, pytest.importorskip("torch").nn.Linear(2, 2)), CODE),
    "truncated zip": (lambda f: (save_torch(f), write(f, lambda raw: raw[: len(raw) // 2], "pytorch_model.bin")), NOT_TORCH),
    "empty .bin": (lambda f: (save_torch(f), write(f, b"", "pytorch_model.bin")), "pytorch_model.bin: not"),
    "a .bin of another kind": (lambda f: (save_torch(f), write(f, bytes(range(256)), "pytorch_model.bin")), "pytorch_model.bin: not"),
    "directory for the .bin": (lambda f: (save_torch(f), directory(f, "pytorch_model.bin")), NOT_TORCH),
    "a list": (lambda f: save_torch(f, [1, 2]), "no state dict but list"),
    "tensors without numbers": (
        lambda f: save_torch(f, {"wte.weight": pytest.importorskip("torch").empty(2, device="meta")}),
        "no dense tensors: wte",
    ),
    "numbers for tensors": (lambda f: save_torch(f, {"wte.weight": 3}), "no dense tensors: wte.weight"),
    "model_args without a key": (lambda f: checkpoint(f, n_head=None), "model_args: n_head missing"),
    "model_args of a wrong type": (lambda f: checkpoint(f, n_head="4"), r"n_heads = '4': expected int"),
    "model_args of a changed nanoGPT": (lambda f: checkpoint(f, use_relu=True), "not nanoGPT's own: use_relu = True"),
    "model_args without biases": (lambda f: checkpoint(f, bias=False), r"ln_f\.bias \(20,\) is not expected"),
}


@pytest.mark.parametrize("what", [*BROKEN, *(pytest.param(what, marks=pytest.mark.parity) for what in BROKEN_TORCH)])
def test_broken_input_is_refused_in_one_line_with_exit_status_2(folder: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    spoil, line = (BROKEN | BROKEN_TORCH)[what]
    tokenizer.characters([TEXT]).save(folder)  # so that nothing but the model is broken
    reference = spoil(folder)
    reference = reference if isinstance(reference, Path) and reference.suffix != ".bin" else folder
    assert cli.main(["import", str(reference), str(folder / "out")]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"mlm-jax: .*{line}.*\.\n", said), said
    assert not (folder / "out").exists() and not (folder / "marker").exists()


def test_the_pickle_with_code_would_have_made_its_marker(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Code(str(tmp_path / "marker"))))
    assert (tmp_path / "marker").exists()


def test_links_out_of_the_folder_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "blob")  # the hub's cache is such
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    assert same_params(huggingface.import_weights(folder)[1], huggingface.import_weights(GOLDEN)[1])


def test_a_pytorch_file_without_pytorch_is_refused_with_the_remedy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"PyTorch is not installed\. pip install torch, or convert the weights to safetensors"):
        huggingface.import_weights(folder)


# ---- bad input: config.json ----


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "llama"}, "model_type = llama: not a GPT-2"),
        ({"model_type": None}, "model_type.*not a GPT-2"),
        ({"activation_function": "gelu_fast"}, "activation_function = gelu_fast: not one of gelu_new, gelu_pytorch_tanh, gelu, relu2"),
        ({"activation_function": ["gelu"]}, "activation_function = .*not one of"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = no: neither true nor false"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn = True"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"resid_pdrop": 0.2}, "embd_pdrop = 0.1, attn_pdrop = 0.1, resid_pdrop = 0.2: three dropouts.*Make the three equal"),
        ({"attn_pdrop": "0.1"}, "attn_pdrop = 0.1: not a number"),
        ({"n_layer": "3"}, "n_layer = 3: not an integer"),
        ({"n_embd": 20.0}, "n_embd = 20.0: not an integer"),
        ({"n_head": True}, "n_head = True: not an integer"),
        ({"n_inner": 0.5}, "n_inner = 0.5: not an integer"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon = small: not a number"),
        ({"n_head": 3}, "model.n_heads = 3 does not divide it"),
        ({"n_positions": None}, "n_positions: missing"),
    ],
)
def test_a_model_that_ours_does_not_compute_is_refused_by_key(folder: Path, changes: dict, reason: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(InputError, match=rf"config\.json.*{reason}") as what:
        huggingface.import_weights(folder)
    message(what)


def test_the_other_name_of_the_tanh_gelu_is_accepted(folder: Path) -> None:
    change_config(folder, activation_function="gelu_pytorch_tanh")
    assert huggingface.import_weights(folder)[0].n_layers == L


@pytest.mark.parametrize(("content", "reason"), [(b"{", "not JSON"), (b"\xff", "not JSON"), (b"3", "not a JSON object"), (None, "cannot be read")])
def test_an_unreadable_config_json_is_refused(folder: Path, content: bytes | None, reason: str) -> None:
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"config\.json: {reason}"):
        huggingface.import_weights(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_refused_in_both_directions(folder: Path, tmp_path: Path) -> None:
    tokenizer.byte_level().save(folder)
    with pytest.raises(InputError, match=r"vocab_size = 97: the tokenizer beside it has 257 tokens"):
        huggingface.import_weights(folder)
    with pytest.raises(InputError, match=r"model\.vocab_size = 97: the tokenizer has 257 tokens"):
        huggingface.export_weights(*huggingface.import_weights(GOLDEN), tmp_path / "out", tokenizer=tokenizer.Tokenizer.load(folder))
    assert not (tmp_path / "out").exists()


def test_a_model_with_more_rows_than_tokens_is_imported(folder: Path, tokens: Path) -> None:
    tokenizer.Tokenizer.load(tokens).save(folder)
    assert huggingface.import_weights(folder)[0].vocab_size == V


# ---- export ----


def test_the_exported_config_json_is_hugging_faces_and_says_the_same_model(tmp_path: Path, tokens: Path) -> None:
    out = huggingface.export_weights(*huggingface.import_weights(GOLDEN), tmp_path / "out", tokenizer=tokenizer.Tokenizer.load(tokens))
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (out, GOLDEN))
    eot = tokenizer.Tokenizer.load(tokens).eot_id
    added = {"n_ctx": T, "n_inner": 4 * D, "bos_token_id": eot, "eos_token_id": eot, "transformers_version": transformers.__version__}
    assert ours == ours | theirs | added
    assert ours["architectures"] == ["GPT2LMHeadModel"] and ours["dtype"] == "float32"
    loaded = transformers.AutoConfig.from_pretrained(out)
    assert type(loaded) is transformers.GPT2Config and (loaded.n_embd, loaded.n_head) == (D, N)
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (eot, eot, eot)


def test_the_exported_file_is_marked_as_pytorchs() -> None:
    with safe_open(GOLDEN / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}  # the file that the exported one equals, byte for byte


@pytest.mark.parametrize("kind", ["char", "bpe", "byte", "gpt2"])
def test_transformers_loads_the_exported_tokenizer_and_gives_the_same_tokens(tmp_path: Path, kind: str) -> None:
    made = tokenizer.make(kind, [TEXT], [TEXT], DataConfig(bpe_vocab_size=280))
    (tmp_path / "tokenizer").mkdir()
    made.save(tmp_path / "tokenizer")
    config = ModelConfig(vocab_size=made.vocab_size, context_len=T, n_layers=1, n_heads=1, d_model=4, d_ff=4)
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), jax.eval_shape(lambda: gpt2.init(gpt2.GPT2(config), jax.random.key(0))))
    out = huggingface.export_weights(config, params, tmp_path / "out", tokenizer=tokenizer.Tokenizer.load(tmp_path / "tokenizer"))
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs.encode(TEXT) == made.encode(TEXT).tolist()
    assert theirs.decode(theirs.encode(TEXT)) == TEXT
    assert (len(theirs), theirs.eos_token_id, theirs.bos_token_id) == (made.vocab_size, made.eot_id, made.eot_id)
    assert theirs.encode("<|endoftext|>") == [made.eot_id]
    assert tokenizer.Tokenizer.load(out).encode(TEXT).tolist() == made.encode(TEXT).tolist()


def test_parameters_that_gpt2_has_no_place_for_are_refused_by_name_and_nothing_is_written(tmp_path: Path) -> None:
    config, params = huggingface.import_weights(GOLDEN)
    params["blocks"]["attention"]["scale_q_H"] = np.ones((L, D // N), np.float32)
    del params["norm_f"]["b_D"]
    params["blocks"]["mlp"]["b_up_F"] = np.zeros((L, 7), np.float32)
    with pytest.raises(InputError) as what:
        huggingface.export_weights(config, params, tmp_path / "out")
    text = message(what)
    for part in (
        "blocks/attention/scale_q_H (3, 5) is not expected",
        "norm_f/b_D is missing, expected (20,)",
        "blocks/mlp/b_up_F is (3, 7), expected (3, 80)",
    ):
        assert part in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("position", "none"),
        ("norm", "rms"),
        ("activation", "swiglu"),
        ("n_kv_heads", 2),
        ("qk_norm", True),
        ("logit_softcap", 30.0),
        ("mup_base_width", 10),
    ],
)
def test_what_hugging_faces_gpt2_cannot_express_is_refused_by_field_and_value(tmp_path: Path, field: str, value: Any) -> None:
    config = dataclasses.replace(huggingface.import_weights(GOLDEN)[0], **{field: value})
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), jax.eval_shape(lambda: gpt2.init(gpt2.GPT2(config), jax.random.key(0))))
    assert huggingface.inexpressible(config) == {field: value}
    with pytest.raises(InputError, match=rf"Hugging Face's GPT-2 cannot express model\.{field} = {value}\. ") as what:
        huggingface.export_weights(config, params, tmp_path / "out")
    message(what)
    assert list(tmp_path.iterdir()) == []


def test_all_that_cannot_be_expressed_is_named_at_once(tmp_path: Path) -> None:
    config = dataclasses.replace(huggingface.import_weights(GOLDEN)[0], position="none", norm="rms", activation="swiglu", qk_norm=True)
    with pytest.raises(InputError, match=r"model\.position = none, model\.norm = rms, model\.qk_norm = True, model\.activation = swiglu\."):
        huggingface.export_weights(config, {}, tmp_path / "out")


def test_export_leaves_a_folder_in_use_alone_unless_asked(tmp_path: Path) -> None:
    model = huggingface.import_weights(GOLDEN)
    out = huggingface.export_weights(*model, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    model[1]["norm_f"]["b_D"][:] = 7
    with pytest.raises(InputError, match=r"^out = .*not empty"):
        huggingface.export_weights(*model, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    huggingface.export_weights(*model, out, overwrite=True)
    assert tensors_of(out)["transformer.ln_f.bias"].tolist() == [7.0] * D
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_export_never_removes_what_no_export_wrote(tmp_path: Path) -> None:
    model = huggingface.import_weights(GOLDEN)
    out = huggingface.export_weights(*model, tmp_path / "out")
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"^out = .*holds what no export wrote: thesis\.tex"):
        huggingface.export_weights(*model, out, overwrite=True)
    assert (out / "thesis.tex").read_text() == "years of work"


def test_export_into_an_empty_folder_and_through_missing_parents_works(tmp_path: Path) -> None:
    model = huggingface.import_weights(GOLDEN)
    (tmp_path / "empty").mkdir()
    assert (huggingface.export_weights(*model, tmp_path / "empty") / "model.safetensors").exists()
    assert (huggingface.export_weights(*model, tmp_path / "a" / "b") / "model.safetensors").exists()


def test_export_onto_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match=r"^out = .*a file"):
        huggingface.export_weights(*huggingface.import_weights(GOLDEN), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_an_export_that_fails_half_way_leaves_the_old_folder_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = huggingface.import_weights(GOLDEN)
    out = huggingface.export_weights(*model, tmp_path / "out")

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(huggingface, "_write_configs", full_disk)  # after the weights are written
    with pytest.raises(OSError, match="no space"):
        huggingface.export_weights(*model, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == (GOLDEN / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_files_of_an_export_can_be_read_by_whoever_may_read_its_folder(tmp_path: Path) -> None:
    out = huggingface.export_weights(*huggingface.import_weights(GOLDEN), tmp_path / "out")
    (tmp_path / "plain").write_text("")
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {(tmp_path / "plain").stat().st_mode & 0o777}


def test_export_to_where_no_folder_can_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"^out = .*cannot be made \(Not a directory\)"):
        huggingface.export_weights(*huggingface.import_weights(GOLDEN), tmp_path / "file" / "out")


def test_export_through_a_link_replaces_the_folder_behind_it(tmp_path: Path) -> None:
    model = huggingface.import_weights(GOLDEN)
    huggingface.export_weights(*model, tmp_path / "out")
    (tmp_path / "link").symlink_to("out")
    model[1]["norm_f"]["b_D"][:] = 7
    assert huggingface.export_weights(*model, tmp_path / "link", overwrite=True) == tmp_path / "link"
    assert tensors_of(tmp_path / "out")["transformer.ln_f.bias"].tolist() == [7.0] * D
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"] and (tmp_path / "link").is_symlink()


# ---- names ----


def test_a_local_folder_is_itself(folder: Path) -> None:
    assert huggingface.resolve(folder) == folder and huggingface.resolve(str(folder)) == folder


@pytest.mark.parametrize(("there", "asked"), [("model.safetensors", 1), ("pytorch_model.bin", 2)])
def test_a_hub_name_is_downloaded_without_subfolders_and_pickles_only_where_there_is_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, there: str, asked: int
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    hub = ["config.json", "merges.txt", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "training_args.bin"]
    calls = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda ref, **options: calls.append((ref, options)) or str(folder))
    (folder / "model.safetensors").rename(folder / there)
    assert huggingface.resolve("openai-community/gpt2") == folder
    assert [ref for ref, _ in calls] == ["openai-community/gpt2"] * asked
    fetched = [list(filter_repo_objects([*hub, "onnx/config.json", "64.tflite"], **options)) for _, options in calls]
    assert fetched == [hub[:4], [*hub[:2], hub[3], hub[4]]][:asked]


def test_a_hub_name_without_a_network_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"^model = no-such-org/no-such-model: .*did not deliver.*Connect to the network, or give") as what:
        huggingface.resolve("no-such-org/no-such-model")
    message(what)


@pytest.mark.parametrize("ref", ["./gpt2", "/no/such/folder", "a/b/c", "", "~nobody/x", "gpt2 large", "../gpt2", "-x"])
def test_what_is_neither_a_folder_nor_a_hub_name_is_refused(ref: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match=r"no such folder|neither"):
        huggingface.resolve(ref)


def test_a_name_that_the_hub_does_not_allow_is_refused() -> None:
    with pytest.raises(InputError, match=r"neither a folder nor a possible name of a hub model"):
        huggingface.resolve("gpt2--large")


def test_a_hub_model_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    def missing(*_: Any, **__: Any) -> str:
        raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.snapshot_download", missing)
    with pytest.raises(InputError, match=r"no such model that you may read.*hf auth login"):
        huggingface.resolve("no-such-org/no-such-model")


def test_a_weight_file_is_itself_and_another_file_is_refused(folder: Path) -> None:
    assert huggingface.resolve(folder / "model.safetensors") == folder / "model.safetensors"
    with pytest.raises(InputError, match=r"a file, not a folder, and none of \.safetensors, \.bin, \.pt, \.pth"):
        huggingface.resolve(folder / "config.json")


# ---- parity with PyTorch, where it is installed ----


def torch_and_maker() -> tuple[Any, dict[str, Any]]:
    torch = pytest.importorskip("torch")
    return torch, runpy.run_path(str(GOLDEN.parent / "make_gpt2.py"))


def torch_logits_and_loss(model: Any, tokens_BT: np.ndarray) -> tuple[np.ndarray, float]:
    import torch

    tokens = torch.from_numpy(tokens_BT.astype(np.int64))
    with torch.no_grad():
        out = model(tokens, labels=tokens)
    return out.logits.numpy(), float(out.loss)


@pytest.mark.parity
def test_the_golden_file_is_what_hugging_face_gives(tmp_path: Path) -> None:
    _, maker = torch_and_maker()
    maker["make"](tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (GOLDEN / "model.safetensors").read_bytes()
    golden, made = np.load(GOLDEN / "golden.npz"), np.load(tmp_path / "golden.npz")
    np.testing.assert_array_equal(made["tokens_BT"], golden["tokens_BT"])
    np.testing.assert_allclose(made["logits_BTV"], golden["logits_BTV"], rtol=0, atol=1e-5)
    assert float(made["loss"]) == pytest.approx(float(golden["loss"]), abs=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_random_gpt2_saved_by_transformers_gives_pytorchs_logits_and_loss(tmp_path: Path, seed: int) -> None:
    _, maker = torch_and_maker()
    sizes = {"vocab_size": 61, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": seed, "n_inner": 40 + seed, "layer_norm_epsilon": 1e-3}
    model = maker["random_gpt2"](seed=seed, **sizes)
    model.save_pretrained(tmp_path, max_shard_size="5GB" if seed == 1 else "10KB")  # the others in shards
    tokens_BT = np.random.default_rng(seed).integers(0, 61, (3, 16))
    logits_BTV, loss = logits_and_loss(*huggingface.import_weights(tmp_path), tokens_BT)
    theirs_BTV, their_loss = torch_logits_and_loss(model, tokens_BT)
    np.testing.assert_allclose(logits_BTV, theirs_BTV, rtol=0, atol=1e-4)
    assert loss == pytest.approx(their_loss, abs=1e-5)


@pytest.mark.parity
def test_transformers_loads_our_export_and_gives_our_logits(tmp_path: Path, tokens: Path) -> None:
    torch, _ = torch_and_maker()
    config, params = huggingface.import_weights(GOLDEN)
    out = huggingface.export_weights(config, params, tmp_path / "out", tokenizer=tokenizer.Tokenizer.load(tokens))
    model, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, unexpected or misshapen
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr() and model.dtype == torch.float32
    tokens_BT = np.random.default_rng(0).integers(0, V, (2, T))
    np.testing.assert_allclose(torch_logits_and_loss(model.eval(), tokens_BT)[0], logits_and_loss(config, params, tokens_BT)[0], rtol=0, atol=1e-4)
    text = transformers.pipeline("text-generation", model=str(out))("Once", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("Once")


def torch_gpt() -> dict[str, Any]:
    pytest.importorskip("torch")
    return runpy.run_path(str(GOLDEN.parent / "torch_gpt.py"))


def save_layout(layout: str, folder: Path) -> tuple[Any, Path, dict[str, Any]]:
    """A random PyTorch model of a layout, saved as that code base saves it: (the model, where it is, the settings that it needs)."""
    torch, maker = torch_and_maker()
    if layout.startswith("hugging face"):
        sizes = {"vocab_size": 61, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 40}
        kinds = {"erf": {"activation_function": "gelu"}, "relu2": {"activation_function": "relu2"}, "untied": {"tie_word_embeddings": False}}
        model = maker["random_gpt2"](seed=1, **sizes, **kinds.get(layout.split()[-1], {}))
        model.save_pretrained(folder, max_shard_size="10KB" if layout.endswith("shards") else "5GB")
        if ".bin" in layout:
            model.config.save_pretrained(folder)
            legacy = {} if layout.endswith("zip") else {"_use_new_zipfile_serialization": False}
            state = model.state_dict() | {"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.uint8)}
            (folder / "model.safetensors").unlink()
            if layout.endswith("parts"):
                files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(state)}
                for file in set(files.values()):
                    torch.save({name: state[name] for name in state if files[name] == file}, folder / file)
                (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
            else:
                torch.save(state, folder / "pytorch_model.bin", **legacy)
        return model, folder, {}
    sizes = {"vocab_size": 61, "context_len": 16, "n_layers": 2, "n_heads": 3, "width": 24}
    if layout == "mingpt model.pt":
        model = torch_gpt()["GPT"]("mingpt", **sizes)
        torch.save(model.state_dict(), folder / "model.pt")
        return model, folder / "model.pt", {"n_heads": 3, "activation": "gelu_tanh"}
    bias = layout != "nanogpt ckpt.pt without biases"
    model = torch_gpt()["GPT"]("nanogpt", **sizes, bias=bias)
    model.loss(torch.zeros(1, 4, dtype=torch.long)).backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    optimizer.zero_grad()
    args = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 16, "bias": bias, "vocab_size": 61, "dropout": 0.0}
    state = {"_orig_mod." + name: tensor for name, tensor in model.state_dict().items()}
    rest = {"optimizer": optimizer.state_dict(), "iter_num": 1, "best_val_loss": torch.tensor(3.0), "config": {"out_dir": "out", "compile": True}}
    torch.save({"model": state, "model_args": args, **rest}, folder / "ckpt.pt")
    return model, folder / "ckpt.pt", {}


LAYOUTS = [f"hugging face {kind}" for kind in ("tanh", "erf", "relu2", "untied", "shards", ".bin zip", ".bin legacy", ".bin parts")]
LAYOUTS += ["mingpt model.pt", "nanogpt ckpt.pt", "nanogpt ckpt.pt without biases"]


@pytest.mark.parity
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_pytorchs_logits_loss_gradients_and_greedy_tokens(tmp_path: Path, layout: str) -> None:
    import torch

    model, where, settings = save_layout(layout, tmp_path)
    config, params = huggingface.import_weights(where, settings=settings)
    tokens_BT = np.random.default_rng(0).integers(0, 61, (3, 16))
    tokens = torch.from_numpy(tokens_BT)
    out = model(tokens)
    theirs_BTV = getattr(out, "logits", out)
    their_loss = torch.nn.functional.cross_entropy(theirs_BTV[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    their_loss.backward()

    def loss_of(params: Any) -> Any:
        logits_BTV = gpt2.GPT2(config).apply({"params": params}, jnp.asarray(tokens_BT, jnp.int32))
        assert isinstance(logits_BTV, jax.Array)
        examples = objectives.causal(jnp.asarray(tokens_BT, jnp.int32))
        return objectives.weighted_mean(objectives.cross_entropy(logits_BTV[:, :-1], examples.targets_BT), examples.weights_BT), logits_BTV

    (loss, logits_BTV), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    # Their gradients, put under our names by hand: c_attn holds queries, keys and values, and Linear is (out, in).
    theirs = {name.removeprefix("transformer."): p.grad.numpy() for name, p in model.named_parameters()}
    theirs = theirs if layout.startswith("hugging face") else linear(theirs)
    attention = [theirs[f"h.{i}.attn.c_attn.weight"].reshape(24, 3, 3, 8) for i in range(2)]
    pairs = [
        (gradients["w_token_VD"], theirs["wte.weight"]),
        (gradients["w_position_TD"], theirs["wpe.weight"]),
        *(
            (gradients["blocks"]["attention"][name], np.stack([part[:, i] for part in attention]))
            for i, name in enumerate(("w_q_DNH", "w_k_DKH", "w_v_DKH"))
        ),
        (gradients["blocks"]["attention"]["w_out_NHD"], np.stack([theirs[f"h.{i}.attn.c_proj.weight"].reshape(3, 8, 24) for i in range(2)])),
        (gradients["blocks"]["mlp"]["w_up_DF"], np.stack([theirs[f"h.{i}.mlp.c_fc.weight"] for i in range(2)])),
        (gradients["blocks"]["mlp"]["w_down_FD"], np.stack([theirs[f"h.{i}.mlp.c_proj.weight"] for i in range(2)])),
        (gradients["blocks"]["norm_1"]["scale_D"], np.stack([theirs[f"h.{i}.ln_1.weight"] for i in range(2)])),
        (gradients["norm_f"]["scale_D"], theirs["ln_f.weight"]),
    ]
    pairs += [] if config.tied_head else [(gradients["w_head_VD"], theirs["lm_head.weight"])]
    pairs += [(gradients["blocks"]["mlp"]["b_up_F"], np.stack([theirs[f"h.{i}.mlp.c_fc.bias"] for i in range(2)]))] if config.biases else []
    difference = np.abs(np.asarray(logits_BTV) - theirs_BTV.detach().numpy()).max()
    worst = max(float(np.abs(np.asarray(a) - b).max()) for a, b in pairs)
    print(f"{layout}: logits {difference:.1e}, loss {abs(float(loss) - their_loss.item()):.1e}, gradients {worst:.1e}")
    assert theirs_BTV.std() > 0.5
    assert difference < 1e-4
    assert float(loss) == pytest.approx(their_loss.item(), abs=1e-5)
    assert worst < 1e-5
    assert greedy(config, params, [1, 2], 12) == torch_greedy(model, [1, 2], 12)


def greedy(config: ModelConfig, params: Any, prompt: list[int], n: int) -> list[int]:
    """The likeliest tokens one by one, without a cache: what follows a position changes nothing at it."""
    apply, ids = jax.jit(gpt2.GPT2(config).apply), list(prompt)
    for _ in range(n):
        tokens_BT = jnp.asarray([ids + [0] * (len(prompt) + n - len(ids))], jnp.int32)
        ids.append(int(np.argmax(np.asarray(apply({"params": params}, tokens_BT))[0, len(ids) - 1])))
    return ids[len(prompt) :]


def torch_greedy(model: Any, prompt: list[int], n: int) -> list[int]:
    import torch

    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            out = model(torch.tensor([ids]))
        ids.append(int(getattr(out, "logits", out)[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["mingpt", "nanogpt"])
def test_a_model_trained_in_pytorch_counts_on_here_and_in_transformers(tmp_path: Path, kind: str) -> None:
    torch, made = pytest.importorskip("torch"), torch_gpt()
    torch.manual_seed(0)
    model = made["GPT"](kind, vocab_size=11, context_len=16, n_layers=2, n_heads=2, width=32)
    made["train"](model, 150)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    settings = {"n_heads": 2, "activation": "gelu_tanh" if kind == "mingpt" else "gelu_erf"}
    config, params = huggingface.import_weights(tmp_path / "model.pt", settings=settings)
    counted = [i % 11 for i in range(5, 17)]
    assert greedy(config, params, [3, 4], 12) == torch_greedy(model, [3, 4], 12) == counted
    tokens_BT = np.random.default_rng(0).integers(0, 11, (4, 16))
    with torch.no_grad():
        theirs_BTV = model(torch.from_numpy(tokens_BT)).numpy()
    logits_BTV = logits_and_loss(config, params, tokens_BT)[0]
    print(f"{kind}: {np.abs(logits_BTV - theirs_BTV).max():.1e} of {np.abs(theirs_BTV).max():.1f}")
    np.testing.assert_allclose(logits_BTV, theirs_BTV, rtol=0, atol=1e-4)
    other = dataclasses.replace(config, activation="gelu_erf" if kind == "mingpt" else "gelu_tanh")
    assert np.abs(logits_and_loss(other, params, tokens_BT)[0] - theirs_BTV).max() > 2e-4  # the two GELUs can be told apart here
    out = huggingface.export_weights(config, params, tmp_path / "out")
    exported, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    np.testing.assert_allclose(torch_logits_and_loss(exported.eval(), tokens_BT)[0], theirs_BTV, rtol=0, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["char", "bpe", "byte", "gpt2"])
def test_the_text_pipeline_of_transformers_writes_what_our_model_writes(tmp_path: Path, kind: str) -> None:
    torch_and_maker()
    made = tokenizer.make(kind, [TEXT], [TEXT], DataConfig(bpe_vocab_size=280))
    made.save(tmp_path / "tokenizer")
    sizes = {"context_len": T, "n_layers": 2, "n_heads": 2, "d_model": 16, "d_ff": 32}
    config = ModelConfig(vocab_size=made.vocab_size, vocab_multiple=64, activation="gelu_erf", biases=False, tied_head=False, init_std=0.5, **sizes)
    params = jax.jit(lambda: gpt2.init(gpt2.GPT2(config), jax.random.key(0)))()
    out = huggingface.export_weights(config, params, tmp_path / "out", tokenizer=tokenizer.Tokenizer.load(tmp_path / "tokenizer"))
    pipeline = transformers.pipeline("text-generation", model=str(out))
    ids = pipeline("Once", max_new_tokens=8, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    ours = greedy(config, params, made.encode("Once").tolist(), 8)
    assert ids == made.encode("Once").tolist() + ours[: ours.index(made.eot_id) + 1 if made.eot_id in ours else None]
    text = pipeline("Once", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert text.startswith("Once") and len(text) > len("Once")


@pytest.mark.parity
@pytest.mark.slow
def test_a_random_gpt2_of_124m_parameters_gives_pytorchs_logits_loss_and_greedy_tokens(tmp_path: Path) -> None:
    torch, _ = torch_and_maker()
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 3  # logits as wide as a trained model's: with the initial weights they are all near 0
    model.save_pretrained(tmp_path / "theirs")
    config, params = huggingface.import_weights(tmp_path / "theirs")
    assert config == ModelConfig(vocab_size=50257, dropout=0.1)

    tokens_BT = np.random.default_rng(0).integers(0, 50257, (2, 128))
    logits_BTV, loss = logits_and_loss(config, params, tokens_BT)
    theirs_BTV, their_loss = torch_logits_and_loss(model, tokens_BT)
    print(f"logits: standard deviation {theirs_BTV.std():.3f}, largest difference {np.abs(logits_BTV - theirs_BTV).max():.2e}")
    print(f"loss: {their_loss:.5f}, difference {abs(loss - their_loss):.2e}")
    assert theirs_BTV.std() > 1
    np.testing.assert_allclose(logits_BTV, theirs_BTV, rtol=0, atol=1e-4)
    assert loss == pytest.approx(their_loss, abs=1e-5)

    prompt = tokens_BT[0, :8].tolist()
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 8:].tolist()
    assert len(set(theirs)) > 8 and 50256 not in theirs  # no loop that agrees by chance, and no early end
    assert greedy(config, params, prompt, 64) == theirs

    huggingface.export_weights(config, params, tmp_path / "ours")
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert sorted(before) == sorted(after) and all(before[name].tobytes() == after[name].tobytes() for name in before)
