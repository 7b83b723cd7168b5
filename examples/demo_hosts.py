"""The demo's second part: six hosts hold every step in each other's memory, two are lost, and the run goes on on four.

Plain `torchrun --nnodes=4:6` on each host; its rendezvous lives outside the hosts, as on a cluster's login node. Hosts are
network namespaces, or, where these are not permitted, groups of processes with addresses of their own. Two of them are
killed with all that runs on them, the one of rank 0 among them. Nothing is written to storage before the end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_launch import HERE, Clock
from demo_log import read_events
from demo_result import Check
from hosts import Hosts
from torch.distributed import TCPStore  # type: ignore[attr-defined]

import ckpt

HOSTS, LEAST, STEPS, LOSE_AFTER = 6, 4, 28, 9
PATIENCE = 240.0  # seconds; on two cores that do nothing else the whole part takes a fifth of it


@dataclass(frozen=True)
class Story:
    """What happened: seconds since the loss, in words, and what has to be true."""

    how: str
    lost: tuple[int, ...]
    lost_at: int
    resumed_at: int
    losses: tuple[tuple[int, float], ...]
    timeline: tuple[tuple[float, str], ...]
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


def tell(clock: Clock, out: Path) -> Story:
    """Runs it all."""
    run, logs = out / "run-hosts", out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    alone, events = logs / "hosts-uninterrupted.jsonl", logs / "hosts.jsonl"
    for path in (alone, events):
        path.unlink(missing_ok=True)
    with Hosts(HOSTS) as hosts:
        how = hosts.why or "network namespaces on a bridge"
        clock.say(f"hosts: six of them, as {'groups of processes: ' + how if hosts.why else how}")
        store = TCPStore(hosts.outside, 0, is_master=True, wait_for_workers=False)
        agents = [_agent(hosts, n, store.port, run, events, logs) for n in range(HOSTS)]
        try:
            lost, moment = _lose(clock, hosts, agents, events)
            left = [agent for n, agent in enumerate(agents) if n not in lost]
            _wait(clock, events, lambda: all(a.poll() is not None for a in left), "the end")
            codes = [a.returncode for a in left]
        finally:
            for agent in agents:
                if agent.poll() is None:
                    agent.kill()
                agent.wait()
    _uninterrupted(run, alone, logs)
    return _story(how, lost, moment, read_events(events), read_events(alone), codes, run)


def _agent(hosts: Hosts, n: int, port: int, run: Path, events: Path, logs: Path) -> subprocess.Popen[bytes]:
    """torchrun on a host, with options of its own only where the waiting of its rendezvous is made shorter."""
    conf = "is_host=false,last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=8"
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nnodes={LEAST}:{HOSTS}", "--nproc-per-node=1",
        "--max-restarts=3", "--monitor-interval=0.2", "--rdzv-backend=c10d", f"--rdzv-endpoint={hosts.outside}:{port}",
        f"--rdzv-conf={conf}", "--rdzv-id=hosts", f"--local-addr={hosts.address(n)}",
        str(HERE / "demo_member.py"), str(run), "--events", str(events), "--steps", str(STEPS),
    ]  # fmt: skip
    environment = {
        **os.environ, **hosts.environment(n), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CKPT_GRACE": "60",
        # torch 2.13's agents remember the store of the first rank 0 for ever, and look for it on a host that is gone
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # fmt: skip
    with (logs / f"hosts-{n}.log").open("wb") as log:
        return subprocess.Popen(
            hosts.command(n, command), stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def _lose(clock: Clock, hosts: Hosts, agents: list[subprocess.Popen[bytes]], events: Path) -> tuple[list[int], float]:
    """Waits until it trains and steps are protected; then two hosts are gone, that of rank 0 and another."""

    def trained() -> bool:
        seen = read_events(events)
        steps = [e["step"] for e in seen if e["event"] == "step"]
        safe = any(e["event"] == "protected" for e in seen)
        if all(a.poll() is not None for a in agents):
            raise RuntimeError("no host trains; see the logs")
        return safe and max(steps, default=-1) >= LOSE_AFTER

    _wait(clock, events, trained, f"step {LOSE_AFTER}")
    begun = [e for e in read_events(events) if e["event"] == "begun"]
    first = next(int(e["host"][1:]) for e in begun if e["rank"] == 0)
    lost = [first, (first + 3) % HOSTS]
    clock.say(f"hosts: h{lost[0]}, which has rank 0, and h{lost[1]} are killed with everything on them")
    moment = time.time()
    threads = [threading.Thread(target=hosts.kill, args=(n,)) for n in lost]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return lost, moment


def _wait(clock: Clock, events: Path, until: Callable[[], bool], what: str) -> None:
    """Says what the log says until something is so; TimeoutError if it is not."""
    end, told = time.monotonic() + PATIENCE, len(read_events(events))
    while not until():
        for event in read_events(events)[told:]:
            told += 1
            if event["event"] == "restored":
                clock.say(f"hosts: {event['world']} ranks begin with step {event['start']}")
            elif event["event"] == "step" and (event["step"] + 1) % 10 == 0:
                clock.say(f"hosts: {event['step'] + 1} steps done, loss {event['loss']:.4f}")
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come within {PATIENCE:.0f} s; see {events}")
        time.sleep(0.1)


def _uninterrupted(run: Path, events: Path, logs: Path) -> None:
    command = [sys.executable, str(HERE / "demo_member.py"), str(run), "--events", str(events), "--alone"]
    with (logs / "hosts-uninterrupted.log").open("wb") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--steps", str(STEPS)], env=environment, stdout=log, stderr=log, timeout=PATIENCE)


def _story(
    how: str, lost: list[int], moment: float, seen: list[dict[str, Any]], alone: list[dict[str, Any]],
    codes: list[int], run: Path,
) -> Story:  # fmt: skip
    """From the logs to the timeline and the verdicts."""
    before, after = [e for e in seen if e["time"] < moment], [e for e in seen if e["time"] >= moment]
    steps = [e for e in seen if e["event"] == "step"]
    safe = max((e["step"] for e in before if e["event"] == "protected"), default=-1)
    at = max((e["step"] for e in before if e["event"] == "step"), default=-1)
    restored = next((e for e in after if e["event"] == "restored"), {})
    noticed = next((e for e in after if e["event"] == "noticed"), {})
    begun = [e for e in after if e["event"] == "begun"]
    running = next((e for e in after if e["event"] == "step" and e["time"] > restored.get("time", moment)), {})
    closed = next((e for e in after if e["event"] == "closed"), {})
    start = restored.get("start", -1)
    reference = {e["step"]: e["loss"] for e in alone if e["event"] == "step"}
    differing = sorted({e["step"] for e in steps if reference.get(e["step"]) != e["loss"]})
    again = [e["step"] for e in steps if e["time"] > restored.get("time", moment)]
    verified = ""
    with suppress(ckpt.CkptError), ckpt.open(str(run)) as stored:
        verified = f"step {stored.step}" if stored.verify().ok and stored.step == STEPS - 1 else ""
    marks = [
        (noticed, "detected: a rank on another host finds its peer gone, torchrun restarts"),
        (max(begun, key=lambda e: e["time"], default={}), f"{LEAST} ranks are up again: torchrun's part"),
        (restored, f"rebuilt: step {start - 1} from the memory of four hosts"),
        (running, f"running: step {running.get('step')} done"),
    ]
    lost_names = " and ".join(f"h{n}" for n in lost)
    timeline = [(0.0, f"lost: {lost_names}, at step {at}, step {safe} being protected")]
    timeline += [(e["time"] - moment, text) for e, text in marks if e]
    checks = (
        Check("six hosts trained, and steps were protected", safe >= 0 and {e["world"] for e in before if "world" in e} == {6}),
        Check("two hosts were lost, that of rank 0 among them", len(lost) == 2, lost_names),
        Check("the run went on on four", {e["world"] for e in begun} == {LEAST} and codes == [0] * LEAST, f"exit codes {codes}"),
        Check(
            "from a step in memory, no older than the one last protected",
            restored.get("source", "").startswith("memory of ") and start - 1 >= safe >= 0,
            f"step {start - 1}; step {safe} was protected, step {at} trained",
        ),
        Check(
            "every loss is bitwise that of the uninterrupted run",
            len(reference) == STEPS and not differing and {e["step"] for e in steps} == set(range(STEPS)),
            f"differs at {differing[:5]}" if differing else f"{len(steps)} losses",
        ),
        Check("steps were protected again on four hosts", any(e["event"] == "protected" and e["step"] >= start for e in after)),
        Check("the last step is stored and verifies", bool(verified) and closed.get("last") == STEPS - 1, verified),
    )  # fmt: skip
    losses = tuple((e["step"], e["loss"]) for e in steps)
    assert not again or min(again) == start
    return Story(how, tuple(lost), at, start, losses, tuple(timeline), checks)


if __name__ == "__main__":
    story = tell(Clock(), Path(sys.argv[1]).resolve())
    print(json.dumps([list(t) for t in story.timeline], indent=1))
    for check in story.checks:
        print(check)
