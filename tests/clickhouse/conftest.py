from collections.abc import Iterator

import pytest

from collector import clickhouse as module
from tests.clickhouse.server import ABSENT, PYTHON, Server, running


@pytest.fixture(scope="session")
def clickhouse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not PYTHON.exists():
        pytest.skip(ABSENT)
    module.COUNTING_SECONDS = 60.0  # a test waits for the counts that it asks for
    with running(tmp_path_factory.mktemp("clickhouse") / "data") as server:
        yield server
