"""Whatever fails, whenever: a verified checkpoint stays, leftovers go, the next save is good."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.core.errors import CorruptError, StorageError
from luthier.store.checkpoints import CheckpointStore
from luthier.store.manifest import Entry, read_manifest, verify
from tests.store.faults import FaultyDisk, Killed


def writer(step: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "state.safetensors").write_bytes(random.Random(step).randbytes(2000))
        (folder / "adapter").mkdir()
        (folder / "adapter/adapter_model.safetensors").write_bytes(random.Random(-step).randbytes(500))

    return write


def saved(folder: Path, *steps: int, run: str = "r") -> CheckpointStore:
    store = CheckpointStore(folder, run=run)
    for step in steps:
        store.save(step, writer(step), {"loss": 1 / (step + 1)})
    return store


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_whole_linked_and_carries_its_facts(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", run="r")
    assert store.latest_valid() is None and store.recover() is None and store.steps() == []
    place = store.save(120, writer(120), {"loss": 0.5}, best=True)
    assert place.name == "step-000120"
    assert verify(place).facts == {"loss": 0.5, "run": "r", "step": 120}
    store.save(1_234_567, writer(1), {})
    assert store.steps() == [120, 1_234_567]
    assert (store.linked("best"), store.linked("last")) == (120, 1_234_567)
    assert (tmp_path / "checkpoints/best").readlink() == Path("step-000120")
    assert store.latest_valid() == tmp_path / "checkpoints/step-1234567"
    assert names(tmp_path / "checkpoints") == ["best", "last", "step-000120", "step-1234567"]
    assert store.notices == []


def test_what_a_writer_tells_of_a_file_is_compared_with_the_disk(tmp_path: Path) -> None:
    """Breaks when the digest of what was handed over is not used, or the file is trusted because of it."""
    store = saved(tmp_path, 1)
    meant = random.Random(2).randbytes(2000)

    def spoiled(folder: Path) -> dict[str, Entry]:
        writer(2)(folder)
        (folder / "state.safetensors").write_bytes(meant[:-1] + b"?")
        return {"state.safetensors": Entry(len(meant), hashlib.sha256(meant).hexdigest())}

    with pytest.raises(CorruptError, match=r"state\.safetensors does not match its manifest"):
        store.save(2, spoiled, {})
    assert names(tmp_path) == [".bad-step-000002-1", "last", "step-000001"] and store.linked("last") == 1


def test_the_run_may_move(tmp_path: Path) -> None:
    saved(tmp_path / "a", 1)
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert CheckpointStore(tmp_path / "b", run="r").linked("last") == 1


def test_saving_a_step_again_keeps_the_one_that_is_there_unless_it_is_damaged(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    before = read_manifest(tmp_path / "step-000001").digest
    store.save(1, writer(99), {})
    assert read_manifest(tmp_path / "step-000001").digest == before
    (tmp_path / "step-000001/state.safetensors").write_bytes(b"")
    store.save(1, writer(1), {"loss": 1 / 2})
    assert read_manifest(tmp_path / "step-000001").digest == before
    assert ".bad-step-000001-1" in names(tmp_path)


def test_rotation_keeps_links_pins_and_the_newest(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2, 3, 4, 5, 6)
    store.point("best", 2)
    assert store.rotate(2, pinned=[3]) == [1]
    assert store.steps() == [2, 3, 4, 5, 6]
    assert store.rotate(1) == [3, 4]
    assert store.rotate(0) == [5]
    assert store.steps() == [2, 6]
    assert store.rotate(5) == []


def test_rotation_never_removes_the_last_good_one(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    for step in (2, 3):
        (tmp_path / f"step-{step:06d}/state.safetensors").write_bytes(b"")
    fresh = CheckpointStore(tmp_path, run="r")
    assert fresh.rotate(1) == []
    assert fresh.rotate(0) == []
    assert fresh.latest_valid() == tmp_path / "step-000001"
    assert any("step-000003 is passed over" in notice for notice in fresh.notices)


def test_recovery_sets_damaged_ones_aside_and_mends_links(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2, 3)
    store.point("best", 3)
    with (tmp_path / "step-000003/state.safetensors").open("r+b") as file:
        file.truncate(100)
    (tmp_path / ".tmp-4-99").mkdir()
    (tmp_path / ".del-step-000000-99").mkdir()
    (tmp_path / ".link-best-99").symlink_to("nowhere")
    fresh = CheckpointStore(tmp_path, run="r")
    assert fresh.recover() == tmp_path / "step-000002"
    assert names(tmp_path) == [".bad-step-000003-1", "last", "step-000001", "step-000002"]
    assert fresh.linked("last") == 2 and fresh.linked("best") is None
    assert "state.safetensors is incomplete or altered (100 of 2,000 bytes)" in fresh.notices[0]
    assert "the link best pointed to step-000003" in fresh.notices[1]
    with pytest.raises(CorruptError, match="is not valid"):
        fresh.point("best", 3)


def test_no_valid_checkpoint_among_several_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / f"step-{step:06d}/manifest.json").unlink()
    for _ in range(2):
        with pytest.raises(StorageError, match="no checkpoint is valid"):
            CheckpointStore(tmp_path, run="r").recover()


def test_a_checkpoint_of_another_run_or_step_is_not_ours(tmp_path: Path) -> None:
    saved(tmp_path / "a", 1, run="one")
    saved(tmp_path / "b", 1, run="two")
    shutil.copytree(tmp_path / "b/step-000001", tmp_path / "a/step-000002")
    store = CheckpointStore(tmp_path / "a", run="one")
    assert store.latest_valid() == tmp_path / "a/step-000001"
    assert "holds step 1" in store.notices[0]
    shutil.copytree(tmp_path / "a/step-000001", tmp_path / "b/step-000009")
    shutil.rmtree(tmp_path / "a/step-000001")
    shutil.copytree(tmp_path / "b/step-000001", tmp_path / "a/step-000001")
    store = CheckpointStore(tmp_path / "a", run="one")
    assert store.latest_valid() is None
    assert "belongs to run 'two'" in store.notices[1]


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)

    def broken(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.save(2, broken, {})
    assert names(tmp_path) == ["last", "step-000001"]


def test_too_little_space_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    with pytest.raises(StorageError, match="bytes needed"):
        store.save(2, writer(2), {}, needed_bytes=1 << 60)
    assert names(tmp_path) == ["last", "step-000001"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("forever", [False, True])
def test_every_failing_operation_is_a_storage_error_and_harms_nothing_older(
    tmp_path: Path, code: int, forever: bool
) -> None:
    number, reached = 1, True
    while reached:
        folder = tmp_path / str(number)
        saved(folder, 1, 2)
        disk = FaultyDisk(number, code=code, forever=forever)
        store = CheckpointStore(folder, run="r", disk=disk)
        try:
            store.save(3, writer(3), {}, best=True)
            store.rotate(1)
        except StorageError as error:
            assert os.strerror(code) in str(error)
        for old in (2, 3) if 3 in store.steps() else (1, 2):
            verify(folder / f"step-{old:06d}")
        _starts_well_after(folder)
        reached, number = disk.reached, number + 1
    assert number > 15


def test_a_kill_at_every_operation_leaves_a_verified_checkpoint(tmp_path: Path) -> None:
    number, reached = 1, True
    while reached:
        folder = tmp_path / str(number)
        saved(folder, 1, 2)
        (folder / ".tmp-7-1").mkdir()
        disk = FaultyDisk(number, kills=True)
        store = CheckpointStore(folder, run="r", disk=disk)
        try:
            store.recover()
            store.save(3, writer(3), {}, best=True)
            store.rotate(0)
        except Killed:
            pass
        newest = CheckpointStore(folder, run="r").latest_valid()
        assert newest is not None and newest.name in ("step-000002", "step-000003")
        _starts_well_after(folder)
        reached, number = disk.reached, number + 1
    assert number > 18


def _starts_well_after(folder: Path) -> None:
    """The next start cleans up by itself, and the next save is good."""
    store = CheckpointStore(folder, run="r")
    newest = store.recover()
    assert newest is not None
    assert not [name for name in names(folder) if name.startswith((".tmp", ".del", ".link"))]
    assert store.linked("last") == int(newest.name[5:])
    assert store.save(9, writer(9), {}) == store.latest_valid()


def test_random_damage_is_always_found(tmp_path: Path) -> None:
    saved(tmp_path / "original", 1, 2)
    dice = random.Random(1)
    for trial in range(32):
        folder = tmp_path / "copy"
        shutil.copytree(tmp_path / "original", folder, symlinks=True)
        files = [path for path in (folder / "step-000002").rglob("*") if path.is_file()]
        path = dice.choice(files)
        data = bytearray(path.read_bytes())
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(bytes(data) if trial % 4 else bytes(data[:-1]))
        store = CheckpointStore(folder, run="r")
        assert store.recover() == folder / "step-000001"
        assert path.name in store.notices[0]
        shutil.rmtree(folder)


def test_a_negative_control_without_verification_would_be_fooled(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step-000002/state.safetensors").write_bytes(bytes(2000))
    assert max(path.name for path in tmp_path.glob("step-*")) == "step-000002"
    assert CheckpointStore(tmp_path, run="r").latest_valid() == tmp_path / "step-000001"


@pytest.mark.slow
def test_real_kills_at_random_moments(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys; from pathlib import Path; from luthier.store.checkpoints import CheckpointStore
        store = CheckpointStore(Path(sys.argv[1]), run="r")
        newest = store.recover()
        step = int(newest.name[5:]) if newest else 0
        print("ready", flush=True)
        while True:
            step += 1
            store.save(step, lambda f: (f / "x").write_bytes(bytes([step % 256]) * 100_000), {})
            store.rotate(1)
            print(step, flush=True)
    """)
    dice = random.Random(2)
    for _ in range(25):
        command = [sys.executable, "-c", program, str(tmp_path / "c")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            output = process.stdout
            if output is None:
                raise RuntimeError("no output")
            output.readline()
            time.sleep(dice.uniform(0, 0.15))
            process.kill()
            # The last line may be torn by the kill; only a whole one is an announcement.
            announced = [int(line) for line in output.read().splitlines(keepends=True) if line.endswith("\n")]
        newest = CheckpointStore(tmp_path / "c", run="r").latest_valid()
        if announced:
            assert newest is not None and int(newest.name[5:]) >= announced[-1]
