"""torch's flex_attention: its own kernel forward, and a reference of the same signature backward, which CPUs lack."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as package
from models import Block, HandWritten, count_targets, llama, pair_batch, token_batch
from nightly import mostly
from torch import Tensor

from lightning_ulysses import UlyssesError
from lightning_ulysses.testing import SplitRun, compare, fit_rank, fit_single, fit_split, split_loader, split_trainer
from lightning_ulysses.testing.processes import ProcessPool

S, H = 33, 4
ORIGINAL = package.flex_attention


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: Any = None,
) -> Tensor:
    """All scores at once; the functions take tensors of indices that broadcast."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    rows, heads, length, others = scores.shape
    b, h = torch.arange(rows).view(-1, 1, 1, 1), torch.arange(heads).view(-1, 1, 1)
    place = b, h, torch.arange(length)[:, None], torch.arange(others)
    if score_mod is not None:
        scores = score_mod(scores, *place)
    if block_mask is not None:
        scores = scores.masked_fill(~block_mask.mask_mod(*place), float("-inf"))
    return scores.softmax(-1) @ value


def use(function: Any) -> None:
    package.flex_attention = function


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    use(ORIGINAL)


SLOPES = torch.tensor([0.5, 0.3, 0.2, 0.1])
EDGES = torch.tensor([0] * 9 + [1] * 11 + [2] * 13)


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


def by_head(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q >= k) & (q - k <= 3 * h + 2)


def documents(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q >= k) & (EDGES[q] == EDGES[k])


