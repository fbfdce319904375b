"""Metrics, spans and log lines. Events of the service come in, text for operators goes out.

This package decides nothing: no other package reads from it.
"""
