"""What importing the configuration may load."""

from __future__ import annotations

import subprocess
import sys


def test_importing_the_configuration_loads_nothing_heavy() -> None:
    program = (
        "import sys, refractor_megatron.config, refractor_megatron.config.command\n"
        "heavy = {'hydra', 'omegaconf', 'torch', 'numpy', 'megatron', 'yaml'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"loads {done.stderr}"


def test_composing_loads_no_torch_and_no_numpy() -> None:
    program = (
        "import sys; from refractor_megatron.config import compose; compose(['experiment=nano'])\n"
        "sys.exit(', '.join(sorted({'torch', 'numpy', 'megatron'} & set(sys.modules))) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"loads {done.stderr}"
