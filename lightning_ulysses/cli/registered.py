"""The registered names as classes.

A command line finds classes by their names and gives them arguments; a string takes none. With these,
``--trainer.strategy=ulysses_deepspeed --trainer.strategy.sp_size=4`` works.
"""

from __future__ import annotations

from typing import Any

from lightning_ulysses.strategy import UlyssesDeepSpeedStrategy


class ulysses_deepspeed(UlyssesDeepSpeedStrategy):
    """`UlyssesDeepSpeedStrategy` at ZeRO stage 2."""


class ulysses_deepspeed_stage_1(UlyssesDeepSpeedStrategy):
    """`UlyssesDeepSpeedStrategy` at ZeRO stage 1."""

    def __init__(self, stage: int = 1, **kwargs: Any) -> None:
        super().__init__(stage=stage, **kwargs)


class ulysses_deepspeed_stage_2(UlyssesDeepSpeedStrategy):
    """`UlyssesDeepSpeedStrategy` at ZeRO stage 2."""


class ulysses_deepspeed_stage_3(UlyssesDeepSpeedStrategy):
    """`UlyssesDeepSpeedStrategy` at ZeRO stage 3."""

    def __init__(self, stage: int = 3, **kwargs: Any) -> None:
        super().__init__(stage=stage, **kwargs)


class ulysses_deepspeed_stage_3_offload(UlyssesDeepSpeedStrategy):
    """`UlyssesDeepSpeedStrategy` at ZeRO stage 3, with optimizer and parameters in host memory."""

    def __init__(
        self, stage: int = 3, offload_optimizer: bool = True, offload_parameters: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(
            stage=stage, offload_optimizer=offload_optimizer, offload_parameters=offload_parameters, **kwargs
        )
