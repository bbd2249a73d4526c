"""Hugging Face GPT-2 folders <-> our configuration and parameters: one table, read in both directions."""

import fnmatch
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mlm_jax.config import InputError, ModelConfig
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.sharding import axes_of

# Hugging Face's tensor -> the parameters inside it, side by side along its last axis. Both sides keep their axes in the same order
# (Conv1D is (in, out)); in a Hugging Face tensor the heads and the width of a head, NH or KH, are one axis.
# A parameter under blocks/ has a leading axis of layers, where Hugging Face has one tensor for each layer.
# Source: transformers, models/gpt2/modeling_gpt2.py.
TABLE: dict[str, tuple[str, ...]] = {
    "wte.weight": ("w_token_VD",),
    "wpe.weight": ("w_position_TD",),
    "h.{layer}.ln_1.weight": ("blocks/norm_1/scale_D",),
    "h.{layer}.ln_1.bias": ("blocks/norm_1/b_D",),
    "h.{layer}.attn.c_attn.weight": ("blocks/attention/w_q_DNH", "blocks/attention/w_k_DKH", "blocks/attention/w_v_DKH"),
    "h.{layer}.attn.c_attn.bias": ("blocks/attention/b_q_NH", "blocks/attention/b_k_KH", "blocks/attention/b_v_KH"),
    "h.{layer}.attn.c_proj.weight": ("blocks/attention/w_out_NHD",),
    "h.{layer}.attn.c_proj.bias": ("blocks/attention/b_out_D",),
    "h.{layer}.ln_2.weight": ("blocks/norm_2/scale_D",),
    "h.{layer}.ln_2.bias": ("blocks/norm_2/b_D",),
    "h.{layer}.mlp.c_fc.weight": ("blocks/mlp/w_up_DF",),
    "h.{layer}.mlp.c_fc.bias": ("blocks/mlp/b_up_F",),
    "h.{layer}.mlp.c_proj.weight": ("blocks/mlp/w_down_FD",),
    "h.{layer}.mlp.c_proj.bias": ("blocks/mlp/b_down_D",),
    "ln_f.weight": ("norm_f/scale_D",),
    "ln_f.bias": ("norm_f/b_D",),
}
PREFIX = "transformer."  # of a language model's tensors; the bare GPT2Model writes none
HEAD = "lm_head.weight"
MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # the causal mask, which old versions saved; attn.c_attn.bias is a parameter

# What the key of config.json must be, its default first: the model computes nothing else.
FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}
SIZES = {"vocab_size": "vocab_size", "n_positions": "context_len", "n_layer": "n_layers", "n_head": "n_heads", "n_embd": "d_model"}
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")

EXPORTED = ("config.json", "generation_config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json") + (
    TOKENIZER_FILES := ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
)


# ---- the table, read in both directions ----


def _shape(config: ModelConfig, path: str) -> tuple[int, ...]:
    """Our shape of a parameter, without the axis of layers."""
    return tuple(_sizes(config)[axis] for axis in axes_of(path))


def _merged_shape(config: ModelConfig, path: str) -> tuple[int, ...]:
    """The same with heads and head width as one axis."""
    return tuple(math.prod(_sizes(config)[axis] for axis in group) for group in re.findall("[NK]H|.", axes_of(path)))


def _sizes(config: ModelConfig) -> dict[str, int]:
    n, h = config.n_heads, config.head_dim
    return {"V": config.vocab_size, "T": config.context_len, "D": config.d_model, "F": config.d_ff, "N": n, "K": n, "H": h}


def _layers(config: ModelConfig, name: str) -> tuple[int, ...]:
    """The leading axes of the parameters of a row: (L,), or () outside the blocks."""
    return (config.n_layers,) if "{layer}" in name else ()


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face model, without its prefix, and its shape."""
    shapes = {}
    for name, paths in TABLE.items():
        *lead, _ = _merged_shape(config, paths[0])
        shape = (*lead, sum(_merged_shape(config, path)[-1] for path in paths))
        shapes |= {name.format(layer=layer): shape for layer in range(*_layers(config, name) or (1,))}
    return shapes


def from_tensors(config: ModelConfig, read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """Our parameters, a nested dict of float32 arrays stacked over layers, from Hugging Face's tensors, read by name without prefix."""
    params: dict[str, Any] = {}
    for name, paths in TABLE.items():
        layers = _layers(config, name)
        stacked = np.stack([read(name.format(layer=layer)) for layer in range(*layers)]) if layers else read(name)
        widths = [_merged_shape(config, path)[-1] for path in paths]
        for path, part in zip(paths, np.split(stacked, np.cumsum(widths[:-1]), axis=-1), strict=True):
            *groups, leaf = path.split("/")
            node = params
            for group in groups:
                node = node.setdefault(group, {})
            node[leaf] = np.ascontiguousarray(part, np.float32).reshape(layers + _shape(config, path))
    return params


