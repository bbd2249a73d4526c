"""Experiment files: loading one, and recording its code in a run so that the run can rebuild its own model.

A run keeps a copy of the experiment file, and of the files that it imports from beside it or under experiments/, with their hashes:
the very bytes that were executed. A structural experiment (one that defines MODEL) is rebuilt from the files where they stood, if they
are unchanged and this user's own; the copies that came with the run are executed only on --trust-code.
"""

import ast
import dataclasses
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from mlm_jax.config import Config, InputError, ModelConfig, override
from mlm_jax.model import gpt2
from mlm_jax.storage import Place

PACKAGE = "experiments"  # its modules belong to an experiment wherever they stand on the module path


class Source(NamedTuple):
    """One file of an experiment's code."""

    origin: Path
    code: bytes

    @property
    def sha256(self) -> str:
        """Of the code, in hex."""
        return hashlib.sha256(self.code).hexdigest()


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment file: what it defines, and the code that it consists of."""

    config: Config
    build: Callable[[ModelConfig], gpt2.Model]  # MODEL of the file; GPT2 where it defines none
    structural: bool  # the file defines MODEL
    module: str
    files: dict[str, Source]  # by path below the root of the module path

    def with_changes(self, changes: Mapping[str, Any]) -> "Experiment":
        """This experiment with dotted fields of its configuration replaced, as `config.override` does."""
        return dataclasses.replace(self, config=override(self.config, changes))


def load(reference: str) -> Experiment:
    """The experiment in a file (experiments/tiny.py) or in a module below the current directory (experiments.tiny).

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
        parts = path.relative_to(root).with_suffix("").parts
    else:
        root, parts = Path.cwd(), tuple(reference.split("."))
    if not all(part and "." not in part for part in parts):
        raise InputError("EXPERIMENT", reference, "not the name of a Python module", "Use names without dots, for example experiments/tiny.py")
    return _execute(".".join(parts), _Finder(_beside(root)))


def _execute(module: str, finder: "_Finder") -> Experiment:
    """Imports `module` and what belongs to it anew, through `finder`."""
    for name in [n for n, m in sys.modules.items() if n.split(".")[0] == PACKAGE or isinstance(getattr(m, "__loader__", None), _Finder)]:
        del sys.modules[name]
    sys.meta_path[:] = [finder, *(other for other in sys.meta_path if not isinstance(other, _Finder))]  # stays, for imports inside functions
    if finder.locate(module) is None:
        raise InputError("EXPERIMENT", module, "no such file or module", "Name an experiment, for example experiments/tiny.py")
    sys.modules.pop(module, None)  # of the same name, from elsewhere
    try:
        loaded = importlib.import_module(module)
    except InputError:
        raise
    except ModuleNotFoundError as e:
        raise InputError("EXPERIMENT", module, f"imports {e.name}, which is not there", "Install it, or run from the folder that has it") from e
    except (Exception, SystemExit) as e:
        raise InputError("EXPERIMENT", module, f"does not run ({type(e).__name__}: {e})", "Mend the file (--traceback shows where)") from e
    config: Any = getattr(loaded, "CONFIG", None)
    build = getattr(loaded, "MODEL", None)
    if not isinstance(config, Config):
        raise InputError("EXPERIMENT", module, "defines no CONFIG of type mlm_jax.config.Config", "Define CONFIG = Config(name=..., ...)")
    structural = build is not None
    if structural and not callable(build):
        raise InputError("EXPERIMENT", module, "MODEL cannot be called", "Define MODEL so that MODEL(config.model) is a Flax module")
    make: Any = build if structural else gpt2.GPT2
    return Experiment(config, make, structural, module, finder.all_files(module))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports an experiment's own modules and keeps the bytes that it executed; no bytecode is read or written."""

    def __init__(self, read: Callable[[str], Source | None]) -> None:
        """`read` gives the file at a path below the root of the module path, or None where it is not the experiment's."""
        self.read = read
        self.files: dict[str, Source] = {}

    def locate(self, name: str) -> str | None:
        """The relative path of module `name`, whose file is then in `files`; None where it is not the experiment's."""
        stem = name.replace(".", "/")
        for relative in (f"{stem}/__init__.py", f"{stem}.py"):
            if relative not in self.files and (found := self.read(relative)):
                self.files[relative] = found
            if relative in self.files:
                return relative
        return None

    def all_files(self, module: str) -> dict[str, Source]:
        """The files of `module` and of what it imports, however deep, also where the import is inside a function."""
        seen: set[str] = set()
        waiting = [module]
        while waiting:
            name = waiting.pop()
            relative = self.locate(name)
            if relative is None or relative in seen:
                continue
            seen.add(relative)
            parts = name.split(".")
            waiting += [".".join(parts[:i]) for i in range(1, len(parts))]
            waiting += _imports(self.files[relative].code, parts if relative.endswith("__init__.py") else parts[:-1])
        return dict(sorted(self.files.items()))

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        relative = self.locate(fullname)
        if relative is None:  # experiments/ may do without an __init__.py
            return importlib.machinery.ModuleSpec(fullname, None, is_package=True) if fullname == PACKAGE else None
        return importlib.util.spec_from_loader(fullname, self, origin=str(self.files[relative].origin), is_package=relative.endswith("__init__.py"))

    def get_filename(self, fullname: str) -> str:
        relative = self.locate(fullname)
        if relative is None:
            raise ImportError(fullname)
        return str(self.files[relative].origin)

    def get_data(self, path: str | bytes) -> bytes:
        for file in self.files.values():
            if str(file.origin) == path:
                return file.code
        raise OSError(path)


