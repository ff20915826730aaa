"""`lightning-ulysses doctor`: on this machine, and on broken ones that files and functions stand for."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ulysses import UlyssesError
from lightning_ulysses.cli.main import main
from lightning_ulysses.diagnosis import Finding, exchange, kernels, machine, versions
from lightning_ulysses.testing.processes import ProcessPool

GIB = 2**30


def by_topic(found: list[Finding]) -> dict[str, Finding]:
    return {finding.topic: finding for finding in found}


def test_versions_are_those_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_topic(versions.versions())
    assert found["torch"].mend is None and torch.__version__.partition("+")[0] in found["torch"].found
    assert {"python", "lightning", "deepspeed"} <= set(found) and "ruff" not in found

    old = {"torch": "2.4.0", "deepspeed": "0.20.1"}
    version = metadata.version

    def pretended(name: str) -> str:
        if name == "lightning":
            raise metadata.PackageNotFoundError
        return old.get(name) or version(name)

    monkeypatch.setattr(metadata, "version", pretended)
    found = by_topic(versions.versions())
    assert found["torch"].mend == "pip install 'torch>=2.11'" and "2.4.0" in found["torch"].found
    assert "0.20.1" in found["deepspeed"].found and "<0.20" in (found["deepspeed"].mend or "")
    assert found["lightning"].found.startswith("not installed") and "pip install" in (found["lightning"].mend or "")


def limited(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    "files",
    [
        {
            "proc/self/cgroup": "0::/job\n",
            "sys/fs/cgroup/job/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/job/memory.current": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory.max": "max\n",
        },
        {
            "proc/self/cgroup": "4:memory:/job/step\n0::/\n",
            "sys/fs/cgroup/memory/job/step/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{8 * GIB}\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{2 * GIB}\n",
        },
        # A container that sees its own group at the top.
        {
            "proc/self/cgroup": "0::/docker/abc\n",
            "sys/fs/cgroup/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{2 * GIB}\n",
        },
    ],
    ids=["v2", "v1", "container"],
)
def test_memory_limits(tmp_path: Path, files: dict[str, str]) -> None:
    """A limit matters where less is left of it than the machine has."""
    limited(tmp_path, {**files, "proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {64 * 2**20} kB\n"})
    found = by_topic(machine.memory(tmp_path))
    assert found["host memory"].found == "64 GiB available"
    assert found["memory limit"].found == "8 GiB, of which 2 GiB are used"
    assert "raise the memory limit" in (found["memory limit"].mend or "")
    (tmp_path / "proc/meminfo").write_text(f"MemAvailable: {4 * 2**20} kB\n")
    assert by_topic(machine.memory(tmp_path))["memory limit"].mend is None


def test_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (65536, 65536))
    found = by_topic(machine.memory())["locked memory"]
    assert found.found == "64 KiB (ulimit -l)" and "ulimit -l unlimited" in (found.mend or "")
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (machine.resource.RLIM_INFINITY,) * 2)
    assert by_topic(machine.memory())["locked memory"].mend is None


def test_build_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that a killed build has left is named with the command that removes it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert [finding.mend for finding in machine.build_locks()] == [None]
    for name, age in (("deepspeed_shm_comm", 7200), ("cpu_adam", 60)):
        lock = tmp_path / "py3_cpu" / name / "lock"
        limited(tmp_path, {str(lock.relative_to(tmp_path)): ""})
        os.utime(lock, (time.time() - age,) * 2)
    fresh, stale = machine.build_locks()
    assert stale.mend == f"rm {tmp_path}/py3_cpu/deepspeed_shm_comm/lock"
    assert (fresh.mend or "").startswith("wait for the build")


def test_gpus_that_do_not_reach_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    stands_in: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 4,
        "get_device_name": lambda index: "H100",
        "can_device_access_peer": lambda a, b: {a, b} != {0, 3},
    }
    for name, function in stands_in.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    found = by_topic(machine.devices())
    assert found["devices"].found == "4 x H100" and found["links"].found.startswith("1 of 6 pairs")
    assert all(found[topic].mend for topic in ("links", "nccl", "nccl settings"))
    assert "unset NCCL_P2P_DISABLE" in (found["nccl settings"].mend or "")


def test_kernels() -> None:
    """Found by running them, on this rank's share of the heads."""
    cpu = torch.device("cpu")
    found = kernels.kernels(8, 2, 16, "float32", 4, cpu, seq_len=64)
    assert [finding.topic for finding in found] == ["kernel, causal", "kernel, window", "kernel, packed"]
    assert all("flash kernel for CPUs" in finding.found and finding.mend is None for finding in found)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert "math (" in kernels.kernels(8, 2, 16, "float32", 4, cpu, seq_len=64)[0].found
    with pytest.raises(UlyssesError, match="a floating point type of torch"):
        kernels.kernels(8, 2, 16, "int8", 4, cpu)
    assert "P=16" in kernels.kernels(8, 2, 16, "float32", 16, cpu, seq_len=64)[0].found
    with pytest.raises(UlyssesError, match="key/value heads that divide the heads"):
        kernels.kernels(8, 3, 16, "float32", 4, cpu)


def corrupt(rank: int, world_size: int, device_type: str) -> tuple[float, bool]:
    return 0.01, rank != 1


def stuck(rank: int, world_size: int, device_type: str) -> tuple[float, bool]:
    raise ConnectionError("nobody listens")


def test_an_exchange_that_is_broken(pool: ProcessPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_send", corrupt)
    assert "memory or a link is broken" in (exchange.exchange(pool, "cpu").mend or "")
    monkeypatch.setattr(exchange, "_send", stuck)
    found = exchange.exchange(pool, "cpu")
    assert found.found == "failed: ConnectionError: nobody listens" and found.mend


def test_a_step_that_is_wrong(pool: ProcessPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is another one."""
    assert exchange.parity(pool, "cpu").mend is None
    monkeypatch.setattr(exchange, "fit_single", lambda make, steps, count: wrong(make, steps, count))
    assert "do not train here" in (exchange.parity(pool, "cpu").mend or "")


def wrong(make: Any, steps: Any, count: Any) -> Any:
    from lightning_ulysses.testing import fit_single

    return fit_single(make, [[(tokens, targets.roll(1, dims=1)) for tokens, targets in step] for step in steps], count)


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In JSON and in lines; its status says whether something has to be mended."""
    arguments = ["doctor", "--no_run", "--heads", "4", "--kv_heads", "2", "--head_dim", "8", "--sp_size", "2"]
    monkeypatch.setattr(machine, "memory", lambda: [])
    status = 0
    try:
        main([*arguments, "--json"])
    except SystemExit as end:
        status = int(end.code or 0)
    told = json.loads(capsys.readouterr().out)
    assert told["ready"] == (status == 0) == all(finding["mend"] is None for finding in told["findings"])
    monkeypatch.setattr(
        "lightning_ulysses.diagnosis.examination.memory", lambda: [Finding("memory", "none", "buy some")]
    )
    with pytest.raises(SystemExit, match="1"):
        main(arguments)
    assert "MEND memory: none\n     -> buy some" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--dtype", "int8"])
