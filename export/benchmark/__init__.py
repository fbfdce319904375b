"""Timing of engines beside each other: a bundle comes in, a table goes out.

This package changes nothing that is served. It never imports torch.
"""