def _beside(root: Path) -> Callable[[str], Source | None]:
    """Reads modules that stand in `root`, and those of experiments/ there, in the current directory or on the module path."""
    places = [root, Path.cwd(), *map(Path, sys.path)]

    def read(relative: str) -> Source | None:
        top = relative.split("/")[0].removesuffix(".py")
        if top == "mlm_jax":  # it is installed, and the run records its version
            return None
        for place in places if top == PACKAGE else places[:1]:
            if (place / relative).is_file():
                return Source((place / relative).resolve(), (place / relative).read_bytes())
        return None

    return read


def _imports(code: bytes, package: list[str]) -> Iterator[str]:
    """Every name in `code` that may be a module: `from a import b` gives a and a.b."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):  # imported inside a function that nobody may ever call
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])]) if node.level else node.module or ""
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def record(experiment: Experiment) -> dict[str, Any]:
    """What `rebuild` needs to know of an experiment's code, for run.json; `copy_code` puts the code beside it."""
    files = [{"path": relative, "origin": str(file.origin), "sha256": file.sha256} for relative, file in experiment.files.items()]
    return {"module": experiment.module, "structural": experiment.structural, "files": files}


def copy_code(experiment: Experiment, run: Path) -> None:
    """Writes the experiment's code, as it was executed, below `run`/code."""
    for relative, file in experiment.files.items():
        copy = run / "code" / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.code)


def check_record(recorded: Any, run: Place) -> dict[str, Any]:
    """`recorded`, as run.json holds it, if it has the form that `record` gives it.

    Raises:
      InputError: it has another form, or names a file outside the run.
    """

    def no(reason: str) -> InputError:
        return InputError(str(run / "run.json"), "", reason, "Restore the file from where the run was made")

    try:
        module, structural, files = recorded["module"], recorded["structural"], recorded["files"]
        ok = type(module) is str and type(structural) is bool and all(type(f[key]) is str for f in files for key in ("path", "origin", "sha256"))
    except (TypeError, KeyError):
        ok, module, structural, files = False, "", False, []
    if not ok:
        raise no("does not say what code made the run")
    for f in files:
        if Path(f["path"]).is_absolute() or not set(Path(f["path"]).parts).isdisjoint({"..", ""}) or "\\" in f["path"]:
            raise no(f"its code file {f['path']!r} is not inside the run")
    stem = module.replace(".", "/")
    if structural and not {f"{stem}.py", f"{stem}/__init__.py"} & {f["path"] for f in files}:
        raise no(f"does not list the code of {module!r}, which builds its model")
    return recorded


def rebuild(recorded: Any, config: ModelConfig, run: Place, *, trust_code: bool) -> gpt2.Model:
    """The model of a run, from what its run.json holds under "experiment".

    Raises:
      InputError: its code has changed or is not this user's, and `trust_code` is False; or the copy in the run is not what was recorded.
    """
    recorded = check_record(recorded, run)
    if not recorded["structural"]:
        return gpt2.GPT2(config)
    files: dict[str, Source] = {}
    wrong = []
    for f in recorded["files"]:
        origin = Path(f["origin"])
        reason = _not_ours(origin, f["path"], run)
        if not reason:
            files[f["path"]] = Source(origin, origin.read_bytes())
            reason = "" if files[f["path"]].sha256 == f["sha256"] else "changed since"
        wrong += [f"{f['path']} ({reason})"] if reason else []
    if wrong and not trust_code:
        remedy = f"Restore it, or pass --trust-code to execute {run / 'code'}"
        raise InputError("run", str(run), f"its model is built by code that is not as it was: {', '.join(wrong)}", remedy)
    if wrong:
        files = {f["path"]: _copy(f, run) for f in recorded["files"]}
    return _execute(recorded["module"], _Finder(files.get)).build(config)


def _not_ours(origin: Path, relative: str, run: Place) -> str:
    """Why a recorded file may not be executed from where it stood; empty if it may."""
    # A run that was made elsewhere can name any path: one relative to this directory, or through a link, may lead back to what came with it.
    if not origin.is_absolute() or not origin.is_file() or origin.resolve() != origin:
        return "not on this machine"
    if origin.parts[-len(Path(relative).parts) :] != Path(relative).parts:
        return "not on this machine"
    if origin.is_relative_to(run.resolve()) or (hasattr(os, "getuid") and origin.stat().st_uid != os.getuid()):
        return "somebody else's"
    return ""


def _copy(file: dict[str, str], run: Place) -> Source:
    """The copy of a recorded file in the run.

    Raises:
      InputError: it is missing, leads outside, or is not what was recorded.
    """
    wrong = InputError("run", str(run), f"code/{file['path']} is not what the run recorded", "Restore the file from where the run was made")
    copy = run / "code" / file["path"]
    if isinstance(run, Path):  # a bucket has no links
        copy = copy.resolve()
        if not copy.is_relative_to((run / "code").resolve()):
            raise wrong
    if copy.is_file():
        found = Source(Path(copy), copy.read_bytes())
        if found.sha256 == file["sha256"]:
            return found
    raise wrong


def changed_files(recorded: dict[str, Any], experiment: Experiment) -> list[str]:
    """The files of `experiment` that are not as a run recorded them: changed, new or gone."""
    then = {f["path"]: f["sha256"] for f in recorded["files"]}
    now = {relative: file.sha256 for relative, file in experiment.files.items()}
    return sorted(path for path in then.keys() | now.keys() if then.get(path) != now.get(path))
