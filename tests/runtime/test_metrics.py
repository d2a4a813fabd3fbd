from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

from fusenorm.runtime.metrics import BUCKETS, Metrics, Start

START = Start("x86-64-v3", fallback=False, seconds=0.25)


def test_buckets_are_cumulative() -> None:
    metrics = Metrics(START)
    for seconds in (0.0001, 0.0002, 0.02, 60.0):
        metrics.record(seconds, rows=2)
    metrics.record(0.5, rows=7, failed=True)
    now = metrics.snapshot()
    assert (now.runs, now.rows, now.errors) == (4, 8, 1)
    assert now.seconds == 0.0001 + 0.0002 + 0.02 + 60.0
    assert list(now.buckets) == list(BUCKETS)
    expected = {0.0001: 1, 0.00025: 2, 0.01: 2, 0.025: 3, 10.0: 3, math.inf: 4}
    assert {bound: now.buckets[bound] for bound in expected} == expected
    metrics.record(0.0001, rows=1)
    assert metrics.snapshot().runs == 5
    assert now.runs == 4


def test_nothing_is_lost_between_threads() -> None:
    metrics = Metrics(START)

    def work(_: int) -> None:
        for number in range(5000):
            metrics.record(0.001, rows=3, failed=number % 10 == 0)
            if number % 500 == 0:
                metrics.snapshot()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    now = metrics.snapshot()
    assert (now.runs, now.rows, now.errors) == (36000, 108000, 4000)


def test_records_are_added_up_while_nobody_asks() -> None:
    metrics = Metrics(START)
    for _ in range(5000):
        metrics.record(0.001, rows=1)
    assert len(metrics._fresh) < 2000
    assert metrics.snapshot().runs == 5000


def test_prometheus_text() -> None:
    metrics = Metrics(START)
    metrics.record(0.003, rows=4)
    lines = metrics.snapshot().prometheus(model='a"b', version="1").splitlines()
    labels = 'model="a\\"b",version="1",variant="x86-64-v3"'
    assert f"fusenorm_rows_total{{{labels}}} 4" in lines
    assert f"fusenorm_errors_total{{{labels}}} 0" in lines
    assert f"fusenorm_fallback{{{labels}}} 0" in lines
    assert f"fusenorm_load_seconds{{{labels}}} 0.25" in lines
    assert "# TYPE fusenorm_run_seconds histogram" in lines
    assert f'fusenorm_run_seconds_bucket{{{labels},le="0.0025"}} 0' in lines
    assert f'fusenorm_run_seconds_bucket{{{labels},le="0.005"}} 1' in lines
    assert f'fusenorm_run_seconds_bucket{{{labels},le="+Inf"}} 1' in lines
    assert f"fusenorm_run_seconds_sum{{{labels}}} 0.003" in lines
    assert f"fusenorm_run_seconds_count{{{labels}}} 1" in lines
    assert 'variant="none"' in Metrics(Start(None, True, 0.0)).snapshot().prometheus()
