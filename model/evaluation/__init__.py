"""Accuracy and calibration: scores and labels come in, figures go out. Never imports torch."""
