"""`python -m serve PIPELINE TIERS`: start a server, and let it finish its requests when it is told to stop."""

import logging

import uvicorn

from serve.server import Server
from serve.settings import parse


def main() -> None:
    """Start a server and serve until a signal comes."""
    settings, address = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    app = Server(settings).app
    uvicorn.run(app, host=address.host, port=address.port, timeout_graceful_shutdown=address.grace, log_config=None)


if __name__ == "__main__":
    main()
