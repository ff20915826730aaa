"""A checkpoint is complete or not there, whenever its writer is killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_ulysses import UlyssesError
from lightning_ulysses.checkpoints import commit, is_complete, newest_complete
from lightning_ulysses.checkpoints.load import check_optimizer, find
from lightning_ulysses.checkpoints.manifest import NAME, Division, Manifest, lacking, list_files, read, write
from lightning_ulysses.checkpoints.save import saved_whole

DIVISION = Division(2, 3, "bf16", {"sub_group_size": 5})


def manifest(step: int, optimizer: str = "AdamW") -> Manifest:
    return Manifest("run", step, 2, optimizer, DIVISION)


def save(path: Path, step: int, stop: Callable[[], None] = lambda: None) -> None:
    """As two ranks would: the state is the number of the step in two shards."""
    with saved_whole(path, manifest(step), True) as folder:
        (folder / "checkpoint").mkdir(parents=True)
        for shard in ("a.pt", "b.pt"):
            (folder / "checkpoint" / shard).write_text("x" * step)
            stop()


def test_the_manifest_comes_back_and_names_what_is_lacking(tmp_path: Path) -> None:
    save(tmp_path / "last.ckpt", 3)
    path = tmp_path / "last.ckpt"
    found = read(path)
    assert found is not None and found.division == DIVISION and found.step == 3
    assert found.files == {"checkpoint/a.pt": 3, "checkpoint/b.pt": 3} == list_files(path)
    assert lacking(path, found) is None and is_complete(path)
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt"]
    (path / "checkpoint" / "b.pt").write_text("xx")
    assert lacking(path, found) == "checkpoint/b.pt has 2 bytes instead of 3"
    (path / "checkpoint" / "b.pt").unlink()
    assert lacking(path, found) == "checkpoint/b.pt is missing"
    (path / NAME).write_text("{")
    assert not is_complete(path)


class Killed(BaseException):
    """Stands for SIGKILL: nothing is cleaned up."""


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.filterwarnings("ignore:.* is incomplete")
def test_at_every_moment_a_complete_one_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    """Every call that changes the file system is the last one once."""
    if not exchanges:
        monkeypatch.setattr(commit, "_exchange", lambda first, second: False)
    for at in range(100):
        folder = tmp_path / str(at)
        folder.mkdir()
        save(folder / "last.ckpt", 3)
        calls = iter(range(at))

        def killed(name: str, calls: object = calls) -> None:
            if next(calls, None) is None:  # type: ignore[call-overload]
                raise Killed(name)

        with monkeypatch.context() as patch:
            for owner, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree"), (os, "fsync")):
                original = getattr(owner, name)
                patch.setattr(owner, name, lambda *a, o=original, n=name, **k: [killed(n), o(*a, **k)][1])
            try:
                save(folder / "last.ckpt", 5, lambda: killed("shard"))
            except Killed:
                pass
            else:
                assert at > 5
                return
        # Whichever of the names Lightning chooses for "last".
        for name in os.listdir(folder):
            assert is_complete(find(folder / name).path)
        newest = newest_complete(folder)
        assert newest is not None
        kept = read(Path(newest))
        assert kept is not None and kept.step == (5 if is_complete(folder / "last.saving.ckpt") else kept.step)
        # The newest one is not lost when the next one fails as well.
        with pytest.raises(Killed):
            save(folder / "last.ckpt", 6, lambda: killed("next"))
        again = read(Path(newest_complete(folder) or ""))
        assert again is not None and again.step == kept.step
        # What was left does not stay.
        save(folder / "last.ckpt", 7)
        assert os.listdir(folder) == ["last.ckpt"]
        assert find(folder / "last.ckpt").manifest.step == 7  # type: ignore[union-attr]
    pytest.fail("never came to an end")


def test_a_killed_process_leaves_the_former_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "last.ckpt", 3)
    code = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_manifest import save
save(Path({str(tmp_path / "last.ckpt")!r}), 5, lambda: os.kill(os.getpid(), signal.SIGKILL))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "last.saving.ckpt"]
    assert newest_complete(tmp_path) == str(tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match=r"it was not written to its end\). Instead, .*last.ckpt is resumed from"):
        assert find(tmp_path / "last.saving.ckpt").path == tmp_path / "last.ckpt"


def test_an_incomplete_one_is_refused_or_replaced_by_the_newest(tmp_path: Path) -> None:
    for step, name in ((2, "step=2.ckpt"), (4, "step=4.ckpt"), (6, "last.ckpt"), (8, "step=8.ckpt")):
        save(tmp_path / name, step)
    for name in ("last.ckpt", "step=8.ckpt"):
        (tmp_path / name / "checkpoint" / "b.pt").unlink()
    assert newest_complete(tmp_path) == str(tmp_path / "step=4.ckpt")
    with pytest.warns(UserWarning, match=r"b.pt is missing\). Instead, .*step=4.ckpt"):
        assert find(tmp_path / "last.ckpt").path.name == "step=4.ckpt"
    with pytest.raises(UlyssesError) as caught:
        find(tmp_path / "step=8.ckpt")
    assert "checkpoint/b.pt is missing" in str(caught.value) and "step=4.ckpt" in caught.value.fix


def test_a_newer_one_of_the_same_run_takes_the_place_of_the_last(tmp_path: Path) -> None:
    for step, name in ((2, "last.ckpt"), (4, "step=4.ckpt"), (6, "mine.ckpt")):
        save(tmp_path / name, step)
    write(tmp_path / "mine.ckpt", Manifest("another", 6, 2, "AdamW", DIVISION, list_files(tmp_path / "mine.ckpt")))
    with pytest.warns(UserWarning, match=r"last.ckpt is not the newest one. Instead, .*step=4.ckpt"):
        assert find(tmp_path / "last.ckpt").path.name == "step=4.ckpt"
    assert find(tmp_path / "mine.ckpt").path.name == "mine.ckpt"


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "file.ckpt").write_text("")
    for name, kind in (("file.ckpt", "a single file"), ("none.ckpt", "not there"), (".", "which is no sharded")):
        with pytest.raises(UlyssesError, match=kind):
            find(tmp_path / name)


def test_removing_one_never_leaves_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "last.ckpt", 3)

    def killed(*args: object, **kwargs: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            commit.discard(tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").exists()
    # What is left of it goes with the next one that is saved.
    assert os.listdir(tmp_path) == [".last.ckpt.removing"]
    save(tmp_path / "other.ckpt", 3)
    assert os.listdir(tmp_path) == ["other.ckpt"]
    commit.discard(tmp_path / "other.ckpt")
    save(tmp_path / "last.ckpt", 3)
    os.symlink("last.ckpt", tmp_path / "link.ckpt")
    commit.discard(tmp_path / "link.ckpt")
    assert (tmp_path / "last.ckpt").is_dir()
    commit.discard(tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == []


def test_optimizers_with_the_same_state_go_on(tmp_path: Path) -> None:
    write(tmp_path, manifest(1, "AdamW"))
    (tmp_path / "checkpoint").mkdir()
    found = find(tmp_path)
    check_optimizer(found, "AdamW")
    with pytest.warns(UserWarning, match="The state of AdamW is continued by DeepSpeedCPUAdam"):
        check_optimizer(found, "DeepSpeedCPUAdam")
    with pytest.raises(UlyssesError, match="optimizer AdamW to resume with SGD"):
        check_optimizer(found, "SGD")
