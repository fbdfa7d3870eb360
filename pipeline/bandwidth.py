"""The floor under decoding: how fast this machine reads memory."""

import statistics
import time

import torch

BUFFER_BYTES = 256 << 20
"""Larger than any cache, so that every pass reads memory."""


def read_bandwidth(repetitions: int = 7) -> float:
    """Bytes per second of a plain multi-threaded sum over a large buffer; the median of several passes."""
    buffer = torch.ones(BUFFER_BYTES // 8, dtype=torch.int64)
    seconds = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - start)
    return BUFFER_BYTES / statistics.median(seconds[1:])
