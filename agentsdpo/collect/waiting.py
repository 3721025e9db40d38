"""Waiting for what may already be there."""

from collections.abc import Awaitable
from typing import TypeVar, cast

T = TypeVar("T")


async def settled(value: Awaitable[T] | T) -> T:
    """What an environment returned, waited for where it is a coroutine."""
    if isinstance(value, Awaitable):
        return await cast(Awaitable[T], value)
    return value
