"""Emulated hosts, links and devices on one Linux machine."""
