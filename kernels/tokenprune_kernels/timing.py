"""Timing that both benches share: events on a GPU, processor time on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def interleaved_ms(runs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Medians of several runs that take turns (A B A B ...), after one unmeasured turn, in milliseconds.

    Processor time of this process, which other processes on the machine do not add to.
    """
    times: list[list[float]] = [[] for _ in runs]
    for i in range(-1, repeats):
        for run, taken in zip(runs, times, strict=True):
            start = time.process_time()
            run()
            if i >= 0:
                taken.append(1e3 * (time.process_time() - start))
    return [statistics.median(taken) for taken in times]


def cuda_ms(run: Callable[[], object], repeats: int = 50, replays: int = 1) -> float:
    """Median of what a run takes on the GPU, in milliseconds, between events; the L2 cache is flushed before each.

    Args:
        run: what is timed.
        repeats: how often.
        replays: above 1 the run is captured in a graph and replayed so often between two events, its inputs staying
            in the cache: launch costs are then left out.
    """
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    timed = run
    if replays > 1:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(replays):
                run()
        timed = graph.replay
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    pairs = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        timed()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / replays


def copy_bandwidth(gigabytes: float = 2.0) -> float:
    """Bytes read and written by a second of a large copy on the GPU: what a kernel that moves memory is held to."""
    source = torch.randint(-(2**31), 2**31 - 1, (int(gigabytes * 2**28),), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * cuda_ms(lambda: target.copy_(source), repeats=20))
