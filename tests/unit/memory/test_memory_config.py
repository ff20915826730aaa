"""The setting ``memory``: what is accepted, and that a command line can write it."""

from __future__ import annotations

from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lightning_ulysses import UlyssesDeepSpeedStrategy, UlyssesError
from lightning_ulysses.config import MemoryConfig


def test_off_by_default() -> None:
    assert not UlyssesDeepSpeedStrategy().ulysses.memory.is_on
    assert MemoryConfig(checkpoint="block").is_on


@pytest.mark.parametrize(
    "given", [{"tiled_loss": True, "tile_tokens": 8}, MemoryConfig(tiled_loss=True, tile_tokens=8)]
)
def test_given(given: Any) -> None:
    memory = UlyssesDeepSpeedStrategy(memory=given).ulysses.memory
    assert memory == MemoryConfig(tiled_loss=True, tile_tokens=8)
    assert memory.rows(10**9) == 8
    assert MemoryConfig(tile_bytes=100).rows(30) == 3
    assert MemoryConfig(tile_bytes=1).rows(30) == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tiled_los": True}, "memory="),
        (3, "memory=3"),
        ({"tiled_mlp": "mlp"}, "tiled_mlp='mlp'"),
        ({"tiled_mlp": []}, "tiled_mlp="),
        ({"tile_tokens": 0}, "tile_tokens=0"),
        ({"tile_bytes": 1.5}, "tile_bytes=1.5"),
        ({"tile_bytes": 5, "tile_tokens": 5}, "one of them"),
        ({"head_chunks": 0}, "head_chunks=0"),
        ({"head_chunks": True}, "head_chunks=True"),
        ({"head_chunks": "all"}, "head_chunks='all'"),
        ({"head_chunks": 2, "overlap": 1}, "overlap=1"),
        ({"overlap": True}, "set head_chunks='auto'"),
        ({"checkpoint": "blocks"}, "checkpoint='blocks'"),
        ({"checkpoint": True}, "checkpoint=True"),
        ({"checkpoint": "block", "offload": "gpu"}, "offload='gpu'"),
        ({"offload": "cpu"}, "offload='cpu' without checkpoint"),
        ({"checkpoint_blocks": ["h.*"]}, "without checkpoint"),
        ({"checkpoint": "block", "checkpoint_blocks": "h.*"}, "checkpoint_blocks='h"),
        ({"checkpoint": "block", "checkpoint_blocks": []}, "checkpoint_blocks="),
    ],
)
def test_refused(given: Any, words: str) -> None:
    with pytest.raises(UlyssesError, match=words):
        UlyssesDeepSpeedStrategy(memory=given)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (["--memory.tiled_loss=true", "--memory.tile_tokens=8"], MemoryConfig(tiled_loss=True, tile_tokens=8)),
        (["--memory={tiled_mlp: [a.mlp]}"], MemoryConfig(tiled_mlp=["a.mlp"])),
        (["--memory={head_chunks: 4, overlap: true}"], MemoryConfig(head_chunks=4, overlap=True)),
        (["--memory.head_chunks=auto"], MemoryConfig(head_chunks="auto")),
        (
            ["--memory.checkpoint=block+attention", "--memory.offload=cpu", "--memory.checkpoint_blocks=[h.*]"],
            MemoryConfig(checkpoint="block+attention", offload="cpu", checkpoint_blocks=["h.*"]),
        ),
        ([], MemoryConfig()),
    ],
)
def test_on_a_command_line(line: list[str], wanted: MemoryConfig) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(UlyssesDeepSpeedStrategy, as_group=False)
    made = parser.instantiate_classes(parser.parse_args(line))
    assert UlyssesDeepSpeedStrategy(memory=made.memory).ulysses.memory == wanted
