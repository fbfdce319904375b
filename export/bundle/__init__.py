"""The versioned artefact, the stores of it, and its report: files come in, checked bundles go out.

This package does not know how graphs are made or run. It never imports torch.
"""
