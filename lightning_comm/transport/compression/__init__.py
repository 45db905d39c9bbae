"""Compressions, which send less than every entry in full; one file a method, behind the interface of `base`."""

from lightning_comm.transport.compression.base import Compression

__all__ = ["Compression"]
