"""Which engine holds the store: the configuration says it."""

import threading
from collections.abc import Mapping
from pathlib import Path

from collector.keeper import Keeper
from collector.loader import Loader
from collector.settings import Storage
from collector.store import Store


def open_store(path: Path, journal: Path, settings: Storage, weights: Mapping[str, float]) -> Store:
    """The store of a configuration; `path` is that of the local file, which either has. Raises Conflict."""
    if settings.url is None:
        return Store(path, journal, settings, weights)
    from collector.clickhouse import ClickHouse  # only who uses it waits for its imports

    return ClickHouse(path, journal, settings, weights)


def keeper_of(store: Store, loader: Loader, loading: "threading.Lock", settings: Storage, journal: Path) -> Keeper:
    """Who cares for that store's old days."""
    if settings.url is None:
        return Keeper(store, loader, loading, settings, journal)
    from collector.clickhouse_keeper import ClickHouseKeeper

    return ClickHouseKeeper(store, loader, loading, settings, journal)
