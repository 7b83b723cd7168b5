"""Starting the processes of the demo, following their logs, and ending them whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo_log import read_events

HERE = Path(__file__).resolve().parent
TIMEOUT = 400.0  # seconds; on two cores that do nothing else, no stage takes a sixth of it


@dataclass
class Clock:
    """Prints what happens, with the time since the demo began."""

    begin: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begin

    def say(self, text: str) -> None:
        print(f"[{self.seconds:6.1f} s] {text}", flush=True)


@dataclass(frozen=True)
class Ended:
    """What a stage left behind: its events and how it ended."""

    events: list[dict[str, Any]]
    code: int
    log: str

    def all(self, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event]


def launch(
    clock: Clock, name: str, script: str, world: int, arguments: Sequence[object], out: Path, *, dies: bool = False
) -> Ended:
    """Run a script, under torchrun if it has more than one process, and print its progress until it ends.

    If it fails although it is not one that `dies`, the end of its log is printed; the verdict is up to the caller.
    """
    out.mkdir(parents=True, exist_ok=True)
    events = out / f"{name}.jsonl"
    events.unlink(missing_ok=True)
    # torchrun's own options are matched by prefix even behind the script, hence names such as --events
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "--max-restarts", "0"]
    command = [sys.executable, *(torchrun if world > 1 else []), str(HERE / script), *map(str, arguments)]
    command += ["--events", str(events)]
    # one thread a rank, none of which spins while it waits: four ranks share two cores
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo"}
    begin = time.perf_counter()
    with (out / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            _follow(clock, name, process, events, begin)
        finally:
            _end(process)
    text = (out / f"{name}.log").read_text(errors="replace")
    if process.returncode and not dies:
        clock.say(f"{name}: failed with exit code {process.returncode}; its log ends with\n{text[-3000:]}")
    return Ended(read_events(events), process.returncode, text)


def _follow(clock: Clock, name: str, process: subprocess.Popen[bytes], events: Path, begin: float) -> None:
    """Say what the log says until the process ends; TimeoutError if it does not."""
    seen = 0
    running = True
    while running:
        running = process.poll() is None
        news = read_events(events)[seen:]
        seen += len(news)
        for event in news:
            text = _sentence(event)
            if text:
                clock.say(f"{name}: {text}")
        if time.perf_counter() - begin > TIMEOUT:
            raise TimeoutError(f"{name} did not end within {TIMEOUT:.0f} s; see its log")
        time.sleep(0.1 if running else 0)


def _sentence(event: dict[str, Any]) -> str | None:
    step = event.get("step", -1) + 1
    match event["event"]:
        case "step" if step % 10 == 0:
            return f"{step} steps done, loss {event['loss']:.4f}"
        case "restored" if event["start"]:
            return f"restored {event['bytes'] / 1e6:.0f} MB in {event['seconds']:.2f} s, next step {event['start']}"
        case "control" if step % 10 == 0:
            return f"control on {event['layout']}: {step} steps done, loss {event['loss']:.4f}"
        case "closed":
            return f"last step stored in {event['seconds']:.2f} s"
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave nothing behind: ask torchrun to take its ranks down, and insist after a while."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
