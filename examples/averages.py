"""Which average of a run's checkpoints is best? A small byte-level GPT, trained from several seeds.

    python examples/averages.py --seeds 5 --out averages-out

Trains on the documentation that ships with Python, once with a constant learning rate and once with one that decays over the
last third, saves while it does, and then makes averages of what is saved: recipes that are loaded, none is written. Every one
is scored on text that neither training nor search has seen. Prints a table (mean and spread over the seeds, and how often a
method beats the last step) and keeps the numbers as JSON. Half a minute a seed on an idle core.
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

import corpus
import gpt
import torch
from torch import Tensor

import ckpt

CONFIG = gpt.GPTConfig(width=64, depth=2, heads=4, dropout=0.0)
BATCH, LEARNING_RATE, WARMUP = 24, 2e-3, 40
SAVES = 12

RECIPES = {
    "EMA, half-life of one spacing": "ema",
    "SWA (uniform)": "uniform",
    "WSM 1-sqrt": "wsm:1-sqrt",
    "MWA-loss, loss^-4": "mwa:loss,4",
    "MWA-loss, by range, 4": "mwa:loss,4,range",
    "MWA-step, step^4": "mwa:step,4",
}


@dataclass(frozen=True)
class Texts:
    """What is trained on, what searches look at, and what nobody sees before the end."""

    train: Tensor
    search: Tensor
    held_out: Tensor


def texts() -> Texts:
    """The last tenth of the text is cut in two."""
    text = corpus.english_bytes()
    a, b = int(len(text) * 0.90), int(len(text) * 0.95)
    return Texts(text[:a], text[a:b], text[b:])


def windows(text: Tensor, count: int) -> Tensor:
    """`count` windows spread evenly over a text: (count, context + 1)."""
    starts = torch.linspace(0, len(text) - CONFIG.context - 2, count).long()
    return torch.stack([text[s : s + CONFIG.context + 1] for s in starts.tolist()])


def loss_of(model: gpt.GPT, some: Tensor) -> float:
    """Mean cross entropy of the next byte, in nats."""
    with torch.no_grad():
        parts = [model(x[:, :-1], x[:, 1:], torch.zeros(len(x), dtype=torch.long)) for x in some.split(128)]
    return sum(float(p) * len(x) for p, x in zip(parts, some.split(128), strict=True)) / len(some)


def rate(step: int, total: int, decay: bool) -> float:
    """Warm-up, then constant; with `decay` linear to a hundredth over the last third."""
    begin = total - total // 3
    falling = 1 - 0.99 * (step - begin) / (total - begin) if decay and step >= begin else 1.0
    return min((step + 1) / WARMUP, falling)


def train(run: Path, text: Tensor, total: int, decay: bool, seed: int) -> None:
    """Saves the model `SAVES` times over the last third of the steps, with the mean loss since the last time."""
    torch.manual_seed(seed)
    model = gpt.GPT(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, total, decay))
    loader = corpus.Loader(text, context=CONFIG.context, global_batch=BATCH, rank=0, world=1, seed=seed)
    every = total // 3 // SAVES
    losses: list[float] = []
    for step in range(total):
        batch = next(loader)
        loss = model(batch.tokens, batch.targets, torch.zeros(BATCH, dtype=torch.long))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
        if (total - 1 - step) % every == 0 and step >= total - every * SAVES:
            ckpt.save({"model": model}, run, step=step, metrics={"loss": statistics.mean(losses[-every:])})


def scored(run: Path, given: Texts, budget: int, every: int) -> dict[str, dict[str, float]]:
    """Name -> loss on the search text and on the held-out one, of the last step and of each average."""
    look, unseen = windows(given.search, 128), windows(given.held_out, 512)
    model = gpt.GPT(CONFIG)

    def both(recipe: ckpt.Recipe) -> dict[str, float]:
        ckpt.load({"model": model}, recipe)
        return {"search": loss_of(model, look), "held_out": loss_of(model, unseen)}

    out = {"last step": both(ckpt.average(run, last=1))}
    for name, weights in RECIPES.items():
        out[name] = both(ckpt.average(run, weights=f"ema:{0.5 ** (1 / every)!r}" if weights == "ema" else weights))

    def objective(state: Mapping[str, Tensor]) -> float:
        model.load_state_dict(state.under("model"))  # type: ignore[attr-defined]
        return loss_of(model, look)

    for name, method in (("best of the ladder", "ladder"), (f"LCSC, {budget} evaluations", "lcsc")):
        out[name] = both(ckpt.search(run, objective, method=method, budget=budget).recipe)
    return out


def table(results: Mapping[str, list[Mapping[str, Mapping[str, float]]]]) -> str:
    """Markdown: a block a schedule, a row a method, mean and standard deviation over the seeds."""
    lines = []
    for schedule, seeds in results.items():
        lines += [
            f"\n{schedule}, {len(seeds)} seeds\n",
            "| | held-out loss | gain over the last step | seeds it wins | search loss |",
        ]
        lines.append("|---|---|---|---|---|")
        for name in seeds[0]:
            held = [s[name]["held_out"] for s in seeds]
            gain = [s["last step"]["held_out"] - s[name]["held_out"] for s in seeds]
            search = statistics.mean(s[name]["search"] for s in seeds)
            wins = f"{sum(g > 0 for g in gain)} of {len(gain)}" if name != "last step" else ""
            lines.append(f"| {name} | {_spread(held)} | {_spread(gain)} | {wins} | {search:.4f} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else math.nan:.4f}"


def main(tell: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("averages-out"), help="folder for the runs and the numbers")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=720)
    parser.add_argument("--budget", type=int, default=120, help="evaluations of the search")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that the numbers do not depend on how many there are
    given, results = texts(), {}
    for schedule, decay in (("constant learning rate", False), ("decayed learning rate", True)):
        seeds: list[dict[str, Any]] = []
        for seed in range(args.seeds):
            began = time.monotonic()
            run = args.out / f"{'decayed' if decay else 'constant'}-{seed}"
            train(run, given.train, args.steps, decay, seed)
            seeds.append(scored(run, given, args.budget, args.steps // 3 // SAVES))
            tell(f"{run.name}: last step {seeds[-1]['last step']['held_out']:.4f}, {time.monotonic() - began:.0f} s")
        results[schedule] = seeds
    (args.out / "averages.json").write_text(json.dumps({"steps": args.steps, "results": results}, indent=1) + "\n")
    tell(table(results))


if __name__ == "__main__":
    main()
