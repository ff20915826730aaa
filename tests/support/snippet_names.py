"""What the snippets of the documents take for granted."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from documents import BLOCKS
from lightning.pytorch.callbacks import ModelCheckpoint
from models import HandWritten, LlamaModule, token_batch
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_ulysses
from lightning_ulysses.testing import SplitRun, split_trainer
from lightning_ulysses.testing.processes import ProcessPool

Names = dict[str, Any]
PROGRAM = "README.md / A first program / 1"
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROWS = [{key: tensor[0] for key, tensor in token_batch(seed, 33, 1, "uneven").items()} for seed in range(4)]
WHOLE = [{key: tensor[None] for key, tensor in row.items()} for row in ROWS]


def given(folder: str) -> Names:
    return {"module": LlamaModule(lr=0.1), "data": DataLoader(ROWS, batch_size=1)}


def given_package(folder: str) -> Names:
    public = {name: getattr(lightning_ulysses, name) for name in lightning_ulysses.__all__}
    return {**public, **given(folder)}


def given_loop(folder: str) -> Names:
    torch.manual_seed(0)
    rows = token_batch(1, 34, 4)["input_ids"]
    return {"model": HandWritten(positions="own"), "loader": DataLoader(rows, batch_size=1)}  # type: ignore[arg-type]


def given_positions(folder: str) -> Names:
    return {"module": HandWritten(positions="own", lr=0.1), "data": DataLoader(ROWS, batch_size=1)}


def given_whole(folder: str) -> Names:
    return {"module": LlamaModule(lr=0.1), "batch": WHOLE[0]}


def given_heads(folder: str) -> Names:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 5, 8, generator=generator) for heads in (4, 2, 2))
    return {"q": q, "k": k, "v": v, "batch": {"cu_seqlens": torch.tensor([0, 2, 5])}}


class Letters:
    """A tokenizer with the vocabulary of the test model."""

    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(letter) % 60 for letter in text]}

    def get_vocab(self) -> dict[str, int]:
        return {chr(code): 1 + code % 60 for code in range(128)}


def given_files(folder: str) -> Names:
    os.environ["XDG_CACHE_HOME"] = folder
    Path("documents").mkdir(exist_ok=True)
    rows = (json.dumps({"text": "word " * number}) + "\n" for number in range(1, 12))
    # Each rank may be the first to read it.
    own = Path(f"rank{os.environ['RANK']}.jsonl")
    own.write_text("".join(rows))
    own.replace(Path("documents", "a.jsonl"))
    return {"module": LlamaModule(lr=0.1), "tokenizer": Letters()}


def given_documents(folder: str) -> Names:
    documents = [{"input_ids": [1 + number] * (3 + number)} for number in range(9)]
    return {"module": LlamaModule(lr=0.1), "documents": documents, "source": lambda: iter(documents)}


def save_checkpoint(rank: int, folder: str) -> None:
    """Stops after the first of four steps."""
    saver = ModelCheckpoint(dirpath=f"{folder}/checkpoints", filename="last", every_n_train_steps=1)
    settings = {"max_steps": 1, "enable_checkpointing": True, "use_distributed_sampler": True}
    names = given(folder)
    split_trainer(SplitRun(trainer=settings), [saver]).fit(names["module"], names["data"])


def given_ops(folder: str) -> Names:
    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    ops: Any = ModuleType("my_ops")
    ops.attention = attention
    sys.modules["my_ops"] = ops
    return {}


def given_trainer(folder: str) -> Names:
    import lightning as L

    return {**given(folder), "trainer": L.Trainer(strategy="ulysses_deepspeed", devices=8)}


def save_model(folder: Path) -> None:
    """A tiny pretrained model and its tokenizer."""
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=384, num_key_value_heads=2, **sizes)).save_pretrained(folder)
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)


def chats(folder: Path) -> str:
    """A file with three chats."""
    answers = ["yes", "no, never", "perhaps; ask again"]
    rows = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}] for answer in answers]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(folder / "chats.jsonl")


def save_chats_and_model(pool: ProcessPool, folder: str) -> None:
    save_model(Path(folder) / "pretrained")
    chats(Path(folder))


def given_chats(folder: str) -> Names:
    """The class of the first program, and names of files."""
    os.environ["XDG_CACHE_HOME"] = folder
    import lightning as L

    source = next(block.source for block in BLOCKS if block.name == PROGRAM)
    names: Names = {"L": L}
    exec(source.partition("torch.manual_seed")[0], names)
    return {**names, "name": f"{folder}/pretrained"}


def given_place(folder: str) -> Names:
    return {"self": HandWritten(), "x": torch.arange(12).view(2, 6), **given_package(folder)}


def given_hidden(folder: str) -> Names:
    hidden, labels = torch.randn(2, 6, 32), torch.tensor([[1, 2, 3, -100, 5, 6], [-100, 2, 3, 4, 5, 6]])
    return {"self": HandWritten(), "hidden": hidden, "labels": labels, "lightning_ulysses": lightning_ulysses}


def given_ray(folder: str) -> Names:
    """Stands for ray.train.lightning, whose class differs from its parent in these two."""
    from lightning.pytorch.strategies import DeepSpeedStrategy

    class RayDeepSpeedStrategy(DeepSpeedStrategy):
        @property
        def root_device(self) -> torch.device:
            return torch.device("cpu")

        @property
        def distributed_sampler_kwargs(self) -> dict[str, int]:
            return {"num_replicas": self.world_size, "rank": self.global_rank}

    for name in ("ray", "ray.train", "ray.train.lightning"):
        sys.modules[name] = ModuleType(name)
    vars(sys.modules["ray.train.lightning"])["RayDeepSpeedStrategy"] = RayDeepSpeedStrategy
    return {"parent": RayDeepSpeedStrategy}


def save_last(pool: ProcessPool, folder: str) -> None:
    pool.run(save_checkpoint, folder, world_size=2)
