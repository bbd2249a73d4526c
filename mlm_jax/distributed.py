"""The processes of one run: who takes part, whether all came, what each says of itself, and how all learn that one failed, is gone or is to stop.

JAX ends a process outright where another does not come in time, without a word on which. So the processes meet first: process 0 listens
where JAX's coordinator will, the others say who they are, and each is told who is missing.
"""

import contextlib
import json
import math
import os
import re
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mlm_jax import status
from mlm_jax.config import InputError

R = TypeVar("R")

TIMEOUT_S = 300.0  # as long as jax.distributed.initialize waits by itself
# JAX ends every process, with status 134, where one was silent for so long, and at once where process 0 is gone. Heartbeats come at half of it, so
# that a process that dies is noticed at half of it at the earliest.
HEARTBEAT_TIMEOUT_S = 100
_GRACE_S = 10.0  # what an answer may take on its way, and how long a process that failed waits for others that failed too
_LINE_BYTES = 4096  # of a message
_STOP = "mlm_jax/stops_after"
_NAMED = 8  # so many processes are named in one line


class Group(NamedTuple):
    """The processes of a run, as one of them sees it."""

    host: str  # of process 0
    port: int
    processes: int
    process: int  # this one
    hosts: Sequence[str] = ()  # of all processes, where the cluster tells


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None, *, timeout: float = TIMEOUT_S) -> None:
    """Joins this process to the others of its run; JAX must not have been used before.

    Without arguments the TPU pod, Slurm or whatever other cluster JAX detects says who they are. Else `coordinator` is HOST:PORT of
    process 0, free there and reachable from all, and this is `process` of `processes`. CPU devices talk through gloo, JAX's default.

    Raises:
      InputError: the arguments are wrong or contradict those of another process, or no cluster is detected.
      TimeoutError: a process did not come within `timeout` seconds; the same line, which names it, in all that came.
    """
    if not 0 < timeout < math.inf:
        raise InputError("--join-timeout", timeout, "not a time to wait", "Give a number of seconds above 0")
    given = (coordinator, processes, process)
    explicit = given != (None, None, None)
    group = _group(*given) if explicit else _detect(timeout)
    if group.processes > 1:
        (_meet if group.process == 0 else _report)(group, timeout)
    address = f"[{group.host}]:{group.port}" if ":" in group.host else f"{group.host}:{group.port}"
    jax.config.update("jax_enable_preemption_service", False)  # its handler would swallow every SIGTERM, and tell nobody who does not ask
    jax.distributed.initialize(
        address,
        group.processes,
        group.process,
        cluster_detection_method="deactivate" if explicit else None,  # by now it says at most which GPU is this process's
        initialization_timeout=max(math.ceil(timeout), 60),  # all are here
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        coordinator_bind_address=address if _is_loopback(group.host) else None,
    )


def _group(coordinator: str | None, processes: int | None, process: int | None) -> Group:
    """The group that the three arguments describe; raises InputError where they do not."""
    for flag, value in (("--coordinator", coordinator), ("--processes", processes), ("--process", process)):
        if value is None:
            raise InputError(flag, "", "missing", "Give --coordinator, --processes and --process, or --distributed alone")
    assert coordinator is not None and processes is not None and process is not None
    found = re.fullmatch(r"(?:\[(?P<ip6>[^\]\s]+)\]|(?P<name>[^:\s]+)):(?P<port>\d{1,5})", coordinator)
    if not found or not 0 < int(found["port"]) < 1 << 16:
        raise InputError("--coordinator", coordinator, "not HOST:PORT", "Write, for example, 10.0.0.2:12345, an address and a free port of process 0")
    if processes < 1:
        raise InputError("--processes", processes, "a run has at least one", "Give the number of processes of this run")
    if not 0 <= process < processes:
        reason = f"{processes} processes are numbered from 0 to {processes - 1}"
        raise InputError("--process", process, reason, "Give each process of the run a number of its own")
    return Group(found["ip6"] or found["name"], int(found["port"]), processes, process)


