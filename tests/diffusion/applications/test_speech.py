"""One-step speech: the filterbank's laws, tones where they belong, noise about a mean, and a student that learns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from consilience.diffusion import karras_grid, solve
from consilience.diffusion.applications.speech.mel import Mel, hertz_to_mel, mel_to_hertz
from consilience.diffusion.applications.speech.model import (
    PROCESS,
    SIGMA_DATA,
    Decoder,
    Encoder,
    Voice,
    speech_denoiser,
    speech_map,
)
from consilience.diffusion.applications.speech.tones import (
    FRAMES,
    HIGH,
    LOW,
    MEL,
    REST,
    Note,
    Score,
    logarithm,
    perform,
    random_score,
    recordings,
    spectrogram,
)
from consilience.diffusion.applications.speech.training import (
    prior_loss,
    regressed,
    regression_loss,
    spoken,
    student_loss,
    taught,
    teacher_loss,
)
from consilience.diffusion.consistency.shared import teacher_step
from consilience.diffusion.metrics import energy_distance
from consilience.diffusion.training import Decay, cosine, train
from consilience.diffusion.training.trainer import Context

torch.set_num_threads(1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------- spectrograms


@given(st.floats(0, 8000))
def test_the_mel_scale_has_an_inverse(hertz: float) -> None:
    assert float(mel_to_hertz(hertz_to_mel(hertz))) == pytest.approx(hertz, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.sampled_from([256, 512, 1024]), st.floats(0, 300))
def test_neighbouring_bands_share_every_bin_between_them(bands: int, window: int, low: float) -> None:
    """The triangles sum to 1 from the first centre to the last, and no bin belongs to more than two."""
    try:
        mel = Mel(bands=bands, window=window, low=low)
    except ValueError:
        return  # narrower than the window tells apart
    bins = np.fft.rfftfreq(window, 1 / mel.rate)
    inside = (bins >= mel.centres[0]) & (bins <= mel.centres[-1])
    assert np.allclose(mel.filters[:, inside].sum(0), 1)
    assert ((mel.filters > 0).sum(0) <= 2).all()
    assert (mel.filters >= 0).all()
    assert (mel.filters <= 1).all()


def test_a_tone_of_amplitude_one_has_a_power_of_about_one_in_its_own_band() -> None:
    seconds = np.arange(8000) / MEL.rate
    for band in range(3, MEL.bands):
        hertz = round(MEL.centres[band] / 15.625) * 15.625  # the nearest bin of a window of 512
        log = MEL.log(np.sin(2 * np.pi * hertz * seconds))[:, 10:40]
        assert (log.argmax(0) == band).all()
        # 1/4, 1, 1/4 in three bins, under the triangle's weights there
        place = int(hertz / 15.625)
        power = MEL.filters[band, place - 1 : place + 2] @ np.array([0.25, 1, 0.25])[: MEL.filters.shape[1] - place + 1]
        assert np.allclose(log[band], np.log(power), atol=0.05)


def test_frames_are_those_of_a_direct_sum() -> None:
    """The power of one bin in one frame, summed term by term."""
    wave = np.random.default_rng(0).normal(size=3 * MEL.hop)
    power = MEL.power(wave)
    assert power.shape == (MEL.window // 2 + 1, 3)
    padded = np.pad(wave, MEL.window)
    start = MEL.window + MEL.hop - (MEL.window - MEL.hop) // 2
    n = np.arange(MEL.window)
    taper = np.sin(np.pi * n / MEL.window) ** 2
    value = (padded[start : start + MEL.window] * taper * np.exp(-2j * np.pi * 37 * n / MEL.window)).sum()
    assert power[37, 1] == pytest.approx(abs(value * 2 / taper.sum()) ** 2)


@pytest.mark.parametrize(
    "settings", [{"low": 5000.0}, {"hop": 0}, {"hop": 600}, {"bands": 0}, {"floor": 0.0}, {"bands": 200}]
)
def test_spectrograms_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"need|too narrow"):
        Mel(**settings)


# ----------------------------------------------------------------------------------------------------------- tones


def test_a_note_sounds_at_its_pitch_and_a_rest_does_not() -> None:
    score = Score((Note(69, 0, 24), Note(REST, 0, 24)))
    x = logarithm(spectrogram(perform(score, np.random.default_rng(0)))).numpy()
    nearest = int(abs(MEL.centres - 440).argmin())
    assert abs(x[:, 10].argmax() - nearest) <= 1
    assert x[:, 36:].max() < x[:, 10].max() - 6


def test_performances_of_a_score_differ_and_its_level_is_as_said() -> None:
    """A batch is centred with a standard deviation of a half; two performances are apart; one seed is one batch."""
    rng = np.random.default_rng(3)
    scores = [random_score(rng) for _ in range(100)]
    one, same, other = (recordings(scores, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert torch.equal(one["x"], same["x"])
    assert torch.equal(one["score"], other["score"])
    assert abs(float(one["x"].mean())) < 0.05
    assert abs(float(one["x"].std()) - SIGMA_DATA) < 0.05
    assert float((one["x"] - other["x"]).std()) > 0.1


@given(st.integers(0, 10_000))
def test_random_scores_fill_their_frames(seed: int) -> None:
    score = random_score(np.random.default_rng(seed))
    table = score.table()
    assert score.frames == FRAMES
    assert table.shape == (4, FRAMES)
    assert all(note.frames >= 12 for note in score.notes)
    assert any(note.pitch != REST for note in score.notes)
    assert (
        table[2] + table[3] + 1 == np.repeat([n.frames for n in score.notes], [n.frames for n in score.notes])
    ).all()


@pytest.mark.parametrize("note", [Note(LOW - 1, 0, 5), Note(HIGH + 1, 0, 5), Note(60, 3, 5), Note(60, 0, 0)])
def test_notes_that_cannot_be(note: Note) -> None:
    with pytest.raises(ValueError, match="no note"):
        Score((note,))


# -------------------------------------------------------------------------------------------- noise about the mean


class Linear(nn.Module):
    """A stand-in for the decoder that uses all it is given."""

    def forward(self, x: Tensor, c_noise: Tensor, mean: Tensor) -> Tensor:
        return 0.7 * x + 0.3 * mean + 0.1 * c_noise[:, None, None]


def some(seed: int = 0) -> tuple[Tensor, Tensor]:
    noise = torch.randn(2, 3, 5, generator=generator(seed), dtype=torch.float64)
    return noise, torch.randn(2, 3, 5, generator=generator(seed + 1), dtype=torch.float64)


def published(decoder: Callable[..., Tensor], x: Tensor, sigma: float, mean: Tensor) -> Tensor:
    """The denoiser of x = x0 + sigma (eps + mean), written out with the paper's c_skip, c_out and c_in."""
    skip = SIGMA_DATA**2 / ((sigma - PROCESS.sigma_min) ** 2 + SIGMA_DATA**2)
    out = (sigma - PROCESS.sigma_min) * SIGMA_DATA / np.hypot(sigma, SIGMA_DATA)
    c_noise = torch.full((len(x),), np.log(sigma) / 4, dtype=x.dtype)
    return skip * x + out * decoder(x / np.hypot(sigma, SIGMA_DATA), c_noise, mean)


