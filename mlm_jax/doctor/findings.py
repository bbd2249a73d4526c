"""What a check found and what is to be done about it, and what the machine has to be fit for."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from mlm_jax import storage
from mlm_jax.config import InputError

OK, WARNING, FAILED = "ok", "warning", "failed"
ALIKE = ("python", "jax")  # checks that have to see the same in all processes
REPORT = "The check itself failed; please report this line"


class Finding(NamedTuple):
    """What one check saw."""

    check: str
    state: str  # OK, WARNING or FAILED
    saw: str
    remedy: str = ""
    process: str = ""  # which one of several saw it; "": this one


class Wanted(NamedTuple):
    """What the machine has to be fit for."""

    out: str = "runs"  # a folder, or gs://BUCKET/FOLDER
    devices: int | None = None  # in all
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    distributed: bool = False
    join_timeout: float = 300.0  # as distributed.TIMEOUT_S, for which JAX would have to be imported

    @property
    def several(self) -> bool:
        return self.distributed or (self.coordinator, self.processes, self.process) != (None, None, None)

    @property
    def in_bucket(self) -> bool:
        return self.out.startswith("gs:/")


class Stage(NamedTuple):
    """What the other process does now, and how long that may take before it counts as hung."""

    name: str
    limit: float


# What to do where it hung, or ended, in a stage, and its last words do not say why.
REMEDIES = {
    "jax": "python -c 'import jax' has to work: make the virtual environment anew as the README says",
    "processes": "Start the same command in all processes at about the same time, with one --coordinator that each can reach",
    "devices": "Look at the last lines of: python -c 'import jax; print(jax.devices())'. On a pod the command has to run on every worker at the same "
    "time, with --distributed; a TPU that another process has just left takes a minute; else restart the machine",
    "compilation cache": "Unset JAX_COMPILATION_CACHE_DIR, or name a folder with it that can be written to",
    "collective": "Restart the machine, or make the TPU VM anew; between machines see to the firewall",
}


def words(findings: Sequence[Finding]) -> str:
    """A line for each check; where several processes made it, one for all that had nothing to find fault with. The last line counts."""
    lines = []
    for check in dict.fromkeys(finding.check for finding in findings):
        made = [finding for finding in findings if finding.check == check]
        good = [finding for finding in made if finding.state == OK]
        several = len(good) > 1 and good[0].process != good[-1].process and (check not in ALIKE or len({finding.saw for finding in good}) == 1)
        also = f" (ok in {len(good) - 1} more processes)" if several else ""
        for finding in [*(good[:1] if also else good), *(finding for finding in made if finding.state != OK)]:
            who = f"{finding.process}: " if finding.process else ""
            lines.append(f"{finding.state.upper() if finding.state == FAILED else finding.state:8} {check:18} {who}{finding.saw}{also}")
            also = ""
            if finding.remedy:
                lines.append(f"{'':8} {'':18} -> {finding.remedy}")
    counts = [sum(finding.state == state for finding in findings) for state in (OK, WARNING, FAILED)]
    return "\n".join([*lines, f"{len(findings)} findings: {counts[0]} ok, {counts[1]} warning{'s' * (counts[1] != 1)}, {counts[2]} failed"])


def safely(name: str, check: Callable[[], Finding | Iterable[Finding]]) -> list[Finding]:
    """What `check` finds; where it fails itself, that is a finding."""
    try:
        found = check()
        return [found] if isinstance(found, Finding) else list(found)
    except InputError as e:
        value = f" = {e.value}" if str(e.value) else ""
        return [Finding(name, FAILED, f"{e.field}{value}: {e.reason}", e.remedy)]
    except Exception as e:  # a check that fails must not take the others with it
        return [Finding(name, FAILED, f"{type(e).__name__}: {storage.first_line(e)}", REMEDIES.get(name, REPORT))]
