"""`python -m starburst_executor.environment STORE DIGEST FOLDER` packs a worker's environment."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from starburst_executor.environment.repository import pack
from starburst_executor.errors import StoreError
from starburst_executor.storage.url import open_store

log = logging.getLogger(__name__)


def _main(url: str, digest: str, folder: str) -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    os.nice(10)  # tasks run beside it
    store = open_store(url)
    try:
        if pack(store, digest, Path(folder)):
            log.info("packed environment %s", digest)
    except StoreError as error:  # the next worker that installs it tries again
        log.warning("environment %s could not be packed: %s", digest, error)
        return 1
    finally:
        store.close()
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
