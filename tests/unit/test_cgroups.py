"""Limits of control groups: files as Linux has them, of both versions."""

from pathlib import Path

import pytest

from besa.system import cgroups, memory
from besa.system.cgroups import Limit

GB = 10**9


def write(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroups, "MOUNT", tmp_path / "cgroup")
    monkeypatch.setattr(cgroups, "OWN", tmp_path / "own")
    return tmp_path / "cgroup"


def test_the_least_limit_of_a_group_and_those_around_it_counts(mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cgroups.OWN.write_text("0::/slurm/job/step\n")
    stat = f"anon 5\ninactive_file {GB}\nactive_file 7"
    write(mount / "slurm" / "job" / "step", {"memory.max": "max", "memory.current": 2 * GB, "memory.stat": stat})
    write(mount / "slurm" / "job", {"memory.max": 3 * GB, "memory.current": 2 * GB, "memory.stat": stat})
    write(mount / "slurm", {"memory.max": 9 * GB, "memory.current": 8 * GB + GB // 2, "memory.stat": "inactive_file 0"})
    assert cgroups.limits() == [Limit(3 * GB, GB), Limit(9 * GB, 8 * GB + GB // 2)]
    monkeypatch.setattr(memory, "cgroups", cgroups)
    assert memory.total_bytes() == min(3 * GB, memory.total_bytes())
    assert memory.available_bytes() <= GB // 2  # those around have less room


def test_the_first_version_and_a_container_whose_group_is_the_mount(mount: Path) -> None:
    cgroups.OWN.write_text("12:cpuset:/\n5:cpu,memory:/docker/abc\n1:name=systemd:/x\n")
    files = {"memory.limit_in_bytes": 4 * GB, "memory.usage_in_bytes": 3 * GB, "memory.stat": "total_inactive_file 5"}
    write(mount / "memory", files)
    assert cgroups.limits() == [Limit(4 * GB, 3 * GB - 5)]
    write(mount / "memory", {"memory.limit_in_bytes": 9223372036854771712})  # its word for none
    assert cgroups.limits() == []


def test_where_there_is_none(mount: Path) -> None:
    assert cgroups.limits() == []
    cgroups.OWN.write_text("0::/\n")
    assert cgroups.limits() == []
