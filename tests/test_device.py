"""Device and precision."""

import pytest
import torch

from reslearn import UserError
from reslearn.device import pick_device, pick_precision


def test_devices_and_precision() -> None:
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="no device 'cud': must be auto, cpu, cuda or mps"):
        pick_device("cud")
    assert pick_precision("fp32", torch.device("cpu")) == "fp32"
    assert pick_precision("auto", torch.device("cpu")) in ("fp32", "bf16")
