"""Bytes of a client or a URL come in, a file in the spool goes out, within limits of size and time.

This package does not know what is in the file.
"""
