"""What the package imports, contains and needs."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest
from fresh import in_fresh_python
from models import count_targets, hand_written, pair_batch

import lightning_ulysses
from lightning_ulysses.testing import SplitRun, compare, fit_single, fit_split
from lightning_ulysses.testing.processes import ProcessPool

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_ulysses"


IMPORTS = """
import json, sys
import lightning
before = set(sys.modules)
import lightning_ulysses
print(json.dumps([sorted(before), sorted(set(sys.modules) - before), lightning_ulysses.__version__]))
"""


@pytest.mark.processes
def test_the_import_stays_light() -> None:
    before, added, release = in_fresh_python(IMPORTS)
    heavy = {"deepspeed", "transformers", "flash_attn", "matplotlib", "datasets", "pytorch_lightning"}
    assert not {name.partition(".")[0] for name in added} & heavy
    assert "deepspeed" not in before and "transformers.modeling_utils" not in [*before, *added]
    assert (
        "lightning_ulysses.strategy" in added and "lightning_ulysses.interceptors.transformers.attention" not in added
    )
    assert release == lightning_ulysses.__version__


OTHER_FLAVOUR = """
import ast
import json
import pytorch_lightning, lightning_ulysses
errors = []
for strategy in ("ulysses_deepspeed", "ulysses_deepspeed_stage_3", lightning_ulysses.UlyssesDeepSpeedStrategy()):
    try:
        pytorch_lightning.Trainer(strategy=strategy, accelerator="cpu", devices=1)
    except Exception as error:
        errors.append([type(error).__name__, str(error)])
registered = [name for name in pytorch_lightning.strategies.StrategyRegistry if name.startswith("ulysses")]
print(json.dumps([errors, registered]))
"""


@pytest.mark.processes
def test_a_trainer_of_the_other_flavour_says_what_to_import() -> None:
    errors, registered = in_fresh_python(OTHER_FLAVOUR)
    for (kind, text), name in zip(errors, ("ulysses_deepspeed", "ulysses_deepspeed_stage_3"), strict=False):
        assert kind == "UlyssesError" and f"strategy={name!r}" in text
        assert "Trainer of pytorch_lightning" in text and "import lightning" in text
    # An instance is refused by that Trainer itself, which names both classes.
    kind, text = errors[2]
    assert kind == "ValueError" and "pytorch_lightning.strategies.Strategy" in text
    assert "lightning_ulysses.strategy.UlyssesDeepSpeedStrategy" in text
    assert sorted(registered) == sorted(name for name in registry() if name.startswith("ulysses"))


def registry() -> list[str]:
    from lightning.pytorch.strategies import StrategyRegistry

    return StrategyRegistry.available_strategies()


def test_floors_import_only_from_below() -> None:
    from importlinter.cli import lint_imports

    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True) == 0


def test_modules_keep_no_state() -> None:
    """Nothing at module level changes but the one slot: no `global`, no empty container that waits to be filled."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        found += [f"{path.name}: global" for node in ast.walk(tree) if isinstance(node, ast.Global)]
        for node in tree.body:
            value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
            is_empty = isinstance(value, (ast.List, ast.Dict, ast.Set)) and not [*ast.iter_child_nodes(value)][1:]
            is_made = isinstance(value, ast.Call) and getattr(value.func, "id", "") in {"dict", "list", "set", "deque"}
            if is_empty or is_made:
                found.append(f"{path.name}: {ast.unparse(node)}")
    assert found == []


def test_files_stay_readable() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert len(lengths) > 20
    assert {name: length for name, length in lengths.items() if length > 400} == {}


@pytest.mark.processes
def test_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hatchling.build import build_wheel

    monkeypatch.chdir(ROOT)
    path = tmp_path / build_wheel(str(tmp_path))
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        info = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(info).decode())
    modules = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == {*modules, "lightning_ulysses/py.typed"}
    assert metadata["Name"] == "lightning-ulysses" and metadata["Version"] == lightning_ulysses.__version__
    assert set(metadata.get_all("Provides-Extra") or []) == {"flash", "hf", "report", "docs", "dev"}
    required = metadata.get_all("Requires-Dist") or []
    assert any(line.startswith("transformers") and "extra == 'hf'" in line for line in required)
    assert any(line.startswith("flash-attn") and "extra == 'flash'" in line for line in required)
    # What runs have to have is not an extra.
    always = " ".join(line for line in required if "extra" not in line)
    assert all(name in always for name in ("torch>=", "lightning<", "deepspeed<")) and "transformers" not in always
    check_installed(path, tmp_path / "site")


INSTALLED = """
import json, runpy, sys
import lightning_ulysses
sys.argv = ["lightning-ulysses", "--help"]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    print(json.dumps([lightning_ulysses.__file__, end.code]))
"""


def check_installed(wheel: Path, target: Path) -> None:
    """The package and its command from the wheel itself, not from the sources."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True, timeout=240)
    script = str(target / "bin" / "lightning-ulysses")
    file, code = in_fresh_python(INSTALLED.format(script=script), cwd=target, PYTHONPATH=str(target))
    assert file == str(target / "lightning_ulysses" / "__init__.py") and code == 0


def test_upstream_is_the_release_that_the_private_hooks_were_read_from() -> None:
    assert version("lightning").startswith("2.6.") and version("deepspeed").startswith("0.19.")


@pytest.mark.processes
def test_no_compiler_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed would build its shared-memory collectives when it sets up communication on CPUs."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    # Nor may it find what was built before.
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    for name in ("CC", "CXX", "DS_BUILD_OPS"):
        monkeypatch.delenv(name, raising=False)
    assert not any(shutil.which(name) for name in ("g++", "c++", "gcc", "cc", "clang", "ninja"))
    reference = fit_single(hand_written(), [[pair_batch(1, 33)]], count_targets)
    # A copy could have what was found before.
    with ProcessPool(2, timeout=200, copies=False) as fresh:
        result = fit_split(fresh, hand_written(), [pair_batch(1, 33)], SplitRun())[0]
    assert compare(result, reference).largest <= 1e-5
    assert not os.path.exists(tmp_path / "extensions")
