"""The network, its weights, what it sees and how it learns. Imports nothing of `export` or `service`."""
