"""Files that ranks write for a checkpoint: whole or not at all, as a set with one id, and looked through when read.

Nothing here knows one of our strategies: what they put into the files is theirs.
"""
