"""Import and export: our parameters against Hugging Face's own files, logits and loss."""

import json
import runpy
import shutil
from collections.abc import Mapping
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

from mlm_jax import decode, huggingface, objectives
from mlm_jax.config import DataConfig, InputError, ModelConfig
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
    assert huggingface.FIXED == {key: getattr(default, key) for key in huggingface.FIXED}
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
    params = gpt2.init(gpt2.GPT2(config), jax.random.key(0))
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


def test_a_hub_name_is_downloaded_without_subfolders_and_pickles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda ref, **options: calls.append((ref, options)) or str(folder))
    assert huggingface.resolve("openai-community/gpt2") == folder
    assert huggingface.resolve("gpt2") == folder
    assert [ref for ref, _ in calls] == ["openai-community/gpt2", "gpt2"]
    from huggingface_hub.utils import filter_repo_objects

    hub = ["config.json", "model.safetensors", "model.safetensors.index.json", "merges.txt", "pytorch_model.bin", "onnx/config.json", "64.tflite"]
    assert list(filter_repo_objects(hub, **calls[0][1])) == hub[:4]


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
    with pytest.raises(InputError, match=r"a file, but none of \.safetensors, \.bin, \.pt, \.pth"):
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
    greedy = decode.Sampling(temperature=0.0)
    ours = decode.continuations(gpt2.GPT2(config), params, prompt, num=1, max_tokens=64, eot_id=50256, sampling=greedy, seed=0)
    assert ours[0].tolist() == theirs

    huggingface.export_weights(config, params, tmp_path / "ours")
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert sorted(before) == sorted(after) and all(before[name].tobytes() == after[name].tobytes() for name in before)
