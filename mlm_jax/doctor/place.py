"""The place that a run would be written into: the disk, the folder, also one that several processes share, or the bucket, and clocks."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

from mlm_jax import lock, storage
from mlm_jax.doctor.findings import FAILED, OK, WARNING, Finding, Wanted

DISK_BYTES, CHECKPOINT_BYTES = 10 << 30, 3 << 29  # the second: a checkpoint of GPT-2 124M
FREE_INODES = 10_000
SKEW_S, SKEW_FAILS_S = 5.0, 60.0  # what clocks may differ by


def disk(folder: Path) -> Finding:
    """There is room where `folder` is, or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))  # False also where one may not look
    stat = os.statvfs(there)
    free = stat.f_bavail * stat.f_frsize
    saw, remedy = f"{free / 2**30:.1f} GiB free in {there}", "Free some space there, or name another disk with --out"
    if free < CHECKPOINT_BYTES:
        return Finding("disk", FAILED, f"{saw}, less than a checkpoint of GPT-2 124M takes, {CHECKPOINT_BYTES / 2**30:g}", remedy)
    if stat.f_files and stat.f_favail < FREE_INODES:  # some file systems do not count them
        return Finding("disk", FAILED, f"room for {stat.f_favail} files in {there}, fewer than {FREE_INODES}", f"Remove many small files. {remedy}")
    if free < DISK_BYTES:
        return Finding("disk", WARNING, f"{saw}, less than {DISK_BYTES >> 30}", remedy)
    return Finding("disk", OK, saw)


def out(wanted: Wanted) -> Iterator[Finding]:
    """What a run would be written into can be written and read; a folder that several processes share is looked at when they are together."""
    place = storage.place(wanted.out)
    if not isinstance(place, Path):
        try:
            ahead = storage.check_writable(place)
        except storage.NotReached as e:
            yield Finding("out", FAILED, str(e), "See to the network, and to the credentials of this machine; then look again")
            return
        yield Finding("out", OK, f"{place} was written, read and removed")
        yield skew("bucket clock", ahead, "the bucket's")
    elif not wanted.several:
        try:
            with lock.hold(place):
                yield written(place, f".doctor_{secrets.token_hex(4)}")
        except OSError as e:
            yield _unwritten(place, e)


def written(folder: Path, name: str) -> Finding:
    """Writes a small file into `folder`, reads it back and takes it away."""
    try:
        storage.write_text(folder / name, name)
        same = storage.read_text(folder / name) == name
        (folder / name).unlink()
    except OSError as e:
        return _unwritten(folder, e)
    if not same:
        return Finding("out", FAILED, f"{folder} gives back other bytes than were written", "Name a directory on another disk with --out")
    return Finding("out", OK, f"{folder} was written to and read")


def _unwritten(folder: Path, error: OSError) -> Finding:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = f"Free some space in {folder}" if full else "Name a directory that can be written to with --out"
    return Finding("out", FAILED, f"{folder} cannot be written to ({error.strerror})", remedy)


def shared_folder(folder: Path, hosts: Mapping[int, str], timeout: float) -> Finding:
    """Every process can write into `folder`, and sees there what the others wrote."""
    from mlm_jax import distributed

    names = distributed.gathered("doctor_names", f".doctor_{secrets.token_hex(4)}", timeout)
    mine = folder / names[distributed.number()]
    found = written(folder, f"{mine.name}_alone")
    if found.state == OK:
        try:
            storage.write_text(mine, "")
        except OSError as e:  # since then: the others wait for what this one says
            found = _unwritten(folder, e)
    wrote = distributed.gathered("doctor_wrote", found.state, timeout)
    unseen = [i for i in hosts if wrote.get(i) == OK and i in names and not (folder / names[i]).exists()]
    distributed.gathered("doctor_seen", "", timeout)
    mine.unlink(missing_ok=True)
    distributed.gathered("doctor_removed", "", timeout)
    with contextlib.suppress(OSError):  # there is something in it
        folder.rmdir()
    if found.state == OK and unseen:
        who = ", ".join(f"process {i} ({hosts[i]})" for i in unseen)
        remedy = "Name a folder that all of them see with --out, such as a network file system, or gs://BUCKET/FOLDER"
        found = Finding("out", FAILED, f"{folder.absolute()} is not the same folder in all processes: files of {who} are not seen here", remedy)
    return found


def skew(check: str, ahead: float, whose: str, than: str = "this machine's") -> Finding:
    """What to say of a clock, `whose`, that is `ahead` seconds of another."""
    saw = f"{whose} is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} {than}"
    if abs(ahead) <= SKEW_S:
        return Finding(check, OK, saw)
    state = FAILED if abs(ahead) > SKEW_FAILS_S else WARNING
    return Finding(check, state, f"{saw}; sign-in to a bucket fails where they differ by minutes", "sudo timedatectl set-ntp true, where it is wrong")
