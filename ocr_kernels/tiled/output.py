"""Where the result goes: a tensor, an array that the caller has, or a file that appears when it is complete."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ocr_kernels.gather.state import GatherState, Sums


class Output:
    """A new tensor, or the array `out`."""

    def __init__(self, out: Any) -> None:
        if out is not None and not (hasattr(out, "shape") and hasattr(out, "__setitem__")):
            raise TypeError(f"out must be None, an array, a tensor or a path, but is {type(out).__name__}")
        self.out = out

    def open(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        if self.out is None:
            with torch.inference_mode(False):  # the caller may change it
                self.out = torch.empty(shape, dtype=dtype, device=device)
        elif tuple(self.out.shape) != shape:
            raise ValueError(f"out must have shape {shape}, but has {tuple(self.out.shape)}")

    def write(self, rows: slice, columns: slice, values: Tensor) -> None:
        self.out[..., rows, columns] = values if isinstance(self.out, Tensor) else values.cpu().numpy()

    def check(self, is_complete: bool) -> None:
        """Raise ValueError where what an earlier run wrote, all of it or some, is not there."""

    def finish(self) -> Any:
        return self.out


class File(Output):
    """A file of NumPy's, written under the name `<path>.partial` in the same folder until it is complete."""

    def __init__(self, path: Path) -> None:
        if path.suffix != ".npy":
            raise ValueError(f"out must end with .npy, but is {path}")
        if not path.parent.is_dir():
            raise ValueError(f"out must be in a folder that exists, but {path.parent} does not")
        if path.is_dir():
            raise ValueError(f"out must be a file, but {path} is a folder")
        if importlib.util.find_spec("numpy") is None:
            raise ImportError("out can be a path with NumPy alone: pip install numpy")
        self.path = path
        self.partial: Path = path.with_name(f"{path.name}.partial")
        self.has_name = False

    def open(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """Reserve the space, so that a disk is full now or not at all."""
        from numpy.lib.format import open_memmap

        try:
            file = open_memmap(self.partial, mode="w+", dtype=str(dtype).removeprefix("torch."), shape=shape)
            size = file.offset + file.nbytes
            del file
            if hasattr(os, "posix_fallocate"):
                with self.partial.open("r+b") as opened:
                    os.posix_fallocate(opened.fileno(), 0, size)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that reserves nothing
                return
            self.partial.unlink(missing_ok=True)
            raise OSError(error.errno, f"out cannot be written ({error.strerror})", str(self.partial)) from error

    def write(self, rows: slice, columns: slice, values: Tensor) -> None:
        from numpy.lib.format import open_memmap

        file = open_memmap(self.partial, mode="r+")  # not kept open: what is mapped counts as memory
        file[..., rows, columns] = values.cpu().numpy()
        file.flush()

    def check(self, is_complete: bool) -> None:
        from numpy.lib.format import open_memmap

        if is_complete and self.path.exists() and not self.partial.exists():
            self.has_name = True
            return
        try:
            open_memmap(self.partial, mode="r")
        except (FileNotFoundError, ValueError) as error:
            raise _damaged(self.partial) from error

    def finish(self) -> Path:
        if not self.has_name:
            os.replace(self.partial, self.path)
        return self.path


class Journal:
    """How far a run has come, in a file beside its output that is replaced at once after each tile."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path: Path = path.with_name(f"{path.name}.journal")
        self.settings = settings

    def load(self) -> tuple[list[list[Tensor]], list[GatherState | None], int] | None:
        """What was saved last; None if nothing was.

        Raises:
            ValueError: the run had other settings, or the file is damaged.
        """
        if not self.path.exists():
            return None
        try:
            with torch.serialization.safe_globals([GatherState, Sums]):
                saved = torch.load(self.path, weights_only=True)
            before, regions, states, done = (saved[name] for name in ("settings", "regions", "states", "done"))
        except OSError:
            raise
        except Exception as error:  # torch.load raises anything
            raise _damaged(self.path) from error
        now = self.settings
        changed = [f"{name} {before.get(name)}, now {now[name]}" for name in now if before.get(name) != now[name]]
        if changed:
            raise ValueError(f"restart must have the settings of the run that was stopped; it had {'; '.join(changed)}")
        return regions, states, done

    def save(self, regions: list[list[Tensor]], states: list[GatherState | None], done: int) -> None:
        save({"settings": self.settings, "regions": regions, "states": states, "done": done}, self.path)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _damaged(path: Path) -> ValueError:
    return ValueError(f"restart cannot go on with {path}, which is damaged or gone: call without restart")


def save(value: Any, path: Path) -> None:
    """Write or replace a file at once. PyTorch writes to memory, since it does not say when a disk is full."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_bytes(buffer.getbuffer())
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def checksum(*parts: object) -> str:
    """Of the parameters and buffers of those that are modules."""
    digest = hashlib.sha256()
    for module in parts:
        if isinstance(module, nn.Module):
            for name, tensor in module.state_dict().items():
                digest.update(name.encode())
                if isinstance(tensor, Tensor):
                    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
