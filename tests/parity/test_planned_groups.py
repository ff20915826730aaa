"""A plan for more ranks than heads is what the strategy does: its YAML trains exactly, and sends as many bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
import yaml
from exact import BOUND
from models import count_targets, llama, token_batch

from lightning_ulysses.config import MemoryConfig
from lightning_ulysses.exchange.gather import name_of_gather
from lightning_ulysses.planning.costs import Groups, Machine, sent
from lightning_ulysses.planning.groups import Fixed
from lightning_ulysses.planning.models import find_model
from lightning_ulysses.planning.plan import make_plan
from lightning_ulysses.planning.render import numbers
from lightning_ulysses.planning.store import Measurements
from lightning_ulysses.testing import SplitRun, compare, fit_rank, fit_single
from lightning_ulysses.testing.processes import ProcessPool

HEADS, KV_HEADS, S = 2, 1, 64


def measured(folder: Path) -> Measurements:
    config = llama(heads=HEADS, kv_heads=KV_HEADS)().model.config
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}))
    return Measurements(find_model(str(folder)), None)


def fit_counted(rank: int, make: Any, batches: list[Any], run: SplitRun) -> Any:
    """`fit_rank`, and the bytes of tensors (..., D) that this rank sent to others in exchanges of attention."""
    sent_bytes, all_to_all, gather = [0], dist.all_to_all_single, getattr(dist, name_of_gather())

    def counted(recv: Any, send: Any, recv_sizes: Any = None, send_sizes: Any = None, *args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        if send_sizes is not None and send.is_floating_point():
            others = sum(send_sizes) - send_sizes[dist.get_rank(group)]
            sent_bytes[0] += others * send.element_size()
        return all_to_all(recv, send, recv_sizes, send_sizes, *args, **kwargs)

    def gathered(recv: Any, send: Any, *args: Any, **kwargs: Any) -> Any:
        if send.is_floating_point() and dist.get_world_size(kwargs.get("group")) < 4:
            sent_bytes[0] += (dist.get_world_size(kwargs.get("group")) - 1) * send.nbytes
        return gather(recv, send, *args, **kwargs)

    with (
        mock.patch.object(dist, "all_to_all_single", counted),
        mock.patch.object(dist, name_of_gather(), gathered),
    ):
        result = fit_rank(rank, make, batches, run)
    return result, sent_bytes[0]


@pytest.mark.parametrize("parts", [{}, {"checkpoint": "block+attention"}], ids=["plain", "block+attention"])
def test_the_yaml_trains_and_sends_what_was_planned(pool: ProcessPool, tmp_path: Path, parts: dict[str, Any]) -> None:
    measurements = measured(tmp_path)
    machine = Machine(4, 4, gpu_memory=2**32, host_memory=2**34, reserve=2**20)
    plan = make_plan(measurements, machine, S, Fixed(sp_size=4, stage=2, memory=parts))
    given = yaml.safe_load(numbers(plan)["yaml"])["trainer"]["strategy"]["init_args"]
    assert given["sp_size"] == {"ulysses": 2, "gather": 2}
    make, batches = llama(heads=HEADS, kv_heads=KV_HEADS), [token_batch(1, S, 1, "uneven")]
    # What a step sends without its trial.
    run = SplitRun(4, 4, {**given, "check_model": False, "split": "batch"})
    results = pool.run(fit_counted, make, batches, run, world_size=4)
    wanted = fit_single(make, [batches], count_targets)
    assert all(compare(result, wanted).largest <= BOUND for result, _ in results)
    once = sum(sent(measurements.facts, S, Groups(2, 2), MemoryConfig(**parts), size=4))
    assert sum(count for _, count in results) / 4 == pytest.approx(once, rel=0.02)
