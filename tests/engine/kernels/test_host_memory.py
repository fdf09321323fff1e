from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from engine.kernels import host_memory
from engine.kernels.host_memory import HUGE_PAGE, available_memory, host_tensor


@pytest.mark.parametrize("shape", [(3, 5), (1024, 1024), (3, 1_000_003)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_zeros_that_can_be_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = host_tensor(shape, dtype=dtype)
    assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
    assert not tensor.any()
    tensor.fill_(1)
    assert (tensor == 1).all()
    if tensor.nbytes >= HUGE_PAGE:
        assert tensor.data_ptr() % HUGE_PAGE == 0


@pytest.mark.parametrize(
    ("limit", "used", "left"), [("max", "1", None), ("3000", "1000", 2300), ("3000", "5000", 0), (None, None, None)]
)
def test_a_cgroup_may_allow_less_than_is_free(
    limit: str | None, used: str | None, left: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit is not None and used is not None:
        (tmp_path / "memory.max").write_text(limit + "\n")
        (tmp_path / "memory.current").write_text(used + "\n")
        (tmp_path / "memory.stat").write_text("anon 700\ninactive_file 300\n")
    monkeypatch.setattr(host_memory, "cgroup_folder", lambda: tmp_path)
    if left is None:
        assert abs(available_memory() - psutil.virtual_memory().available) < 1 << 30
    else:
        assert available_memory() == left
