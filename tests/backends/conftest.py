"""Ray for tests: a stand-in, under a name that tests can import, and a cluster of two nodes where Ray is installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location("stand_in_ray", Path(__file__).with_name("stand_in_ray.py"))
assert _spec is not None
assert _spec.loader is not None
_stand_in = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _stand_in
_spec.loader.exec_module(_stand_in)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    ray = _stand_in.FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    return ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one core each, on this machine."""
    if not _stand_in.REAL:
        pytest.skip("Ray is not installed: pip install automode[ray]")
    import ray
    from ray.cluster_utils import Cluster

    # Without node_ip_address: with 127.0.0.1 the driver waits for another address for ever.
    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 * 1024 * 1024}
    )
    made.worker = _stand_in.a_node(made)
    ray.init(address=made.address, log_to_driver=False)
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
