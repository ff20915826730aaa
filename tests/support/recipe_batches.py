"""Batches of the training recipes, made from a seed."""

from __future__ import annotations

import torch
from models import VOCAB
from torch import Tensor

ROWS, LENGTH = 4, 37


def tokens(seed: int, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCAB, (ROWS, length), generator=torch.Generator().manual_seed(seed))


def prompted(seed: int) -> dict[str, Tensor]:
    """A prompt of another length in each row, and padding after some of them."""
    x = tokens(seed)
    y, mask = x.clone(), torch.ones_like(x)
    for row in range(ROWS):
        y[row, : 2 + (5 * row + seed) % 11] = -100
        if row % 2:
            end = LENGTH - 3 - (row + seed) % 5
            x[row, end:], y[row, end:], mask[row, end:] = 0, -100, 0
    return {"input_ids": x, "labels": y, "attention_mask": mask}


def unpadded(seed: int) -> dict[str, Tensor]:
    batch = prompted(seed)
    return {"input_ids": tokens(seed), "labels": batch["labels"]}


def packed(seed: int) -> dict[str, Tensor]:
    place = torch.cat([torch.arange(14), torch.arange(LENGTH - 14)])[None].expand(ROWS, -1)
    batch = unpadded(seed)
    # No token is the target of the last one of another document.
    batch["labels"][:, [0, 14]] = -100
    return {**batch, "position_ids": place.clone()}


def classes_of_rows(seed: int) -> dict[str, Tensor]:
    batch = prompted(seed)
    return {**batch, "labels": torch.tensor([0, 1, 1, 0])}


def spans(seed: int) -> dict[str, Tensor]:
    batch = prompted(seed)
    del batch["labels"]
    return {**batch, "start_positions": torch.tensor([3, 9, 22, 17]), "end_positions": torch.tensor([5, 31, 30, 20])}


def judged(seed: int) -> dict[str, Tensor]:
    return {**prompted(seed), "good": torch.tensor([True, False, False, True])}


def sampled(seed: int) -> dict[str, Tensor]:
    batch, generator = prompted(seed), torch.Generator().manual_seed(seed)
    return {
        "input_ids": batch["input_ids"],
        "completion_mask": (batch["labels"] != -100).float(),
        "old": -4 + 0.1 * torch.randn(ROWS, LENGTH, generator=generator),
        "advantage": torch.randn(ROWS, generator=generator),
    }


def only_tokens(seed: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(seed)}


def scored(seed: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(seed), "wanted": torch.linspace(-1, 1, ROWS) + seed}


def one_tensor(seed: int) -> Tensor:
    return tokens(seed, LENGTH + 1)


def masked(seed: int) -> dict[str, Tensor]:
    x, y = tokens(seed), tokens(seed)
    hidden = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.2 + 0.1 * seed
    return {"input_ids": x.masked_fill(hidden, 1), "labels": y.masked_fill(~hidden, -100)}


def series(seed: int) -> dict[str, Tensor]:
    return {"series": torch.randn(ROWS, LENGTH, 5, generator=torch.Generator().manual_seed(seed))}


def padded_series(seed: int) -> dict[str, Tensor]:
    padded = torch.arange(LENGTH) >= torch.tensor([LENGTH, 20, 31, 12])[:, None]
    return {**series(seed), "padded": padded, "classes": torch.tensor([0, 3, 1, 4])}


def weighted_series(seed: int) -> dict[str, Tensor]:
    weight = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(seed + 10))
    return {**series(seed), "weight": weight}


def patches(seed: int) -> dict[str, Tensor]:
    return {"series": torch.randn(ROWS, LENGTH, 6, generator=torch.Generator().manual_seed(seed))}


def latents(seed: int) -> dict[str, Tensor]:
    return {"latents": patches(seed)["series"]}


def images(seed: int) -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, 3, 20, 20, generator=torch.Generator().manual_seed(seed)), torch.tensor([1, 5, 0, 2])
