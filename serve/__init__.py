"""The same models online: an HTTP service over engines, in one process or on Ray Serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["app_builder"]


def app_builder(args: dict[str, Any]) -> Application:
    """The application for `serve run` and `serve deploy`: `import_path: diffray.serve:app_builder`.

    Args:
        args: the keys of a service config. Where Serve's proxies listen is not known here, so that without
            `access.keys` it has to be said that everybody may ask (`access: {anonymous: true}`). When the ingress
            starts it asks Serve: what listens on a loopback address only then answers to local names only.

    Raises:
        InvalidConfig: a key is unknown, has a wrong value, or access is open by mistake.
    """
    from .config import ServeConfig
    from .deployment import application

    return application(ServeConfig.checked({"host": "0.0.0.0", **args}))
