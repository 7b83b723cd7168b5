"""Is a metric-weighted average (MWA) of a fine-tuning better than its mean, or its last step? LoRA on a small GPT.

    python examples/lora.py --seeds 5 --out lora-out

Trains the byte-level GPT of the other examples on the documentation that ships with Python, once; then fine-tunes adapters
(LoRA, arXiv 2106.09685) on the source code of the standard library, from several seeds, once with a constant learning rate
and once with one that decays. Only the adapters are saved and averaged, each factor by itself; the averages are recipes that
are loaded, none is written. All are scored on source code that was not trained on. Prints tables (mean and spread over the
seeds) and keeps the numbers as JSON. About a quarter of a minute a seed on an idle core.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import corpus
import gpt
import torch
from torch import Tensor, nn

import ckpt

CONFIG = gpt.GPTConfig(width=64, depth=2, heads=4, dropout=0.0)
BATCH, LEARNING_RATE, WARMUP, RANK = 24, 1e-2, 10, 8
SAVES = 12
MODULES = (
    "argparse",
    "typing",
    "inspect",
    "tarfile",
    "turtle",
    "mailbox",
    "doctest",
    "optparse",
    "subprocess",
    "zipfile",
)
RECIPES = {
    "uniform mean": "uniform",
    "uniform mean, second half": "half",
    "MWA-loss, loss^-4": "mwa:loss,4",
    "MWA-loss, loss^-16": "mwa:loss,16",
    "MWA-loss, by range, 4": "mwa:loss,4,range",
    "MWA-step, step^1": "mwa:step,1",
    "MWA-step, step^4": "mwa:step,4",
}


class Adapted(nn.Module):
    """A frozen linear layer with a trained update of low rank beside it."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(RANK, frozen.in_features) / math.sqrt(frozen.in_features))
        self.up = nn.Parameter(torch.zeros(frozen.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + x @ self.down.T @ self.up.T


def adapted(model: gpt.GPT) -> nn.ParameterDict:
    """Puts adapters around the linear layers of all blocks, in place; returns them, the only parameters that are trained."""
    model.requires_grad_(False)
    out: dict[str, nn.Parameter] = {}
    for i, block in enumerate(model.blocks):
        for name in ("qkv", "proj", "up", "down"):
            layer = Adapted(getattr(block, name))
            setattr(block, name, layer)
            out |= {f"{i}_{name}_down": layer.down, f"{i}_{name}_up": layer.up}
    return nn.ParameterDict(out)


def source_code() -> Tensor:
    """Modules of the standard library as one array of bytes."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [folder / f"{name}.py" for name in MODULES]
    text = b"\n\n".join(f.read_bytes() for f in files if f.exists())
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def loss_of(model: gpt.GPT, text: Tensor, count: int) -> float:
    """Mean cross entropy of the next byte, in nats, over `count` windows spread evenly over a text."""
    starts = torch.linspace(0, len(text) - CONFIG.context - 2, count).long().tolist()
    some = torch.stack([text[s : s + CONFIG.context + 1] for s in starts])
    with torch.no_grad():
        parts = [model(x[:, :-1], x[:, 1:], torch.zeros(len(x), dtype=torch.long)) for x in some.split(128)]
    return sum(float(p) * len(x) for p, x in zip(parts, some.split(128), strict=True)) / len(some)


def train(
    model: gpt.GPT, text: Tensor, total: int, seed: int, rate: float, decay: bool, saved: Callable[[int, float], None]
) -> None:
    """AdamW; calls `saved(step, mean loss since the last time)` `SAVES` times, evenly."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    loader = corpus.Loader(text, context=CONFIG.context, global_batch=BATCH, rank=0, world=1, seed=seed)
    losses: list[float] = []
    for step in range(1, total + 1):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, step / WARMUP, (1.01 - step / total) if decay else 1.0)
        batch = next(loader)
        loss = model(batch.tokens, batch.targets, torch.zeros(BATCH, dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % (total // SAVES) == 0:
            saved(step, statistics.mean(losses[-(total // SAVES) :]))


def pretrained(out: Path, steps: int) -> Path:
    """The model that all fine-tunings begin with, as a checkpoint."""
    run = out / "base"
    torch.manual_seed(0)
    model = gpt.GPT(CONFIG)
    train(model, corpus.english_bytes(), steps, 0, 2e-3, True, lambda *_: None)
    ckpt.save({"model": model}, run, step=steps)
    return run


def tuned(base: Path, run: Path, code: Tensor, total: int, decay: bool, seed: int, windows: int) -> dict[str, float]:
    """Fine-tunes from one seed; name -> held-out loss of the last step, of each average, and before."""
    edge = int(len(code) * 0.9)
    model = gpt.GPT(CONFIG)
    ckpt.load({"model": model}, base)
    out = {"before the fine-tuning": loss_of(model, code[edge:], windows)}
    torch.manual_seed(seed)
    adapters = adapted(model)
    train(
        model,
        code[:edge],
        total,
        seed,
        LEARNING_RATE,
        decay,
        lambda step, loss: ckpt.save({"adapters": adapters}, run, step=step, metrics={"loss": loss}),
    )
    out["last step"] = loss_of(model, code[edge:], windows)
    for name, weights in RECIPES.items():
        last = SAVES // 2 if weights == "half" else None
        ckpt.load({"adapters": adapters}, ckpt.average(run, weights="uniform" if last else weights, last=last))
        out[name] = loss_of(model, code[edge:], windows)
    return out


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a row a method, a pair of columns a schedule."""
    lines = ["| | " + " | ".join(f"{schedule} | better than the mean" for schedule in results) + " |"]
    lines.append("|---" * (1 + 2 * len(results)) + "|")
    for name in next(iter(results.values()))[0]:
        cells = []
        for seeds in results.values():
            values = [s[name] for s in seeds]
            wins = sum(s[name] < s["uniform mean"] for s in seeds)
            cells += [_spread(values), "" if name == "uniform mean" else f"{wins} of {len(seeds)}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else math.nan:.4f}"


def main(tell: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("lora-out"), help="folder for the runs and the numbers")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--base", type=int, default=960, help="steps of training before the fine-tuning")
    parser.add_argument("--steps", type=int, default=360, help="steps of the fine-tuning")
    parser.add_argument("--windows", type=int, default=512, help="of the held-out text")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that the numbers do not depend on how many there are
    base, code = pretrained(args.out, args.base), source_code()
    results: dict[str, list[Any]] = {}
    for schedule, decay in (("constant learning rate", False), ("decayed learning rate", True)):
        for seed in range(args.seeds):
            began = time.monotonic()
            run = args.out / f"{'decayed' if decay else 'constant'}-{seed}"
            found = tuned(base, run, code, args.steps, decay, seed, args.windows)
            results.setdefault(schedule, []).append(found)
            tell(f"{run.name}: last step {found['last step']:.4f}, {time.monotonic() - began:.0f} s")
    (args.out / "lora.json").write_text(json.dumps({"steps": args.steps, "results": results}, indent=1) + "\n")
    tell(table(results))


if __name__ == "__main__":
    main()
