"""Does a searched combination (LCSC) beat EMAs, and how many training steps does it save? A diffusion model of digits.

    pip install scikit-learn        # for the digits that ship with it; `make setup` has done so
    python examples/digits.py --seeds 5 --out digits-out

Trains a small flow-matching model on the 8x8 digits, at a constant learning rate, from several seeds, and saves as it does:
the weights, and EMAs of them that are updated at every step. Quality is a Frechet distance in the features of a small
classifier of digits, always the same one. The search sees other noise and other digits than the score at the end. Prints
tables (mean and spread over the seeds) and keeps the numbers as JSON. About a minute a seed on an idle core.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ckpt

WIDTH, BATCH, LEARNING_RATE, WARMUP = 192, 128, 1e-3, 50
RATES = (0.99, 0.997, 0.999, 0.9997)
COMBINED = 16
STEPS_OF_SAMPLER = 12
FEATURES = 16


@dataclass(frozen=True)
class Digits:
    """Images (n, 64) in [-1, 1] and their labels: for training, for the search, and for the end."""

    train: Tensor
    labels: Tensor
    search: Tensor
    held_out: Tensor


def digits() -> Digits:
    from sklearn.datasets import load_digits  # type: ignore[import-not-found, import-untyped, unused-ignore]

    found = load_digits()
    images = torch.tensor(found.data, dtype=torch.float32) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(found.target)[order]
    return Digits(images[:997], labels[:997], images[997:1397], images[1397:])


class Flow(nn.Module):
    """The velocity that carries noise at time 0 to digits at time 1 (flow matching, arXiv 2210.02747)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(60), 8)))
        self.inner = nn.Sequential(
            nn.Linear(64 + 16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU()
        )
        self.out = nn.Linear(WIDTH, 64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        return self.out(self.inner(torch.cat([x, angles.sin(), angles.cos()], dim=1)))


def loss_of(model: Flow, images: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(images.shape, generator=generator)
    t = torch.rand(len(images), generator=generator)
    x = noise + t[:, None] * (images - noise)
    return F.mse_loss(model(x, t), images - noise)


@torch.no_grad()
def sampled(model: Flow, noise: Tensor) -> Tensor:
    """Euler steps from noise to images."""
    x = noise
    for k in range(STEPS_OF_SAMPLER):
        x = x + model(x, torch.full((len(x),), (k + 0.5) / STEPS_OF_SAMPLER)) / STEPS_OF_SAMPLER
    return x.clamp(-1, 1)


class Features:
    """The last hidden layer of a classifier of the training digits, the same for all seeds."""

    def __init__(self, given: Digits) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.hidden = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, FEATURES), nn.Tanh())
            head = nn.Linear(FEATURES, 10)
            optimizer = torch.optim.AdamW([*self.hidden.parameters(), *head.parameters()], lr=3e-3, weight_decay=0.1)
            for _ in range(400):
                some = torch.randint(len(given.train), (128,))
                noisy = given.train[some] + 0.1 * torch.randn(128, 64)
                optimizer.zero_grad()
                F.cross_entropy(head(self.hidden(noisy)), given.labels[some]).backward()
                optimizer.step()

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.hidden(images).double()
        return found.mean(dim=0), found.T.cov()


def frechet(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """|mean - mean|^2 + trace(A + B - 2 (A B)^(1/2)), of Gaussians with these means and covariances."""
    values, vectors = torch.linalg.eigh(a[1])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    both = torch.linalg.eigvalsh(root @ b[1] @ root).clamp(min=0).sqrt().sum()
    return float((a[0] - b[0]).square().sum() + a[1].trace() + b[1].trace() - 2 * both)


class Judge:
    """Scores models: `search` for searches, `held_out` for the end, of other noise against other digits. Times 1000."""

    def __init__(self, given: Digits, samples: int) -> None:
        self._features = Features(given)
        g = torch.Generator().manual_seed(1)
        self._noise = {
            "search": torch.randn(samples, 64, generator=g),
            "held_out": torch.randn(2 * samples, 64, generator=g),
        }
        self._there = {
            "search": self._features.moments(given.search),
            "held_out": self._features.moments(given.held_out),
        }
        self._model = Flow()

    def __call__(self, state: Mapping[str, Tensor], which: str = "held_out") -> float:
        self._model.load_state_dict(state)
        return 1000 * frechet(self._features.moments(sampled(self._model, self._noise[which])), self._there[which])


def train(run: Path, images: Tensor, total: int, every: int, seed: int) -> None:
    """Saves the model and its EMAs every so many steps."""
    torch.manual_seed(seed)
    model = Flow()
    averages = {
        f"ema{rate}": torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(rate)
        )
        for rate in RATES
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, total + 1):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, step / WARMUP)
        some = images[torch.randint(len(images), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        loss = loss_of(model, some, generator)
        loss.backward()
        optimizer.step()
        for average in averages.values():
            average.update_parameters(model)
        if step % every == 0:
            state = {"model": model, **{name: average.module for name, average in averages.items()}}
            ckpt.save(state, run, step=step, metrics={"loss": loss.item()})


def curves(run: Path, judge: Judge) -> dict[str, dict[int, float]]:
    """Name -> step -> held-out distance, of the weights as they are and of each EMA."""
    out: dict[str, dict[int, float]] = {}
    for term in ckpt.average(run).terms:
        with ckpt.open(term.ref) as c:
            for key in ("model", *(f"ema{rate}" for rate in RATES)):
                state = {n[len(key) + 1 :]: t[:] for n, t in c.tensors.items() if n.startswith(f"{key}.")}
                out.setdefault("last step" if key == "model" else f"EMA {key[3:]}", {})[term.step] = judge(state)
    return out


def searched(
    run: Path, judge: Judge, ends: list[int], every: int, budget: int, seed: int
) -> dict[str, dict[int, float]]:
    """Name -> step -> held-out distance of what is found among the last saves up to that step."""
    out: dict[str, dict[int, float]] = {}
    for end in ends:
        for name, method in (("best of the ladder", "ladder"), ("LCSC", "lcsc")):
            found = ckpt.search(
                run,
                lambda state: judge(state.under("model"), "search"),
                method=method,
                budget=budget,
                only=["model"],
                steps=f"{max(0, end - (COMBINED - 1) * every)}:{end}",
                seed=seed,
            )
            model = Flow()
            ckpt.load({"model": model}, found.recipe)
            out.setdefault(name, {})[end] = judge(model.state_dict())
    return out


def first(curve: Mapping[int, float], wanted: float) -> int | None:
    """The first step from which on a curve's mean over five saves is as good; None if it never gets there."""
    steps = sorted(curve)
    for i in range(len(steps) - 4):
        if statistics.mean(curve[s] for s in steps[i : i + 5]) <= wanted:
            return steps[i + 2]
    return None


def table(results: list[dict[str, dict[int, float]]], ends: list[int]) -> str:
    """Markdown: distances of all methods after each number of steps; then who needs how many steps."""
    lines = ["| | " + " | ".join(f"after {end} steps | better than the last step" for end in ends) + " |"]
    lines.append("|---" * (1 + 2 * len(ends)) + "|")
    for name in results[0]:
        cells = []
        for end in ends:
            values = [r[name][end] for r in results]
            wins = sum(v < r["last step"][end] for v, r in zip(values, results, strict=True))
            cells += [_spread(values), f"{wins} of {len(results)}" if name != "last step" else ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", f"Steps until the same quality as LCSC after {ends[0]} steps (in how many seeds they got there):", ""]
    lines += ["| | steps | seeds |", "|---|---|---|"]
    for name in [n for n in results[0] if n == "last step" or n.startswith("EMA")]:
        steps = [first(r[name], r["LCSC"][ends[0]]) for r in results]
        there = [float(s) for s in steps if s is not None]
        lines.append(f"| {name} | {_spread(there, 0) if there else 'never'} | {len(there)} of {len(steps)} |")
    return "\n".join(lines)


def _spread(values: list[float], places: int = 2) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.{places}f} ± {spread:.{places}f}"


def main(tell: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("digits-out"), help="folder for the runs and the numbers")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4800)
    parser.add_argument("--budget", type=int, default=120, help="evaluations of each search")
    parser.add_argument("--saves", type=int, default=48)
    parser.add_argument("--samples", type=int, default=1000, help="images to score a candidate by")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that the numbers do not depend on how many there are
    given = digits()
    judge = Judge(given, args.samples)
    ends, every = [args.steps // 2, args.steps], args.steps // args.saves
    results: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        began = time.monotonic()
        run = args.out / f"seed-{seed}"
        train(run, given.train, args.steps, every, seed)
        results.append({**curves(run, judge), **searched(run, judge, ends, every, args.budget, seed)})
        tell(f"{run.name}: last step {results[-1]['last step'][args.steps]:.2f}, {time.monotonic() - began:.0f} s")
    (args.out / "digits.json").write_text(json.dumps({"steps": args.steps, "results": results}, indent=1) + "\n")
    tell(table(results, ends))


if __name__ == "__main__":
    main()
