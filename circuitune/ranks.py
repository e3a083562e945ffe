"""Several processes at work on one command, as `torchrun` or `accelerate launch` starts them.

Examples are dealt out like cards: example i belongs to process i mod world. What every process
measured on its own share is brought back into the order of the whole, so all go on with the same
numbers and take the same decisions, and a result does not depend on how many they are (beyond
the rounding of floats). Only the first process, rank 0, reads and writes the run directory, and
only it speaks. In a world of one nothing is sent, and this file imports nothing heavy.
"""

import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from circuitune.errors import UserError

MEETING = timedelta(minutes=5)  # for all processes to start
# For one process to wait for another, as through a stage that the first one does alone. A process
# that ends is noticed at once, whatever this is.
STEP = timedelta(days=1)
# Bad input fails everywhere; the first process tells it, and the others give it this long.
TELLING = timedelta(seconds=10)
STOPPED = 128 + signal.SIGTERM  # exit status of a process that was told to end
TOLD = "circuitune/told"  # note of the first process in the store of the launch

Item = TypeVar("Item")
Items = TypeVar("Items")  # a list, or an array of any library


def rank() -> int:
    """Number of this process, zero-based; 0 if it works alone."""
    group = _group()
    return group.get_rank() if group else 0


def world() -> int:
    """Number of processes that work together; 1 if this one works alone."""
    group = _group()
    return group.get_world_size() if group else 1


def _group() -> Any:
    """The module `torch.distributed` once this process has joined others, else None."""
    distributed = sys.modules.get("torch.distributed")
    joined = distributed and distributed.is_available() and distributed.is_initialized()
    return distributed if joined else None


@dataclass(frozen=True)
class Share:
    """Which items of a list a process has: those at rank, rank + world, rank + 2 world, ...

    The methods that bring shares together must be called by all processes in the same order.
    """

    rank: int
    world: int

    def of(self, items: Items) -> Items:
        """This process's part of a list or array (along its first axis) that all of them hold."""
        return items[self.rank :: self.world]

    def collect(self, items: Sequence[Item]) -> list[Item]:
        """The whole list in its order, on every process, from each one's part of it."""
        if self.world == 1:
            return list(items)
        parts = _exchange(list(items))
        whole: list[Any] = [None] * sum(map(len, parts))
        for number, part in enumerate(parts):
            whole[number :: self.world] = part
        return whole

    def gather(self, values: Items) -> Items:
        """The whole NumPy array, on every process, from each one's part of its *last* axis."""
        if self.world == 1:
            return values
        import numpy as np

        return np.stack(self.collect(list(np.moveaxis(values, -1, 0))), axis=-1)

    def mean(self, values: Items, dim: int) -> Items:
        """Mean of a tensor over the examples of all processes.

        Args:
            values: tensor with this process's examples along ``dim``.
            dim: the axis; it is kept, with length 1.
        """
        own = values.mean(dim, keepdim=True)
        if self.world == 1:
            return own
        parts = _exchange((own.cpu().double(), values.shape[dim]))
        total = sum(part * count for part, count in parts)
        return (total / sum(count for _, count in parts)).to(own)


WHOLE = Share(0, 1)


def share() -> Share:
    """The share of this process; everything if it works alone."""
    return Share(rank(), world())


def first(function: Callable[[], Item]) -> Item:
    """Call a function on the first process alone; all others wait and get its result too."""
    if world() == 1:
        return function()
    box = [function() if rank() == 0 else None]
    with in_step():
        _group().broadcast_object_list(box, src=0)
    return box[0]


def _exchange(value: Any) -> list[Any]:
    """The value of every process, in the order of their ranks."""
    parts = [None] * world()
    with in_step():
        _group().all_gather_object(parts, value)
    return parts


@contextmanager
def in_step() -> Iterator[None]:
    """Work that exchanges data with the others: say what it means that they cannot be reached.

    Raises:
        UserError: they cannot.
    """
    try:
        yield
    except RuntimeError as error:
        # torch has a class only for some of these errors, DistBackendError and the like.
        if not (type(error).__name__.startswith("Dist") or "gloo" in str(error)):
            raise
        raise UserError(
            f"All {world()} processes must work in step, another one has ended or did not answer "
            f"for {STEP // timedelta(hours=1)} hours; see what it said, or start fewer processes "
            "if memory ran out."
        ) from error


def device(name: str) -> str:
    """Device of this process: where a GPU is taken by default, each process takes another one."""
    if world() > 1 and name in ("auto", "cuda"):
        import torch

        if torch.cuda.is_available():
            return f"cuda:{_local_rank() % torch.cuda.device_count()}"
    return name


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def together() -> Iterator[None]:
    """Work together with the processes of the same launch, if there are others; leave at the end.

    Output of all processes but the first is held back. After an exception in the first process
    the others end silently; one that fails alone says why. None is left waiting: whoever waits
    for a process that has ended fails.

    Raises:
        UserError: the environment promises other processes, but they cannot be found.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    store = _meet()
    try:
        with _telling(store) if rank() == 0 else _listening(store):
            yield
    finally:
        _group().destroy_process_group()


def _stop(*_signal: Any) -> None:
    """End on SIGTERM, with which a launcher ends the others, so that nothing is left half-done."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(STOPPED)


def _meet() -> Any:
    """Join the group; gives the store in which all processes can leave notes."""
    # Stack traces of lost connections would drown the sentence that says why a process ended.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch
    from torch import distributed

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(_local_rank() % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, number, size = next(distributed.rendezvous("env://", timeout=MEETING))
        distributed.init_process_group(
            backend, store=store, rank=number, world_size=size, timeout=STEP
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            "Processes that work together must find each other by RANK, WORLD_SIZE, MASTER_ADDR "
            f"and MASTER_PORT, they do not ({str(error)[:120]}); start them with torchrun, or "
            "unset WORLD_SIZE to work in one process."
        ) from error
    signal.signal(signal.SIGTERM, _stop)
    return store


@contextmanager
def _telling(store: Any) -> Iterator[None]:
    """The first process: if it fails, it speaks before it leaves a note that it has spoken."""
    try:
        yield
    except BaseException as error:
        if _is_normal(error):
            raise
        # Printed now: the launcher ends this process as soon as it sees another one end.
        if isinstance(error, Exception):
            traceback.print_exception(error)
        with suppress(RuntimeError):
            store.set(TOLD, "")
        if getattr(error, "code", None) == STOPPED:
            raise UserError(
                "A launch goes on while all its processes do, this one was told to end (SIGTERM) "
                "because another one ended or the whole launch was stopped; see what was said "
                "before, and start the same command again to go on."
            ) from None
        raise SystemExit(getattr(error, "code", 1)) from None


@contextmanager
def _listening(store: Any) -> Iterator[None]:
    """Any other process: silent, unless it fails and the first one does not."""
    words = io.StringIO()
    try:
        with redirect_stdout(words), redirect_stderr(words):
            yield
    except BaseException as error:
        if _is_normal(error):
            raise
        if _is_told(store):
            raise SystemExit(getattr(error, "code", 1)) from None
        sys.stderr.write(words.getvalue())
        raise


def _is_told(store: Any) -> bool:
    """Whether the first process says soon why all end; false also if it is not there any more."""
    until = time.monotonic() + TELLING.total_seconds()
    with suppress(RuntimeError):
        while time.monotonic() < until:
            if store.check([TOLD]):
                return True
            time.sleep(0.05)
    return False


def _is_normal(error: BaseException) -> bool:
    """Whether an exception is only the way in which a command ends."""
    return isinstance(error, SystemExit) and not error.code
