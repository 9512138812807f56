"""The seconds of a run by phase, as its record tells them."""

from __future__ import annotations

import time

import torch

from llmprune.machine.device import wait_for


class Clock:
    """Seconds by phase, since the start and since the last lap."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device, self._last = device, time.monotonic()

    def lap(self, phase: str, of_it: tuple[str, float] = ("", 0.0)) -> None:
        """Count the time since the last lap to a phase, except the part of it that belongs to another one."""
        wait_for(self._device)
        now = time.monotonic()
        for name, seconds in ((phase, now - self._last - of_it[1]), of_it):
            if name:
                self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._last = now