@pytest.mark.parametrize("sigma", [0.002, 0.3, 80.0])
def test_teacher_and_student_are_the_published_denoiser_of_the_shifted_state(sigma: float) -> None:
    y, mean = some()
    x = y + sigma * mean
    wanted = published(Linear(), x, sigma, mean)
    assert torch.allclose(speech_denoiser(Linear()).x0(y, sigma, mean=mean), wanted)
    assert torch.allclose(speech_map(Linear()).x0(y, sigma, mean=mean), wanted)


def test_at_the_least_noise_the_map_is_the_identity() -> None:
    """f(x, eps) = x for x = y + eps mean, whatever the decoder says."""
    y, mean = some()
    for decoder in (Linear(), lambda x, c_noise, mean: 1e3 * x + 5):
        found = speech_map(decoder).x0(y, PROCESS.t_min, mean=mean)
        assert torch.allclose(found, y + PROCESS.t_min * mean, atol=1e-12)


def test_euler_about_the_mean_is_the_published_sampler() -> None:
    """Steps of x with slope (x - D) / sigma from sigma_max (eps + mean) end where ours of y do, up to the shift."""
    noise, mean = some(7)
    grid = karras_grid(9, PROCESS.sigma_min, PROCESS.sigma_max)[:-1]
    x = PROCESS.sigma_max * (noise + mean)
    for here, there in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        x = x + (there - here) * (x - published(Linear(), x, here, mean)) / here
    y = solve(speech_denoiser(Linear()), PROCESS.sigma_max * noise, grid, "euler", mean=mean).x
    assert torch.allclose(y + float(grid[-1]) * mean, x, atol=1e-9)


def test_the_prior_loss_is_the_normal_density() -> None:
    x, mean = some()
    exact = -torch.distributions.Normal(mean, 1.0).log_prob(x).mean()
    assert float(prior_loss(mean, x)) == pytest.approx(float(exact))


# -------------------------------------------------------------------------------------------------------- networks


def batch(count: int = 4, seed: int = 0) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    return recordings([random_score(rng) for _ in range(count)], rng)


def test_the_teachers_loss_teaches_the_encoder_and_the_decoder() -> None:
    torch.manual_seed(0)
    voice = Voice(32)
    loss, log = teacher_loss(voice, batch(), generator())
    assert float(loss.detach()) == pytest.approx(log["diffusion"] + log["prior"], rel=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in voice.encoder.parameters())
    assert voice.decoder.last[-1].weight.grad.abs().sum() > 0
    same = teacher_loss(voice, batch(), generator())[0]
    assert torch.equal(same, loss)


def test_the_students_gradient_reaches_the_student_alone() -> None:
    """Neither the teacher nor the average that is the target takes any; the loss is 0 for nobody's difference."""
    torch.manual_seed(0)
    teacher, student, average = Decoder(32), Decoder(32), Decoder(32)
    data = batch()
    shown = {"x": data["x"], "mean": torch.randn(data["x"].shape, generator=generator(1))}
    loss, log = student_loss(speech_denoiser(teacher), 20)(student, shown, generator(), Context(0, 1, average))
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for net in (teacher, average) for p in net.parameters())
    assert student.last[-1].weight.grad.abs().sum() > 0
    assert log["ratio"] < 1


