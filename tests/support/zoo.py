"""Tiny random models of many architectures, and what one step on split sequences does to each.

python tests/support/zoo.py    # writes docs/models.md
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from guests import GUESTS, Guest
from hybrids import HYBRIDS, STRONG, decay_slowly
from models import VOCAB, token_batch
from pairs import PAIRS
from sights import SIGHTS
from torch import Tensor
from torch.nn.functional import pad

from lightning_ulysses.geometry.distance import largest
from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool, RemoteError

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 1.0}
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
SEQ_LEN, BOUND = 33, 1e-5


@dataclass(frozen=True)
class Entry:
    """One architecture of transformers.

    Args:
        family: The prefix of its configuration class.
        head: The suffix of its model class.
        sizes: Settings of the configuration.
        exact: Whether it is; else it is refused.
        why: A part of the refusal; else what the row is about.
        config: Its configuration class, where it has another name.
        variant: What tells it from another row of the same class.
    """

    family: str
    head: str = "ForCausalLM"
    sizes: dict[str, Any] = field(default_factory=lambda: GROUPED)
    exact: bool = True
    why: str = ""
    config: str = ""
    variant: str = ""

    @property
    def kind(self) -> str:
        """The model class."""
        return self.family + self.head

    @property
    def name(self) -> str:
        """The row's."""
        return f"{self.kind} {self.variant}".strip()


