"""Opening local paths and fsspec URLs: the one place that decides how patient a storage client is.

Credentials come from the options of a URL or from the standard places of its client (`AWS_*`, profiles,
instance roles). A URL never holds them, because URLs are shown and recorded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import fsspec

ATTEMPTS = 8
"""Of one S3 request, with botocore's jittered exponential backoff (at most 20 s): about half a minute in all."""
READS = 3
"""Rounds of these, by s3fs: where a body breaks off, which botocore leaves to its caller, and for 503 and timeouts."""
_CREDENTIALS = re.compile(r"^[\w+.-]+://[^/@]+@")


def open_storage(url: str, options: Mapping[str, Any] | None = None) -> tuple[Any, str]:
    """The filesystem of a path or URL, and the path inside it.

    Args:
        url: a local path, or a URL whose protocol fsspec knows.
        options: fsspec storage options, such as `endpoint_url`, `profile`, `anon`, `key` and `secret` of S3.

    Raises:
        ValueError: the protocol is unknown, or the URL holds credentials.
        ImportError: the protocol's library is not installed.
    """
    if _CREDENTIALS.match(url):
        protocol = url.partition("://")[0]
        raise ValueError(f"a {protocol} URL with credentials in it: give them as storage options instead")
    values = dict(options or {})
    s3 = url.startswith(("s3://", "s3a://"))
    if s3:
        patience = {
            "retries": {"mode": "standard", "total_max_attempts": ATTEMPTS},
            "connect_timeout": 10,
            "read_timeout": 60,
            "max_pool_connections": 32,
        }
        values["config_kwargs"] = {**patience, **values.get("config_kwargs", {})}
        values.setdefault("use_listings_cache", False)
    fs, root = fsspec.core.url_to_fs(url, **values)
    if s3:
        fs.retries = READS
    return fs, str(root)
