"""Guidance on class-conditional mixtures whose densities are known: what each method gives and costs, in one run.

Four parts. Guided sampling of a small trained network, against the true conditional distributions. Minority and
density guidance of exact denoisers. Replay for a classifier that learns classes task by task. The two training losses
against the plain one.

    python benchmarks/guidance.py [--plot plot.png]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _common import COLOURS, emit, parser, picture, table
from torch import Tensor, nn

from consilience.diffusion import EDM, Denoiser, GaussianMixture, precondition, solve
from consilience.diffusion import guidance as g
from consilience.diffusion import losses as objectives
from consilience.diffusion.losses import cfg_aligned_loss, denoising_loss, self_perceptual_loss
from consilience.diffusion.metrics import energy_distance

DIM, CLASSES, PARTS, STD = 8, 4, 3, 0.15
PROCESS = EDM(sigma_min=0.005, sigma_max=20.0)
TIMES, WEIGHT = objectives.lognormal_times(-1.0, 1.3), objectives.edm_weight(0.5)
NULL = {"labels": CLASSES}
SCALES = (1.5, 3.0, 6.0, 12.0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -------------------------------------------------------------------------------------------------- data and models


def conditionals() -> list[GaussianMixture]:
    """One mixture of three components per class, in eight dimensions."""
    generator = seeded(0)
    homes = 0.5 * torch.randn(CLASSES, 1, DIM, generator=generator)
    means = homes + 0.35 * torch.randn(CLASSES, PARTS, DIM, generator=generator)
    covariances = STD**2 * torch.eye(DIM).expand(PARTS, DIM, DIM)
    return [GaussianMixture(torch.full((PARTS,), 1 / PARTS), mean, covariances, PROCESS) for mean in means]


class Network(nn.Module):
    """A multilayer perceptron of a state, its noise level and a label."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES + 1, 16)
        self.first = nn.Sequential(nn.Linear(DIM + 17, width), nn.SiLU())
        self.middle = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.last = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, DIM))

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        inside = self.first(torch.cat([x, noise[:, None], self.embedding(labels)], 1))
        return self.last(inside + self.middle(inside))


def view(network: nn.Module) -> Denoiser:
    return precondition(network, PROCESS, 0.5)


Loss = Callable[[Denoiser, dict[str, Tensor], torch.Generator], Tensor]


