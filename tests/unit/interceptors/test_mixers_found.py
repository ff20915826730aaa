"""Which functions are taken over, and that they are put back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from lightning_ulysses import UlyssesError
from lightning_ulysses.context import LocalBatch, SequenceContext
from lightning_ulysses.exchange.mesh import ALONE
from lightning_ulysses.geometry.layout import SequenceLayout
from lightning_ulysses.interceptors import mixers
from lightning_ulysses.mixing.table import FUSED, TABLE
from lightning_ulysses.patching.early_bound import rebind
from lightning_ulysses.patching.handle import Handle

SPLIT = replace(ALONE, sp_size=2)


@contextmanager
def modules(**functions: Any) -> Iterator[tuple[ModuleType, ModuleType]]:
    """A library with functions, and a model's file that has imported them early."""
    library, model = ModuleType("mamba_ssm_library"), ModuleType("a_model")
    for name, function in functions.items():
        setattr(library, name, function)
        setattr(model, name, function)
    with mock.patch.dict(sys.modules, {"mamba_ssm_library": library, "a_model": model}):
        yield library, model


def install(context: SequenceContext) -> Handle:
    handle, early = Handle(), {}
    mixers.install(context, early)
    rebind(handle, nn.Identity(), early)
    return handle


def whole(*args: Any, **kwargs: Any) -> str:
    return "as it is"


def test_functions_are_replaced_wherever_they_are_held_and_put_back() -> None:
    context = SequenceContext(SPLIT)
    with modules(chunk_kda=whole) as (library, model):
        # Its name in this module holds the replacement, too.
        original = whole
        handle = install(context)
        assert library.chunk_kda is model.chunk_kda is not original
        # Nothing is split here.
        assert library.chunk_kda() == "as it is"
        handle.remove()
        assert library.chunk_kda is model.chunk_kda is original


def test_one_process_replaces_nothing() -> None:
    with modules(chunk_kda=whole) as (library, _):
        install(SequenceContext(ALONE))
        assert library.chunk_kda is whole


def test_fused_kernels_of_a_library_are_refused_where_something_is_split() -> None:
    context = SequenceContext(SPLIT)
    with modules(mamba_split_conv1d_scan_combined=whole) as (library, _):
        handle = install(context)
        assert library.mamba_split_conv1d_scan_combined() == "as it is"
        batch = LocalBatch(SequenceLayout(8, 2))
        with context.step(batch), pytest.raises(UlyssesError, match="use_mem_eff_path=False"):
            library.mamba_split_conv1d_scan_combined()
        handle.remove()


def test_fused_kernels_of_transformers_are_taken_apart() -> None:
    from transformers.models.bamba import modeling_bamba

    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a kernel that convolves and scans a slice")

    context = SequenceContext(SPLIT)
    with mock.patch.object(modeling_bamba, "mamba2_split_conv1d_scan_combined", kernel):
        handle = install(context)
        with context.step(LocalBatch(SequenceLayout(8, 2))):
            assert modeling_bamba.mamba2_split_conv1d_scan_combined() is None
        handle.remove()
        assert modeling_bamba.mamba2_split_conv1d_scan_combined is kernel


@pytest.mark.parametrize("share", [1, 3])
def test_padding_of_a_slice_of_one_token_is_padding(share: int) -> None:
    from transformers import BambaConfig
    from transformers.models.bamba import modeling_bamba

    context, padding = SequenceContext(SPLIT), torch.zeros(2, share, dtype=torch.long)
    given = {"config": BambaConfig(), "inputs_embeds": torch.zeros(2, share, 4), "attention_mask": padding}
    handle = install(context)
    with context.step(LocalBatch(SequenceLayout(2 * share, 2))):
        found = modeling_bamba.create_recurrent_attention_mask(**given)
    handle.remove()
    assert torch.equal(found, padding)
    # transformers takes a single token for one that is being generated.
    assert (modeling_bamba.create_recurrent_attention_mask(**given) is None) == (share == 1)


def test_the_table_has_the_functions_of_transformers() -> None:
    """Every function that transformers has a kernel for, but those of generation."""
    import re
    from pathlib import Path

    import transformers

    found = set()
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        found |= set(re.findall(r"@use_kernel_func_from_hub_with_fallback\([^)]*\)\s+def (\w+)\(", file.read_text()))
    generating = {name for name in found if name.endswith("_update")}
    assert len(found) >= 10 and found - generating == {*TABLE, *FUSED} & found
