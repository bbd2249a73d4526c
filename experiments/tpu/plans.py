"""Plans the experiments of this folder, and writes what each will take into its header, and the pages of the README anew.

Run   python -m experiments.tpu.plans      (pip install -e ".[tpu]", no TPU; two at a time, a quarter of an hour on two cores)
      python -m experiments.tpu.plans experiments/tpu/gpt2_124m_v5e_2x4.py ...
"""

import concurrent.futures
import contextlib
import io
import multiprocessing
import re
import shlex
import sys
from pathlib import Path

from mlm_jax import cli, experiment
from mlm_jax.plan import describe, topology, tpu

ROOT = Path(__file__).parents[2]
FILES = sorted(Path(__file__).parent.glob("gpt2_*.py"))
PAGE = re.compile(r"^(    mlm-jax (plan .*)\n(?:.*\n)*?```text\n)((?:.*\n)*?)(```)$", re.MULTILINE)  # of the README: a command and what it prints


def slice_of(file: Path) -> str:
    """The slice that an experiment is for: of gpt2_124m_v5e_2x4.py "v5e:2x4"."""
    return ":".join(file.stem.split("_")[2:])


def plan(file: Path) -> tpu.Plan:
    """What the experiment will take on its slice."""
    loaded = experiment.load(str(file))
    return tpu.plan(loaded.config, loaded.build, topology.parse(slice_of(file)))


def header(made: tpu.Plan) -> str:
    """The paragraph of a plan in the header of its experiment."""
    return "Plan     " + "\n         ".join(describe.summary(made)) + "\n"


def write(file: Path) -> tuple[str, str]:
    """Plans an experiment and puts the paragraph in its place; returns the command of `mlm-jax` that plans the same, and what it prints."""
    made = plan(file)
    text = file.read_text("utf-8")
    file.write_text(re.sub(r"^Plan     .*\n(?:         .*\n)*", header(made), text, count=1, flags=re.MULTILINE), "utf-8")
    return f"plan experiments/tpu/{file.name} --topology {slice_of(file)}", describe.describe(made)


def printed(command: str) -> tuple[str, str]:
    """A command of `mlm-jax`, and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = cli.main(shlex.split(command))
    if status:
        sys.exit(f"mlm-jax {command}: status {status}")
    return command, out.getvalue()


def main() -> None:
    files = [Path(name).resolve() for name in sys.argv[1:]]
    readme = ROOT / "README.md"
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        pages = dict(pool.map(write, files or FILES))
        if not files:
            commands = [found[2] for found in PAGE.finditer(readme.read_text("utf-8"))]
            pages |= pool.map(printed, [command for command in commands if command not in pages])
    readme.write_text(PAGE.sub(lambda found: found[1] + pages.get(found[2], found[3]) + found[4], readme.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
