"""Many requests as few runs: group what stacks, run each group once, hand every request its rows.

Everything here is onnxruntime's own tensors (OrtValue), copied by address: no other array library
touches the data, so the same code runs where numpy's bridge is broken (Triton's Python stub).
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from onnxruntime import OrtValue
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from fusenorm.errors import BadInput
from fusenorm.runtime.binding import viewed
from fusenorm.runtime.session import ORT_ERRORS, Session

Feed = Mapping[str, OrtValue]
Outcome = dict[str, OrtValue] | Exception


def run_all(session: Session, feeds: Sequence[Feed], *, stack: bool) -> list[Outcome]:
    """Run requests, those of equal trailing shapes as one batch.

    Args:
        session: the model.
        feeds: one per request: every input by name, [rows, ...] where `stack`.
        stack: whether rows along the first axis are independent.

    Returns:
        Per request its outputs by name, or the error that concerns it alone.
    """
    outcomes: list[Outcome] = [BadInput("not run")] * len(feeds)
    groups: dict[object, list[int]] = {}
    for index, feed in enumerate(feeds):
        try:
            check(session, feed)
        except BadInput as error:
            outcomes[index] = error.with_traceback(None)  # whose frames would keep every feed
        else:
            groups.setdefault(_key(feed) if stack else index, []).append(index)
    for members in groups.values():
        results = _run_group(session, [feeds[index] for index in members])
        for index, outcome in zip(members, results, strict=True):
            outcomes[index] = outcome
    return outcomes


def check(session: Session, feed: Feed) -> None:
    """Refuse what the session cannot take, and requests that hold nothing.

    Raises:
        BadInput: names the input.
    """
    session.signature.check({name: viewed(value) for name, value in feed.items()})
    for name, value in feed.items():
        if 0 in value.shape():
            raise BadInput(f"input '{name}' is {value.shape()}: it must hold at least one element")


def _key(feed: Feed) -> object:
    return tuple((name, tuple(feed[name].shape()[1:])) for name in sorted(feed))


def _run_group(session: Session, feeds: Sequence[Feed]) -> list[Outcome]:
    if len(feeds) == 1:
        return [_run(session, feeds[0])]
    whole = _run(session, {name: _stack([feed[name] for feed in feeds]) for name in feeds[0]})
    if isinstance(whole, Exception):  # one request's values may be at fault: find out whose
        return [_run(session, feed) for feed in feeds]
    rows = [next(iter(feed.values())).shape()[0] for feed in feeds]
    parts = {name: _split(value, rows) for name, value in whole.items()}
    return [{name: values[index] for name, values in parts.items()} for index in range(len(feeds))]


def _run(session: Session, feed: Feed) -> Outcome:
    names = [tensor.name for tensor in session.signature.outputs]
    try:
        return dict(zip(names, session.run_with_ort_values(names, feed), strict=True))
    except InvalidArgument as error:
        return BadInput(f"the model cannot take these values: {error}")
    except ORT_ERRORS as error:
        return error


def _stack(values: Sequence[OrtValue]) -> OrtValue:
    """Tensors [rows_i, ...] as one [sum of rows_i, ...]."""
    rows = sum(value.shape()[0] for value in values)
    whole = _empty([rows, *values[0].shape()[1:]], values[0])
    address = whole.data_ptr()
    for value in values:
        size = value.tensor_size_in_bytes()
        ctypes.memmove(address, value.data_ptr(), size)
        address += size
    return whole


def _split(whole: OrtValue, rows: Sequence[int]) -> list[OrtValue]:
    """A tensor [sum of rows, ...] as copies of its parts [rows_i, ...]."""
    parts, address = [], whole.data_ptr()
    for count in rows:
        part = _empty([count, *whole.shape()[1:]], whole)
        size = part.tensor_size_in_bytes()
        ctypes.memmove(part.data_ptr(), address, size)
        address += size
        parts.append(part)
    return parts


def _empty(shape: list[int], like: OrtValue) -> OrtValue:
    return OrtValue.ortvalue_from_shape_and_type(shape, like.element_type())


class Batcher:
    """Batches requests of one event loop: what arrived during a run is the next batch.

    Args:
        session: the model.
        rows: most rows of one batch; 1 runs every request by itself.
    """

    def __init__(self, session: Session, rows: int) -> None:
        self._session = session
        self._rows = rows
        self._waiting: list[tuple[Feed, asyncio.Future[dict[str, OrtValue]]]] = []
        self._runner: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "fusenorm")

    async def infer(self, feed: Feed) -> dict[str, OrtValue]:
        """Outputs by name.

        Raises:
            BadInput: the request cannot be run.
            Exception: one of `ORT_ERRORS`, if it cannot be run on these values.
        """
        check(self._session, feed)
        future: asyncio.Future[dict[str, OrtValue]] = asyncio.get_running_loop().create_future()
        self._waiting.append((feed, future))
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = self._next()
            feeds = [feed for feed, _ in batch]
            outcomes = await loop.run_in_executor(self._thread, self._run_all, feeds)
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                if future.cancelled():
                    continue
                if isinstance(outcome, Exception):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)

    def _run_all(self, feeds: Sequence[Feed]) -> list[Outcome]:
        return run_all(self._session, feeds, stack=self._rows > 1)

    def _next(self) -> list[tuple[Feed, asyncio.Future[dict[str, OrtValue]]]]:
        """As many waiting requests as fit in one batch, at least one."""
        rows = count = 0
        for feed, _ in self._waiting:
            rows += next(iter(feed.values())).shape()[0] if self._rows > 1 else 1
            if count and rows > self._rows:
                break
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch
