"""What has to be true after the snippets of the documents; each check runs on every rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import LlamaModule, count_targets, hand_written, llama, pair_batch
from snippet_names import WHOLE, Names, given_heads
from torch import Tensor

from lightning_ulysses import UlyssesDeepSpeedStrategy
from lightning_ulysses.attention.route import AttentionTally
from lightning_ulysses.batch.whole import read_batch
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.exchange.mesh import MeshSizes, SequenceMesh
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.geometry.split_plan import SHIPPED
from lightning_ulysses.testing import (
    QUIET,
    SplitRun,
    StepResult,
    compare,
    fit_rank,
    fit_single,
    split_loader,
    split_trainer,
)


def trained(names: Names, reference: StepResult) -> None:
    after = {name: parameter.detach().cpu() for name, parameter in names["module"].named_parameters()}
    found = StepResult(reference.losses, reference.grad_norms, reference.before, after)
    assert compare(found, reference).step <= 1e-5


def in_order(names: Names, batches: Sequence[Any]) -> list[Any]:
    """Whole batches as the run took them."""
    return [[batches[index]] for index in names["trainer"].train_dataloader.sampler]


def nothing(names: Names) -> None:
    """For snippets that say by themselves what has to be true."""


def check_default(names: Names) -> None:
    assert names["trainer"].strategy.mesh.sp_size == 2 and names["trainer"].global_step == 4
    trained(names, fit_single(llama(lr=0.1), in_order(names, WHOLE), count_targets))


def check_fabric(names: Names) -> None:
    """The steps of one process on the rows that the loader dealt, two of them in each."""
    model = names["model"].module
    after = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    names["fabric"].strategy.close()
    alone = type(model)(positions="own")
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    rows = list(names["loader"])
    for step in range(2):
        for row in rows[2 * step : 2 * step + 2]:
            (F.cross_entropy(alone(row[:, :-1]).flatten(0, 1), row[:, 1:].flatten()) / 2).backward()
        torch.nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in alone.named_parameters():
        assert float((after[name] - parameter).norm() / parameter.norm()) <= 1e-5, name


def check_plan(names: Names) -> None:
    assert names["trainer"].global_step == 4
    whole = [{**batch, "shift_labels": F.pad(batch["labels"][:, 1:], (0, 1), value=-100)} for batch in WHOLE]
    trained(names, fit_single(hand_written(lr=0.1), in_order(names, whole), count_targets))
    assert {"litgpt", "litgpt_unjoined", "diffusers"} == set(SHIPPED)


def check_two_lines(names: Names) -> None:
    strategy = names["trainer"].strategy
    assert isinstance(strategy, UlyssesDeepSpeedStrategy) and strategy.mesh.sp_size == 2
    assert names["trainer"].global_step == 1
    trained(names, fit_single(llama(lr=0.1), [WHOLE], count_targets, clip=1.0))


def check_strategy(names: Names) -> None:
    strategy = names["trainer"].strategy
    assert strategy is names["strategy"] and strategy.ulysses.sp_size == 4
    assert strategy.config["zero_optimization"]["stage"] == 3
    assert strategy.config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def check_sequence_dims(names: Names) -> None:
    batch = {"features": torch.rand(2, 8, 3), "targets": torch.ones(2, 8).long(), "image": torch.rand(2, 8, 8)}
    rules = names["strategy"].ulysses.rules
    assert read_batch(batch, rules, 2).dims == {"features": 1, "targets": 1}


def check_documents(names: Names) -> None:
    whole = read_batch(names["batch"], UlyssesDeepSpeedStrategy().ulysses.rules, 2)
    assert whole.layout.documents == (((0, 3), (3, 5)),)
    assert whole.tensors["shift_labels"].tolist() == [[6, 7, -100, 9, -100]]


def tokens_of(loader: Any) -> int:
    return sum(int((batch["labels"] != -100).sum()) + len(batch["cu_seqlens"]) - 2 for batch in loader)


def check_files(names: Names) -> None:
    documents = names["data"].documents
    assert (len(documents["train"]), len(documents["validation"])) == (10, 1)
    assert documents["train"].lengths.sum() + documents["validation"].lengths.sum() == 5 * 66 + 11
    assert names["trainer"].global_step == 1 and len(list(Path("lightning_ulysses").iterdir())) == 1


def check_sampler(names: Names) -> None:
    assert names["trainer"].global_step == 1
    assert tokens_of(names["loader"]) == sum(range(3, 12))


def check_stream(names: Names) -> None:
    assert tokens_of(names["loader"]) == sum(range(3, 12))


def check_tiny_gpt(names: Names) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return names["TinyGPT"]()

    batches = [pair_batch(seed, 33, 2, "uneven") for seed in range(2)]
    reference = fit_single(make, [batches], count_targets)
    run = SplitRun(trainer={"accumulate_grad_batches": 2})
    assert compare(fit_rank(int(os.environ["RANK"]), make, batches, run), reference).largest <= 1e-5


def check_explicit_attention(names: Names) -> None:
    parts = [names[name].split([2, 3], dim=2) for name in ("q", "k", "v")]
    wanted = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in zip(*parts, strict=True)
    ]
    torch.testing.assert_close(names["out"], torch.cat(wanted, dim=2))


def check_unsharded(names: Names) -> None:
    class Previewing(LlamaModule):
        validation_step = names["validation_step"]
        preview: Tensor

    module, run = Previewing(), SplitRun()
    split_trainer(run).validate(module, split_loader(WHOLE[:1], run, 0), verbose=False)
    with torch.no_grad():
        wanted = LlamaModule().model(input_ids=WHOLE[0]["input_ids"][:, :8]).logits
    torch.testing.assert_close(module.preview, wanted)


def check_loss(names: Names) -> None:
    by_mask, none = names["by_mask"].ulysses, names["no_token_mean"].ulysses
    assert (by_mask.targets, by_mask.rules.ignore_index, by_mask.loss_weighting) == ("loss_mask", -1, "tokens")
    assert none.loss_weighting == "none"


def check_monitor(names: Names) -> None:
    found = names["trainer"].callback_metrics
    assert {"train/loss", "tokens/global", "throughput/tokens_per_sec"} <= set(found)
    assert found["tokens/global"] == 33
    saver = names["saver"]
    saved = Path(saver.best_model_path)
    assert saved.parent.name == "checkpoints" and (saved / "checkpoint").is_dir()
    assert 0 < saver.best_model_score < 10


def check_resumed(names: Names) -> None:
    assert names["trainer"].global_step == 4
    trained(names, fit_single(llama(lr=0.1), in_order(names, WHOLE), count_targets))


def check_export(names: Names) -> None:
    from safetensors.torch import load_file

    weights = names["module"].model.state_dict()
    exported = load_file("model.safetensors")
    assert set(exported) == set(weights)
    assert all(torch.equal(exported[name], weights[name]) for name in exported)
    # One step from where it began, which is where a fresh module still is.
    assert not torch.equal(weights["lm_head.weight"], LlamaModule().model.state_dict()["lm_head.weight"])


def check_interceptor(names: Names) -> None:
    ops = sys.modules.pop("my_ops")
    original, rank = ops.attention, int(os.environ["RANK"])
    dist.init_process_group("gloo")
    context = SequenceContext(SequenceMesh.create(MeshSizes(2, 1), "cpu"))
    layout = SequenceLayout(5, 2)
    heads = given_heads("")
    q, k, v = heads["q"], heads["k"], heads["v"]
    wanted = original(q, k, v, True)
    handle = names["install"](context)
    assert ops.attention is not original
    assert torch.equal(ops.attention(q, k, v, True), wanted)
    span = layout.spans[rank]
    with context.step(LocalBatch(layout)):
        mine = ops.attention(q[:, :, span], k[:, :, span], v[:, :, span], True)
    torch.testing.assert_close(mine, wanted[:, :, span])
    assert context.notes.of(AttentionTally).calls == 1
    handle.remove()
    assert ops.attention is original


def check_chats(names: Names) -> None:
    """The only step has the loss of one process on the same batch."""
    trainer = names["trainer"]
    assert trainer.global_step == 1 and trainer.strategy.zero_stage_3
    data = names["data"]
    batch = data.collator([data.documents["train"][index] for index in range(3)])
    assert 0 < int((batch["labels"] != -100).sum()) < batch["labels"].numel() / 2
    alone = names["AutoModelForCausalLM"].from_pretrained(names["name"])
    with torch.no_grad():
        wanted = float(alone(**batch, use_cache=False).loss)
    found = float(trainer.callback_metrics["loss"])
    assert abs(found - wanted) <= 1e-5 * wanted, (found, wanted)


def check_place(names: Names) -> None:
    module, x = names["self"], names["x"]
    torch.testing.assert_close(names["h"], module.embed(x) + module.place.weight[:6])


def check_tiled_loss(names: Names) -> None:
    logits = 30.0 * torch.tanh(names["self"].head(names["hidden"]) / 30.0)
    wanted = F.cross_entropy(logits.flatten(0, 1), names["labels"].flatten())
    torch.testing.assert_close(names["loss"], wanted)


def check_pack(names: Names) -> None:
    batch = names["batch"]
    assert batch["input_ids"][0, :5].tolist() == [5, 6, 7, 8, 9]
    assert batch["labels"][0, :5].tolist() == [-100, 6, 7, -100, 9]
    assert batch["position_ids"][0, :5].tolist() == [0, 1, 2, 0, 1]


def check_ray(names: Names) -> None:
    """The groups are ours and the device is theirs, and a step under it is exact."""
    for name in ("ray", "ray.train", "ray.train.lightning"):
        del sys.modules[name]
    strategy = names["RayUlyssesStrategy"](sp_size=2)
    assert isinstance(strategy, names["parent"])
    module = llama(lr=0.1)()
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": 2, "max_epochs": 1, "use_distributed_sampler": False}
    pl.Trainer(strategy=strategy, **settings, **QUIET).fit(
        module, split_loader(WHOLE[:1], SplitRun(), int(os.environ["RANK"]))
    )
    assert strategy.distributed_sampler_kwargs == {"num_replicas": 1, "rank": 0}
    assert strategy.root_device == torch.device("cpu", int(os.environ["RANK"]))
    trained({"module": module}, fit_single(llama(lr=0.1), [WHOLE[:1]], count_targets))


def check_resumed_newest(names: Names) -> None:
    assert names["trainer"].global_step == 4
