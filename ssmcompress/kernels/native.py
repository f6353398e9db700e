"""Placeholder until the native kernels land."""


def available() -> tuple[bool, str]:
    return False, "not built yet"
