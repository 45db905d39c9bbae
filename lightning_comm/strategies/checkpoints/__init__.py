"""Files that ranks write for a checkpoint: whole or not at all, as a set with one id, and checked when they are read.

Nothing here knows a strategy of this package: each decides itself what it puts into the files.
"""
