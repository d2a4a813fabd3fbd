"""Requests stacked and split again, against the same requests one by one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnxruntime import OrtValue

from fusenorm.errors import BadInput
from fusenorm.serving.batching import Batcher, Feed, run_all
from fusenorm.serving.endpoint import Endpoint
from fusenorm.serving.model import Served
from fusenorm.serving.protocol import Input

SHAPES = [(1, 3), (2, 3), (1, 5), (4, 3), (1, 1), (3, 5)]


@pytest.fixture
def served(folder: Path) -> Served:
    return Served(folder)


@pytest.fixture
def runs(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Shapes of the ids of every run."""
    seen: list[list[int]] = []
    run = ort.InferenceSession.run_with_ort_values

    def counted(self: ort.InferenceSession, names: object, feed: Feed, *rest: object) -> object:
        seen.append(list(feed["ids"].shape()))
        return run(self, names, feed, *rest)

    monkeypatch.setattr(ort.InferenceSession, "run_with_ort_values", counted)
    return seen


def arrays(rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng([rows, length, seed])
    return {
        "ids": random.integers(0, 11, (rows, length), np.int32),
        "offset": random.standard_normal((rows, length, 8)).astype(np.float32),
    }


def values(feed: dict[str, np.ndarray]) -> dict[str, OrtValue]:
    return {name: OrtValue.ortvalue_from_numpy(array) for name, array in feed.items()}


def test_stacked_is_as_alone(served: Served, runs: list[list[int]]) -> None:
    feeds = [arrays(*shape) for shape in SHAPES]
    outcomes = run_all(served.session, [values(feed) for feed in feeds], stack=True)
    assert sorted(runs) == [[1, 1], [4, 5], [7, 3]]
    for feed, outcome in zip(feeds, outcomes, strict=True):
        assert isinstance(outcome, dict)
        (y,) = served.session.run(None, feed)
        np.testing.assert_array_equal(outcome["y"].numpy(), y)


def test_nothing_is_stacked_unless_told(served: Served, runs: list[list[int]]) -> None:
    feeds = [values(arrays(2, 3, seed)) for seed in range(4)]
    run_all(served.session, feeds, stack=False)
    assert runs == [[2, 3]] * 4


def test_a_bad_request_fails_alone(served: Served, runs: list[list[int]]) -> None:
    """One out of the table's range among good ones, one of the wrong type, one without rows."""
    good = [arrays(1, 3, seed) for seed in range(3)]
    beyond, wide, none = arrays(1, 3), arrays(1, 3), arrays(0, 3)
    beyond["ids"][0, 0] = 11
    wide["ids"] = wide["ids"].astype(np.int64)
    feeds = [good[0], beyond, good[1], wide, none, good[2]]
    outcomes = run_all(served.session, [values(feed) for feed in feeds], stack=True)
    assert runs == [[4, 3], [1, 3], [1, 3], [1, 3], [1, 3]]  # together, then each for itself
    for index, message in ((1, "out of data bounds"), (3, "int64"), (4, "at least one element")):
        assert isinstance(outcomes[index], BadInput)
        assert message in str(outcomes[index])
    for feed, outcome in zip(feeds, outcomes, strict=True):
        if isinstance(outcome, dict):
            (y,) = served.session.run(None, feed)
            np.testing.assert_array_equal(outcome["y"].numpy(), y)
    assert sum(isinstance(outcome, dict) for outcome in outcomes) == 3


def test_a_batcher_takes_what_came_meanwhile(served: Served, runs: list[list[int]]) -> None:
    feeds = [arrays(1, 3, seed) for seed in range(9)]

    async def ask() -> list[dict[str, OrtValue]]:
        batcher = Batcher(served.session, rows=4)
        return await asyncio.gather(*(batcher.infer(values(feed)) for feed in feeds))

    outcomes = asyncio.run(ask())
    assert runs == [[4, 3], [4, 3], [1, 3]]
    for feed, outcome in zip(feeds, outcomes, strict=True):
        (y,) = served.session.run(None, feed)
        np.testing.assert_array_equal(outcome["y"].numpy(), y)


def test_a_request_larger_than_a_batch(served: Served, runs: list[list[int]]) -> None:
    async def ask() -> None:
        batcher = Batcher(served.session, rows=4)
        await asyncio.gather(*(batcher.infer(values(arrays(rows, 3))) for rows in (9, 1, 3, 1)))

    asyncio.run(ask())
    assert runs == [[9, 3], [4, 3], [1, 3]]


def test_a_batcher_s_errors_are_the_request_s(served: Served) -> None:
    beyond = arrays(1, 3)
    beyond["ids"][0, 0] = 11

    async def ask() -> list[object]:
        batcher = Batcher(served.session, rows=4)
        feeds = (arrays(1, 3), beyond, {"ids": arrays(1, 3)["ids"]})
        answers = (batcher.infer(values(feed)) for feed in feeds)
        return await asyncio.gather(*answers, return_exceptions=True)

    good, bad, missing = asyncio.run(ask())
    assert isinstance(good, dict)
    assert isinstance(bad, BadInput)
    assert isinstance(missing, BadInput)
    assert "'offset' is missing" in str(missing)


def test_a_cancelled_request_is_no_harm(served: Served) -> None:
    async def ask() -> object:
        batcher = Batcher(served.session, rows=2)
        tasks = [asyncio.create_task(batcher.infer(values(arrays(1, 3)))) for _ in range(6)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        tasks[5].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = asyncio.run(ask())
    assert isinstance(outcomes, list)
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds == [dict, asyncio.CancelledError, dict, dict, dict, asyncio.CancelledError]


def test_an_endpoint(folder: Path, served: Served) -> None:
    feed = arrays(2, 3)
    inputs = [
        Input("ids", "INT32", [2, 3], feed["ids"].tolist()),
        Input("offset", "FP32", [2, 3, 8], feed["offset"].tobytes()),
    ]
    endpoint = Endpoint(folder)
    (output,) = asyncio.run(endpoint.infer(inputs))
    assert (output.name, output.datatype) == ("y", "FP32")
    (y,) = served.session.run(None, feed)
    np.testing.assert_array_equal(output.array, y)
    for bad, message in (
        (inputs[:1], "'offset' is missing"),
        ([*inputs, inputs[0]], "'ids' is given twice"),
        ([inputs[0], inputs[1]._replace(name="z")], "'z' is none of the model's"),
    ):
        with pytest.raises(BadInput, match=message):
            asyncio.run(endpoint.infer(bad))
    with pytest.raises(BadInput, match="output 'z' is none of the model's: y"):
        asyncio.run(endpoint.infer(inputs, ["z"]))
