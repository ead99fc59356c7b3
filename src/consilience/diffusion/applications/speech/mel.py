"""Mel-spectrograms in NumPy: frames, a triangular filterbank, and logarithms."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def hertz_to_mel(hertz: Array | float) -> Array:
    """2595 log10(1 + f / 700) (O'Shaughnessy 1987)."""
    return np.asarray(2595 * np.log10(1 + np.asarray(hertz) / 700), dtype=np.float64)


def mel_to_hertz(mel: Array | float) -> Array:
    """The inverse of `hertz_to_mel`."""
    return np.asarray(700 * (10 ** (np.asarray(mel) / 2595) - 1), dtype=np.float64)


@dataclass(frozen=True)
class Mel:
    """How sound becomes a spectrogram: samples per second, window and hop in samples, bands from low to high Hz.

    Powers below ``floor`` are taken as it. Raises ValueError unless 0 <= low < high <= rate / 2 and 1 <= hop <= window,
    or where a band is narrower than the window can tell apart.
    """

    rate: int = 8000
    window: int = 512
    hop: int = 160
    bands: int = 24
    low: float = 60.0
    high: float = 4000.0
    floor: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= self.rate / 2 or not 1 <= self.hop <= self.window:
            raise ValueError(
                f"need 0 <= low < high <= rate / 2 and 1 <= hop <= window, got {self.low}, {self.high}, {self.rate}, "
                f"{self.hop} and {self.window}"
            )
        if self.bands < 1 or self.floor <= 0:
            raise ValueError(f"need at least one band and a positive floor, got {self.bands} and {self.floor}")
        if (self.filters.max(1) == 0).any():
            raise ValueError(f"{self.bands} bands are too narrow for a window of {self.window}: take fewer")

    @cached_property
    def centres(self) -> Array:
        """The frequencies at which the bands peak, [bands], evenly spaced in mel between ``low`` and ``high``."""
        return self._edges[1:-1]

    @cached_property
    def filters(self) -> Array:
        """The weights of the bins, [bands, window / 2 + 1]: triangles of height 1 from one centre to the next but one.

        Neighbours sum to 1 between the first and the last centre.
        """
        bins = np.fft.rfftfreq(self.window, 1 / self.rate)
        left, centre, right = (self._edges[k : k + self.bands, None] for k in range(3))
        return np.clip(np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)), 0, None)

    @cached_property
    def _edges(self) -> Array:
        return mel_to_hertz(np.linspace(hertz_to_mel(self.low), hertz_to_mel(self.high), self.bands + 2))

    def frames(self, samples: int) -> int:
        """How many frames so many samples have: one per ``hop``, the last one not full."""
        return -(-samples // self.hop)

    def power(self, wave: Array) -> Array:
        """The power spectrogram [..., bins, frames] of waves [..., samples], each frame centred in its hop."""
        before = (self.window - self.hop) // 2
        count = self.frames(wave.shape[-1])
        after = (count - 1) * self.hop + self.window - before - wave.shape[-1]
        padded = np.pad(wave, [(0, 0)] * (wave.ndim - 1) + [(before, max(after, 0))])
        framed = np.lib.stride_tricks.sliding_window_view(padded, self.window, axis=-1)[..., :: self.hop, :]
        spectrum = np.fft.rfft(framed[..., :count, :] * self._taper)
        return np.swapaxes(np.abs(spectrum) ** 2, -1, -2)

    def log(self, wave: Array) -> Array:
        """The log mel-spectrogram [..., bands, frames] of waves [..., samples]: natural logarithms of band powers.

        A sinusoid of amplitude 1 on a bin at a band's centre has a power of about 1, a logarithm of 0.
        """
        return np.log(np.maximum(self.filters @ self.power(wave), self.floor))

    @cached_property
    def _taper(self) -> Array:
        """A Hann window under which a sinusoid of amplitude 1 has the powers 1/4, 1, 1/4 in its three bins."""
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(self.window) / self.window)
        return window * (2 / window.sum())
