"""The memory that a container or a batch system lets this process have: limits of Linux control groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOUNT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
UNLIMITED = 1 << 60  # version 1 writes a number near 2⁶³ where there is no limit


@dataclass(frozen=True)
class Limit:
    """Memory limit of one control group.

    Attributes:
        most: bytes that its processes may have together.
        used: bytes that they have, without what the system can drop: pages of files that nobody used lately.
    """

    most: int
    used: int


def limits() -> list[Limit]:
    """Limits of this process's group and of all groups around it; none where there are no control groups."""
    return [limit for folder, names in _groups() if (limit := _limit(folder, *names)) is not None]


def _groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The folders of the groups, each with the names of limit, use and droppable pages.

    Inside a container, the folder of its own group is the mount itself, whatever the path says.
    """
    try:
        lines = OWN.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        inner = Path(path.lstrip("/"))
        if number == "0":
            mount, names = MOUNT, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount, names = MOUNT / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for part in (inner, *inner.parents):
            yield mount / part, names


def _limit(folder: Path, most: str, used: str, droppable: str) -> Limit | None:
    """The limit of a control group's folder; None if it has none."""
    try:
        limit, use = ((folder / name).read_text(encoding="ascii").strip() for name in (most, used))
        if not limit.isdigit() or int(limit) >= UNLIMITED:
            return None
        pairs = (line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return Limit(int(limit), max(0, int(use) - int(dict(pairs).get(droppable, 0))))
    except (OSError, ValueError):
        return None
