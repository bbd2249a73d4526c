"""GPT-2 weights of Hugging Face, nanoGPT and minGPT <-> our configuration and parameters: one table, read in both directions."""

import dataclasses
import fnmatch
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mlm_jax import sharding, weights
from mlm_jax.config import InputError, ModelConfig, override
from mlm_jax.data.tokenizer import Tokenizer

# Hugging Face's tensor -> the parameters inside it, side by side along its last axis. Both sides keep their axes in the same order, where
# the tensor is (in, out) as in Conv1D; in a Hugging Face tensor the heads and the width of a head, NH or KH, are one axis.
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
    "lm_head.weight": ("w_head_VD",),
}
HEAD = "lm_head.weight"
PREFIX = "transformer."  # of a language model's tensors but the head; the bare GPT2Model writes none
WRAPPERS = re.compile(r"((_orig_mod|module)\.)*(transformer\.)?")  # torch.compile and DistributedDataParallel put theirs before it
MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # the causal mask, which old versions saved; attn.c_attn.bias is a parameter
PROJECTION = re.compile(r"h\.\d+\.(attn|mlp)\.c_\w+\.weight")  # the layouts differ in these

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_erf", "relu2": "relu2"}  # ours, by transformers' name
# What the key of config.json must be, its default too: the model computes nothing else.
FIXED: dict[str, Any] = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
SIZES = {"vocab_size": "vocab_size", "n_positions": "context_len", "n_layer": "n_layers", "n_head": "n_heads", "n_embd": "d_model"}
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
# nanoGPT's model_args, GPTConfig in its model.py -> ours.
MODEL_ARGS = {"block_size": "context_len", "bias": "biases", "dropout": "dropout"} | {key: SIZES[key] for key in SIZES if key != "n_positions"}

EXPORTED = ("config.json", "generation_config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json") + (
    TOKENIZER_FILES := ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
)
RESTORE = "Restore the file, or download the model again"
WANTED = "Give a folder with config.json and model.safetensors, or a weight file"


# ---- the table, read in both directions ----


