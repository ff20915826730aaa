"""flash-attn's kernel where a model asks for it: found by its caller, and called on the exchanged heads of a step."""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from exact import BOUND
from gpu_paths import gpu_paths, varlen_attention
from models import LlamaModule, count_targets, token_batch
from torch import Tensor

from lightning_ulysses.interceptors.flash_attn import _kernels
from lightning_ulysses.testing import SplitRun, StepResult, compare, fit_rank, fit_single
from lightning_ulysses.testing.processes import ProcessPool
from lightning_ulysses.upstream.transformers_flash import variable_length_function


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, causal: bool = False) -> Tensor:
    raise AssertionError


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> Tensor:
    SEEN.append((q.shape[1], k.shape[1], cu_seqlens_q.tolist(), max_seqlen_q, causal))
    return varlen_attention(q, k, v, cu_seqlens_q, (window_size[0], 0) if causal else window_size, softmax_scale)


SEEN: list[Any] = []


def always(tensor: Tensor) -> bool:
    return True


def there() -> bool:
    return True


def imported(name: str) -> tuple[Any, ...]:
    return flash_attn_func, flash_attn_varlen_func, None, None, None


def fit_on_flash_attn(rank: int, batch: Any) -> tuple[StepResult, list[Any]]:
    SEEN.clear()
    run = SplitRun(strategy={"check_model": False})
    with (
        gpu_paths() as (varlen, sdpa),
        mock.patch("lightning_ulysses.attention.device.has_flash", always),
        mock.patch("transformers.utils.is_flash_attn_2_available", there),
        mock.patch("transformers.modeling_flash_attention_utils._lazy_imports", imported),
    ):
        result = fit_rank(rank, partial(LlamaModule, implementation="flash_attention_2"), [batch], run)
    assert not varlen.calls and not sdpa.chosen
    return result, list(SEEN)


def test_a_packed_step_of_transformers_runs_on_flash_attn(pool: ProcessPool) -> None:
    tokens = token_batch(1, 33)["input_ids"]
    batch = {"input_ids": tokens, "labels": tokens, "position_ids": torch.arange(33)[None] % 12}
    documents = [{"input_ids": part, "labels": part} for part in tokens.split([12, 12, 9], dim=1)]
    reference = fit_single(LlamaModule, [documents], count_targets)
    heads = LlamaModule().model.config
    share = heads.num_attention_heads // 2
    for result, seen in pool.run(fit_on_flash_attn, batch, world_size=2):
        assert compare(result, reference).largest <= BOUND
        # All documents of the whole row, for this rank's heads.
        assert seen and all(entry[0] == share and entry[2:] == ([0, 12, 24, 33], 12, True) for entry in seen)


def test_the_package_must_be_there() -> None:
    # Without it, transformers would load a kernel from the hub.
    with mock.patch("transformers.modeling_flash_attention_utils._lazy_imports", side_effect=AssertionError):
        assert variable_length_function("flash_attention_2") is None
        assert variable_length_function("flash_attention_9") is None
    with (
        mock.patch("transformers.utils.is_flash_attn_2_available", there),
        mock.patch("transformers.modeling_flash_attention_utils._lazy_imports", imported),
    ):
        assert variable_length_function("flash_attention_2") is flash_attn_varlen_func


def test_functions_of_a_version_share_its_kernel() -> None:
    package: Any = ModuleType("flash_attn")
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    with mock.patch.dict(sys.modules, {"flash_attn": package}):
        found = _kernels()
    assert found[flash_attn_func] == found[flash_attn_varlen_func] == (flash_attn_varlen_func, "flash-attn 2")
