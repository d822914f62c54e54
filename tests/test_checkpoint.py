import hashlib

import pytest
import torch

from simclr_kernels.checkpoint import (
    DamagedCheckpoint,
    checkpoint_step,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    save_checkpoint,
    write_atomically,
)


def state(value: float) -> dict:
    return {"weights": torch.full((300,), value), "step": 3, "nested": [{"rng": None}, (1, "a")]}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = save_checkpoint(tmp_path / "checkpoints", 7, state(1.5))
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["weights"], state(1.5)["weights"])
    assert loaded["nested"] == [{"rng": None}, (1, "a")]
    assert checkpoint_step(path) == 7


def test_the_name_carries_the_checksum_of_the_bytes(tmp_path):
    path = save_checkpoint(tmp_path, 1, state(2.0))
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem.split("-")[2])


def test_only_the_newest_are_kept_and_no_temporary_file_remains(tmp_path):
    for step in (1, 2, 10, 100):
        save_checkpoint(tmp_path, step, state(step), keep=2)
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [10, 100]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped bit"])
def test_a_damaged_newest_is_refused_and_the_one_before_is_used(tmp_path, damage):
    save_checkpoint(tmp_path, 1, state(1.0))
    newest = save_checkpoint(tmp_path, 2, state(2.0))
    content = bytearray(newest.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = b""
    else:
        content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    path, loaded, refused = load_newest(tmp_path)
    assert checkpoint_step(path) == 1
    assert loaded["weights"][0] == 1.0
    assert len(refused) == 1
    assert newest.name in refused[0]
    assert "truncated or damaged" in refused[0]


def test_all_damaged_says_so_and_names_each(tmp_path):
    paths = [save_checkpoint(tmp_path, step, state(step)) for step in (1, 2)]
    for path in paths:
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DamagedCheckpoint, match="every checkpoint is damaged") as error:
        load_newest(tmp_path)
    assert all(path.name in str(error.value) for path in paths)


def test_an_empty_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        load_newest(tmp_path)


def test_other_names_are_refused(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="a checkpoint is named"):
        load_checkpoint(tmp_path / "model.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "config.yaml"
    write_atomically(target, b"old")
    with pytest.raises(TypeError):
        write_atomically(target, "not bytes")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_keep_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        save_checkpoint(tmp_path, 1, state(0), keep=0)
