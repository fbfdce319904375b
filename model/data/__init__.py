"""Lists of videos, remote files, the check of a set. Never imports torch.

Paths and URLs come in, labelled videos go out. This package does not know the network.
"""
