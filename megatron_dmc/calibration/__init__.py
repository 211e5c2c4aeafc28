"""Decisions from the base's attention, before any training: scores, their regression, and one threshold for a ratio."""

from megatron_dmc.calibration.calibrator import DAMAGED, CalibrationError, CalibrationResult, Calibrator

__all__ = ["DAMAGED", "CalibrationError", "CalibrationResult", "Calibrator"]
