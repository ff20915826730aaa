"""Plans against measurements that others have published, on GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_ulysses.config import MemoryConfig
from lightning_ulysses.planning.costs import Machine
from lightning_ulysses.planning.lab import Scene
from lightning_ulysses.planning.models import find_model
from lightning_ulysses.planning.plan import Fixed, make_plan
from lightning_ulysses.planning.store import Measurements

QWEN3_4B: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
#: ALST's own parts: checkpoints on the host, tiled loss and MLP.
ALST = {"tiled_loss": True, "tiled_mlp": True, "checkpoint": "block", "offload": "cpu"}


def measured(config: dict[str, Any], folder: Path) -> Measurements:
    (folder / "config.json").write_text(json.dumps(config))
    return Measurements(find_model(str(folder)), None)


def test_qwen3_4b_on_four_gpus_as_hugging_face_measured(tmp_path):
    """35.0, 50.5 and 66.0 GiB for 32K, 64K and 96K tokens, with full logits."""
    lab = measured(QWEN3_4B, tmp_path)
    memory = MemoryConfig(checkpoint="block")
    here, there = (lab.rehearsal(Scene(length * 2**10, 4, memory)).on_device(36) for length in (64, 96))
    assert (there - here) / 2**30 == pytest.approx(15.5, rel=0.03)
    # 0.15 of the slope is one block's inputs beside the logits: the control of the bound above.
    without = lab.rehearsal(Scene(96 * 2**10, 4, MemoryConfig(checkpoint="block", tiled_loss=True))).on_device(36)
    assert without < there / 2


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("gpus", "parts", "longest"),
    [(8, ALST, 3.7e6), (1, ALST, 5e5)],
    ids=["ALST on 8", "ALST on 1"],
)
def test_the_longest_sequence_of_an_8b_model(gpus, parts, longest, tmp_path):
    machine = Machine(gpus, 8, 80 * 2**30, 1900 * 10**9)
    fixed = Fixed(gpus, 3, True, gpus == 1, parts)
    plan = make_plan(measured(LLAMA_8B, tmp_path), machine, 2**21 if gpus > 1 else 2**18, fixed)
    assert plan.best.longest_seq_len == pytest.approx(longest, rel=0.15)
