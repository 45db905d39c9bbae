"""Compressions: what to send instead of every gradient in full; one file a method, behind the interface of `base`."""

from lightning_comm.transport.compression.base import Compression

__all__ = ["Compression"]
