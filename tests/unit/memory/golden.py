"""Small chunks of every codec version, as the encoders of this tree wrote them once: readers must go on reading them.

python -m tests.unit.memory.golden      (writes golden.json again; only for a new version, never to mend a test)
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refractor_megatron.memory.codecs import CODECS, decode, encode

PATH = Path(__file__).with_name("golden.json")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sample(dtype: torch.dtype) -> Tensor:
    """[1, 2, 3, 16]: plain arithmetic, the same everywhere; one vector is zero and one value sticks out."""
    x = ((torch.arange(96) * 37 % 101 - 50) / 16).reshape(1, 2, 3, 16)
    x[0, 1, 1] = 0
    x[0, 0, 2, 5] = 100
    return x.to(dtype)


def write() -> None:
    """Encode the samples, their bounds wide open so that no codec escalates."""
    entries: list[dict[str, Any]] = []
    for codec in CODECS.values():
        for version in codec.versions:
            for dtype in DTYPES:
                chunk = encode(sample(dtype), codec.name, bound=1.0, escalate=False, version=version)
                restored = decode(chunk).float().numpy().tobytes()
                entries.append(
                    {
                        "codec": codec.name,
                        "version": version,
                        "dtype": str(dtype).removeprefix("torch."),
                        "chunk": base64.b64encode(chunk).decode(),
                        "restored_fp32": base64.b64encode(restored).decode(),
                    }
                )
    PATH.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    write()
