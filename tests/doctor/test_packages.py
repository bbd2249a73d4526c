"""Python and packages that are not the right ones are found, and set right by the remedy."""

import importlib
import itertools
import sys

from packaging.specifiers import SpecifierSet  # pytest needs it

from mlm_jax.doctor import packages
from mlm_jax.doctor.findings import FAILED, OK, WARNING, Finding


def test_a_libtpu_that_is_not_the_one_of_this_jax_is_found_and_set_right_by_the_remedy(environment):
    for name, version in {"jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.40"}.items():
        environment.place(name, version)
    saw, remedy = "jax 0.10.2, jaxlib 0.10.2, libtpu 0.0.40; jax wants libtpu==0.0.42.*", f"{sys.executable} -m pip install 'jax[tpu]==0.10.2'"
    assert packages.jax_family() == Finding("jax", FAILED, saw, remedy)
    environment.pip(remedy)
    assert packages.jax_family() == Finding("jax", OK, "jax 0.10.2, jaxlib 0.10.2, libtpu 0.0.42.1")


def test_without_a_plugin_the_oldest_jaxlib_that_jax_takes_is_right(environment, monkeypatch):
    version = packages.installed
    monkeypatch.setattr(packages, "installed", lambda name: version(name) if name in ("jax", "jaxlib", "pip") else "")
    environment.place("jax", "0.10.2")
    environment.place("jaxlib", "0.10.1")
    assert packages.jax_family() == Finding("jax", OK, "jax 0.10.2, jaxlib 0.10.1")
    environment.place("jaxlib", "0.9.2")
    assert packages.jax_family().remedy == f"{sys.executable} -m pip install jax==0.10.2"
    monkeypatch.setattr(packages, "installed", lambda name: version(name) if name in ("jax", "jaxlib") else "")  # as uv makes environments
    assert packages.jax_family().remedy == f"uv pip install --python {sys.executable} jax==0.10.2"


def test_a_missing_package_is_named_unless_an_extra_alone_requires_it(monkeypatch):
    installed = packages.installed
    monkeypatch.setattr(packages, "installed", lambda name: "" if name in ("grain", "wandb") else installed(name))
    (found,) = packages.packages()
    assert found.saw == "grain is missing, not >=0.2.18" and found.remedy == f"{sys.executable} -m pip install 'grain>=0.2.18'"


def test_an_old_package_of_an_extra_is_worth_a_warning_that_names_it_and_those_of_the_tests_are_not(environment):
    for name, version in (("pytest", "8.4"), ("ruff", "0.14"), ("wandb", "0.1")):
        environment.place(name, version)
    (found,) = packages.packages()
    assert found[1:3] == (WARNING, "wandb 0.1, not >=0.18, which the extra wandb asks for")
    environment.pip(found.remedy)
    assert [found.state for found in packages.packages()] == [OK]


def test_another_libtpu_than_the_packages_is_found_and_gone_after_the_remedy(environment, tmp_path, monkeypatch):
    (tmp_path / "own" / "libtpu").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "own")
    monkeypatch.delitem(sys.modules, "libtpu", raising=False)  # JAX has imported it
    for name in ("own/libtpu/__init__.py", "own/libtpu/libtpu.so", "other.so"):
        (tmp_path / name).touch()
    importlib.invalidate_caches()
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "own" / "libtpu" / "libtpu.so"))  # as importing it does
    assert list(packages.libtpu()) == []
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "other.so"))
    (found,) = packages.libtpu()
    assert found[1:3] == (WARNING, f"TPU_LIBRARY_PATH={tmp_path}/other.so goes before the package's")
    monkeypatch.delenv(found.remedy.removeprefix("unset "))
    assert list(packages.libtpu()) == []
    for name, version in {"jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.42.1", "libtpu-nightly": "0.1"}.items():
        environment.place(name, version)
    (found,) = packages.libtpu()
    assert found[1:3] == (WARNING, "libtpu-nightly 0.1 is installed, in the same folder as libtpu")
    environment.pip(found.remedy)
    assert list(packages.libtpu()) == [] and packages.jax_family().saw == "jax 0.10.2, jaxlib 0.10.2, libtpu 0.0.42.1"


def test_versions_are_compared_as_pip_compares_them():
    versions = ["0.0.42", "0.0.42.1", "0.0.43", "0.10.1", "0.10.2", "0.12.0.1", "2", "2.0.0", "2.1", "10.0"]
    specifiers = [
        "",
        ">=2",
        "<2.1",
        "==0.0.42.*",
        "==2",
        "!=2.1",
        "<=0.10.2,>=0.10.1",
        "<=0.12.0.1,>=0.12.0.1",
        "~=0.10.1",
        "~=2.0",
        ">0.12",
        "== 2.*",
    ]
    for version, specifier in itertools.product(versions, specifiers):
        assert packages.satisfies(version, specifier) == (version in SpecifierSet(specifier)), (version, specifier)
    assert not packages.satisfies("", ">=2")


def test_what_a_package_requires_is_read_with_its_extras(environment):
    environment.place("jax", "0.10.2")
    assert packages.requirements("jax") == [
        ("jaxlib", "<=0.10.2,>=0.10.1", ""),
        ("libtpu", "==0.0.42.*", "tpu"),
        ("jaxlib", "<=0.10.2,>=0.10.2", "tpu"),
    ]
    assert ("etils", ">=1.14", "") in packages.requirements("mlm_jax") and ("gcsfs", ">=2026.1", "gcs") in packages.requirements("mlm_jax")


def test_a_python_that_is_too_old_fails_and_one_newer_than_tested_is_worth_a_warning():
    assert packages.python((3, 10, 12))[1:3] == (FAILED, "3.10.12, and not >=3.11")
    newer = packages.python((3, 14, 0))
    assert newer.state == WARNING
    version = tuple(map(int, newer.remedy.rpartition("--python ")[2].split(".")))
    assert packages.python((*version, 1)) == Finding("python", OK, "3.13.1")
