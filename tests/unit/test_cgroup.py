"""A container's limits are found from its own group up to the root, under both of the kernel's hierarchies."""

import pytest

from octavo import cgroup
from octavo.config import EngineConfig

MIB = 1 << 20


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Writes the files of a machine's groups: what /proc/self/cgroup says, then file by file."""

    def write(own: str, **texts: str) -> None:
        (tmp_path / "own").write_text(own)
        for name, text in texts.items():
            path = tmp_path / "mount" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    monkeypatch.setattr(cgroup, "OWN", tmp_path / "own")
    monkeypatch.setattr(cgroup, "MOUNT", tmp_path / "mount")
    return write


def files(folder: str, **named: str) -> dict[str, str]:
    return {f"{folder}/{name}".strip("/"): text for name, text in named.items()}


def test_the_strictest_group_of_version_2_counts(groups) -> None:
    unit = {
        "memory.max": f"{900 * MIB}\n",
        "memory.current": f"{500 * MIB}\n",
        "memory.stat": f"anon 1\nactive_file {MIB}\n",
    }
    above = {"memory.max": f"{600 * MIB}\n", "memory.current": f"{550 * MIB}\n", "cpu.max": "250000 100000\n"}
    groups(
        "0::/system.slice/octavo.service\n",
        **files("system.slice/octavo.service", **unit, **{"cpu.max": "max 100000\n"}),
        **files("system.slice", **above),
    )
    assert cgroup.memory_left() == 50 * MIB
    assert cgroup.whole_cpus() == 2


def test_a_container_of_version_1_sees_its_limits_at_the_root_that_it_is_given(groups) -> None:
    memory = {"memory.limit_in_bytes": str(100 * MIB), "memory.usage_in_bytes": str(90 * MIB)}
    memory["memory.stat"] = f"inactive_file {5 * MIB}\n"
    cpu = {"cpu.cfs_quota_us": "50000\n", "cpu.cfs_period_us": "100000\n"}
    groups(
        "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n", **files("memory", **memory), **files("cpu", **cpu)
    )
    assert cgroup.memory_left() == 15 * MIB
    assert cgroup.whole_cpus() == 1, "half a CPU still needs a thread"


def test_no_limit_and_no_groups(groups) -> None:
    groups("0::/\n", **files("cpu", **{"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}))
    assert cgroup.memory_left() is None
    assert cgroup.whole_cpus() is None
    groups("")
    assert cgroup.whole_cpus() is None


def test_threads_follow_the_quota_unless_they_are_given(groups) -> None:
    groups("0::/\n", **files("", **{"cpu.max": "100000 100000"}))
    assert EngineConfig(model="m").threads() == 1
    assert EngineConfig(model="m", num_threads=7).threads() == 7
