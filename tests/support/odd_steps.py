"""Losses and heads in which tokens meet, as people write them for one process.

Each step takes a module with a GPT-like ``model`` and the batch. Those in `MEANS` are means over the batch's labels; of
the others, all micro-batches have equal weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from models import VOCAB
from recipe_models import GPT
from torch import Tensor, nn

WIDTH, STATES = 32, 6


class Odd(L.LightningModule):
    """A model with one of the steps, and the modules that some of them need."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name, self.model = name, GPT()
        parts: dict[str, Callable[[], nn.Module]] = {
            "behind_an_lstm": lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True),
            "behind_a_bidirectional_gru": lambda: nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True),
            "behind_a_cell": lambda: nn.GRUCell(WIDTH, WIDTH),
            "behind_a_group_norm": lambda: nn.GroupNorm(4, WIDTH),
            "behind_a_batch_norm": lambda: nn.BatchNorm1d(WIDTH),
            "chunks": lambda: nn.Linear(4 * WIDTH, 8),
            "conditional_random_field": lambda: nn.Linear(STATES, STATES),
        }
        if name in parts:
            self.part = parts[name]()

    def hidden(self, x: Tensor) -> Tensor:
        """(B, S) -> (B, S, C)"""
        hidden = self.model.embed(x) + self.model.place(torch.arange(x.shape[1]))
        for block in self.model.blocks:
            hidden = block(hidden)
        return self.model.norm(hidden)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return STEPS[self.name](self, batch["input_ids"], batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def entropy(logits: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **settings)


def each(module: Any, x: Tensor, y: Tensor) -> Tensor:
    """(B, S), 0 where there is no target."""
    return entropy(module.model(x), y, reduction="none").view(x.shape)


# Means over labels.


def focal(module: Any, x: Tensor, y: Tensor) -> Tensor:
    found = each(module, x, y)
    return ((1 - (-found).exp()) ** 2 * found)[y != -100].mean()


def divided_by_an_int(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return entropy(module.model(x), y, reduction="sum") / int((y != -100).sum())


def divided_by_numpys_count(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return entropy(module.model(x), y, reduction="sum") / float((y.numpy() != -100).sum())


def behind_an_lstm(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return entropy(module.model.head(module.part(module.hidden(x))[0]), y)


behind_a_bidirectional_gru = behind_an_lstm


def behind_a_cell(module: Any, x: Tensor, y: Tensor) -> Tensor:
    hidden, state, found = module.hidden(x), x.new_zeros(len(x), WIDTH, dtype=torch.float32), []
    for token in range(x.shape[1]):
        state = module.part(hidden[:, token], state)
        found.append(state)
    return entropy(module.model.head(torch.stack(found, 1)), y)


def behind_a_group_norm(module: Any, x: Tensor, y: Tensor) -> Tensor:
    # (B, S, C) -> (B, C, S) -> (B, S, C)
    return entropy(module.model.head(module.part(module.hidden(x).transpose(1, 2)).transpose(1, 2)), y)


behind_a_batch_norm = behind_a_group_norm


def behind_an_instance_norm(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return entropy(module.model.head(F.instance_norm(module.hidden(x).transpose(1, 2)).transpose(1, 2)), y)


def scaled_to_all(module: Any, x: Tensor, y: Tensor) -> Tensor:
    """What is normalized has a norm over all tokens that is nearly that over a slice."""
    hidden = module.model.embed(x)
    for block in module.model.blocks:
        hidden = block(hidden)
        each = module.model.norm(hidden)
        hidden = hidden + each / each.pow(2).mean((1, 2), keepdim=True).sqrt()
    return entropy(module.model.head(hidden), y)


def resampled(module: Any, x: Tensor, y: Tensor) -> Tensor:
    # (B, C, S) -> (B, C, 2 * S) -> (B, C, S)
    finer = F.interpolate(module.hidden(x).transpose(1, 2), scale_factor=2, mode="linear")
    return entropy(module.model.head(F.avg_pool1d(finer, 2).transpose(1, 2)), y)


def mean_so_far(module: Any, x: Tensor, y: Tensor) -> Tensor:
    count = torch.arange(1, x.shape[1] + 1)[:, None]
    return entropy(module.model.head(module.hidden(x).cumsum(1) / count), y)


def read_backwards(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return entropy(module.model(x), y) + entropy(module.model(x.flip(1)).flip(1), y)


def own_predictions(module: Any, x: Tensor, y: Tensor) -> Tensor:
    """Scheduled sampling."""
    with torch.no_grad():
        best = module.model(x).argmax(-1)
    return entropy(module.model(torch.where(x % 2 == 0, best.roll(1, 1), x)), y)


def functional(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return entropy(torch.func.functional_call(module.model, dict(module.model.named_parameters()), (x,)), y)


# Others.


def classes_weighted(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return entropy(module.model(x), y, weight=torch.linspace(0.5, 2.0, VOCAB))


def classes_balanced(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return entropy(module.model(x), y, weight=1 / (1 + torch.bincount(y[y != -100], minlength=VOCAB)))


def median(module: Any, x: Tensor, y: Tensor) -> Tensor:
    found = each(module, x, y)
    return found[found > 0].median()


def quantile(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return each(module, x, y).flatten().quantile(0.8)


def hardest(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return each(module, x, y).topk(8, dim=1).values.mean()


def hard_half(module: Any, x: Tensor, y: Tensor) -> Tensor:
    found = each(module, x, y).flatten()
    return found[found >= found.detach().sort(descending=True).values[found.numel() // 2]].mean()


def mean_of_rows(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return (each(module, x, y).sum(1) / (y != -100).sum(1)).mean()


def row_by_row(module: Any, x: Tensor, y: Tensor) -> Tensor:
    logits = module.model(x)
    return torch.stack([F.cross_entropy(a, b) for a, b in zip(logits, y, strict=True)]).mean()


def token_by_token(module: Any, x: Tensor, y: Tensor) -> Tensor:
    logits = module.model(x)
    return torch.stack([F.cross_entropy(logits[:, t], x[:, t]) for t in range(x.shape[1])]).mean()


def total(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return entropy(module.model(x), y, reduction="sum") / 100


def total_of_a_length(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return entropy(module.model(x), y, reduction="sum") / x.shape[1]


def later_tokens_more(module: Any, x: Tensor, y: Tensor) -> Tensor:
    weight = torch.linspace(0, 1, x.shape[1])
    return (each(module, x, y) * weight).sum() / weight.sum()


def every_other_token(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return entropy(module.model(x)[:, ::2], y[:, ::2])


def first_half(module: Any, x: Tensor, y: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return entropy(module.model(x)[:, :half], y[:, :half])


def smooth(module: Any, x: Tensor, y: Tensor) -> Tensor:
    logits = module.model(x)
    return entropy(logits, y) + 0.1 * (logits[:, 1:] - logits[:, :-1]).pow(2).mean()


def varied(module: Any, x: Tensor, y: Tensor) -> Tensor:
    logits = module.model(x)
    return entropy(logits, y) + 0.1 * torch.diff(logits, dim=1).abs().mean()


def spectrum(module: Any, x: Tensor, y: Tensor) -> Tensor:
    logits = module.model(x)
    return entropy(logits, y) + torch.fft.rfft(logits, dim=1).abs().mean()


def correlation(module: Any, x: Tensor, y: Tensor) -> Tensor:
    a, b = module.model(x)[..., 0], x.float()
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return -((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()


def contacts(module: Any, x: Tensor, y: Tensor) -> Tensor:
    """Pairs of residues, (B, S, S)."""
    hidden = module.hidden(x)
    wanted = (x[:, :, None] == x[:, None]).float()
    return F.binary_cross_entropy_with_logits(torch.einsum("bic,bjc->bij", hidden, hidden), wanted)


def distances(module: Any, x: Tensor, y: Tensor) -> Tensor:
    hidden = module.hidden(x)
    return 0.1 * torch.cdist(hidden, hidden).mean()


def segments(module: Any, x: Tensor, y: Tensor) -> Tensor:
    """Means of five tokens each, such as codons."""
    hidden, place = module.hidden(x), (torch.arange(x.shape[1]) // 5).expand(len(x), -1)
    sums = hidden.new_zeros(len(x), int(place.max()) + 1, WIDTH)
    sums = sums.scatter_add(1, place[..., None].expand_as(hidden), hidden)
    return entropy(module.model.head(sums), y[:, ::5])


def chunks(module: Any, x: Tensor, y: Tensor) -> Tensor:
    # (B, 36, C) -> (B, 9, 4 * C)
    return module.part(module.hidden(x)[:, :36].unflatten(1, (9, 4)).flatten(2)).pow(2).mean()


def windows(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return module.model.head(module.hidden(x).unfold(1, 4, 2).mean(-1)).logsumexp(-1).mean()


def last_token(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module.model(x)[:, -1], x[:, 0])


def highest_token(module: Any, x: Tensor, y: Tensor) -> Tensor:
    """As CLIP finds the end of a text."""
    return F.cross_entropy(module.model(x)[torch.arange(len(x)), x.argmax(1)], x[:, 0])


def largest_of_all(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module.model(x).amax(1), x[:, 0])


def attended(module: Any, x: Tensor, y: Tensor) -> Tensor:
    """Attention pooling."""
    hidden = module.hidden(x)
    weights = module.model.head(hidden)[..., :1].softmax(1)
    return F.cross_entropy(module.model.head((hidden * weights).sum(1)), x[:, 0])


def place_of_a_token(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return -module.model(x)[..., 3].log_softmax(1)[:, 11].mean()


def over_all_tokens(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return -module.model(x)[..., 3].flatten().log_softmax(0)[::7].mean()


def connectionist(module: Any, x: Tensor, y: Tensor) -> Tensor:
    # (B, S, V) -> (S, B, V)
    found = module.model(x).log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(found, x[:, :9], torch.full((len(x),), x.shape[1]), torch.tensor([9, 7, 8, 5]))


def conditional_random_field(module: Any, x: Tensor, y: Tensor) -> Tensor:
    scores = module.model(x)[..., :STATES]
    state = scores[:, 0]
    for token in range(1, x.shape[1]):
        # (B, from, to) -> (B, to)
        state = (state[:, :, None] + module.part.weight + scores[:, token, None]).logsumexp(1)
    return state.logsumexp(1).mean() / x.shape[1]


def scaled_by_a_number(module: Any, x: Tensor, y: Tensor) -> Tensor:
    logits = module.model(x)
    return entropy(logits, y) / logits.abs().max().item()


def two_views(module: Any, x: Tensor, y: Tensor) -> Tensor:
    one, other = (module.model(tokens).log_softmax(-1) for tokens in (x, x.roll(3, 1)))
    return F.nll_loss(one.flatten(0, 1), y.flatten()) + 0.1 * F.kl_div(
        other, one, log_target=True, reduction="batchmean"
    )


def _steps(*found: Callable[[Any, Tensor, Tensor], Tensor], **named: Any) -> dict[str, Any]:
    return {step.__name__: step for step in found} | named


MEANS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = _steps(
    focal,
    divided_by_an_int,
    divided_by_numpys_count,
    behind_an_lstm,
    behind_a_cell,
    behind_a_group_norm,
    behind_an_instance_norm,
    scaled_to_all,
    resampled,
    mean_so_far,
    read_backwards,
    own_predictions,
    functional,
    behind_a_bidirectional_gru=behind_a_bidirectional_gru,
    behind_a_batch_norm=behind_a_batch_norm,
)
OTHERS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = _steps(
    classes_weighted,
    classes_balanced,
    median,
    quantile,
    hardest,
    hard_half,
    mean_of_rows,
    row_by_row,
    token_by_token,
    total,
    total_of_a_length,
    later_tokens_more,
    every_other_token,
    first_half,
    smooth,
    varied,
    spectrum,
    correlation,
    contacts,
    distances,
    segments,
    chunks,
    windows,
    last_token,
    highest_token,
    largest_of_all,
    attended,
    place_of_a_token,
    over_all_tokens,
    connectionist,
    conditional_random_field,
    scaled_by_a_number,
    two_views,
)
STEPS = MEANS | OTHERS