def test_two_levels_are_distillation_of_the_whole_way() -> None:
    """With two levels the target is the teacher's step from sigma_max to sigma_min, where the map leaves x as it is."""
    torch.manual_seed(0)
    teacher, student = Decoder(32).double(), Decoder(32).double()
    data = batch(2)
    x, mean = data["x"].double(), torch.randn(data["x"].shape, generator=generator(1), dtype=torch.float64)
    loss, _ = student_loss(speech_denoiser(teacher), 2)(
        student, {"x": x, "mean": mean}, generator(4), Context(0, 1, None)
    )
    rng = generator(4)
    torch.randint(1, (2,), generator=rng)
    y = x + PROCESS.sigma_max * torch.randn(x.shape, generator=rng, dtype=torch.float64)
    top, low = (torch.full((2,), level, dtype=torch.float64) for level in (PROCESS.sigma_max, PROCESS.sigma_min))
    target = teacher_step(speech_denoiser(teacher), y, top, low, mean=mean) + PROCESS.sigma_min * mean
    found = published(student, y + PROCESS.sigma_max * mean, PROCESS.sigma_max, mean)
    wanted = (found - target).square().flatten(1).sum(1).mean()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)


def test_what_is_drawn_depends_on_the_noise_alone() -> None:
    torch.manual_seed(0)
    voice = Voice(32).eval()
    data = batch(2)
    with torch.no_grad():
        mean = voice.encoder(data["score"])
    noise = torch.randn(mean.shape, generator=generator(2))
    assert torch.equal(taught(voice.decoder, mean, noise, 3), taught(voice.decoder, mean, noise, 3))
    assert torch.equal(spoken(voice.decoder, mean, noise), spoken(voice.decoder, mean, noise, generator=generator(9)))
    first, second = (spoken(voice.decoder, mean, noise, 2, generator(seed)) for seed in (1, 2))
    assert not torch.equal(first, second)
    # from sigma_max one Euler step to sigma_min keeps sigma_min of the state's slope beside the denoised
    one = taught(voice.decoder, mean, noise, 1)
    start = PROCESS.sigma_max * noise
    denoised = speech_denoiser(voice.decoder).x0(start, PROCESS.sigma_max, mean=mean)
    share = PROCESS.sigma_min / PROCESS.sigma_max
    assert torch.allclose(one, (share * start + (1 - share) * denoised).detach(), atol=1e-3)


def test_rests_and_notes_have_embeddings_of_their_own() -> None:
    encoder = Encoder(16)
    score = torch.zeros(3, 4, FRAMES, dtype=torch.long)
    score[0, 0], score[1, 0], score[2, 0] = REST, LOW, HIGH
    seen = encoder(score)
    assert seen.shape == (3, MEL.bands, FRAMES)
    assert not torch.allclose(seen[0], seen[1])
    assert not torch.allclose(seen[1], seen[2])


@pytest.mark.slow
def test_the_student_speaks_at_once_what_its_teacher_needs_steps_for() -> None:
    """A training as long as the results page's: one step of the student is nearer the performances than either rival's.

    With half the teacher's steps the student is ahead of the teacher at one step only, not yet of the regression.
    """
    data = batch(1500)
    torch.manual_seed(0)
    options = {"batch_size": 32, "seed": 0, "clip": 1.0, "progress": False}
    voice = train(Voice(), teacher_loss, data, steps=520, lr=cosine(2e-3, 520, 26), ema=0.995, **options).best
    rival = train(Voice(), regression_loss, data, steps=200, lr=cosine(2e-3, 200, 10), ema=0.99, **options).best
    with torch.no_grad():
        mean = voice.encoder(data["score"])
    student = train(
        copy.deepcopy(voice.decoder).requires_grad_(True),
        student_loss(speech_denoiser(voice.decoder), 20),
        {"x": data["x"], "mean": mean},
        steps=260,
        lr=cosine(1e-3, 260, 13),
        ema=(Decay(0.95, warmup=False), Decay(0.99)),
        **options,
    ).averages[-1]
    rng = np.random.default_rng(9)
    scores = [score for _ in range(6) for score in [random_score(rng)] * 16]
    held_out = recordings(scores, rng)
    with torch.no_grad():
        mean = voice.encoder(held_out["score"])
        plain = regressed(rival, held_out["score"])
    noise = torch.randn(mean.shape, generator=generator(1))
    found = {
        "student": spoken(student, mean, noise), "teacher": taught(voice.decoder, mean, noise, 1), "regression": plain
    }  # fmt: skip
    distance = {
        name: np.mean([energy_distance(x[k : k + 16], held_out["x"][k : k + 16]) for k in range(0, 96, 16)])
        for name, x in found.items()
    }
    assert distance["student"] < 0.9 * distance["teacher"]
    assert distance["student"] < 0.9 * distance["regression"]
