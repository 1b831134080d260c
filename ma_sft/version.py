"""The version of this package, which is part of every cache key, and those of what it stands on."""

__version__ = "0.2.0"

PACKAGES = "ma-sft torch transformers trl datasets peft accelerate tokenizers bitsandbytes deepspeed".split()


def versions() -> dict[str, str]:
    """Of Python and of the packages that make a run what it is, where they are installed."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