def _detect(timeout: float) -> Group:
    """The group that the cluster describes; raises InputError where there is none."""
    from jax._src.clusters import ClusterEnv  # no public name: what jax.distributed.initialize itself asks

    env: Any = next((env for env in ClusterEnv._cluster_types if not env.opt_in_only_method and env.is_env_present()), None)
    if env is None:
        remedy = "Give --coordinator HOST:PORT --processes N --process I instead"
        raise InputError("--distributed", "", "neither a TPU pod nor Slurm nor another cluster that JAX knows is detected", remedy)
    address = os.environ.get("JAX_COORDINATOR_ADDRESS") or env.get_coordinator_address(
        timeout_secs=math.ceil(timeout), override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
    )
    group = _group(address, env.get_process_count(), env.get_process_id())
    hosts = []
    if "tpu" in env.name:
        hosts = env._get_worker_list_in_slice()
    elif env.name == "slurm" and os.environ.get("SLURM_DISTRIBUTION", "block").startswith("block"):
        hosts = _slurm_hosts(os.environ["SLURM_STEP_NODELIST"], os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return group._replace(hosts=hosts if len(hosts) == group.processes else ())  # of other slices nothing is known


def _slurm_hosts(nodes: str, tasks: str) -> list[str]:
    """The host of each task: ("n[08-09,11],gpu", "2(x3),1") -> n08, n08, n09, n09, n11, n11, gpu. Source: man srun, SLURM_TASKS_PER_NODE."""
    names: list[str] = []
    for prefix, ranges, suffix in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[\]]*)", nodes):
        for part in ranges.split(","):
            low, _, high = part.partition("-")
            numbers = [f"{n:0{len(low)}}" for n in range(int(low), int(high or low) + 1)] if low else [""]
            names += [prefix + number + suffix for number in numbers]
    counts = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks) for _ in range(int(times or 1))] or [1] * len(names)
    return [name for name, n in zip(names, counts, strict=False) for _ in range(n)]


# ---- the meeting: one line of JSON from each process to process 0, and one back ----


def _meet(group: Group, timeout: float) -> None:
    """Process 0: waits until every other one has said who it is, then tells each the outcome. Raises as `start` does."""
    deadline = time.monotonic() + timeout
    here: dict[int, tuple[socket.socket, str]] = {}  # process -> its connection, and what tells it from another with its number
    read: dict[socket.socket, bytes] = {}  # every open connection, and what came of its line
    error: Exception | None = None
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(group))
        selector = stack.enter_context(selectors.DefaultSelector())
        selector.register(server, selectors.EVENT_READ)
        stack.callback(lambda: [connection.close() for connection in read])
        while len(here) < group.processes - 1 and error is None:
            if (left := deadline - time.monotonic()) <= 0:
                error = TimeoutError(_missing(group, [i for i in range(1, group.processes) if i not in here], timeout))
                break
            for key, _ in selector.select(left):
                if key.fileobj is server:
                    connection, _ = server.accept()
                    connection.setblocking(False)
                    read[connection] = b""
                    selector.register(connection, selectors.EVENT_READ)
                    continue
                connection: Any = key.fileobj
                try:
                    some = connection.recv(_LINE_BYTES)
                except OSError:
                    some = b""
                read[connection] += some
                hello = _hello(read[connection]) if some else None
                if some and hello is None and len(read[connection]) < _LINE_BYTES and b"\n" not in read[connection]:
                    continue  # there is more to come
                if hello is None:  # it has gone, or is none of ours
                    selector.unregister(connection)
                    del read[connection]
                    connection.close()
                    here = {i: (other, who) for i, (other, who) in here.items() if other is not connection}
                    continue
                process, processes, who = hello
                if processes != group.processes:
                    reason = f"process 0 has {group.processes}, process {process} on {who.split()[0]} has {processes}"
                    error = InputError("--processes", "", reason, "Start all processes of a run with the same number")
                elif process == 0 or here.get(process, (None, who))[1] != who:
                    others = " and ".join(sorted({name.split()[0] for name in (here[process][1] if process else _who(), who)}))
                    error = InputError("--process", process, f"two processes have this number, on {others}", "Give each a number of its own")
                else:
                    here[process] = connection, who
        for connection in read:
            with contextlib.suppress(OSError):  # it learns by the silence
                connection.settimeout(_GRACE_S)
                connection.sendall(_packed(error) + b"\n")
    if error:
        raise error


