"""TensorZero's embedded gateway over HTTP, observability off. Runs in the peer's own environment, which has no Ratchet.

python tensorzero_gateway.py CONFIG        prints its port
"""

import sys
import threading

from openai import OpenAI
from tensorzero import patch_openai_client  # type: ignore[import-not-found]


def main() -> None:
    """Serve until killed: the patched client's base URL is the gateway's own HTTP port."""
    client = patch_openai_client(OpenAI(api_key="unused"), config_file=sys.argv[1], async_setup=False)
    print(f"port {client.base_url.port}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