def plain_loss(model: Denoiser, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """The denoising loss with a tenth of the labels dropped."""
    drop = torch.rand(len(batch["x"]), generator=generator) < 0.1
    labels = torch.where(drop, CLASSES, batch["labels"])
    return denoising_loss(model, {"x": batch["x"], "labels": labels}, generator, times=TIMES, weight=WEIGHT)


def train(network: Network, data: dict[str, Tensor], steps: int, loss: Loss = plain_loss, lr: float = 3e-3) -> Network:
    """Adam with a linearly falling rate; returns the network."""
    generator = seeded(7)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        rows = torch.randint(len(data["x"]), (256,), generator=generator)
        value = loss(view(network), {name: part[rows] for name, part in data.items()}, generator)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network


def training_data(truth: list[GaussianMixture], count: int = 4000) -> dict[str, Tensor]:
    generator = seeded(1)
    x = torch.cat([one.sample(count, generator) for one in truth])
    return {"x": x, "labels": torch.arange(CLASSES).repeat_interleave(count)}


# ----------------------------------------------------------------------------------------------------- what is judged


def judge(x: Tensor, labels: Tensor, truth: list[GaussianMixture], real: list[Tensor]) -> dict[str, float]:
    """Against the true conditionals, class by class, then averaged."""
    rows = []
    for k, one in enumerate(truth):
        mine = x[labels == k]
        away = torch.cdist(mine, one.means).amin(1) / STD
        rows.append(
            (
                energy_distance(mine, real[k]),
                float(mine.var(0).sum() / real[k].var(0).sum()),
                float(mine.norm(dim=1).mean() / real[k].norm(dim=1).mean()),
                float((away > 5).float().mean()),  # 2e-3 of real data, by the chi-square of 8 dimensions
            )
        )
    means = torch.tensor(rows).mean(0).tolist()
    return dict(zip(("distance", "spread", "norm", "outside"), means, strict=True))


def drawn(model: Denoiser, count: int, steps: int) -> tuple[Tensor, Tensor, int]:
    labels = torch.arange(CLASSES).repeat_interleave(count)
    x = PROCESS.prior((len(labels), DIM), seeded(3))
    with torch.no_grad():
        found = solve(model, x, steps, "ab2", labels=labels)
    return found.x, labels, found.nfe


def guided_rows(strong: Denoiser, weak: Denoiser, truth: list[GaussianMixture], o: Namespace) -> list[dict[str, Any]]:
    real = [one.sample(3 * o.samples, seeded(20 + k)) for k, one in enumerate(truth)]
    again = [one.sample(o.samples, seeded(40 + k)) for k, one in enumerate(truth)]
    labels = torch.arange(CLASSES).repeat_interleave(o.samples)
    rows = [{"method": "true samples", "scale": "", **judge(torch.cat(again), labels, truth, real), "nfe": ""}]
    models: list[tuple[str, float, Denoiser]] = [("no guidance", 1.0, strong)]
    for scale in SCALES:
        cfg = g.classifier_free(strong, scale, NULL)
        models += [
            ("classifier-free", scale, cfg),
            ("interval (0.1, 1]", scale, g.interval(cfg, strong, 0.1, 1.0)),
            ("apg", scale, g.apg(strong, scale, NULL, momentum=-0.5, norm_limit=0.3)),
            ("apg, projection alone", scale, g.apg(strong, scale, NULL, momentum=0.0)),
            ("autoguidance", scale, g.autoguidance(strong, weak, scale)),
        ]
    for name, scale, model in models:
        x, labels, nfe = drawn(model, o.samples, o.evaluations)
        rows.append({"method": name, "scale": scale, **judge(x, labels, truth, real), "nfe": nfe})
    return rows


# ------------------------------------------------------------------------------------------------ minorities, density

CENTRES = torch.tensor([[-1.5, 0.0], [1.5, 0.0], [0.0, 2.5]])


class NoisyClassifier(nn.Module):
    """Logits of minority bins from a noisy state of two dimensions and its time."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, bins))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale = torch.hypot(torch.ones_like(t), t)[:, None]
        return self.layers(torch.cat([x / scale, torch.atan(t)[:, None]], 1))


def minority_rows(o: Namespace) -> list[dict[str, Any]]:
    weights = torch.tensor([0.475, 0.475, 0.05])
    model = GaussianMixture(weights, CENTRES, 0.04 * torch.eye(2).expand(3, 2, 2), EDM(sigma_min=0.01, sigma_max=10.0))
    data = model.sample(4000, seeded(1))
    torch.manual_seed(0)
    network = NoisyClassifier(20)
    bins = g.ordinal_bins(g.minority_score(model, data, 2.0, seeded(2)), 20)
    g.fit_minority_classifier(network, model, data, bins, seeded(3), steps=o.classifier_steps)
    network.requires_grad_(False)
    models: list[tuple[str, float, Denoiser]] = [("none", 0.0, model)]
    models += [("minority", scale, g.minority_guidance(model, network, 19, scale)) for scale in (0.5, 1.0, 2.0, 3.5)]
    for scale in (1.0, 2.0, 4.0, 8.0):
        self_guided = g.self_minority(model, scale, 0.5, seeded(4))
        models.append(("self-guided, ratio above 1", scale, g.interval(self_guided, model, 1.0, math.inf)))
    rows, x = [], model.process.prior((2 * o.samples, 2), seeded(5))
    for name, scale, guided in models:
        found = solve(guided, x, 25, "ab2")
        nearest, which = (torch.cdist(found.x, CENTRES) / 0.2).min(1)
        rows.append(
            {
                "method": name,
                "scale": scale,
                "rare": float((which == 2).float().mean()),
                "near": float((nearest < 4).float().mean()),
                "log_density": float(model.log_density(found.x, 0.0).median()),
                "nfe": found.nfe,
            }
        )
    return rows


def density_rows(count: int = 100, dim: int = 128) -> list[dict[str, Any]]:
    means = torch.randn(3, dim, generator=seeded(3), dtype=torch.float64)
    covariances = 0.04 * torch.eye(dim, dtype=torch.float64).expand(3, dim, dim)
    process = EDM(sigma_max=20.0)
    model = GaussianMixture(torch.full((3,), 1 / 3, dtype=torch.float64), means, covariances, process)
    x = process.prior((count, dim), seeded(5), dtype=torch.float64)
    real = model.log_density(model.sample(2000, seeded(6)), 0.0)
    rows = [{"quantile": "true samples", "mean": float(real.mean()), "std": float(real.std()), "nfe": ""}]
    for quantile in (0.1, 0.3, 0.5, 0.7):
        guided = g.interval(g.quantile_guidance(model, quantile), model, 0.2, math.inf)
        found = solve(guided, x, 40, "ab2")
        end = model.log_density(found.x, 0.0)
        rows.append({"quantile": quantile, "mean": float(end.mean()), "std": float(end.std()), "nfe": found.nfe})
    return rows


# ----------------------------------------------------------------------------------------------- continual learning


def circle(count: int = 6, std: float = 0.6) -> list[GaussianMixture]:
    """Overlapping classes on a circle of radius 1.5."""
    angles = 2 * math.pi * torch.tensor([0.0, 3, 1, 4, 2, 5]) / count
    process = EDM(sigma_min=0.02, sigma_max=10.0)
    centres = 1.5 * torch.stack([angles.cos(), angles.sin()], 1)
    covariance = std**2 * torch.eye(2)[None]
    return [GaussianMixture(torch.ones(1), centre[None], covariance, process) for centre in centres]


def class_conditional(classes: list[GaussianMixture]) -> Denoiser:
    centres = torch.cat([one.means for one in classes])
    variance = float(classes[0].covariances[0, 0, 0])

    def function(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        gain = variance / (variance + t**2)
        return centres[labels] + gain * (x - centres[labels])

    return Denoiser(function, classes[0].process)


def continual(seed: int, scale: float, replayed: int, o: Namespace) -> tuple[float, float]:
    """Final average accuracy over all classes, and the mean drop of the old tasks' accuracy since they were learnt."""
    classes, generator = circle(), seeded(seed)
    torch.manual_seed(seed)
    classifier = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 6))
    tests = [one.sample(2000, seeded(900 + k)) for k, one in enumerate(classes)]
    model, best = class_conditional(classes), []

    def accuracy(task: int, seen: int) -> float:
        with torch.no_grad():
            right = [(classifier(tests[k])[:, :seen].argmax(1) == k).float().mean() for k in (2 * task, 2 * task + 1)]
        return float(sum(right) / 2)

    for task in range(3):
        old, new = list(range(2 * task)), [2 * task, 2 * task + 1]
        x = torch.cat([classes[k].sample(500, generator) for k in new])
        y = torch.tensor(new).repeat_interleave(500)
        optimizer = torch.optim.Adam(classifier.parameters(), lr=3e-3)
        for step in range(o.task_steps):
            rows = torch.randint(len(x), (64,), generator=generator)
            seen_x, seen_y = x[rows], y[rows]
            if old:
                if step % 20 == 0:  # every refresh sees the classifier as it is
                    seen = 2 * task + 2
                    guided = g.rehearsal_guidance(model, lambda x0, n=seen: classifier(x0)[:, :n], new, scale)
                    replay = g.rehearsal(guided, old, replayed, (2,), 8, generator, method="ddim")
                seen_x, seen_y = torch.cat([seen_x, replay[0]]), torch.cat([seen_y, replay[1]])
            loss = nn.functional.cross_entropy(classifier(seen_x)[:, : 2 * task + 2], seen_y)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        best.append(accuracy(task, 2 * task + 2))
    final = [accuracy(task, 6) for task in range(3)]
    return sum(final) / 3, sum(best[k] - final[k] for k in range(2)) / 2


