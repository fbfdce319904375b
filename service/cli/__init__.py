"""The command `timesformer`. Words of a command line come in, text or JSON and an exit code go out.

Commands call the other packages; no other package imports this one.
"""
