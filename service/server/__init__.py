"""The composition root: settings come in, a running service goes out.

This package binds sockets, starts the other packages and stops them.

No other package imports this one.
"""
