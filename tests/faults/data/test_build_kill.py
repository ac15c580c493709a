"""A build that is killed again and again, and started again each time, ends in the bytes of one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.corpus import write_corpus

BUILD = """
import sys
from pathlib import Path
from data_pipeline.build import build
from data_pipeline.engine import local
from data_pipeline.options import *
local._SMALL = 0.0  # so little text would need no pool
root, name = Path(sys.argv[1]), sys.argv[2]
options = Options(
    "killed", 512, 5.0, 0.05, tokenizer_mb=0.3, dedup=Dedup(enabled=True, paragraphs=True),
    filters=Filters(enabled=True, pii="scrub"), decontaminate=Decontaminate(enabled=True), mix=Mix("source", 2.0),
    tasks=Tasks(0.05, 0.05, window=64), curriculum=Curriculum((256, 1024)), engine=Engine(workers=2),
)
build(root / "corpus", root / name, options, cache=root / f"{name}-cache", log=lambda line: None)
"""


def start(root: Path, name: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", BUILD, str(root), name]
    return subprocess.Popen(command, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def content(folder: Path) -> dict[str, bytes]:
    (dataset,) = folder.glob("killed-*")
    return {path.name: path.read_bytes() for path in dataset.iterdir()}


@pytest.mark.slow
def test_killed_at_random_moments_a_build_ends_in_the_same_bytes(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    started = time.monotonic()
    assert start(tmp_path, "alone").wait(timeout=200) == 0
    whole = time.monotonic() - started
    draw = random.Random(11)
    for _ in range(5):
        process = start(tmp_path, "killed")
        time.sleep(draw.uniform(0.2, 0.9) * whole)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(tmp_path, "killed").wait(timeout=200) == 0
    assert content(tmp_path / "killed") == content(tmp_path / "alone")
    assert not list((tmp_path / "killed").glob(".building-*"))
