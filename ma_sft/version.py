"""The version of this package, which is part of every cache key."""

__version__ = "0.2.0"