def _table(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The rows of TABLE that a model of this configuration has."""
    left_out = ((not config.biases) * (".bias",)) + (config.tied_head * (HEAD,))
    return {name: paths for name, paths in TABLE.items() if not name.endswith(left_out)}


def _sizes(config: ModelConfig) -> dict[str, int]:
    c = config
    return {"V": c.vocab_size, "T": c.context_len, "D": c.d_model, "F": c.d_ff, "N": c.n_heads, "K": c.n_keys, "H": c.head_dim}


def _shape(config: ModelConfig, path: str) -> tuple[int, ...]:
    """Our shape of a parameter, without the axis of layers and without the padding of the vocabulary."""
    return tuple(_sizes(config)[axis] for axis in sharding.axes_of(path))


def _merged_shape(config: ModelConfig, path: str) -> tuple[int, ...]:
    """The same with heads and head width as one axis."""
    return tuple(math.prod(_sizes(config)[axis] for axis in group) for group in re.findall("[NK]H|.", sharding.axes_of(path)))


def _layers(config: ModelConfig, name: str) -> tuple[int, ...]:
    """The leading axes of the parameters of a row: (L,), or () outside the blocks."""
    return (config.n_layers,) if "{layer}" in name else ()


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of ours, by its path, and its shape: stacked over layers, the vocabulary padded."""
    padded = dataclasses.replace(config, vocab_size=config.padded_vocab_size)
    return {path: _layers(config, name) + _shape(padded, path) for name, paths in _table(config).items() for path in paths}


def tensor_shapes(config: ModelConfig, *, linear: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model in Hugging Face's naming, without prefix, and its shape; `linear`: projections are (out, in), not (in, out)."""
    shapes = {}
    for row, paths in _table(config).items():
        *lead, _ = _merged_shape(config, paths[0])
        shape = (*lead, sum(_merged_shape(config, path)[-1] for path in paths))
        for layer in range(*_layers(config, row) or (1,)):
            name = row.format(layer=layer)
            shapes[name] = shape[::-1] if linear and PROJECTION.fullmatch(name) else shape
    return shapes


def _row(path: str) -> str:
    """The row of TABLE that one of our parameters is in."""
    return next(row for row, paths in TABLE.items() if path in paths)


def _offences(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """Every name that is missing, extra or misshapen, in words; empty where all fit."""
    lines = [f"{name} is missing, expected {shape}" for name, shape in expected.items() if name not in found]
    lines += [f"{name} is {found[name]}, expected {shape}" for name, shape in expected.items() if found.get(name, shape) != shape]
    lines += [f"{name} {shape} is not expected" for name, shape in found.items() if name not in expected]
    return "; ".join(lines)


# ---- from weights of others ----


def resolve(ref: str | Path) -> Path:
    """The local folder or weight file of a model: `ref` itself where it is one, else the snapshot of the hub's model of that name.

    Raises:
      InputError: no folder, weight file or name of a model on the hub, or the hub cannot be reached.
    """
    path = Path(os.path.expanduser(ref))
    if str(ref) and path.is_dir():
        return path
    remedy = f"{WANTED}, or a hub name such as gpt2 or openai-community/gpt2"
    if path.is_file():
        if path.suffix not in (".safetensors", *weights.PYTORCH):
            raise InputError("model", str(ref), f"a file, not a folder, and none of .safetensors, {', '.join(weights.PYTORCH)}", remedy)
        return path
    if isinstance(ref, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", ref):
        raise InputError("model", str(ref), "no such folder", remedy)
    import huggingface_hub  # only here, as a local folder does without it
    import huggingface_hub.errors as hub

    def download(kind: str) -> Path:
        # Subfolders are left out: gpt2 keeps ONNX copies there.
        return Path(huggingface_hub.snapshot_download(ref, allow_patterns=[kind, "*.json", "*.txt"], ignore_patterns=["*/*"]))

    try:
        folder = download("*.safetensors")
        return folder if any(folder.glob("*.safetensors")) else download("pytorch_model*.bin")
    except (hub.GatedRepoError, hub.RepositoryNotFoundError) as e:
        reason = "no such folder, and the Hugging Face hub has no such model that you may read"
        raise InputError("model", ref, reason, f"{remedy}; for a private model, log in with `hf auth login`") from e
    except hub.HFValidationError as e:
        raise InputError("model", ref, "neither a folder nor a possible name of a hub model", remedy) from e
    except Exception as e:  # a download fails in many ways: no route, time-out, offline mode, the transfer's own errors
        reason = f"no such folder, and the Hugging Face hub did not deliver it ({type(e).__name__}: {e})"
        raise InputError("model", ref, reason, "Connect to the network, or give a local folder with config.json and model.safetensors") from e


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights that fit `config`, opened and checked by name, shape and dtype, not read yet."""

    config: ModelConfig
    tensors: Mapping[str, weights.Tensor]  # in Hugging Face's naming, without prefix
    linear: bool  # projections are (out, in)

    def describe(self) -> str:
        """What was found, in one line."""
        c = self.config
        layout = "Linear (out, in), nanoGPT's and minGPT's" if self.linear else "Conv1D (in, out), Hugging Face's"
        head, biases = "tied" if c.tied_head else "separate", "biases" if c.biases else "no biases"
        return f"{c.n_layers} layers, {c.n_heads} heads, {c.activation}, {biases}, {head} head; projections are {layout}"

    def params(self, place: jax.sharding.Mesh | jax.sharding.Sharding | None = None) -> dict[str, Any]:
        """Our parameters, float32, stacked over layers: NumPy arrays, or laid out, each process reading just its parts.

        Raises:
          InputError: a number is NaN or infinite, or the mesh does not divide a parameter.
        """
        shapes = param_shapes(self.config)
        layouts: dict[str, jax.sharding.Sharding] = {}
        if isinstance(place, jax.sharding.Mesh):
            layouts = _flatten(sharding.shardings(place, _tree({path: jax.ShapeDtypeStruct(shapes[path], np.float32) for path in shapes})))
        elif place is not None:
            layouts = dict.fromkeys(shapes, place)

        def read(path: str) -> Any:
            return self._laid_out(path, shapes[path], layouts[path]) if layouts else self._part(path, tuple(map(slice, shapes[path])))

        with ThreadPoolExecutor(max_workers=1 if layouts else os.cpu_count()) as pool:  # on a device it is one array more that is in memory
            return _tree(dict(zip(shapes, pool.map(read, shapes), strict=True)))

    def unread(self) -> dict[str, Any]:
        """Our parameters, not read yet, for `export_weights`, which holds a few tensors of them at a time."""
        return _tree({path: Unread(self, path, shape) for path, shape in param_shapes(self.config).items()})

    def _laid_out(self, path: str, shape: tuple[int, ...], layout: jax.sharding.Sharding) -> jax.Array:
        parts: dict[str, np.ndarray] = {}  # devices that hold the same part share one reading

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            if str(index) not in parts:
                parts[str(index)] = self._part(path, index)
            return parts[str(index)]

        return jax.make_array_from_callback(shape, layout, part)

    def _part(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """The elements `index` of one of our parameters, float32; rows that pad the vocabulary are 0."""
        ranges = [range(*axis.indices(size)) for axis, size in zip(index, param_shapes(self.config)[path], strict=True)]
        out = np.zeros([len(r) for r in ranges], np.float32)
        stacked = bool(_layers(self.config, _row(path)))
        for i, layer in enumerate(ranges[0] if stacked else [None]):
            tensor, take = self._place(path, layer)
            weights.copy(out[i] if stacked else out, tensor, lambda whole, take=take: take(whole)[index[stacked:]])
        return out

    def _place(self, path: str, layer: int | None) -> tuple[weights.Tensor, Callable[[np.ndarray], np.ndarray]]:
        """(the tensor that holds one of our parameters, or a layer of it; what selects it, as a view, from the whole tensor)."""
        row, shape = _row(path), _shape(self.config, path)
        before = TABLE[row][: TABLE[row].index(path)]
        first, width = (sum(_merged_shape(self.config, p)[-1] for p in paths) for paths in (before, (path,)))
        name = row.format(layer=layer)

        def take(whole: np.ndarray) -> np.ndarray:
            whole = whole.T if self.linear and PROJECTION.fullmatch(name) else whole
            return whole[..., first : first + width].reshape(shape)  # splits an axis into heads

        return self.tensors[name], take


@dataclasses.dataclass(frozen=True)
class Unread:
    """A parameter of ours in a Source, to be read layer by layer."""

    source: Source
    path: str
    shape: tuple[int, ...]

    def read(self, layer: int | None) -> np.ndarray:
        """One layer of it, or all of one outside the blocks, float32, without the padding of the vocabulary.

        Raises:
          InputError: a number is NaN or infinite.
        """
        return weights.view(*self.source._place(self.path, layer))


def _tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *groups, leaf = path.split("/")
        at = tree
        for group in groups:
            at = at.setdefault(group, {})
        at[leaf] = value
    return tree


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def import_weights(
    path: str | Path, *, settings: Mapping[str, Any] | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """The configuration and the float32 parameters of a GPT-2: `open_weights` and `Source.params` in one.

    Raises:
      InputError: as for these two.
    """
    source = open_weights(path, settings=settings)
    return source.config, source.params(mesh)


def open_weights(path: str | Path, *, settings: Mapping[str, Any] | None = None) -> Source:
    """The GPT-2 in a Hugging Face folder, or in a single weight file of Hugging Face, nanoGPT (ckpt.pt) or minGPT (model.pt).

    float16 and bfloat16 weights become the same numbers in float32. Whether projections are (in, out) or (out, in) is seen from their
    shapes, whether the head is tied and biases exist from the tensors, where config.json or nanoGPT's model_args do not say it. nanoGPT
    computes the GELU with erf; checkpoints of before June 2023 want {"activation": "gelu_tanh"}.

    `settings` are fields of ModelConfig that say what the file does not ({"n_heads": 3, "activation": "gelu_tanh"}: a bare state dict
    tells neither), or that leave the model the same ({"vocab_multiple": 128} pads the embedding with rows of zeros).

    Raises:
      InputError: a file is missing, damaged or holds code, the model is not a GPT-2 that we compute, a setting is missing or makes another
        model of these weights, or a tensor is missing, extra or misshapen, or no exact float32.
    """
    path, settings = Path(path), dict(settings or {})
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise InputError("model", str(path), "no such folder or file", WANTED)
    described = _read_config(path / "config.json", settings) if path.is_dir() else {}
    tensors, args = _open_tensors(_weight_files(path) if path.is_dir() else [path])
    if args is not None:
        described = _read_model_args(path, args)
    elif not path.is_dir() and _is_hugging_faces(folder / "config.json"):
        described = _read_config(folder / "config.json", settings)

    c_attn = next((t.shape for name, t in tensors.items() if name.endswith(".attn.c_attn.weight")), ())
    linear = len(c_attn) == 2 and c_attn[0] == 3 * c_attn[1]
    seen = _seen(path, tensors, linear) if not described else {"biases": any(name.endswith(".bias") for name in tensors)} if linear else {}
    fields = seen | described | settings
    unsaid = [f"model.{field}" for field in ("n_heads", "activation") if field not in fields]
    if unsaid:
        remedy = "Say it: mlm-jax import FILE OUT --set model.n_heads=12 --set model.activation=gelu_erf for nanoGPT, gelu_tanh for others"
        raise InputError(str(path), "", f"the weights alone do not tell {' and '.join(unsaid)}", remedy)
    if "tied_head" not in fields:
        fields["tied_head"] = HEAD not in tensors or _equal(tensors, HEAD, "wte.weight")
    try:
        config = override(ModelConfig(), fields)
    except InputError as e:
        if e.field.removeprefix("model.") in settings:
            raise InputError(f"model.{e.field.removeprefix('model.')}", e.value, e.reason, e.remedy) from e
        raise InputError(str(path / "config.json" if path.is_dir() else path), "", str(e), RESTORE) from e
    _check_settings(path, config, settings, described, assumed=("activation",) if args is not None else ())
    _check_tensors(path, config, tensors, linear)
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        n_tokens = Tokenizer.load(folder).vocab_size
        if n_tokens > config.vocab_size:
            reason = f"the tokenizer beside it has {n_tokens} tokens, more than the model embeds"
            raise InputError(f"{path}: vocab_size", config.vocab_size, reason, "Use the tokenizer that the model was trained with")
    return Source(config, tensors, linear)


def _check_settings(path: Path, config: ModelConfig, settings: Mapping[str, Any], described: Mapping[str, Any], assumed: tuple[str, ...]) -> None:
    """Raises InputError where a setting would compute something else from these weights than what was trained."""
    for field, value in inexpressible(config).items():
        raise InputError(f"model.{field}", value, "no model of Hugging Face, nanoGPT or minGPT is computed so", "Leave this setting out")
    for field in ("n_heads", "activation", "norm_eps"):  # what no shape of a tensor tells
        if field in settings and field in described and field not in assumed and getattr(config, field) != described[field]:
            reason = f"the file beside the weights says {described[field]}"
            raise InputError(f"model.{field}", settings[field], reason, f"Leave this setting out, or correct what {path} says")


def _seen(path: Path, tensors: Mapping[str, weights.Tensor], linear: bool) -> dict[str, Any]:
    """The fields of ModelConfig that the shapes of the tensors tell, where nothing beside them does."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    needed = ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight")
    missing = [name for name in needed if len(shapes.get(name, ())) != 2]
    if missing:
        there = ", ".join(list(shapes)[:4]) + (", ..." if len(shapes) > 4 else "")
        raise InputError(str(path), "", f"no GPT-2: {', '.join(missing)} missing or no matrix; it has {there}", WANTED)
    (vocab_size, d_model), (context_len, _), c_fc = (shapes[name] for name in needed)
    return {
        "vocab_size": vocab_size,
        "context_len": context_len,
        "n_layers": _n_layers(tensors),
        "d_model": d_model,
        "d_ff": c_fc[0] if linear else c_fc[1],
        "biases": not linear or any(name.endswith(".bias") for name in tensors),
    }


def _n_layers(tensors: Mapping[str, Any]) -> int:
    return 1 + max((int(match[1]) for name in tensors if (match := re.match(r"h\.(\d{1,9})\.", name))), default=-1)


def _equal(tensors: Mapping[str, weights.Tensor], a: str, b: str) -> bool:
    """Two tensors hold the same numbers; False where one is missing."""
    if (
        a not in tensors
        or b not in tensors
        or tensors[a].shape != tensors[b].shape
        or not {tensors[a].dtype, tensors[b].dtype} <= set(weights.DTYPES)
    ):
        return False
    step = max(1, weights.CHUNK // max(1, 4 * math.prod(tensors[a].shape[1:])))
    rows = range(0, tensors[a].shape[0], step)
    return all(np.array_equal(tensors[a].map()[start : start + step], tensors[b].map()[start : start + step], equal_nan=True) for start in rows)


def _check_tensors(path: Path, config: ModelConfig, tensors: Mapping[str, weights.Tensor], linear: bool) -> None:
    """Raises InputError where the tensors are not those of the configuration."""
    if config.n_layers > len(tensors):
        reason = f"the weights have {len(tensors)} tensors, of {_n_layers(tensors)} layers"
        raise InputError(f"{path}: model.n_layers", config.n_layers, reason, "Give the weights that belong to the configuration")
    expected = tensor_shapes(config, linear=linear)
    if HEAD in tensors:  # a tied head may repeat the embedding
        expected |= {HEAD: expected["wte.weight"]}
    offences = _offences({name: tensor.shape for name, tensor in tensors.items()}, expected)
    if offences:
        layout = ", with Linear (out, in) projections" if linear else ""
        reason = f"the tensors are not those of the GPT-2 that was described{layout}: {offences}"
        raise InputError(str(path), "", reason, "Give the weights that belong to the configuration")
    inexact = [f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in weights.DTYPES]
    if inexact:
        raise InputError(str(path), "", f"no exact float32: {'; '.join(inexact)}", "Give weights in float32, float16 or bfloat16")
    if config.tied_head and HEAD in tensors and not _equal(tensors, HEAD, "wte.weight"):
        reason = f"{HEAD} differs from wte.weight, though the head is said to be tied to the token embedding"
        raise InputError(str(path), "", reason, "Set tie_word_embeddings to false in config.json, or import with --set model.tied_head=False")


def _is_hugging_faces(config: Path) -> bool:
    return config.is_file() and _read_json(config).get("model_type") == "gpt2"  # minGPT writes a config.json of another kind


def _read_config(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ModelConfig that Hugging Face's config.json tells."""
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
    check(kind == "gpt2", "model_type", kind, "not a GPT-2", "Give a model whose model_type is gpt2; of nanoGPT or minGPT, the weight file itself")
    for key, only in FIXED.items():
        value = values.get(key, only)
        check(value is only, key, value, f"this model is computed with {key} = {only} only", "Give a GPT-2 that was trained so")
    activation = values.get("activation_function", "gelu_new")
    known = isinstance(activation, str) and activation in ACTIVATIONS
    check(known, "activation_function", activation, f"not one of {', '.join(ACTIVATIONS)}", "Give a GPT-2 that was trained so")
    tied = values.get("tie_word_embeddings", True)
    check(type(tied) is bool, "tie_word_embeddings", tied, "neither true nor false", "Restore config.json")
    for key in SIZES:
        check(key in values, key, "", "missing", "Restore config.json")
    dropouts = {key: number(key, 0.1, float) for key in DROPOUTS}
    named = ", ".join(f"{key} = {rate}" for key, rate in dropouts.items())
    reason = "three dropouts, where this model has one for all"
    remedy = "Make the three equal in config.json, or import with --set model.dropout=0.1; only training uses them"
    check(len(set(dropouts.values())) == 1 or "dropout" in settings, "dropout", named, reason, remedy)
    sizes: dict[str, Any] = {ours: number(key, None, int) for key, ours in SIZES.items()}
    return sizes | {
        "d_ff": 4 * sizes["d_model"] if values.get("n_inner") is None else number("n_inner", None, int),
        "dropout": dropouts["embd_pdrop"],
        "activation": ACTIVATIONS[activation],
        "tied_head": tied,
        "norm_eps": number("layer_norm_epsilon", 1e-5, float),
        "init_std": number("initializer_range", 0.02, float),
    }


def _read_model_args(path: Path, args: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ModelConfig that nanoGPT's model_args tell."""
    remedy = "Save the checkpoint as nanoGPT's train.py does"
    missing = [key for key in MODEL_ARGS if key not in args]
    if missing:
        raise InputError(f"{path}: model_args", "", f"{', '.join(missing)} missing", remedy)
    foreign = [f"{key} = {value}" for key, value in args.items() if key not in MODEL_ARGS]
    if foreign:  # a changed nanoGPT: its tensors may look the same and be computed otherwise
        reason = f"not nanoGPT's own: {', '.join(foreign)}"
        raise InputError(f"{path}: model_args", "", reason, "Take it out if the model computes what nanoGPT does, and save again")
    fields = {ours: args[key] for key, ours in MODEL_ARGS.items()}
    width = fields["d_model"]
    return fields | {"d_ff": 4 * width if type(width) is int else 0, "activation": "gelu_erf", "norm_eps": 1e-5}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(str(path), "", f"cannot be read ({e.strerror})", WANTED) from e
    except (ValueError, RecursionError) as e:  # not UTF-8 or not JSON
        raise InputError(str(path), "", f"not JSON ({e})", RESTORE) from e
    if not isinstance(values, dict):
        raise InputError(str(path), "", "not a JSON object", RESTORE)
    return values


def _open_tensors(files: list[Path]) -> tuple[dict[str, weights.Tensor], dict[str, Any] | None]:
    """The tensors of all weight files, by name without prefix, mask buffers left out; and nanoGPT's model_args."""
    tensors: dict[str, weights.Tensor] = {}
    args = None
    for file in files:
        opened, args = weights.open_pytorch(file) if file.suffix in weights.PYTORCH else (weights.open_safetensors(file), None)
        for name, tensor in opened.items():
            bare = WRAPPERS.sub("", name, count=1)
            if bare in tensors:
                raise InputError(str(file), "", f"{bare} is there twice", "Keep one of the two")
            if not MASK_BUFFER.fullmatch(bare):
                tensors[bare] = tensor
    return tensors, args


def _weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder: safetensors where there are any, else PyTorch's; of an index, its shards."""
    for single in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        index = single.with_name(f"{single.name}.index.json")
        if single.exists():
            return [single]
        if index.exists():
            return _shards(index, single.suffix)
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (*weights.PYTORCH, ".h5", ".msgpack"))
    reason = "no model.safetensors and no pytorch_model.bin" + (f", but {', '.join(others)}" if others else "")
    raise InputError(str(folder), "", reason, "Name the weight file itself" if others else WANTED)


def _shards(index: Path, suffix: str) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(str(index), "", "has no weight_map", RESTORE)
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if not re.fullmatch(rf"[^/\\]+{re.escape(suffix)}", name):  # no way out of the folder
            raise InputError(str(index), name, f"not a {suffix} file of this folder", RESTORE)
        if not (index.parent / name).is_file():
            raise InputError(str(index.parent / name), "", "missing, though the index names it", weights.DAMAGED)
    return [index.parent / name for name in names]


# ---- to a Hugging Face folder ----


def inexpressible(config: ModelConfig) -> dict[str, Any]:
    """The fields, with their values, that Hugging Face's GPT-2 has no place for; empty where the model can be exported."""
    only = {"position": "learned", "norm": "layer", "qk_norm": False, "logit_softcap": 0.0, "mup_base_width": 0}
    found = {field: getattr(config, field) for field in only if getattr(config, field) != only[field]}
    found |= {"activation": config.activation} if config.activation not in ACTIVATIONS.values() else {}
    return found | ({"n_kv_heads": config.n_kv_heads} if config.n_keys < config.n_heads else {})


def to_tensors(config: ModelConfig, params: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """Hugging Face's tensors of our parameters: shapes by name without prefix, and a function that gives one of them, float32.

    A model without biases has them all, zero, which computes the same. Rows that pad the vocabulary are left out.

    Raises:
      InputError: Hugging Face's GPT-2 cannot express the configuration, or a parameter is missing, misshapen or has no place in it.
    """
    remedy = "Export a model that is GPT-2 as Hugging Face has it"
    if fields := inexpressible(config):
        named = ", ".join(f"model.{field} = {value}" for field, value in fields.items())
        raise InputError("model", "", f"Hugging Face's GPT-2 cannot express {named}", remedy)
    ours = _flatten(params)
    offences = _offences({path: tuple(np.shape(array)) for path, array in ours.items()}, param_shapes(config))
    if offences:
        raise InputError("params", "", f"not the parameters of this GPT-2: {offences}", remedy)
    theirs = dataclasses.replace(config, biases=True)
    shapes = tensor_shapes(theirs)
    places = {row.format(layer=layer): (row, layer) for row in _table(theirs) for layer in range(*_layers(theirs, row) or (1,))}

    def read(name: str) -> np.ndarray:
        row, layer = places[name]
        parts = []
        for path in TABLE[row]:
            shape = _merged_shape(config, path)
            if path in ours:
                whole, layer = ours[path], layer if _layers(config, row) else None
                part = (
                    whole.read(layer)
                    if isinstance(whole, Unread)
                    else np.asarray(whole)[... if layer is None else layer].astype(np.float32, copy=False)
                )
            else:
                part = np.zeros(shape, np.float32)
            parts.append(part[: config.vocab_size].reshape(shape) if "V" in sharding.axes_of(path) else part.reshape(shape))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    return shapes, read


def export_weights(
    config: ModelConfig,
    params: Mapping[str, Any],
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the folder, whole or not at all, that `transformers` loads as GPT2LMHeadModel and its tokenizer, and returns its path.

    A model without biases is written with zero biases, and comes back with them. The weights are written tensor by tensor.

    Raises:
      InputError: Hugging Face's GPT-2 cannot express the model, the parameters are not those of its configuration, the tokenizer has more
        tokens than the model embeds, or `folder` is in use.
    """
    out, folder = Path(folder), Path(folder).resolve()  # behind a link it is the folder itself that is replaced
    _check_free(folder, overwrite)
    shapes, read = to_tensors(config, params)
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
        bare = {name if name == HEAD else PREFIX + name: name for name in shapes}
        weights.write_safetensors(new / "model.safetensors", {name: shapes[bare[name]] for name in bare}, lambda name: read(bare[name]))
        if tokenizer:
            tokenizer.save(new)
        _write_configs(config, new, tokenizer.eot_id if tokenizer else None)
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
        raise InputError("out", str(folder), "not empty", "Name another folder")
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
        "activation_function": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation),
        "n_ctx": config.context_len,  # what readers older than n_positions look for
        "n_inner": config.d_ff,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_head,
        "dtype": "float32",
    }
    transformers.GPT2Config(**values).save_pretrained(folder)
    transformers.GenerationConfig(**ids, pad_token_id=eot_id).save_pretrained(folder)
