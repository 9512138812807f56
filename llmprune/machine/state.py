"""Protects settings that a library keeps once per process from threads that change them at the same time.

Not imported by `import llmprune` alone, which must not load torch.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

# Held while a library changes such settings and restores them: transformers loading a model (torch's default
# dtype and weight initialisers), lm-eval scoring (loggers, warnings, stderr). Two threads at once would
# restore each other's values.
_LIBRARIES = threading.RLock()


@contextmanager
def libraries() -> Iterator[None]:
    """Let one thread at a time use libraries that change process-wide settings.

    Afterwards the random number generators of Python, numpy
    and torch are in the state in which they were before.
    """
    with _LIBRARIES:
        python_state, numpy_state, torch_state = (
            random.getstate(),
            np.random.get_state(),
            torch.get_rng_state(),
        )
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            torch.set_rng_state(torch_state)


class Setting:
    """A process-wide setting with a wanted value while a thread needs it, and its former value afterwards.

    Args:
        read: returns the setting.
        write: changes it.
        wanted: its value while it is needed.
    """

    def __init__(self, read: Callable[[], object], write: Callable[[object], None], wanted: object) -> None:
        self._read, self._write, self._wanted = read, write, wanted
        self._lock = threading.Lock()
        self._users = 0
        self._before: object = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Have the wanted value inside the `with`.

        The last of several threads to leave restores the former value.
        """
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
