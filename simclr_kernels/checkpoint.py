"""Checkpoints that survive a crash: written aside, synced, renamed; the name carries the checksum.

`step-00000320-9f86d081884c7d65.pt` holds the state after 320 steps, and its bytes have a SHA-256
that starts with `9f86d081884c7d65` (compare `sha256sum FILE`). A file under its final name is
therefore complete or provably damaged, never half-trusted. Only tensors, numbers, strings and
containers are stored: files load with `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from pathlib import Path
from typing import Any

import torch

_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{16})\.pt")


class DamagedCheckpoint(RuntimeError):
    """No checkpoint of a folder can be loaded, or the one asked for is not what was written."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves either the old one or the new one, whole."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    _sync_folder(path.parent)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Store `state` as the checkpoint after `step` steps and drop all but the `keep` newest.

    Args:
        folder: created where missing.
        step: optimiser steps done, >= 0.
        state: nested dict/list/tuple of tensors, numbers, strings, None.
        keep: checkpoints to keep, >= 1; two let a damaged newest one be survived.

    Returns:
        The path written. An older checkpoint is removed only after the new one is on disk.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    digest = hashlib.sha256(content).hexdigest()[:16]
    path = folder / f"step-{step:08d}-{digest}.pt"
    write_atomically(path, content)
    # what a killed run left behind under its temporary name
    for stale in [*list_checkpoints(folder)[:-keep], *folder.glob(".step-*")]:
        stale.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first, by their names alone."""
    found = [path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (checkpoint_step(path), path.stat().st_mtime_ns))


def checkpoint_step(path: Path) -> int:
    """Steps done when `path` was written, from its name."""
    return int(_NAME.fullmatch(path.name)[1])


def load_checkpoint(path: Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read one checkpoint and verify it.

    Raises:
        DamagedCheckpoint: the bytes do not have the checksum in the file's name.
        ValueError: the name is not that of a checkpoint.
    """
    name = _NAME.fullmatch(path.name)
    if name is None:
        raise ValueError(f"a checkpoint is named step-NNNNNNNN-<16 hex digits>.pt, got {path.name}")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:16]
    if digest != name[2]:
        raise DamagedCheckpoint(
            f"{path} is truncated or damaged: its {len(content)} bytes have SHA-256 {digest}..., "
            f"the name says {name[2]}..."
        )
    return torch.load(io.BytesIO(content), map_location=map_location, weights_only=True)


def load_newest(
    folder: Path, map_location: str | torch.device = "cpu"
) -> tuple[Path, dict[str, Any], list[str]]:
    """Read the newest checkpoint that verifies.

    Returns:
        Its path, its state, and one message for each newer checkpoint that was refused.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        DamagedCheckpoint: it holds some, and every one is damaged.
    """
    refused = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, load_checkpoint(path, map_location), refused
        except DamagedCheckpoint as damage:
            refused.append(str(damage))
    if refused:
        raise DamagedCheckpoint("every checkpoint is damaged:\n" + "\n".join(refused))
    raise FileNotFoundError(f"no checkpoint in {folder}")


def _sync_folder(folder: Path) -> None:
    # the rename itself is durable only once the folder is synced
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
