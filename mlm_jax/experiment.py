"""Experiment files: loading one, and recording its code in a run so that the run can rebuild its own model.

A run keeps a copy of the experiment file, and of the files that it imports from beside it or under experiments/, with their hashes.
A structural experiment (one that defines MODEL) is rebuilt from the files where they stood, if they are unchanged and this user's
own; the copies that came with the run are executed only on --trust-code.
"""

import ast
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from mlm_jax.config import Config, InputError, ModelConfig, override
from mlm_jax.model import gpt2


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment file: what it defines, and the code that it consists of."""

    config: Config
    build: Callable[[ModelConfig], gpt2.Model]  # MODEL of the file; GPT2 where it defines none
    structural: bool  # the file defines MODEL
    module: str
    files: dict[str, Path]  # path below the root on the module path -> file

    def with_changes(self, changes: Mapping[str, Any]) -> "Experiment":
        """This experiment with dotted fields of its configuration replaced, as `config.override` does."""
        return dataclasses.replace(self, config=override(self.config, changes))


def load(reference: str) -> Experiment:
    """The experiment in a file (experiments/tiny.py) or module (experiments.tiny).

    Raises:
      InputError: no such file or module, it does not run, or it defines no CONFIG.
    """
    if reference.endswith(".py") or os.sep in reference:
        path = Path(reference).resolve()
        if not path.is_file():
            raise InputError("EXPERIMENT", reference, "no such file", "Name an experiment, for example experiments/tiny.py")
        root = path.parent
        while (root / "__init__.py").is_file():
            root = root.parent
        module = ".".join(path.relative_to(root).with_suffix("").parts)
    else:
        root, module = Path.cwd(), reference
    return _load(root, module)


def _load(root: Path, module: str) -> Experiment:
    with _importable(root):
        loaded = _import(module)
        config, build = getattr(loaded, "CONFIG", None), getattr(loaded, "MODEL", None)
        if not isinstance(config, Config):
            raise InputError("EXPERIMENT", module, "defines no CONFIG of type mlm_jax.config.Config", "Define CONFIG = Config(name=..., ...)")
        if build is not None and not callable(build):
            raise InputError("EXPERIMENT", module, "MODEL cannot be called", "Define MODEL so that MODEL(config.model) is a Flax module")
        return Experiment(config, build or gpt2.GPT2, build is not None, module, _files(module))


@contextlib.contextmanager
def _importable(root: Path) -> Iterator[None]:
    """`root`, then the current directory, lead the module path; modules of experiments are read anew, from there."""
    before_path, before = list(sys.path), {name: m for name, m in sys.modules.items() if name.split(".")[0] == "experiments"}
    for name in before:
        del sys.modules[name]
    sys.path[:0] = [str(root), str(Path.cwd())]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before_path
        sys.modules.update(before)


def _import(module: str) -> ModuleType:
    sys.modules.pop(module, None)
    try:
        return importlib.import_module(module)
    except InputError:
        raise
    except ModuleNotFoundError as e:
        if e.name and (module == e.name or module.startswith(e.name + ".")):
            raise InputError("EXPERIMENT", module, "no such file or module", "Name an experiment, for example experiments/tiny.py") from e
        raise InputError("EXPERIMENT", module, f"imports {e.name}, which is not there", "Install it, or run from the folder that has it") from e
    except Exception as e:
        raise InputError("EXPERIMENT", module, f"does not run ({type(e).__name__}: {e})", "Mend the file (--traceback shows where)") from e


def _files(module: str) -> dict[str, Path]:
    """The files of `module` and of what it imports, however deep, from experiments/ or from beside it."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        parts = name.split(".")
        spec = _find(name)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        path = Path(spec.origin)
        relative = str(Path(*parts, "__init__.py") if spec.submodule_search_locations is not None else Path(*parts).with_suffix(".py"))
        if relative in found:
            continue
        found[relative] = path
        package = parts if spec.submodule_search_locations is not None else parts[:-1]
        waiting += [".".join(parts[:i]) for i in range(1, len(parts))]
        folder = Path(sys.modules[module].__file__ or "").parent
        waiting += [other for other in _imports(path, package) if other.split(".")[0] == "experiments" or (folder / f"{other.split('.')[0]}.py").is_file()]
    return dict(sorted(found.items()))


def _find(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def _imports(path: Path, package: list[str]) -> Iterator[str]:
    """Every name in `path` that may be a module: `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])]) if node.level else node.module or ""
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def record(experiment: Experiment, run: Path) -> dict[str, Any]:
    """Copies the experiment's code into `run`/code and returns what `rebuild` needs to know of it."""
    files = []
    for relative, path in experiment.files.items():
        copy = run / "code" / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
        files.append({"path": relative, "origin": str(path.resolve()), "sha256": sha256(path)})
    return {"module": experiment.module, "structural": experiment.structural, "files": files}


def rebuild(recorded: dict[str, Any], config: ModelConfig, run: Path, *, trust_code: bool) -> gpt2.Model:
    """The model of a run.

    Raises:
      InputError: its code has changed or is not this user's, and `trust_code` is False; or the copy in the run is not what was recorded.
    """
    if not recorded["structural"]:
        return gpt2.GPT2(config)
    files = recorded["files"]
    if str(Path(*recorded["module"].split(".")).with_suffix(".py")) not in {f["path"] for f in files}:
        raise InputError("run", str(run), f"run.json does not list the code of {recorded['module']}", "Restore the file from where the run was made")
    wrong = [f"{f['path']} ({reason})" for f in files if (reason := _not_ours(f, run))]
    if not wrong:
        root = Path(files[0]["origin"]).parents[len(Path(files[0]["path"]).parts) - 1]
    elif trust_code:
        root = run / "code"
        for f in files:
            copy = root / f["path"]
            if not copy.resolve().is_relative_to(root.resolve()) or not copy.is_file() or sha256(copy) != f["sha256"]:
                raise InputError("run", str(run), f"code/{f['path']} is not what the run recorded", "Restore the file from where the run was made")
    else:
        raise InputError(
            "run", str(run), f"its model is built by code that is not as it was: {', '.join(wrong)}", f"Restore it, or pass --trust-code to execute {run / 'code'}"
        )
    return _load(root, recorded["module"]).build(config)


def _not_ours(file: dict[str, str], run: Path) -> str:
    """Why the recorded file may not be executed from where it stood; empty if it may."""
    origin = Path(file["origin"])
    if not origin.is_file() or not str(origin).endswith(file["path"]):
        return "not on this machine"
    if origin.resolve().is_relative_to(run.resolve()) or (hasattr(os, "getuid") and origin.stat().st_uid != os.getuid()):
        return "somebody else's"
    return "" if sha256(origin) == file["sha256"] else "changed since"


def changed_files(recorded: dict[str, Any], experiment: Experiment) -> list[str]:
    """The files of `experiment` that are not as a run recorded them: changed, new or gone."""
    then = {f["path"]: f["sha256"] for f in recorded["files"]}
    now = {relative: sha256(path) for relative, path in experiment.files.items()}
    return sorted(path for path in then.keys() | now.keys() if then.get(path) != now.get(path))
