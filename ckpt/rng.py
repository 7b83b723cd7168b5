"""The random number generators of a process, as something to save."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ["RNG"]


class RNG:
    """Python's, numpy's and torch's generators (CPU, and CUDA's current device where there is one; not run here).

    Per rank: every rank has its own. In another world rank r continues with the state of rank r mod W.
    """

    ckpt_scope = "rank"

    def state_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state().numpy(),
        }
        if torch.cuda.is_available():
            out["cuda"] = torch.cuda.get_rng_state().numpy()
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        random.setstate(state_dict["python"])
        np.random.set_state(state_dict["numpy"])
        torch.set_rng_state(torch.from_numpy(state_dict["torch"].copy()))
        if "cuda" in state_dict and torch.cuda.is_available():
            torch.cuda.set_rng_state(torch.from_numpy(state_dict["cuda"].copy()))
