"""What may be asked for; groups of real processes are in tests/distributed/launching/test_hsdp.py."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_modules.sharded_strategy import ShardedStrategy


@pytest.mark.parametrize("shard_over", ["all", 0, 1.5])
def test_other_devices_are_refused(shard_over: Any) -> None:
    with pytest.raises(ValueError, match="shard_over is job, node or a number of devices, got"):
        ShardedStrategy(shard_over)


def test_groups_must_divide_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = ShardedStrategy(4)
    strategy.num_nodes = 3
    monkeypatch.setattr(ShardedStrategy, "num_processes", 2)
    with pytest.raises(ValueError, match="6 devices cannot be divided into groups of shard_over: 4"):
        strategy.setup_environment()
