"""HTTP. Requests and errors of the other packages come in, responses go out.

This package does not know how videos are decoded, how batches are formed, or how a service starts.
"""
