"""The log of a command: JSON lines on stderr."""

from __future__ import annotations

import sys

import msgspec


def configure_logs(least: int = 20) -> None:
    """JSON on stderr, from this level of `logging` on (20 is INFO)."""
    import structlog  # late: the commands that only ask an agent are typed a hundred times a day

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(
                serializer=lambda event, **_: msgspec.json.encode(event, enc_hook=str).decode()
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