def continual_rows(o: Namespace) -> list[dict[str, Any]]:
    rows = []
    for replayed in (4, 16):
        base: Tensor | None = None
        for scale in (0.0, 0.2, 0.5, 1.0, 2.0):
            runs = torch.tensor([continual(seed, scale, replayed, o) for seed in range(o.seeds)])
            base = runs if base is None else base
            gain = runs - base
            rows.append(
                {
                    "replayed": replayed,
                    "scale": scale,
                    "accuracy": float(runs[:, 0].mean()),
                    "forgetting": float(runs[:, 1].mean()),
                    "gain": float(gain[:, 0].mean()),
                    "error": float(gain[:, 0].std() / math.sqrt(o.seeds)) if scale and o.seeds > 1 else 0.0,
                }
            )
    return rows


# ------------------------------------------------------------------------------------------------------------ losses


def loss_rows(plain: Network, data: dict[str, Tensor], truth: list[GaussianMixture], o: Namespace) -> dict[str, Any]:
    """The aligned loss from scratch at several scales; the perceptual one as fine-tuning, without guidance."""
    real = [one.sample(3 * o.samples, seeded(20 + k)) for k, one in enumerate(truth)]

    def aligned(model: Denoiser, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        return cfg_aligned_loss(model, batch, generator, null=NULL, w=(0.0, 4.0), times=TIMES, weight=WEIGHT)

    critic = objectives.frozen(plain)

    def perceptual(model: Denoiser, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        judge = {"critic": view(critic), "features": critic.middle}
        return self_perceptual_loss(model, batch, generator, times=TIMES, **judge)  # type: ignore[arg-type]

    torch.manual_seed(0)
    trained = {"plain": plain, "aligned": train(Network(o.width), data, o.steps, aligned)}
    result: dict[str, Any] = {"aligned": []}
    for scale in (1.0, 1.5, 3.0, 5.0, 9.0):
        for name, network in trained.items():
            x, labels, _ = drawn(g.classifier_free(view(network), scale, NULL), o.samples, o.evaluations)
            result["aligned"].append({"loss": name, "scale": scale, **judge(x, labels, truth, real)})
    tuned: dict[str, Network] = {"before": plain}
    for name, loss in (("plain", plain_loss), ("self-perceptual", perceptual)):
        copy = objectives.frozen(plain).requires_grad_(True).train()
        tuned[name] = train(copy, data, o.steps // 2, loss, 3e-4)
    result["perceptual"] = []
    for name, network in tuned.items():
        x, labels, _ = drawn(view(network), o.samples, o.evaluations)
        result["perceptual"].append({"fine-tuned with": name, **judge(x, labels, truth, real)})
    return result


# ------------------------------------------------------------------------------------------------------------ output


def shown(rows: Sequence[dict[str, Any]], head: Sequence[str], names: Sequence[str], digits: dict[str, int]) -> str:
    def cell(row: dict[str, Any], name: str) -> object:
        value = row[name]
        return f"{value:.{digits[name]}f}" if name in digits and not isinstance(value, str) else value

    return table(head, [[cell(row, name) for name in names] for row in rows])


JUDGED = ("distance", "spread", "norm", "outside")
JUDGED_HEAD = ("energy distance", "spread", "norm", "outside")
DIGITS = {"distance": 4, "spread": 3, "norm": 3, "outside": 3, "scale": 1}


def markdown(result: dict[str, Any]) -> str:
    """Everything the results page shows."""
    head = ("method", "scale", *JUDGED_HEAD, "evaluations")
    judged = {"rare": 3, "near": 3, "log_density": 2, "scale": 1}
    learnt = {"scale": 1, "accuracy": 4, "forgetting": 4, "gain": 4, "error": 4}
    fields = ("replayed", "scale", "accuracy", "forgetting", "gain", "error")
    return "\n\n".join(
        [
            shown(result["guided"], head, ("method", "scale", *JUDGED, "nfe"), DIGITS),
            shown(
                result["minority"],
                ("guidance", "scale", "share of the rare mode", "within 4 std", "median log-density", "evaluations"),
                ("method", "scale", "rare", "near", "log_density", "nfe"),
                judged,
            ),
            shown(
                result["density"],
                ("quantile", "mean log-density", "its std", "evaluations"),
                ("quantile", "mean", "std", "nfe"),
                {"mean": 1, "std": 1},
            ),
            shown(
                result["continual"],
                (
                    "replayed per class",
                    "scale",
                    "final accuracy",
                    "forgetting",
                    "gain over random",
                    "its standard error",
                ),
                fields,
                learnt,
            ),
            shown(
                result["losses"]["aligned"], ("trained with", "scale", *JUDGED_HEAD), ("loss", "scale", *JUDGED), DIGITS
            ),
            shown(
                result["losses"]["perceptual"],
                ("fine-tuned with", *JUDGED_HEAD),
                ("fine-tuned with", *JUDGED),
                DIGITS,
            ),
        ]
    )


def plot(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """Distance and norm against the scale, one line per method."""
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] not in ("true samples", "no guidance")))
    start = next(row for row in rows if row["method"] == "no guidance")
    floor = next(row for row in rows if row["method"] == "true samples")
    with picture(path) as figure:
        for axis, (name, label) in zip(
            figure.subplots(1, 2),
            (("distance", "energy distance to the truth"), ("norm", "norm, of the true one")),
            strict=True,
        ):
            for colour, method in zip(COLOURS, methods, strict=False):
                line = [start, *(row for row in rows if row["method"] == method)]
                axis.plot(
                    [row["scale"] for row in line], [row[name] for row in line], "o-", ms=3, c=colour, label=method
                )
            axis.axhline(max(floor[name], 1e-4), color="0.6", lw=0.8, ls="--")
            axis.set(xlabel="scale", ylabel=label, xscale="log", yscale="log")
            axis.set_xticks([1, 1.5, 3, 6, 12], ["1", "1.5", "3", "6", "12"])
            if name == "norm":
                axis.set_yticks([1, 2, 5], ["1", "2", "5"])
            axis.minorticks_off()
        axis.legend(frameon=False, fontsize=7)


def main() -> None:
    options = parser(
        __doc__, steps=1500, width=128, samples=800, evaluations=24, classifier_steps=600, task_steps=200, seeds=10
    )
    options.add_argument("--plot", help="write the picture here")
    o = options.parse_args()
    torch.set_num_threads(1)
    truth = conditionals()
    data = training_data(truth)
    torch.manual_seed(0)
    strong = train(Network(o.width), data, o.steps)
    weak = train(Network(o.width // 4), data, o.steps // 6)
    result: dict[str, Any] = {
        "guided": guided_rows(view(strong), view(weak), truth, o),
        "minority": minority_rows(o),
        "density": density_rows(),
        "continual": continual_rows(o),
        "losses": loss_rows(strong, data, truth, o),
    }
    if o.plot:
        plot(o.plot, result["guided"])
    emit(o, result, markdown(result))


if __name__ == "__main__":
    main()
