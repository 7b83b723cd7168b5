"""Outliving the trainer: one process per host and job that holds the snapshots of its ranks and writes them to storage.

Nothing in this room knows torch; the side of the trainer is `ckpt.keeping`.
"""
