"""Ulysses sequence parallelism for Lightning, on top of DeepSpeed ZeRO.

Importing this package registers the ``ulysses_deepspeed`` strategies; neither transformers nor deepspeed is imported.
"""

from __future__ import annotations

import gc

_collects = gc.isenabled()
gc.disable()
try:
    # Of what is imported next to nothing is garbage; looking for it would take a quarter of the time.
    from lightning.fabric.strategies import STRATEGY_REGISTRY
    from lightning.pytorch.strategies import StrategyRegistry

    from lightning_ulysses.attention import ulysses_attention
    from lightning_ulysses.callbacks import TokenCountMonitor
    from lightning_ulysses.cli import registered as registered
    from lightning_ulysses.data import (
        CostModel,
        PackedStream,
        PackingCollator,
        SequenceDataModule,
        SequenceShardSampler,
    )
    from lightning_ulysses.errors import UlyssesError
    from lightning_ulysses.fabric import UlyssesFabricStrategy
    from lightning_ulysses.memory import tiled_cross_entropy
    from lightning_ulysses.sequence import gather_sequence, sequence_positions, unsharded
    from lightning_ulysses.strategy import UlyssesDeepSpeedStrategy
    from lightning_ulysses.upstream.flavour import register_refusals
finally:
    if _collects:
        gc.enable()

__version__ = "0.2.0"
__all__ = [
    "CostModel",
    "PackedStream",
    "PackingCollator",
    "SequenceDataModule",
    "SequenceShardSampler",
    "TokenCountMonitor",
    "UlyssesDeepSpeedStrategy",
    "UlyssesError",
    "UlyssesFabricStrategy",
    "gather_sequence",
    "sequence_positions",
    "tiled_cross_entropy",
    "ulysses_attention",
    "unsharded",
]

UlyssesDeepSpeedStrategy.register_strategies(StrategyRegistry)
UlyssesFabricStrategy.register_strategies(STRATEGY_REGISTRY)
register_refusals(name for name in StrategyRegistry if name.startswith(UlyssesDeepSpeedStrategy.strategy_name))
