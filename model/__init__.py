"""The network, its weights, what it sees, how it learns. Imports nothing of the other layers."""
