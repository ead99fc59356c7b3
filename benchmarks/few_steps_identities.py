"""Identities of the few-step objectives, and which of them see a planted mistake: numbers without any training.

    python benchmarks/few_steps_identities.py

The data are one Gaussian, whose flow map is known in closed form. Every objective is judged by its map's identity, its
loss at the exact map (with the exact teacher; and against the known floor without one), its gradient against finite
differences, forward-mode derivatives against differences, its published weight, and the times and noises it compares.
Then each mistake of `MISTAKES` is really planted in the library, and the laws that no longer hold are named.
"""

from __future__ import annotations

import sys
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from _common import emit, parser, table
from _few_steps_cases import CASES, Case, Network, data, fresh_spread, replaced

from consilience.diffusion import EDM, Process, RectifiedFlow, TrigFlow, VPLinear
from consilience.diffusion.consistency import exact_map
from consilience.diffusion.consistency.curriculum import boundary_error
from consilience.testing import few_steps as laws

PROCESSES: tuple[Process, ...] = (EDM(), VPLinear(), RectifiedFlow(), TrigFlow())


def identity(case: Case, free: bool = False) -> float | None:
    """max |f(x, s, s) - x| of a random network's map; of a consistency model also f(x, t_min) - x at the boundary."""
    if case.name == "nct":
        return None
    net = Network(1 if case.one_time else 2)
    model = case.free(net) if free else case.map(net)
    x = data(case.process, 16)
    error = laws.identity_error(model, x) if not (free and case.one_time) else 0.0
    return max(error, boundary_error(model, x)) if case.one_time else error


def zero(case: Case, swapped: bool = False) -> float | None:
    """The loss at the exact map of the teacher."""
    if case.zero is None:
        return None
    model = exact_map(case.source(case.process))
    return case.zero(laws.swapped(model) if swapped else model)


def floor(case: Case, batches: int | None = None) -> tuple[float, float, float] | None:
    """(mean loss of the exact map without a teacher, its known floor, the standard errors between them)."""
    if case.floor is None or case.untaught is None:
        return None
    size, count = case.sizes
    losses, floors = [], []
    for seed in range(batches or count):
        x0 = data(case.process, size, seed)
        if case.name == "nct":
            x0 = torch.randn(size, 2, dtype=torch.float64, generator=laws.generator(seed))
            losses.append(float(case.untaught(lambda z, condition: z, None, x0, laws.generator(1000 + seed))[0]))
            floors.append(case.floor([], x0))
            continue
        recorder = laws.Recorder(exact_map(laws.gaussian(case.process)))
        losses.append(float(case.untaught(recorder.map, None, x0, laws.generator(1000 + seed))[0].detach()))
        floors.append(case.floor(recorder.calls, x0))
    score = laws.z_score([a - b for a, b in zip(losses, floors, strict=True)], 0.0)
    return sum(losses) / len(losses), sum(floors) / len(floors), score


def weight(case: Case) -> float | None:
    """The relative difference of the weight that the loss has from the published one."""
    if case.weight is None:
        return None
    found, published = case.weight()
    return abs(found / published - 1)


def jvp(case: Case, attention: bool) -> float | None:
    """The relative difference of the losses by forward mode and by central differences."""
    if case.jvp is None:
        return None
    net = Network(2, attention)
    exact, finite = (case.jvp(net, how) for how in ("exact", "finite"))
    return abs(exact / finite - 1)


def broken(case: Case) -> list[str]:
    """The laws that do not hold, without those that take long."""
    found = []
    value = zero(case)
    if value is not None and not value < case.bound:
        found.append("zero")
    levels = floor(case, 200 if case.sizes[0] == 1 else 20)
    if levels is not None and not abs(levels[2]) < 5:
        found.append("floor")
    if case.gradient is not None:
        g = case.gradient()
        if not (g.held < 1e-4 and g.copied < 1e-9 and g.moving > 1e-2):
            found.append("gradient")
    off = weight(case)
    if off is not None and not off < 1e-6:
        found.append("weight")
    if case.times is not None and not case.times():
        found.append("times")
    return found


FRESH = replaced("nct", "spread", fresh_spread)
ALONE = ("sct", "mlcm", "tlcm", "scott", "ayf", "rcm", "scflow", "dcm")
"""Their second state is a step from the first, by a teacher or by the data: there is no second noise."""
MISTAKES = ("unshared noise", "no stop-gradient", "no boundary", "ratio stuck", "missing weight", "swapped s and t")


def noticed(case: Case, mistake: str) -> list[str] | None:
    """The laws that see the planted mistake; None where the objective has nothing to be mistaken in."""
    if mistake == "no boundary":
        error = identity(case, free=True)
        return None if error is None else ["identity"] * (error > 1e-2)
    if mistake == "swapped s and t" and case.swap is None:
        if case.zero is None or case.name in ("rcm", "scm"):  # one time
            return None
        value = zero(case, swapped=True)
        return ["zero"] * (value is None or not value < case.bound)
    plant = planting(case, mistake)
    if plant is None:
        return None
    with plant:
        return broken(case)


