"""The CPU runtime: every name it replaces exists, it is inert where there is CUDA, and never installs itself."""

import pytest
import torch

from refractor_megatron.compat import cpu_runtime
from refractor_megatron.errors import CapabilityError
from tests.runs import printed


@pytest.mark.parametrize(("module", "attribute", "why"), cpu_runtime.PATCHES)
def test_patched_names_exist_upstream(module: str, attribute: str, why: str) -> None:
    owner, name = cpu_runtime.locate(module, attribute)
    assert hasattr(owner, name) and why


def test_torch_cuda_names_exist() -> None:
    assert all(hasattr(torch.cuda, name) for name in cpu_runtime.CUDA_NAMES)


def test_inert_where_cuda_is_present() -> None:
    """With torch saying that CUDA is there, nothing of torch.cuda or Megatron changes."""
    out = printed(
        "-c",
        "import torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "from refractor_megatron.compat import cpu_runtime as r\n"
        "import refractor_megatron.compat.megatron\n"
        "owners = [r.locate(m, a) for m, a, _ in r.PATCHES]\n"
        "before = [getattr(o, n) for o, n in owners] + [getattr(torch.cuda, n) for n in r.CUDA_NAMES]\n"
        "assert r.install() is False and not r.is_installed()\n"
        "after = [getattr(o, n) for o, n in owners] + [getattr(torch.cuda, n) for n in r.CUDA_NAMES]\n"
        "assert all(a is b for a, b in zip(before, after))\n"
        "print(torch.overrides._len_torch_function_stack())\n",
    )
    assert out == "0"


def test_importing_compat_installs_nothing() -> None:
    assert printed(
        "-c",
        "import refractor_megatron.compat.megatron as m\n"
        "from refractor_megatron.compat import cpu_runtime\n"
        "print(cpu_runtime.is_installed(), m.MEGATRON_VERSION.startswith('0.16.'))\n",
    ).split() == ["False", "True"]


def test_an_unknown_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core

    monkeypatch.setattr(megatron.core, "__version__", "0.21.0")
    with pytest.raises(CapabilityError, match=r"0\.21\.0.*0\.16"):
        cpu_runtime._check_version()


def test_what_it_maps() -> None:
    out = printed(
        "-c",
        "import torch\n"
        "from refractor_megatron.compat import cpu_runtime as r\n"
        "assert r.install() and r.install() and r.is_installed()\n"
        "x = torch.zeros(2, device='cuda')\n"
        "assert x.device.type == 'cpu' and x.cuda() is x and x.to('cuda').device.type == 'cpu'\n"
        "assert torch.empty(1, pin_memory=True).is_pinned() is False\n"
        "assert x.type() == 'torch.cuda.FloatTensor'\n"
        "state = torch.cuda.get_rng_state(); a = torch.rand(3); torch.cuda.set_rng_state(state)\n"
        "assert torch.equal(a, torch.rand(3))\n"
        "torch.cuda.manual_seed(5); a = torch.rand(3); torch.manual_seed(5); assert torch.equal(a, torch.rand(3))\n"
        "with torch.cuda.stream(torch.cuda.Stream()): torch.cuda.current_stream().wait_stream(None)\n"
        "print('fine')\n",
    )
    assert out == "fine"