def _listen(group: Group) -> socket.socket:
    """A socket on the port of process 0, open to other machines unless its address is one of this machine's own."""
    try:
        if _is_loopback(group.host):
            family, _, _, _, address = socket.getaddrinfo(group.host, group.port, type=socket.SOCK_STREAM)[0]
            return socket.create_server(address[:2], family=family, backlog=group.processes)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", group.port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=group.processes)
        return socket.create_server(("", group.port), backlog=group.processes)
    except OSError as e:
        raise InputError(
            "--coordinator", f"{group.host}:{group.port}", f"cannot listen there ({os.strerror(e.errno or 0)})", "Choose another port"
        ) from e


def _report(group: Group, timeout: float) -> None:
    """Any other process: tells process 0 that it is here, and waits for the outcome. Raises as `start` does."""
    deadline = time.monotonic() + timeout
    hello = json.dumps({"run": "mlm_jax", "process": group.process, "processes": group.processes, "who": _who()}).encode() + b"\n"
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((group.host, group.port), timeout=left) as connection, connection.makefile("rb") as answers:
                connection.sendall(hello)
                connection.settimeout(timeout + _GRACE_S)  # process 0 may have begun to wait only now
                error = _unpacked(answers.readline(_LINE_BYTES).removesuffix(b"\n"))
        except (OSError, ValueError, TypeError) as e:
            reason = (e.strerror if isinstance(e, OSError) else "another program answers") or "no answer"
            time.sleep(min(0.2, left))
            continue
        if error:
            raise error
        return
    raise TimeoutError(f"{_missing(group, [0], timeout)} ({reason})")


def _hello(line: bytes) -> tuple[int, int, str] | None:
    """(process, processes, who) of a first line; None where it is not whole, or not from a process of a run."""
    try:
        said = json.loads(line) if line.endswith(b"\n") else {}
        process, processes, who = said["process"], said["processes"], said["who"]
    except (ValueError, TypeError, KeyError):
        return None
    ok = said["run"] == "mlm_jax" and type(process) is int and type(processes) is int and isinstance(who, str) and bool(who.strip())
    return (process, processes, who) if ok else None


def _who() -> str:
    """This process among all of all machines."""
    return f"{socket.gethostname()} {os.getpid()}"


def _missing(group: Group, absent: Sequence[int], timeout: float) -> str:
    """One line that names the absent processes."""
    names = [f"{i} ({group.hosts[i]})" if group.hosts else str(i) for i in absent[:_NAMED]]
    more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
    of = f"process{'es' if len(absent) > 1 else ''} {', '.join(names)}{more} of {group.processes}"
    return f"{of} did not come to {group.host}:{group.port} within {timeout:g} s; see whether each was started and can reach that address"


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d+){3}", host) is not None


# ---- failing together ----


def together(work: Callable[[], R]) -> R:
    """What `work` returns here, after it has succeeded in every process; no process goes on where it failed in one.

    Raises:
      InputError: where the first process that failed raised one; the same everywhere.
      RuntimeError: it failed in another way; in that process, its own exception.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except Exception as e:
        error = e
    said = np.zeros(_LINE_BYTES, np.uint8)
    line = np.frombuffer(_packed(error), np.uint8)
    said[: len(line)] = line
    indices, lines = multihost_utils.process_allgather((np.int32(jax.process_index()), said))
    for process, row in sorted(zip(indices.tolist(), map(bytes, lines), strict=True)):
        first = _unpacked(row.rstrip(b"\0"))
        if first is None:
            continue
        if error is not None and process == jax.process_index():
            raise error
        raise first if isinstance(first, InputError) else RuntimeError(f"process {process}: {first}")
    return result  # pyright: ignore[reportReturnType]


def any_of(flag: bool) -> bool:
    """Whether it is true in any process; all call it together, between computations."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.bool_(flag)).any())


