"""Calibration behind the quantized part of a model: sites in order, against what the float model has at the same place."""
