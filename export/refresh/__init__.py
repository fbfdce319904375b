"""Retrain, compare, export, verify, publish, activate: videos come in, a version goes out."""
