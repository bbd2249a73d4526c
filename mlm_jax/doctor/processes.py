"""The process that looks at what needs JAX: it joins those of the other machines, compares itself with them, and has the devices looked at."""

import json
import math
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from mlm_jax.doctor.devices import collective, compilation_cache, devices, pod, summary
from mlm_jax.doctor.findings import ALIKE, FAILED, OK, REMEDIES, WARNING, Finding, Stage, Wanted, safely
from mlm_jax.doctor.packages import pip
from mlm_jax.doctor.place import shared_folder, skew
from mlm_jax.doctor.tpu import advice

SAYS_S = 300.0  # at most, until all processes have said what they saw: three requests of a bucket that does not answer, and some
APART = Finding("devices", WARNING, "not looked at, as the processes are not together", "First see to the processes")


def look(wanted: Wanted, read_local: Callable[[], list[Finding]]) -> Iterator[Finding | Stage]:
    """What the other process does: every stage before it begins, and every finding."""
    from mlm_jax import distributed

    host = socket.gethostname()
    if wanted.several:
        yield Stage("processes", wanted.join_timeout + 120 if math.isfinite(wanted.join_timeout) else 600.0)
        joined = safely("processes", lambda: _join(wanted))
        if joined:
            yield from joined
            yield APART
            return
        hosts = dict(sorted(distributed.gathered("doctor_hosts", host, SAYS_S).items()))
        yield Finding("processes", OK, f"{len(hosts)} came, on {', '.join(dict.fromkeys(hosts.values()))}")
        if silent := [str(i) for i in range(distributed.count()) if i not in hosts]:
            yield Finding("processes", FAILED, f"came, but said nothing within {SAYS_S:g} s: {', '.join(silent)}", "Look at what they have printed")
    else:
        hosts = {0: host}
        if (workers := pod().workers) > 1:
            saw = f"this is one of {workers} workers of a pod, and looked at alone"
            yield Finding("processes", FAILED, saw, "Give the command on every worker at about the same time, with --distributed")
            yield APART
            return

    def others(name: str, findings: list[Finding]) -> Iterator[Finding]:
        """Tells the others the findings of this process, and yields theirs to the first one."""
        said = distributed.gathered(f"doctor_{name}", json.dumps(findings), SAYS_S)
        for i, who in list(hosts.items())[1:] if distributed.number() == 0 else ():
            silent = [Finding(name, FAILED, "has said nothing more", "Look at what it has printed itself")]
            for finding in json.loads(said[i]) if i in said else silent:
                yield Finding(*finding)._replace(process=f"process {i} ({who})")

    if wanted.several:
        yield Stage("processes", SAYS_S + 60)
    here = read_local()
    theirs = list(others("processes", here))
    yield from theirs
    yield from versions(here, theirs)
    if wanted.several:
        distributed.gathered("doctor_ready", "", SAYS_S)  # from here on all are within the time of a message
        times = distributed.gathered("doctor_clock", repr(time.time()), SAYS_S)
        yield from clocks({i: float(said) for i, said in times.items()}, hosts)
        if not wanted.in_bucket:  # into which each has written by itself
            found = safely("out", lambda: shared_folder(Path(wanted.out), hosts, SAYS_S))
            yield from found
            yield from others("out", found)
    yield Stage("devices", SAYS_S + 60)
    told = distributed.gathered("doctor_summary", json.dumps(summary()), SAYS_S)
    each = {i: json.loads(told[i]) if i in told else "did not tell of any" for i in hosts}
    if wrong := {i: error for i, error in each.items() if isinstance(error, str)}:
        for i, error in wrong.items():
            yield Finding("devices", FAILED, error, advice("devices", error), f"process {i} ({hosts[i]})" if wanted.several else "")
        return
    yield devices(list(each.values()), wanted.devices)
    found = []
    for name, limit, check in (("compilation cache", 120.0, compilation_cache), ("collective", 180.0, collective)):
        if check is compilation_cache and distributed.number() > 0:
            continue  # JAX lets process 0 alone write there
        yield Stage(name, limit)
        found += (made := safely(name, check))
        yield from made
    yield from others("collective", found)


def versions(here: Sequence[Finding], theirs: Sequence[Finding]) -> Iterator[Finding]:
    """What to say where Python or JAX is not the same in all processes: what process 0 has is right, if it is fine there."""
    for mine in (finding for finding in here if finding.check in ALIKE and finding.state == OK):
        if differ := [finding for finding in theirs if finding.check == mine.check and finding.saw != mine.saw]:
            saw = f"not the same in all processes: {mine.saw}, but in {', '.join(f'{finding.process} {finding.saw}' for finding in differ)}"
            packages = [f"{name}=={version}" for name, version in re.findall(r"(\S+) (\d[^,]*)", mine.saw)]
            remedy = pip("install", *packages) if mine.check == "jax" else f"Make virtual environments with Python {mine.saw}"
            yield Finding(mine.check, FAILED if mine.check == "jax" else WARNING, saw, f"In these: {remedy}")


def _join(wanted: Wanted) -> list[Finding]:
    """Joins the other processes; what is to be said where that fails."""
    from mlm_jax import distributed

    given = (None, None, None) if wanted.distributed else (wanted.coordinator, wanted.processes, wanted.process)
    try:
        distributed.start(*given, timeout=wanted.join_timeout)
    except TimeoutError as e:
        return [Finding("processes", FAILED, str(e), REMEDIES["processes"])]
    return []


def clocks(times: Mapping[int, float], hosts: Mapping[int, str]) -> list[Finding]:
    """What to say of the clocks of the processes, in seconds, all read at the same moment: each against the middle one."""
    middle = sorted(times.values())[len(times) // 2]
    every = [skew("clocks", time - middle, f"that of process {i} ({hosts[i]})", "the others'") for i, time in sorted(times.items())]
    wrong = [finding for finding in every if finding.state != OK]
    return wrong or [Finding("clocks", OK, f"within {max(times.values()) - min(times.values()):.1f} s of each other")]


def main() -> None:
    """What the other process is started for: reads what is wanted, and what was found without it, and says its stages and findings, a line each."""
    wanted = Wanted(*json.loads(sys.stdin.readline()))
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # gloo greets its peers on stdout

    def read_local() -> list[Finding]:
        return [Finding(*finding) for finding in json.loads(sys.stdin.readline())]

    from mlm_jax import distributed, status

    ended = status.FAILED
    try:
        for said in look(wanted, read_local):
            print(json.dumps(["stage" if isinstance(said, Stage) else "finding", said]), file=stdout, flush=True)
        print(json.dumps(["stage", Stage("end", 30.0)]), file=stdout, flush=True)
        ended = status.DONE
    except Exception:
        traceback.print_exc()  # its last line is found by the process that started this one
    distributed.leave(ended)  # of several, without waiting long for the others
    sys.exit(ended)


if __name__ == "__main__":
    main()