def to_tensors(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Hugging Face's float32 tensors, by name without prefix, from our parameters.

    Raises:
      InputError: a parameter is missing, misshapen, or has no place in a Hugging Face GPT-2.
    """
    ours = _flatten(params)
    expected = {path: _layers(config, name) + _shape(config, path) for name, paths in TABLE.items() for path in paths}
    offences = _offences({path: tuple(np.shape(array)) for path, array in ours.items()}, expected)
    if offences:
        raise InputError("params", "", f"not the parameters of this GPT-2: {offences}", "Export a model that is GPT-2 as Hugging Face has it")
    tensors = {}
    for name, paths in TABLE.items():
        layers = _layers(config, name)
        parts = [np.asarray(ours[path], np.float32).reshape(layers + _merged_shape(config, path)) for path in paths]
        packed = np.concatenate(parts, axis=-1)
        tensors |= {name.format(layer=layer): packed[layer] for layer in range(*layers)} if layers else {name: packed}
    return tensors


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _offences(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """Every name that is missing, extra or misshapen, in words; empty where all fit."""
    lines = [f"{name} is missing, expected {shape}" for name, shape in expected.items() if name not in found]
    lines += [f"{name} is {found[name]}, expected {shape}" for name, shape in expected.items() if found.get(name, shape) != shape]
    lines += [f"{name} {shape} is not expected" for name, shape in found.items() if name not in expected]
    return "; ".join(lines)


# ---- from a Hugging Face folder ----


def resolve(ref: str | Path) -> Path:
    """The local folder of a Hugging Face model: `ref` itself where it is a folder, else the snapshot of the hub's model of that name.

    Raises:
      InputError: neither a folder nor the name of a model on the hub, or the hub cannot be reached.
    """
    path = Path(os.path.expanduser(ref))
    if str(ref) and path.is_dir():
        return path
    remedy = "Give a folder with config.json and model.safetensors, or a hub name such as gpt2 or openai-community/gpt2"
    if path.is_file():
        raise InputError("model", str(ref), "a file, not a folder", remedy)
    if isinstance(ref, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", ref):
        raise InputError("model", str(ref), "no such folder", remedy)
    import huggingface_hub  # only here, as a local folder does without it
    import huggingface_hub.errors as hub

    try:
        # Subfolders are left out: gpt2 keeps ONNX copies there.
        patterns = ["*.safetensors", "*.json", "*.txt"]
        return Path(huggingface_hub.snapshot_download(ref, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (hub.GatedRepoError, hub.RepositoryNotFoundError) as e:
        reason = "no such folder, and the Hugging Face hub has no such model that you may read"
        raise InputError("model", ref, reason, f"{remedy}; for a private model, log in with `hf auth login`") from e
    except hub.HFValidationError as e:
        raise InputError("model", ref, "neither a folder nor a possible name of a hub model", remedy) from e
    except Exception as e:  # a download fails in many ways: no route, time-out, offline mode, the transfer's own errors
        reason = f"no such folder, and the Hugging Face hub did not deliver it ({type(e).__name__}: {e})"
        raise InputError("model", ref, reason, "Connect to the network, or give a local folder with config.json and model.safetensors") from e


def import_weights(folder: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration and the float32 parameters (numpy, blocks stacked over layers) of the GPT-2 in a Hugging Face folder.

    float16 and bfloat16 weights become the same numbers in float32.

    Raises:
      InputError: a file is missing or damaged, the model is not a GPT-2 that we compute, or a tensor is missing, extra or misshapen.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("model", str(folder), "no such folder", "Give a folder with config.json and model.safetensors")
    config, tied = _read_config(folder / "config.json")
    if any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        n_tokens = Tokenizer.load(folder).vocab_size
        if n_tokens > config.vocab_size:
            reason = f"the tokenizer beside it has {n_tokens} tokens, more than the model embeds"
            raise InputError(f"{folder / 'config.json'}: vocab_size", config.vocab_size, reason, "Use the tokenizer that the model was trained with")
    return config, _read_params(folder, config, tied)


def _read_config(path: Path) -> tuple[ModelConfig, bool]:
    """The configuration, and whether the head is tied to the token embedding."""
    values = _read_json(path)

    def check(ok: bool, key: str, value: object, reason: str, remedy: str) -> None:
        if not ok:
            raise InputError(f"{path}: {key}", value, reason, remedy)

    def number(key: str, default: float | None, kind: type) -> Any:
        value = values.get(key, default)
        ok = type(value) is int or (kind is float and type(value) is float)
        check(ok, key, value, f"not {'an integer' if kind is int else 'a number'}", "Restore config.json")
        return kind(value)

    kind = values.get("model_type")
    check(kind == "gpt2", "model_type", kind, "not a GPT-2", "Give a model whose model_type is gpt2")
    for key, choices in FIXED.items():
        value = values.get(key, choices[0])
        reason = f"this model is computed with {key} = {' or '.join(map(repr, choices))} only"
        check(value in choices, key, value, reason, "Give a GPT-2 that was trained so")
    for key in SIZES:
        check(key in values, key, "", "missing", "Restore config.json")
    dropouts = {key: number(key, 0.1, float) for key in DROPOUTS}
    reason = "three dropouts, where this model has one for all"
    named = ", ".join(f"{key} = {rate}" for key, rate in dropouts.items())
    check(len(set(dropouts.values())) == 1, "dropout", named, reason, "Make the three equal in config.json; only training uses them")
    sizes: dict[str, Any] = {ours: number(key, None, int) for key, ours in SIZES.items()}
    d_ff = 4 * sizes["d_model"] if values.get("n_inner") is None else number("n_inner", None, int)
    norm_eps, init_std = number("layer_norm_epsilon", 1e-5, float), number("initializer_range", 0.02, float)
    try:
        config = ModelConfig(**sizes, d_ff=d_ff, dropout=dropouts["embd_pdrop"], norm_eps=norm_eps, init_std=init_std)
    except InputError as e:
        raise InputError(str(path), "", str(e), "Restore config.json") from e
    return config, values.get("tie_word_embeddings") is not False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(str(path), "", f"cannot be read ({e.strerror})", "Give a folder with config.json and model.safetensors") from e
    except ValueError as e:  # not UTF-8 or not JSON
        raise InputError(str(path), "", f"not JSON ({e})", "Restore the file, or download the model again") from e
    if not isinstance(values, dict):
        raise InputError(str(path), "", "not a JSON object", "Restore the file, or download the model again")
    return values


def _read_params(folder: Path, config: ModelConfig, tied: bool) -> dict[str, Any]:
    tensors = _open_tensors(folder)  # by name without prefix; nothing is read yet
    expected = tensor_shapes(config)
    if HEAD in tensors or not tied:  # a tied head may be left out
        expected |= {HEAD: expected["wte.weight"]}
    offences = _offences({name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}, expected)
    if offences:
        remedy = "Give the weights that belong to this config.json"
        raise InputError(str(folder), "", f"the tensors are not those of the GPT-2 in config.json: {offences}", remedy)
    inexact = [f"{name} is {tensor.get_dtype()}" for name, tensor in tensors.items() if tensor.get_dtype() not in ("F32", "F16", "BF16")]
    if inexact:
        raise InputError(str(folder), "", f"no exact float32: {'; '.join(inexact)}", "Give weights in float32, float16 or bfloat16")

    def read(name: str) -> np.ndarray:
        return tensors[name][...].astype(np.float32, copy=False)

    params = from_tensors(config, read)
    if HEAD in tensors and not np.array_equal(read(HEAD), params["w_token_VD"], equal_nan=True):
        reason = f"{HEAD} differs from wte.weight: the head is not tied to the token embedding, as it is in this model"
        raise InputError(str(folder), "", reason, "Give a GPT-2 with a tied head")
    return params


def _open_tensors(folder: Path) -> dict[str, Any]:
    """Handles on the tensors of all weight files, by name without prefix, mask buffers left out."""
    tensors = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                opened = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        except (SafetensorError, OSError) as e:
            raise InputError(str(path), "", f"not a whole safetensors file ({e})", "Copy or download the file again") from e
        for name, tensor in opened.items():
            bare = name.removeprefix(PREFIX)
            if bare in tensors:
                raise InputError(str(path), "", f"{bare} is there twice", "Keep one of the two")
            if not MASK_BUFFER.fullmatch(bare):
                tensors[bare] = tensor
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if not index.exists():
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack"))
        reason = "no model.safetensors, and only safetensors is read" + (f", not {', '.join(others)}" if others else "")
        remedy = "Convert the weights with `save_pretrained` of transformers" if others else "Give a folder with model.safetensors"
        raise InputError(str(folder), "", reason, remedy)
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(str(index), "", "has no weight_map", "Restore the file, or download the model again")
    names: Iterable[Any] = sorted(set(map(str, weight_map.values())))
    for name in names:
        if not re.fullmatch(r"[^/\\]+\.safetensors", name):  # no way out of the folder
            raise InputError(str(index), name, "not a safetensors file of this folder", "Restore the file, or download the model again")
        if not (folder / name).is_file():
            raise InputError(str(folder / name), "", "missing, though the index names it", "Copy or download the file again")
    return [folder / name for name in names]


# ---- to a Hugging Face folder ----


def export_weights(
    config: ModelConfig,
    params: Mapping[str, Any],
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the folder, whole or not at all, that `transformers` loads as GPT2LMHeadModel and its tokenizer, and returns its path.

    Raises:
      InputError: the parameters are not a GPT-2's, the tokenizer has more tokens than the model embeds, or `folder` is in use.
    """
    out, folder = Path(folder), Path(folder).resolve()  # behind a link it is the folder itself that is replaced
    _check_free(folder, overwrite)
    tensors = to_tensors(config, params)
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        reason = f"the tokenizer has {tokenizer.vocab_size} tokens, more than the model embeds"
        raise InputError("model.vocab_size", config.vocab_size, reason, "Export with the tokenizer that the model was trained with")

    new = folder.parent / f".{folder.name}.new.{os.getpid()}"
    old = folder.parent / f".{folder.name}.old.{os.getpid()}"
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
    except OSError as e:
        raise InputError("out", str(out), f"cannot be made ({e.strerror})", "Name a folder where you may write") from e
    try:
        save_file({PREFIX + name: tensor for name, tensor in tensors.items()}, new / "model.safetensors", metadata={"format": "pt"})
        if tokenizer:
            tokenizer.save(new)
        _write_configs(config, new, tokenizer.eot_id if tokenizer else None)
        (new / "model.safetensors").chmod((new / "config.json").stat().st_mode)  # safetensors lets only its owner read it
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return out


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError("out", str(folder), "a file", "Name a folder that does not exist yet")
    inside = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if inside and not overwrite:
        raise InputError("out", str(folder), "not empty", "Name another folder, or ask for it to be overwritten")
    foreign = [name for name in inside if not any(fnmatch.fnmatch(name, pattern) for pattern in EXPORTED)]
    if foreign:
        raise InputError("out", str(folder), f"holds what no export wrote: {', '.join(foreign)}", "Name another folder, or move these away")


def _write_configs(config: ModelConfig, folder: Path, eot_id: int | None) -> None:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it advises to install PyTorch, which nothing here needs
    import transformers  # only here: it takes seconds to import, and neither an import nor a generation needs it

    ids = {"bos_token_id": eot_id, "eos_token_id": eot_id}
    values: dict[str, Any] = {key: getattr(config, ours) for key, ours in SIZES.items()} | dict.fromkeys(DROPOUTS, config.dropout) | ids
    values |= {
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "n_ctx": config.context_len,  # what readers older than n_positions look for
        "n_inner": config.d_ff,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    transformers.GPT2Config(**values).save_pretrained(folder)
    transformers.GenerationConfig(**ids, pad_token_id=eot_id).save_pretrained(folder)
