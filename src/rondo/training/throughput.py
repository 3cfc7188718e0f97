"""What a machine can do: the rate that perf/mfu is a fraction of."""

import time

import torch


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large square matrix product, the best of ten.

    It is the machine's own rate, as cooled, clocked and shared, in place of a data sheet's.
    """
    size = 8192 if device.type == "cuda" else 512
    # Random, since a GPU runs faster on plain numbers, and from a stream that is nobody else's.
    stream = torch.Generator(device).manual_seed(0)
    left = torch.randn(size, size, device=device, generator=stream).to(dtype)
    seconds: list[float] = []
    # The first one loads kernels. A CPU without bfloat16 instructions is slow: two more will do.
    while len(seconds) < 2 or (len(seconds) < 11 and sum(seconds[1:]) < 0.5):
        start = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