def planting(case: Case, mistake: str) -> AbstractContextManager[Any] | None:
    """The context in which the mistake is made."""
    if mistake == "ratio stuck":
        return case.stuck() if case.stuck else None
    if mistake == "swapped s and t":
        return case.swap() if case.swap else None
    if mistake == "missing weight" and case.weight is None:
        return None
    if mistake == "unshared noise":
        if case.name == "nct":
            return FRESH()
        if case.name in ALONE:
            return None
    return laws.planted(mistake)  # type: ignore[arg-type]


def maps_table() -> str:
    """The semigroup and the derivative at the exact map, on each process."""
    rows = []
    for process in PROCESSES:
        model = exact_map(laws.gaussian(process))
        t, u, s = (process.time(torch.full((64,), r, dtype=torch.float64)) for r in (5.0, 1.0, 0.1))
        x0 = data(process, 64)
        x = process.add_noise(x0, process.noise((64, 2), t, laws.generator(1)), t)
        velocity = laws.gaussian(process).velocity(x, t)
        rows.append(
            (
                type(process).__name__,
                f"{laws.identity_error(model, x0):.1e}",
                f"{laws.semigroup_error(model, x, t, u, s):.1e}",
                f"{laws.velocity_error(model, velocity, x, t):.1e}",
                f"{laws.semigroup_error(laws.swapped(model), x, t, u, s):.1e}",
            )
        )
    return table(["process", "f(x, s, s) - x", "semigroup", "derivative", "semigroup, s and t swapped"], rows)


def shown(value: float | None) -> str:
    """A number for the table."""
    return "–" if value is None else f"{value:.1e}"


def laws_rows(cases: list[Case]) -> list[dict[str, Any]]:
    """What every objective's laws give."""
    rows = []
    for case in cases:
        levels = floor(case)
        gradient = case.gradient() if case.gradient else None
        rows.append(
            {
                "objective": case.name,
                "identity": identity(case),
                "zero": zero(case),
                "bound": case.bound,
                "loss": levels and levels[0],
                "floor": levels and levels[1],
                "z": levels and levels[2],
                "gradient": gradient and max(gradient.held, gradient.copied),
                "moving": gradient and gradient.moving,
                "jvp": jvp(case, False),
                "attention": jvp(case, True),
                "weight": weight(case),
                "times": None if case.times is None else case.times(),
            }
        )
        print(f"{case.name}", file=sys.stderr)
    return rows


def laws_table(rows: list[dict[str, Any]]) -> str:
    """The laws' numbers."""
    head = ["objective", "f(x, s, s) - x", "loss at the exact map, taught", "loss there, untaught", "its floor", "z"]
    head += ["gradient", "gradient, target moving", "JVP", "JVP, attention", "weight", "times"]
    body = []
    for row in rows:
        level = ("–",) * 3
        if row["loss"] is not None:
            level = (f"{row['loss']:.5f}", f"{row['floor']:.5f}", f"{row['z']:+.1f}")
        right = "–" if row["times"] is None else "right" if row["times"] else "wrong"
        body.append(
            (
                f"`{row['objective']}`",
                shown(row["identity"]),
                shown(row["zero"]),
                *level,
                *(shown(row[name]) for name in ("gradient", "moving", "jvp", "attention", "weight")),
                right,
            )
        )
    return table(head, body)


def mistakes_rows(cases: list[Case]) -> list[dict[str, Any]]:
    """Which laws see each planted mistake."""
    rows = []
    for case in cases:
        print(f"{case.name}: mistakes", file=sys.stderr)
        rows.append({"objective": case.name} | {mistake: noticed(case, mistake) for mistake in MISTAKES})
    return rows


def mistakes_table(rows: list[dict[str, Any]]) -> str:
    """Who notices what."""

    def cell(found: list[str] | None) -> str:
        return "–" if found is None else ", ".join(found) or "NOTHING"

    body = [(f"`{row['objective']}`", *(cell(row[mistake]) for mistake in MISTAKES)) for row in rows]
    return table(["objective", *MISTAKES], body)


def main() -> int:
    """Print the tables."""
    flags = parser(__doc__)
    flags.add_argument("--only", nargs="*", help="objectives by name; all by default")
    options = flags.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cases = [CASES[name] for name in options.only or CASES]
    rows = laws_rows(cases)
    mistakes = mistakes_rows(cases)
    text = "\n\n".join([maps_table(), laws_table(rows), mistakes_table(mistakes)])
    emit(options, {"laws": rows, "mistakes": mistakes}, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
