"""What a container or a service leaves to this process: GPUs, and, by its control groups, memory and processors.

The files are those of the kernel's cgroup-v2.rst and, where that hierarchy is mounted instead, of cgroup-v1/.
"""

import os
from collections.abc import Iterator
from pathlib import Path

OWN, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def memory_left() -> int | None:
    """Fewest bytes that a group of this process leaves; page cache counts as free. None: no group has a limit."""
    left = []
    for folder in _folders("memory"):
        limit = _number(folder, "memory.max") or _number(folder, "memory.limit_in_bytes")
        taken = _number(folder, "memory.current") or _number(folder, "memory.usage_in_bytes")
        if limit is not None and taken is not None:
            stats = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
            left.append(limit - taken + sum(int(stats.get(name, 0)) for name in ("inactive_file", "active_file")))
    return min(left, default=None)


def hides_gpus() -> bool:
    """Whether CUDA_VISIBLE_DEVICES leaves no GPU: it is empty or begins with -1 (CUDA programming guide)."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return shown in ("", "-1")


def whole_cpus() -> int | None:
    """CPUs that the strictest quota pays for, rounded down, at least 1: a thread too many stalls all at a barrier.

    None: no group has a quota.
    """
    quotas = []
    for folder in _folders("cpu"):
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        if not period:
            quota, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        if quota.isdigit() and period:  # not "max", not -1
            quotas.append(max(int(quota) // int(period), 1))
    return min(quotas, default=None)


def _folders(controller: str) -> Iterator[Path]:
    """This process's groups under both hierarchies, from its own up to the root that is mounted here."""
    for line in _read(OWN).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = MOUNT / controller if controllers else MOUNT
        own = root / path.strip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))


def _number(folder: Path, name: str) -> int | None:
    text = _read(folder / name).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    """The file's text; "" where a group is not seen from here, or the kernel has no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""
