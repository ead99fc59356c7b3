"""The error that any solver is left with on the package's digits model: its prediction wavers with the time it is told.

The network is told 1000 t by sines, the fastest of which turn by one radian while t moves by .001. The state is held at
a point of its path and only the told time moves by up to .01: what is left of the flow after a parabola in t is the
wavering. If n evaluations met it at unrelated phases, an integral from t = 1 to 0 with equal weights would keep an
error of its root mean square over sqrt(n): an estimate of the size, no bound.

    python benchmarks/solver_floor.py
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import math

import torch
from _common import emit, parser, table
from torch import Tensor

from consilience.diffusion import Denoiser, solve
from consilience.diffusion.digits import teacher

WINDOW, POINTS = 0.01, 81
COUNTS = (17, 33, 65)


def wavering(model: Denoiser, x: Tensor, t: float) -> tuple[float, float, float]:
    """(rms norm of the wavering at state x [batch, ...] and time t, norm of the flow, period in t)."""
    away = torch.linspace(-WINDOW, WINDOW, POINTS, dtype=torch.float64)
    rows = [model.predict("flow", x, torch.full((len(x),), t + float(step))) for step in away]
    values = torch.stack(rows).reshape(POINTS, -1).double()
    powers = torch.stack([away**0, away, away**2], 1)
    left = values - powers @ torch.linalg.lstsq(powers, values).solution
    spectrum = torch.fft.rfft(left, dim=0).abs().square().sum(1)
    period = 2 * WINDOW / (int(spectrum[1:].argmax()) + 1)
    size = left.reshape(POINTS, len(x), -1).square().sum(2).mean().sqrt()
    norm = values[POINTS // 2].reshape(len(x), -1).norm(dim=1).mean()
    return float(size), float(norm), period


def main() -> None:
    """Run it."""
    options = parser(__doc__, samples=32).parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = teacher().denoiser(torch.arange(options.samples) % 10)
    noise = torch.randn(options.samples, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    data = solve(model, noise, 32).x.float()
    times = [0.02, *(k / 10 for k in range(1, 10)), 0.98]
    found = [wavering(model, (1 - t) * data + t * noise, t) for t in times]
    whole = math.sqrt(sum(size**2 for size, _, _ in found) / len(found))
    floors = {n: whole / math.sqrt(n) for n in COUNTS}
    rows = [
        [t, f"{size:.3f}", f"{norm:.1f}", f"{period:.4f}"] for t, (size, norm, period) in zip(times, found, strict=True)
    ]
    text = table(["t", "wavering", "flow", "period in t"], rows)
    said = ", ".join(f"{floor:.1e} for {n}" for n, floor in floors.items())
    result = {"times": times, "wavering": [one[0] for one in found], "rms": whole, "floor": floors}
    emit(options, result, f"{text}\n\nRoot mean square {whole:.3f}; over the root of the evaluations: {said}.")


if __name__ == "__main__":
    main()
