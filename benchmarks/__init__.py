"""Benchmarks of `ckpt`: one file per question, each prints tables and writes JSON.

What is common to all of them:

- Peers and physical limits are measured in the same run, alternating: in every round each contestant has one turn,
  and the order rotates from round to round. The first round warms up and is dropped.
- The figure of a contestant is the median over rounds of its speed divided by the limit's *in the same round*: disks
  of virtual machines drift by a factor of two within minutes, so only paired ratios mean something.
- Times run from the moment all ranks have passed a barrier to the moment the last rank is done. CPU time is user plus
  system time of all ranks and their children.
- Nothing is timed that a training job would not wait for: deleting old files, `sync`, zeroing and checking tensors
  stand outside. Every load is checked to the bit.
"""
