"""What holds for every test: how properties are tried, the precision that a machine chooses, and Triton without a GPU."""

import os
from collections.abc import Callable, Iterator

# of this process and of those that it starts: tests are small, and two threads wait for each other on a busy processor
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():  # read when triton is imported, which torchvision may do
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy one is slow
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bfloat16", choices=("yes", "no"), help="what compute_dtype=None takes on any CPU (default: this one's)")


CHOICE = "oag_transform.generator.run._multiplies_bfloat16"


@pytest.fixture(scope="session", autouse=True)
def choice_of_this_cpu(pytestconfig: pytest.Config) -> Iterator[Callable[[], bool]]:
    """Makes every CPU one that is faster in bfloat16, or none, where ``--bfloat16`` says so; what it was without."""
    from oag_transform.generator import run

    forced, own = pytestconfig.getoption("--bfloat16"), run._multiplies_bfloat16
    with pytest.MonkeyPatch.context() as patch:
        if forced is not None:
            patch.setattr(CHOICE, lambda: forced == "yes")
        yield own


@pytest.fixture(scope="module")
def choice_of_processes(choice_of_this_cpu: Callable[[], bool]) -> Iterator[None]:
    """For modules that compare with other processes, which ``--bfloat16`` doesn't reach: the choice is that of this CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CHOICE, choice_of_this_cpu)
        yield
