"""Answers for fake tensors are those that torch's own mode returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from lightning_ulysses.upstream.torch_fake import Answers, is_plain_view, view_of

aten = torch.ops.aten
VIEWS: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.view.default, ([3, 8, 5],)),
    (aten._unsafe_view.default, ([3, 8, 5],)),
    (aten.detach.default, ()),
    (aten.permute.default, ([2, 0, 1],)),
    (aten.transpose.int, (0, 1)),
    (aten.slice.Tensor, (1, 2, 7)),
    (aten.select.int, (1, 3)),
    (aten.unsqueeze.default, (1,)),
    (aten.expand.default, ([2, 3, 8, 5],)),
    (aten.as_strided.default, ([4, 2], [7, 3], 5)),
    (aten.split_with_sizes.default, ([1, 5, 2], 1)),
    (aten.unbind.int, (0,)),
]
OTHERS: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.mul.Tensor, (2.0,)),
    (aten.mul.Tensor, (2,)),
    (aten.sum.dim_IntList, ([1], True)),
    (aten._to_copy.default, ()),
    (aten.new_empty.default, ([2, 9],)),
    (aten.new_empty_strided.default, ([2, 3], [1, 2])),
    (aten.empty_like.default, ()),
    (aten.clone.default, ()),
]


def facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device, storage._cdata


@pytest.mark.parametrize(("func", "args"), VIEWS, ids=[str(func) for func, _ in VIEWS])
def test_a_view_is_that_of_the_mode(func: Any, args: tuple[Any, ...]) -> None:
    with FakeTensorMode():
        tensor = torch.empty(3, 8, 5, dtype=torch.bfloat16)
        assert is_plain_view(func, (tensor, *args), {})
        wanted, found = func(tensor, *args), view_of(func, (tensor, *args))
    assert type(wanted) is type(found) or {type(wanted), type(found)} <= {list, tuple}
    pairs = zip(wanted, found, strict=True) if isinstance(found, list) else [(wanted, found)]
    for one, other in pairs:
        assert type(one) is type(other) and facts(one) == facts(other)
        assert vars(one) == vars(other)


def test_what_is_no_view_of_one_fake_tensor_is_left_to_the_mode() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensor, number = torch.empty(2, 2), torch.tensor(3)
        assert not is_plain_view(aten.add.Tensor, (tensor, tensor), {})
        # Its value is known, and that of its view must be.
        assert not is_plain_view(aten.view.default, (number, [1]), {})
        assert is_plain_view(aten.view.default, (tensor, [4]), None)
    assert not is_plain_view(aten.view.default, (torch.empty(2), [2]), {})


@pytest.mark.parametrize(("func", "args"), OTHERS, ids=str)
def test_an_answer_that_is_known_is_that_of_the_mode(func: Any, args: tuple[Any, ...]) -> None:
    with FakeTensorMode():
        # Not contiguous.
        tensor = torch.empty(3, 8, 5, dtype=torch.bfloat16).transpose(0, 1)
        answers, wanted = Answers(), func(tensor, *args)
        for found in (answers(func, (tensor, *args), {}) for _ in range(3)):
            assert facts(found)[:-1] == facts(wanted)[:-1] and vars(found) == vars(wanted)
            assert found.untyped_storage().nbytes() == wanted.untyped_storage().nbytes()
            assert found.untyped_storage()._cdata != tensor.untyped_storage()._cdata
        # What it is asked with counts.
        wide = answers(func, (tensor.float(), *args), {})
        assert wide.dtype == func(tensor.float(), *args).dtype == torch.float32


def test_answers_that_are_their_arguments_or_not_told_by_shapes() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        answers, tensor, other = Answers(), torch.empty(4, 4), torch.empty(4, 4)
        for _ in range(2):
            assert answers(aten.add_.Tensor, (tensor, other), {}) is tensor
            # A shape that changes in place.
            assert answers(aten.squeeze_.dim, (narrow := torch.empty(1, 4), 0), {}).shape == narrow.shape == (4,)
            # A value that is known.
            assert answers(aten.add.Tensor, (tensor, torch.tensor(2)), {}).shape == (4, 4)
            values, places = answers(aten.max.dim, (tensor, 0), {})
            assert values.shape == places.shape == (4,)
    # Real tensors have values.
    assert answers(aten.add.Tensor, (torch.ones(2), torch.ones(2)), {}).tolist() == [2, 2]
