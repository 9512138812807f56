"""State that libraries keep once per process, and that threads of one program would change under one another."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Held while a library changes such state for a while and puts it back: transformers loading a model (torch's default dtype, its
# weight initialisers), lm-eval scoring (loggers, warnings, stderr). Two at once would put back what they took from one another.
_LIBRARIES = threading.RLock()


@contextmanager
def libraries() -> Iterator[None]:
    """Alone with the libraries' process-wide state, and the random numbers of Python, numpy and torch afterwards as before."""
    import numpy as np
    import torch

    with _LIBRARIES:
        own, arrays, tensors = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(arrays)
            torch.set_rng_state(tensors)


class Setting:
    """A process-wide setting that is one value while anyone needs it so, and afterwards what it was.

    Args:
        read, write: how the setting is read and set. wanted: its value while someone needs it.
    """

    def __init__(self, read: Callable[[], object], write: Callable[[object], None], wanted: object) -> None:
        self._read, self._write, self._wanted = read, write, wanted
        self._lock = threading.Lock()
        self._users = 0
        self._before: object = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """The wanted value inside the `with`. The last of several threads to leave restores what the first one found."""
        with self._lock:
            if self._users == 0:
                self._before = self._read()
                self._write(self._wanted)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._write(self._before)
