"""The CPU: every machine has one."""

from .plugin import backend_plugin

__all__ = ["backend_plugin"]
