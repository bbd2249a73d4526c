"""Python, JAX and the other packages: those that are installed are those that are required."""

import importlib.metadata
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Iterator
from typing import NamedTuple

from mlm_jax.doctor.findings import FAILED, OK, WARNING, Finding

NEWEST_PYTHON = (3, 13)  # that the tests run on


def python(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    """Python is one that the package was made for."""
    saw, wanted = ".".join(map(str, version)), importlib.metadata.metadata("mlm_jax")["Requires-Python"]
    newest = ".".join(map(str, NEWEST_PYTHON))
    remedy = f"Make a virtual environment with Python {newest}: uv venv --python {newest}"
    if not satisfies(saw, wanted):
        return Finding("python", FAILED, f"{saw}, and not {wanted}", remedy)
    if version[:2] > NEWEST_PYTHON:
        return Finding("python", WARNING, f"{saw}, newer than {newest}, the newest that is tested", remedy)
    return Finding("python", OK, saw)


class Requirement(NamedTuple):
    """A line of what a package requires."""

    name: str
    specifiers: str
    extra: str  # the extra that asks for it


def requirements(package: str) -> list[Requirement]:
    """What the installed `package` requires, also by its extras."""
    found = []
    for line in importlib.metadata.requires(package) or []:
        matched = re.match(r"([\w.-]+)(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?(?:;.*?\bextra == ['\"]([^'\"]+))?", line)
        if matched:
            found.append(Requirement(matched[1], matched[2].strip(), matched[3] or ""))
    return found


def installed(package: str) -> str:
    """The version of `package`; "" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def satisfies(version: str, specifiers: str) -> bool:
    """Whether `version` is one of "<=0.10.2,>=0.10.1" or "==0.0.42.*"; by the numbers of its release alone. Source: PEP 440."""

    def numbers(text: str) -> list[int]:
        return [int(n) for n in re.split(r"[^\d.]", text)[0].split(".") if n]

    for specifier in filter(None, map(str.strip, specifiers.split(","))):
        _, operator, other = re.split(r"([~=!<>]+)", specifier)
        ours, theirs = numbers(version), numbers(other.strip())
        width = len(theirs) if other.endswith("*") else max(len(ours), len(theirs))
        ours, prefix = (ours + [0] * width)[:width], theirs[:-1]
        theirs += [0] * (width - len(theirs))
        holds = {
            "==": ours == theirs,
            "!=": ours != theirs,
            "<=": ours <= theirs,
            ">=": ours >= theirs,
            "<": ours < theirs,
            ">": ours > theirs,
            "~=": ours >= theirs and ours[: len(prefix)] == prefix,
        }
        if not holds[operator]:
            return False
    return True


def pip(verb: str, *packages: str) -> str:
    """The command that does so in the environment of this Python."""
    command = [sys.executable, "-m", "pip", verb] if installed("pip") else ["uv", "pip", verb, "--python", sys.executable]
    return shlex.join([*command, *packages])  # environments that uv makes have no pip


def packages() -> Iterator[Finding]:
    """What the package requires is installed; what only an extra requires may be missing, and is worth a warning where it is too old."""
    needs = [need for need in requirements("mlm_jax") if need.name != "mlm_jax" and need.extra not in ("test", "dev")]
    needs = [need for need in needs if installed(need.name) or not need.extra]
    wrong = [need for need in needs if not satisfies(installed(need.name), need.specifiers)]
    for state, some in ((FAILED, [need for need in wrong if not need.extra]), (WARNING, [need for need in wrong if need.extra])):
        if some:
            whose = [f", which the extra {need.extra} asks for" if need.extra else "" for need in some]
            each = [f"{need.name} {installed(need.name) or 'is missing'}, not {need.specifiers}" for need in some]
            remedy = pip("install", *(need.name + need.specifiers for need in some))
            yield Finding("packages", state, "; ".join(map("".join, zip(each, whose, strict=True))), remedy)
    if not wrong:
        yield Finding("packages", OK, f"{len({need.name for need in needs})} that are required are there, in the right versions")


def jax_family() -> Finding:
    """jaxlib, libtpu and the CUDA plugin are those that the installed jax asks for."""
    plugins = (("libtpu", "tpu"), ("jax-cuda12-plugin", "cuda12"), ("jax-cuda13-plugin", "cuda13"))
    extras = {extra: name for name, extra in plugins if installed(name)}
    asked = [need for need in requirements("jax") if need.name in ("jaxlib", *extras.values()) and need.extra in ("", *extras)]
    wrong = {need.name: need.specifiers for need in asked if not satisfies(installed(need.name), need.specifiers)}
    saw = ", ".join(f"{name} {installed(name) or 'is missing'}" for name in ("jax", "jaxlib", *extras.values()))
    if wrong:
        saw += f"; jax wants {', '.join(f'{name}{specifiers}' for name, specifiers in wrong.items())}"
        chosen = f"[{','.join(extras)}]" if extras else ""
        return Finding("jax", FAILED, saw, pip("install", f"jax{chosen}=={installed('jax')}"))
    return Finding("jax", OK, saw)


def libtpu() -> Iterator[Finding]:
    """Another libtpu than the package would be used; nothing where it is not. Source: jax/_src/cloud_tpu_init.py, get_tpu_library_path."""
    named, package = os.environ.get("TPU_LIBRARY_PATH"), importlib.util.find_spec("libtpu")
    own = os.path.join(os.path.dirname(package.origin or ""), "libtpu.so") if package else ""
    if named and os.path.realpath(named) != os.path.realpath(own):
        yield Finding("libtpu", WARNING, f"TPU_LIBRARY_PATH={named} goes before the package's", "unset TPU_LIBRARY_PATH")
    if nightly := installed("libtpu-nightly"):
        remedy = " && ".join([pip("uninstall", "libtpu-nightly", "libtpu"), pip("install", f"jax[tpu]=={installed('jax')}")])
        yield Finding("libtpu", WARNING, f"libtpu-nightly {nightly} is installed, in the same folder as libtpu", remedy)
