"""Scores and their performances: what is to be played is given, how it is played differs from time to time.

The stand-in for text and speech. A score fixes pitches, durations and timbres; each performance draws the phase of
every note's vibrato and tremolo, its attack and its loudness. A model that predicts the mean performance plays none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilience.diffusion.applications.speech.mel import Array, Mel

MEL = Mel()
"""The spectrograms that scores are played in: 24 bands, 50 frames a second."""

FRAMES = 48
"""Frames of a score, 0.96 seconds."""

REST = 0
LOW, HIGH = 48, 72
"""The pitches of notes, as MIDI numbers: 131 to 523 Hz."""

LOG_MEAN, LOG_STD = -7.4, 2.4
"""Mean and standard deviation of the log mel-spectrograms of random scores."""


class Timbre(NamedTuple):
    """Amplitudes of the harmonics; depth of vibrato in semitones and of tremolo in dB, and their rate in Hz."""

    harmonics: tuple[float, ...]
    vibrato: float
    tremolo: float
    rate: float
    breath: float


TIMBRES = (
    Timbre((1.0, 0.7, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2), 0.6, 4.0, 5.5, 0.01),
    Timbre((1.0, 0.3, 0.2, 0.1, 0.05), 0.1, 10.0, 4.0, 0.03),
    Timbre((1.0, 0.0, 0.6, 0.0, 0.5, 0.0, 0.4), 0.2, 7.0, 7.0, 0.01),
)


class Note(NamedTuple):
    """A pitch (a MIDI number, or `REST`), a timbre (an index of `TIMBRES`) and a duration in frames."""

    pitch: int
    timbre: int
    frames: int


@dataclass(frozen=True, slots=True)
class Score:
    """Notes one after the other. Raises ValueError for a pitch, timbre or duration that cannot be."""

    notes: tuple[Note, ...]

    def __post_init__(self) -> None:
        for note in self.notes:
            pitched = note.pitch == REST or LOW <= note.pitch <= HIGH
            if not pitched or not 0 <= note.timbre < len(TIMBRES) or note.frames < 1:
                raise ValueError(f"no note {note}: pitches are {REST} and {LOW} to {HIGH}, durations at least 1")

    @property
    def frames(self) -> int:
        """Its length."""
        return sum(note.frames for note in self.notes)

    def table(self) -> NDArray[np.int64]:
        """Per frame: pitch, timbre, frames since the note began, frames until it ends; [4, frames]."""
        columns = [(note.pitch, note.timbre, k, note.frames - 1 - k) for note in self.notes for k in range(note.frames)]
        return np.array(columns, dtype=np.int64).T


def random_score(rng: np.random.Generator, frames: int = FRAMES) -> Score:
    """Two or three notes of at least 12 frames; one in twelve is a rest, but not all of them."""
    count = int(rng.integers(2, 4))
    cuts = 12 * np.arange(1, count) + np.sort(rng.integers(0, frames - 12 * count + 1, count - 1))
    lengths = np.diff([0, *cuts, frames])
    pitches = np.where(rng.random(count) < 1 / 12, REST, rng.integers(LOW, HIGH + 1, count))
    if (pitches == REST).all():
        pitches[0] = rng.integers(LOW, HIGH + 1)
    timbres = rng.integers(len(TIMBRES), size=count)
    return Score(tuple(Note(int(p), int(t), int(n)) for p, t, n in zip(pitches, timbres, lengths, strict=True)))


def perform(score: Score, rng: np.random.Generator) -> Array:
    """One performance as a wave [frames * hop], in [-1, 1] or little beyond."""
    return np.concatenate([_note(note, rng) for note in score.notes])


def _note(note: Note, rng: np.random.Generator) -> Array:
    samples = note.frames * MEL.hop
    wave = rng.normal(0, 1e-3, samples)
    if note.pitch == REST:
        return wave
    timbre, seconds = TIMBRES[note.timbre], np.arange(samples) / MEL.rate
    phase, start = rng.uniform(0, 2 * np.pi, 2)
    swing = np.sin(2 * np.pi * timbre.rate * seconds + phase)
    hertz = 440 * 2 ** ((note.pitch - 69 + timbre.vibrato * swing) / 12)
    turn = start + 2 * np.pi * np.cumsum(hertz) / MEL.rate
    tone = sum(a * np.sin(k * turn) for k, a in enumerate(timbre.harmonics, 1) if a)
    attack, level = np.exp(rng.uniform(np.log(0.01), np.log(0.08))), 0.3 * 10 ** (rng.uniform(-3, 3) / 20)
    envelope = (1 - np.exp(-seconds / attack)) * np.minimum(1, (samples / MEL.rate - seconds) / 0.02)
    envelope *= level * 10 ** (timbre.tremolo * swing / 20)
    return np.asarray(wave + envelope * (tone + rng.normal(0, timbre.breath, samples)))


def spectrogram(wave: Array) -> Tensor:
    """The log mel-spectrogram [..., bands, frames] of waves, centred and with a standard deviation of one half."""
    return torch.from_numpy((MEL.log(wave) - LOG_MEAN) / (2 * LOG_STD)).float()


def logarithm(x: Tensor) -> Tensor:
    """The log mel-spectrogram, natural logarithms of powers, of one from `spectrogram` or a model."""
    return x * (2 * LOG_STD) + LOG_MEAN


def recordings(scores: list[Score], rng: np.random.Generator) -> dict[str, Tensor]:
    """One performance of each score: spectrograms ``x`` [n, bands, frames] and ``score`` [n, 4, frames]."""
    x = torch.stack([spectrogram(perform(score, rng)) for score in scores])
    return {"x": x, "score": torch.from_numpy(np.stack([score.table() for score in scores]))}
