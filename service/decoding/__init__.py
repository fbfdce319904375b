"""Decoding in sandboxed processes. Files of videos come in, clips and windows go out.

This package does not know HTTP, models or versions. A decoder process imports `child`, `messages`
and `sandbox` of this package, so this file imports nothing.
"""
