"""Refuses adapters of peft that add tokens of their own before the sequence."""

from __future__ import annotations

import sys

from torch import nn

from lightning_ulysses.errors import UlyssesError


def check_adapters(root: nn.Module) -> None:
    """Checks every peft model below ``root``.

    Raises:
        UlyssesError: For prompt and prefix tuning. Every rank would add the virtual tokens before its own slice.
    """
    # A module with a peft model has imported peft.
    peft = sys.modules.get("peft")
    if peft is None:
        return
    for name, module in root.named_modules():
        if not isinstance(module, peft.PeftModel):
            continue
        for config in module.peft_config.values():
            if config.is_prompt_learning:
                raise UlyssesError(
                    f"{name!r} ({type(module).__name__}) with {type(config).__name__}, which adds virtual tokens",
                    "adapters that leave the sequence as it is",
                    "use LoRA or another method inside the layers, or train without sequence parallelism (sp_size=1)",
                )