ENTRIES = [
    Entry("Llama"),
    Entry("Qwen2"),
    Entry("Qwen3", sizes=HEADS),
    Entry("Mistral", sizes={**GROUPED, "sliding_window": 7}, why="sliding window"),
    Entry("Mixtral", sizes={**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, why="experts"),
    Entry(
        "Mixtral",
        sizes={**GROUPED, **BALANCED, "num_local_experts": 4, "num_experts_per_tok": 2},
        why="experts, auxiliary loss",
        variant="balanced",
    ),
    Entry("Qwen3Moe", sizes={**HEADS, **EXPERTS, "num_experts": 4}, why="experts"),
    Entry(
        "Qwen3Moe",
        sizes={**HEADS, **EXPERTS, **BALANCED, "num_experts": 4},
        why="experts, auxiliary loss",
        variant="balanced",
    ),
    Entry("Gemma", sizes=HEADS),
    Entry(
        "Gemma2",
        sizes={
            **HEADS,
            "sliding_window": 7,
            "attn_logit_softcapping": 0.5,
            "query_pre_attn_scalar": 1,
            "initializer_range": 0.2,
        },
        why="softcap, local and global layers",
    ),
    Entry("Gemma3", sizes={**HEADS, "sliding_window": 7}, why="local and global layers", config="Gemma3TextConfig"),
    Entry("Phi", sizes=SIZES),
    Entry("Phi3"),
    Entry("Olmo2"),
    Entry("GPT2", "LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    Entry("GPTNeoX", sizes=SIZES),
    Entry("GptOss", sizes={**HEADS, **EXPERTS, "num_local_experts": 4, "sliding_window": 7}, why="sinks, experts"),
    Entry(
        "Llama4",
        sizes={**HEADS, **EXPERTS, "num_local_experts": 2, "attention_chunk_size": 12, "intermediate_size_mlp": 48},
        why="chunked attention, experts",
        config="Llama4TextConfig",
    ),
    Entry("Falcon", sizes={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    Entry("Starcoder2"),
    Entry("Cohere"),
    Entry("Granite"),
    Entry(
        "DeepseekV3",
        sizes={
            **SIZES,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
            **EXPERTS,
        },
        why="latent attention, experts",
    ),
    Entry("SmolLM3"),
    Entry("StableLm"),
    Entry("Glm", sizes=HEADS),
    Entry("Bert", "ForMaskedLM", SIZES),
    Entry("Roberta", "ForMaskedLM", SIZES, why="positions counted from the padding"),
    Entry(
        "ModernBert",
        "ForMaskedLM",
        {**SIZES, "local_attention": 8},
        why="windows on both sides, and global layers",
    ),
    Entry("Esm", "ForMaskedLM", {**SIZES, "position_embedding_type": "rotary"}),
    Entry("Electra", "ForMaskedLM", {**SIZES, "embedding_size": 32}),
    *(Entry(**{**given, "sizes": {**given["sizes"], **STRONG}}) for given in HYBRIDS),
]
ZOO = {entry.name: entry for entry in ENTRIES}


class Specimen(L.LightningModule):
    """A user's module around a transformers model."""

    def __init__(self, name: str) -> None:
        super().__init__()
        import transformers

        torch.manual_seed(0)
        entry = ZOO[name]
        kind = entry.config or f"{entry.family}Config"
        if not hasattr(transformers, kind):
            pytest.skip(f"transformers {transformers.__version__} without {kind}")
        config = getattr(transformers, kind)(vocab_size=VOCAB, pad_token_id=0, **entry.sizes)
        for key in [k for k, v in vars(config).items() if isinstance(v, float) and ("dropout" in k or "pdrop" in k)]:
            setattr(config, key, 0.0)
        kind = getattr(transformers, entry.kind)
        config._attn_implementation = "sdpa" if kind._supports_sdpa else "eager"
        self.model = kind(config)
        decay_slowly(self.model)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def targets_of(name: str, batch: dict[str, Tensor]) -> float:
    """Targets of a batch; causal models shift the labels."""
    labels = batch["labels"] if "Masked" in name else batch["labels"][:, 1:]
    return float((labels != -100).sum())


def compared(
    pool: ProcessPool,
    make: Callable[[], L.LightningModule],
    batches: list[Any],
    count: Callable[[Any], float],
    strategy: dict[str, Any],
) -> tuple[str, str]:
    """One step on two ranks against one process.

    Returns:
        ``"exact"``, ``"wrong"`` with the difference, or ``"refused"`` with the message.
    """
    run = SplitRun(strategy=strategy, trainer={"accumulate_grad_batches": 2})
    try:
        results = fit_split(pool, make, batches, run)
    except RemoteError as error:
        return "refused", str(error.cause or error)
    reference = fit_single(make, [[shifted(batch) for batch in batches]], count)
    if not reference.step().norm() > 1e-4:
        return "wrong", "the reference has not moved"
    error = largest(compare(result, reference).largest for result in results)
    return ("exact" if error <= BOUND else "wrong"), f"{error:.1e}"


def shifted(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the strategy adds to a batch of text."""
    if "input_ids" not in batch:
        return batch
    if batch["labels"].shape != batch["input_ids"].shape:
        return batch
    return {**batch, "shift_labels": pad(batch["labels"][:, 1:], (0, 1), value=-100)}


def run_one(pool: ProcessPool, name: str) -> tuple[str, str]:
    """`compared` for a model of transformers."""
    batches = [token_batch(seed, SEQ_LEN, 2, "uneven") for seed in range(2)]
    return compared(pool, partial(Specimen, name), batches, partial(targets_of, name), {})


def run_guest(pool: ProcessPool, guest: Guest) -> tuple[str, str]:
    """`compared` for another model."""
    return compared(pool, guest.make, guest.batches, guest.count, {"plan": guest.plan})


def table() -> str:
    """The text of docs/models.md."""
    head = (
        "# Models\n\n"
        "Tiny random models, one optimizer step on two processes against one, in float32: uneven labels, two rows,\n"
        "two micro-batches. Exact means a relative difference of the step, the loss and the gradient norm of at most\n"
        "1e-5. `tests/parity/test_zoo.py` runs every row; `python tests/support/zoo.py` writes this file.\n\n"
        "## transformers\n\n"
        "| Model | Result | |\n| --- | --- | --- |\n"
    )
    rows = (f"| {entry.name} | {'exact' if entry.exact else 'refused'} | {entry.why} |\n" for entry in ENTRIES)
    other = (
        "\n## Others\n\n"
        "Split inside by a plan, where there is one. LitGPT and timm do not install beside the packages of the tests:\n"
        "models with the same names, inputs and order of submodules stand for them. LitGPT 0.5.13 and timm 1.0.31\n"
        "were run by hand with these plans, and were exact.\n\n"
        "| Model | `plan` | Result | |\n| --- | --- | --- | --- |\n"
    )
    guests = (
        f"| {guest.name} | {f'`{json.dumps(guest.plan)}`' if guest.plan else ''} "
        f"| {'exact' if guest.exact else 'refused'} | {guest.why} |\n"
        for guest in GUESTS
    )
    two = (
        "\n## Encoders and decoders\n\n"
        "A text with padding, and labels of another length. Both are split inside the model, without a plan.\n\n"
        "| Model | Result | |\n| --- | --- | --- |\n"
    )
    seeing = (
        "\n## Images with text\n\n"
        "An image in each row. The tower sees all of them on every rank, and the language model is split inside.\n\n"
        "| Model | Result | |\n| --- | --- | --- |\n"
    )
    pairs, sights = (
        "".join(f"| {each.name} | {'exact' if each.exact else 'refused'} | {each.why} |\n" for each in found)
        for found in (PAIRS, SIGHTS)
    )
    return head + "".join(rows) + two + pairs + seeing + sights + other + "".join(guests)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(table())
