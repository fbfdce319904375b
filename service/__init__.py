"""HTTP over a bundle: uploads, decoding, batching, metrics, the CLI. Never imports torch."""
