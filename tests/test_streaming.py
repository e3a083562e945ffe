"""A checkpoint of 4 GB is swept in a process that may not have more than 1.5 GB."""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCH = Path(__file__).parents[1] / "bench" / "streaming.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The benchmark, which writes and sweeps the checkpoint."""
    spec = importlib.util.spec_from_file_location("bench_streaming", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_model_larger_than_memory(bench: ModuleType, tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 8e9:
        pytest.fail("This test writes 4 GB to the temporary folder; give it 8 GB of free disk.")
    bench.write_checkpoint(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) > 4e9
    whole, _ = bench.sweep(tmp_path, tmp_path / "whole.npy", limit=0, pairs=4)
    limited, facts = bench.sweep(tmp_path, tmp_path / "limited.npy", limit=bench.LIMIT, pairs=4)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert np.abs(whole).max() > 0.01
    np.testing.assert_allclose(limited, whole, atol=1e-5, rtol=0)
    assert facts["peak_mib"] * 2**20 < bench.LIMIT * 1e6


def test_the_limit_is_hard(bench: ModuleType, tmp_path: Path) -> None:
    """Far less than one layer, and the process fails: the limit does bite."""
    bench.write_checkpoint(tmp_path, layers=1)
    with pytest.raises(RuntimeError, match="failed"):
        bench.sweep(tmp_path, tmp_path / "never.npy", limit=450, pairs=1)
