"""Plans: what fits, what is the limit, and that their YAML is a config."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import Strategy

from lightning_ulysses import UlyssesError
from lightning_ulysses.attention.packed import has_varlen
from lightning_ulysses.cli.main import main
from lightning_ulysses.cli.plan import length, size
from lightning_ulysses.config import MemoryConfig
from lightning_ulysses.planning import groups
from lightning_ulysses.planning import plan as planning
from lightning_ulysses.planning.costs import Groups, Machine, gathered_volume, passes, ulysses_volume
from lightning_ulysses.planning.groups import gathering
from lightning_ulysses.planning.lab import Scene
from lightning_ulysses.planning.models import find_model
from lightning_ulysses.planning.plan import Fixed, make_plan, sizes
from lightning_ulysses.planning.render import numbers, text_of
from lightning_ulysses.planning.store import Measurements
from lightning_ulysses.planning.zero import Sharding, state_bytes

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}
MACHINE = Machine(4, 4, gpu_memory=2 * 2**30, host_memory=8 * 2**30, reserve=2**28)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def measurements(folder) -> Measurements:
    # One model for all tests of this file: what is measured once is known.
    return Measurements(find_model(str(folder)), None)


@pytest.fixture(scope="module", autouse=True)
def few_parts() -> Any:
    """Some steps of the ladder, to rehearse less."""
    with mock.patch.object(planning, "LADDER", planning.LADDER[::3]):
        yield


@pytest.fixture(scope="module")
def fitting(measurements, few_parts) -> Any:
    return make_plan(measurements, MACHINE, 16384)


def test_facts_are_those_of_the_whole_model(measurements):
    hidden, inner, vocab = 256, 512, 4096
    block = hidden * (2 * hidden + 2 * 64) + 3 * hidden * inner + 2 * hidden
    assert measurements.facts.numel == 12 * block + 2 * vocab * hidden + hidden
    assert (measurements.facts.blocks, measurements.facts.heads, measurements.facts.kv_heads) == (12, 8, 2)


def test_experts_that_run_as_one_product_are_planned(tmp_path):
    sizes = {"model_type": "qwen3_moe", "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2}
    values = CONFIG | sizes | {"architectures": ["Qwen3MoeForCausalLM"], "moe_intermediate_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(values))
    experts = Measurements(find_model(str(tmp_path)), None)
    facts = experts.facts
    # Of each block's 8 experts, a token passes 2.
    assert facts.per_token == 2 * (facts.numel - 12 * 6 * 3 * 256 * 128)
    assert experts.rehearsal(Scene(4096, 2, MemoryConfig(checkpoint="block", tiled_loss=True))).peak > 0


def test_what_fits_is_below_its_limits_and_what_is_longest_at_them(measurements, fitting):
    best = fitting.best
    assert best.limit is None
    assert best.peak_gpu_bytes <= MACHINE.gpu_memory
    assert best.peak_host_bytes <= MACHINE.host_memory
    states = best.sharding
    fixed = Fixed(best.sp_size, states.stage, states.offload_optimizer, states.offload_parameters, best.parts)
    for factor, fits in ((0.95, True), (1.05, False)):
        plan = make_plan(measurements, MACHINE, int(best.longest_seq_len * factor), fixed)
        assert (plan.best.limit is None) == fits


def test_more_memory_is_never_slower(measurements, fitting):
    larger = make_plan(measurements, Machine(4, 4, 4 * MACHINE.gpu_memory, reserve=MACHINE.reserve), 16384)
    assert larger.best.tokens_per_second >= fitting.best.tokens_per_second


def test_an_impossible_machine_says_which_limit_comes_first(measurements):
    for machine, name in (
        (Machine(4, 4, gpu_memory=2**28, host_memory=2**34, reserve=2**27), "GPU"),
        (Machine(4, 4, gpu_memory=2**29, host_memory=2**24, reserve=2**27), "host"),
    ):
        parts = {"checkpoint": "block", "offload": "cpu", "tiled_loss": True, "tiled_mlp": True}
        plan = make_plan(measurements, machine, 2**17, Fixed(memory=parts))
        limit = plan.best.limit
        assert limit is not None and limit.needed > limit.available
        assert not numbers(plan)["fits"]
        assert f"{limit.name} memory is the first limit" in text_of(plan)
        if name == "GPU":
            assert limit.name == name


def test_sizes_that_do_not_divide_the_gpus_are_refused(measurements):
    with pytest.raises(UlyssesError, match=r"sp_size to one of \[1, 2, 4\]"):
        make_plan(measurements, MACHINE, 4096, Fixed(sp_size=3))


def test_groups_stay_inside_a_machine(measurements):
    facts = measurements.facts
    assert sizes(Machine(4, 4), facts, 4096, Fixed()) == ([1, 2, 4], [])
    assert sizes(Machine(16, 4), facts, 4096, Fixed()) == ([1, 2, 4], [8])
    assert sizes(Machine(16, 4), facts, 4096, Fixed(sp_size=8)) == ([8], [])


def test_no_mask_of_all_pairs_is_built_on_one_rank(measurements):
    found = measurements.rehearsal(Scene(2**15, 1, MemoryConfig(checkpoint="block", tiled_loss=True)))
    assert found.peak < 2**30


@pytest.mark.nightly
def test_a_guess_by_proportion_is_near_a_rehearsal(measurements):
    memory = MemoryConfig(checkpoint="block", tiled_loss=True, tiled_mlp=True, tiled_norm=True)
    at, twice, smaller = (
        measurements.rehearsal(scene).on_device(12)
        for scene in (Scene(2**17, 4, memory), Scene(2**18, 4, memory), Scene(2**17, 2, memory))
    )
    assert twice == pytest.approx(smaller, rel=0.15)
    assert at < smaller


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_states_of_zero(stage):
    numel, world = 10**9, 8
    states = state_bytes(numel, 10**8, Sharding(stage, world))
    whole = {1: 4, 2: 2, 3: 0}[stage] * numel
    shards = {1: 12, 2: 14, 3: 16}[stage] * numel / world
    rest = states.device["buckets"] + states.device.get("gathered parameters", 0)
    assert sum(states.device.values()) - rest == whole + shards
    on_host = state_bytes(numel, 10**8, Sharding(stage, world, offload_optimizer=True))
    assert sum(on_host.host.values()) == 16 * numel / world
    assert "optimizer" not in on_host.device


def test_what_is_sent_and_computed(measurements):
    facts, share = measurements.facts, 1000
    # (q + k + v + out) of a rank's tokens, of which 3 of 4 go to other ranks; 4 ranks need 4 copies of 2 heads.
    once = 12 * (2 * 8 + 2 * 4) * 32 * share * 2 * 3 / 4
    for parts, times in (({}, 2), ({"checkpoint": "block"}, 3), ({"head_chunks": 2}, 3)):
        assert ulysses_volume(facts, 4 * share, 4, MemoryConfig(**parts)) == times * once
    # Two ranks and few key/value heads: gathering them sends less.
    assert gathered_volume(facts, 2 * share, 2, MemoryConfig()) < ulysses_volume(facts, 2 * share, 2, MemoryConfig())
    assert passes(MemoryConfig(checkpoint="block")) == (4, 4.5)
    assert passes(MemoryConfig(checkpoint="block+attention")) == (4, 3.5)


@pytest.mark.parametrize(
    ("text", "bytes_"), [("80GiB", 80 * 2**30), ("1TB", 10**12), ("512", 512), ("1.5 MiB", 3 * 2**19)]
)
def test_sizes_are_read(text, bytes_):
    assert size(text) == bytes_


def test_lengths_are_read():
    assert (length("1M"), length("128k"), length("1000")) == (2**20, 2**17, 1000)


def test_the_yaml_is_a_config(fitting):
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Strategy, "strategy")
    for choice in numbers(fitting)["choices"]:
        trainer = yaml.safe_load(choice["yaml"])["trainer"]
        given = parser.parse_object({"strategy": trainer["strategy"]}).strategy.init_args
        assert (given.sp_size, given.stage) == (choice["sp_size"], choice["stage"])
        assert MemoryConfig(**trainer["strategy"]["init_args"].get("memory", {}))
        assert trainer["devices"] * trainer["num_nodes"] == MACHINE.gpus


@pytest.fixture
def command(folder, tmp_path, monkeypatch) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return [
        "plan", "--model", str(folder), "--gpus", "2", "--gpus_per_node", "2", "--gpu_memory", "4GiB",
        "--reserve", "256MiB", "--seq_len", "16K",
    ]  # fmt: skip


def test_the_command_answers_at_once_when_asked_again(command, tmp_path, capsys):
    config = tmp_path / "my.yaml"
    settings = {"sp_size": 2, "stage": 2, "offload_optimizer": False, "offload_parameters": False}
    settings["memory"] = {"checkpoint": "block", "tiled_loss": True}
    config.write_text(yaml.safe_dump({"trainer": {"strategy": {"init_args": settings}}}))
    answers = []
    for _ in range(2):
        begin = time.perf_counter()
        assert main([*command, "--config", str(config), "--json", "--html", str(tmp_path / "a.html")]) == 0
        answers.append((json.loads(capsys.readouterr().out), time.perf_counter() - begin))
    (first, _), (second, seconds) = answers
    assert first == second and seconds < 1.5
    names = {"fits", "peak_gpu_bytes", "peak_host_bytes", "longest_seq_len", "tokens_per_second", "parts", "yaml"}
    assert names | {"choices"} <= first.keys()
    assert first["parts"] == settings["memory"] and first["fits"] is True
    assert "<svg" in (tmp_path / "a.html").read_text()


def test_bad_models_are_refused(command, tmp_path, capsys):
    for given in (str(tmp_path / "none"), "no.module:Here", str(Path(__file__))):
        with pytest.raises(SystemExit) as ended:
            main([*command[:2], given, *command[3:]])
        assert ended.value.code == 2
        assert "--model" in capsys.readouterr().err or given.endswith(".py")


def test_a_module_of_the_users_own_is_planned(tmp_path, monkeypatch):
    (tmp_path / "mine_to_plan.py").write_text(
        "from models import HandWritten\n\n\nclass Mine(HandWritten):\n"
        "    def __init__(self):\n        super().__init__(heads=4, loss='cross_entropy')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    plan = make_plan(Measurements(find_model("mine_to_plan:Mine"), None), MACHINE, 256, Fixed(memory={}))
    assert plan.facts.blocks == 2
    assert plan.facts.numel > 0 and plan.best.limit is None
    sys.modules.pop("mine_to_plan", None)


def test_more_ranks_than_heads_gather_keys_and_machines_may(measurements):
    facts = measurements.facts
    assert gathering(Machine(8, 8), facts, 4096, Fixed()) == []
    # Beyond a machine, heads are exchanged inside of it.
    assert gathering(Machine(64, 4), facts, 4096, Fixed()) == [Groups(4, count) for count in (2, 4, 8, 16)]
    assert gathering(Machine(16, 16), facts, 4096, Fixed()) == [Groups(8, 2)]
    assert gathering(Machine(64, 4), facts, 4096, Fixed(sp_size={"ulysses": 2, "gather": 16})) == [Groups(2, 16)]
    with pytest.raises(UlyssesError, match="a divisor of the GPUs"):
        gathering(Machine(8, 8), facts, 4096, Fixed(sp_size={"ulysses": 3, "gather": 2}))
    assert sizes(Machine(64, 4), facts, 4096, Fixed(sp_size=16)) == ([], [])


@pytest.mark.parametrize("asked", [16, {"ulysses": 8, "gather": 2}])
def test_gathered_keys_are_not_counted_in_blocks(measurements, monkeypatch, asked):
    monkeypatch.setattr(groups, "has_varlen", lambda: False)
    parts = {"checkpoint": "block", "tiled_loss": True}
    with pytest.raises(UlyssesError, match="a torch whose varlen_attn takes window_size"):
        make_plan(measurements, Machine(16, 16), 4096, Fixed(sp_size=asked, stage=2, memory=parts))
    # Nobody asked for them: others are planned.
    plan = make_plan(measurements, Machine(16, 16), 4096, Fixed(stage=2, memory=parts))
    assert plan.choices and all(choice.gather == 1 for choice in plan.choices)


@pytest.mark.skipif(not has_varlen(), reason="this torch computes such attention in blocks, which no plan counts")
def test_a_plan_for_more_ranks_than_heads_says_so_in_its_yaml(measurements):
    parts = {"checkpoint": "block", "tiled_loss": True}
    plan = make_plan(measurements, Machine(16, 16), 2**16, Fixed(sp_size=16, stage=2, memory=parts))
    assert [(choice.sp_size, choice.gather) for choice in plan.choices] == [(16, 2)]
    strategy = yaml.safe_load(numbers(plan)["yaml"])["trainer"]["strategy"]
    assert strategy["init_args"]["sp_size"] == {"ulysses": 8, "gather": 2}
    assert "gather 2" in text_of(plan)
