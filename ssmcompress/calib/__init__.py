"""Calibration: text becomes token windows, windows become statistics of what every weight sees."""
