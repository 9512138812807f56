"""Best of several runs, the two sides taking turns: what disturbs one disturbs the other."""

import time


def best(*functions, repeats=3):
    """The shortest time of each function, in seconds."""
    shortest = [float("inf")] * len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            started = time.perf_counter()
            function()
            shortest[i] = min(shortest[i], time.perf_counter() - started)
    return shortest
