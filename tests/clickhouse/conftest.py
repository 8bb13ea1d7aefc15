from collections.abc import Iterator

import pytest

from tests.clickhouse.server import ABSENT, PYTHON, Server, running


@pytest.fixture(scope="session")
def clickhouse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not PYTHON.exists():
        pytest.skip(ABSENT)
    with running(tmp_path_factory.mktemp("clickhouse") / "data") as server:
        yield server