def stops_after(step: int, asked: bool) -> bool:
    """Whether all processes stop after this step, the same in all; `asked` says that this process was asked to. Called before each step is given.

    The first that was asked names the step, two further on. By then all know: a process gives a step when the one two before is done, which takes
    all processes, and so what they had said before it.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return asked
    client = _store()
    try:
        if asked:
            client.key_value_set(_STOP, str(step + 2))
        return int(client.key_value_try_get(_STOP)) <= step
    except jax.errors.JaxRuntimeError as e:
        if "ALREADY_EXISTS" in str(e):
            return int(client.key_value_try_get(_STOP)) <= step
        if "NOT_FOUND" in str(e):
            return False
        raise


def _packed(error: Exception | None) -> bytes:
    """An error, or none, as one line of at most _LINE_BYTES - 1 bytes."""
    if isinstance(error, InputError):
        value = error.value if isinstance(error.value, str) else repr(error.value)
        said = ["InputError", error.field, value, error.reason, error.remedy]
    else:
        said = [] if error is None else ["TimeoutError" if isinstance(error, TimeoutError) else type(error).__name__, str(error)]
    return json.dumps([part[: _LINE_BYTES // 40] if len(json.dumps(said)) >= _LINE_BYTES else part for part in said]).encode()


def _unpacked(line: bytes) -> Exception | None:
    """The error of `_packed`; ValueError or TypeError where the line is none of its lines."""
    kind, *words = json.loads(line) or [""]
    if kind == "InputError":
        return InputError(*words)
    if kind == "TimeoutError":
        return TimeoutError(*words)
    return RuntimeError(f"{kind}: {' '.join(words)}") if kind else None


def leads() -> bool:
    """This process is the one that writes and answers."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def leave(exit_status: int) -> None:
    """Ends a process of several that failed, with `exit_status`; returns where the process is alone.

    The others may wait for it in a computation, so it waits only a moment for them to fail too: its end is what ends their waiting. Where one
    of them is gone, process 0 alone waits: with it end the others, by JAX's hand, and they have to find out by themselves first.
    """
    if not jax.distributed.is_initialized():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if exit_status == status.LOST:
        time.sleep(_GRACE_S / 2 if leads() else 0)
    else:
        last = threading.Thread(target=jax.distributed.shutdown, daemon=True)  # waits until all have called it
        last.start()
        last.join(TIMEOUT_S if exit_status == status.STOPPED else _GRACE_S)  # who was asked to stop may still save
    os._exit(exit_status)


# What the collectives of a CPU (gloo) and JAX's coordination service say where another process has ended, or no longer answers.
_LOST = re.compile(
    r"gloo.*(connection closed by peer|connection reset by peer|broken pipe|timed out)"
    r"|coordination ?service.*(unavailable|failed to send rpc|socket closed)|(unavailable|failed to send rpc|socket closed).*coordination ?service"
    r"|stopped sending heartbeats|barrier timed out",
    re.IGNORECASE | re.DOTALL,
)


def lost(error: BaseException) -> bool:
    """`error`, or what it was raised from, says that another process of this run is gone."""
    if not jax.distributed.is_initialized():
        return False
    seen: list[BaseException] = []
    next_one: BaseException | None = error
    while next_one is not None and next_one not in seen:
        seen.append(next_one)
        next_one = next_one.__cause__ or next_one.__context__
    return any(_LOST.search(str(e)) for e in seen)


# ---- what each process says of itself, for the others to read when they want ----


def publish(name: str, value: str) -> None:
    """Says `value` under `name` in place of what this process said before. Blocks while process 0, which keeps it, does not answer."""
    _store().key_value_set(f"mlm_jax/{name}/{jax.process_index()}", value, allow_overwrite=True)


def published(name: str) -> dict[int, str]:
    """What each process has said last under `name`; without those that have said nothing. Blocks as `publish` does."""
    return {int(key.rpartition("/")[2]): value for key, value in _store().key_value_dir_get(f"mlm_jax/{name}/")}


def number() -> int:
    """The number of this process among those of its run; no device is asked."""
    return _state().process_id or 0


def count() -> int:
    """How many processes the run has; no device is asked."""
    return _state().num_processes or 1


def gathered(name: str, value: str, timeout: float) -> dict[int, str]:
    """What each process says under `name`, a new one each time, once all have, or without those that have not within `timeout` seconds.

    All call it together. It needs no device, so that it also works before they do.
    """
    if not jax.distributed.is_initialized():
        return {0: value}
    client, deadline, said = _store(), time.monotonic() + timeout, {}
    client.key_value_set(f"mlm_jax/{name}/{number()}", value)
    for i in range(count()):
        left_ms = max(int(1000 * (deadline - time.monotonic())), 1)
        try:
            said[i] = client.blocking_key_value_get(f"mlm_jax/{name}/{i}", left_ms)
        except jax.errors.JaxRuntimeError as e:
            if "DEADLINE_EXCEEDED" not in str(e):
                raise
    return said


def _store() -> Any:
    """The keys and values that JAX keeps at process 0 for all."""
    return _state().client


def _state() -> Any:
    from jax._src import distributed  # no public name

    return distributed.global_state
