"""Clips for calibration come in, recorded ranges of activations go out.

This package does not decide which precision a product gets.
"""