def alibi(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return score - SLOPES[h] * (q - k)


MASKS = {"causal": (causal, None), "by head": (by_head, H), "documents": (documents, None), "alibi": (causal, None)}


class Flexible(HandWritten):
    """Attention by flex_attention, taken from its module in every call or held from before."""

    def __init__(self, kind: str, held: bool = False, kv_heads: int = 2) -> None:
        super().__init__(heads=H, kv_heads=kv_heads)
        self.kind = kind
        self.held = package.flex_attention if held else None
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attend = self.attend  # type: ignore[method-assign]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        settings: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]}
        if self.kind in MASKS:
            mod, heads = MASKS[self.kind]
            settings["block_mask"] = package.create_block_mask(mod, None, heads, S, S, device="cpu", BLOCK_SIZE=16)
            settings["score_mod"] = alibi if self.kind == "alibi" else None
        elif self.kind == "local mask":
            length = q.shape[2]
            settings["block_mask"] = package.create_block_mask(causal, None, None, length, length, device="cpu")
        elif self.kind == "lse":
            settings["return_lse"] = True
        return (self.held or package.flex_attention)(q, k, v, **settings)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


def fit(rank: int, kind: str, kv_heads: int, held: bool, run: SplitRun) -> Any:
    use(reference)
    try:
        batches = [pair_batch(seed, S, 2, "uneven") for seed in range(run.world_size // run.sp_size)]
        result = fit_rank(rank, partial(Flexible, kind, held, kv_heads), batches, run)
        assert package.flex_attention is reference
        return result
    finally:
        use(ORIGINAL)


def gathered(ulysses: int, gather: int, **strategy: Any) -> SplitRun:
    return SplitRun(4, 4, {"sp_size": {"ulysses": ulysses, "gather": gather}, **strategy})


PADDED = SplitRun(strategy={"pad_to_multiple_of": 8})
RUNS = [
    *((kind, SplitRun(), 2, False) for kind in (*MASKS, "plain")),
    *((kind, SplitRun(4, 4), 1, True) for kind in ("by head", "documents")),
    *((kind, SplitRun(3, 3), 4, False) for kind in ("by head", "alibi")),
    *((kind, PADDED, 2, True) for kind in ("causal", "alibi")),
    *((kind, gathered(2, 2), 2, False) for kind in ("by head", "documents", "alibi")),
    # Of the last rank, all queries are padding.
    ("causal", gathered(1, 4, pad_to_multiple_of=64), 2, False),
]


@pytest.mark.parametrize(("kind", "run", "kv_heads", "held"), mostly(RUNS, [RUNS[-9], RUNS[-6], *RUNS[-3:-1]]))
def test_one_step(pool: ProcessPool, kind: str, run: SplitRun, kv_heads: int, held: bool) -> None:
    use(reference)
    single = fit_single(partial(Flexible, kind, False, kv_heads), [[pair_batch(0, S, 2, "uneven")]], count_targets)
    for result in pool.run(fit, kind, kv_heads, held, run, world_size=run.world_size):
        assert compare(result, single).largest <= 1e-5


def fit_with_heads_from_zero(rank: int, kind: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_ulysses.interceptors.torch_flex._shifted", lambda mod, head, query, at: mod)
        # Tried, the model runs on the joined sequence where slices give another step.
        return fit(rank, kind, 2, False, SplitRun(strategy={"check_model": False}))


@pytest.mark.parametrize("kind", ["by head", "alibi"])
def test_heads_counted_from_zero_would_be_wrong(pool: ProcessPool, kind: str) -> None:
    use(reference)
    single = fit_single(partial(Flexible, kind), [[pair_batch(0, S, 2, "uneven")]], count_targets)
    for result in pool.run(fit_with_heads_from_zero, kind, world_size=2):
        assert compare(result, single).step > 1e-3


def predict(rank: int, kind: str) -> Tensor:
    """torch's own kernel, which works on CPUs in the forward."""
    module, run = Flexible(kind), SplitRun()
    outputs: Any = split_trainer(run).predict(module, split_loader([pair_batch(0, S, 2)], run, rank))
    return outputs[0]


@pytest.mark.parametrize("kind", ["by head", "documents", "alibi"])
def test_the_real_kernel(pool: ProcessPool, kind: str) -> None:
    with torch.no_grad():
        wanted = Flexible(kind).eval()(pair_batch(0, S, 2)[0])
    for found in pool.run(predict, kind, world_size=2):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


class Compiled(Flexible):
    """Holds a compiled copy, as most users of flex_attention do."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.held = torch.compile(ORIGINAL, backend="eager", dynamic=False)


def predict_compiled(rank: int) -> list[Any]:
    module, run = Compiled("causal"), SplitRun()
    held = module.held
    outputs: Any = split_trainer(run).predict(module, split_loader([pair_batch(0, S, 2)], run, rank))
    return [outputs[0], module.held is held]


def test_a_compiled_copy(pool: ProcessPool) -> None:
    with torch.no_grad():
        wanted = Flexible("causal").eval()(pair_batch(0, S, 2)[0])
    for found, restored in pool.run(predict_compiled, world_size=2):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        assert restored


REFUSED = {
    "local mask": ("BlockMask of 1 heads over (1", "in a step of S=33", "Q_LEN=33, KV_LEN=33"),
    "lse": ("log-sum-exp", "leave out return_lse"),
}


def refused(rank: int, kind: str) -> UlyssesError:
    with pytest.raises(UlyssesError) as caught:
        fit_rank(rank, partial(Flexible, kind), [pair_batch(0, S)], SplitRun(strategy={"check_model": False}))
    return caught.value


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_kept_is_refused(pool: ProcessPool, kind: str) -> None:
    for error in pool.run(refused, kind, world_size=2):
        assert [part for part in REFUSED[kind] if part not in str(error)] == [], error


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_3", "flash_attention_4"])
def test_transformers_by_that_name(pool: ProcessPool, implementation: str) -> None:
    """The reference in one process is SDPA; neither needs its package for a split sequence."""
    batches = [token_batch(0, S, 2, "uneven")]
    single = fit_single(llama(), [batches], count_targets)
    for result in fit_split(pool, llama(implementation=implementation), batches, SplitRun()):
        assert compare(result, single).largest <= 1e-5
