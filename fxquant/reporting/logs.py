"""FXQUANT_LOGS: fxquant's loggers on stderr."""

import logging


def setup_logging(names: tuple[str, ...]) -> None:
    """Print the loggers ``fxquant.<name>`` at INFO; a logger that has a handler already keeps it."""
    for name in names:
        logger = logging.getLogger(f"fxquant.{name}")
        if logger.handlers:
            continue
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
