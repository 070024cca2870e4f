"""Looking into a model: where its visual tokens' diversity collapses, and what its attention does."""

from tokenprune.analysis.calibration import CalibrationSample, calibration_calls, load_calibration
from tokenprune.analysis.layers import LayerStatistics, read_layers

__all__ = ["CalibrationSample", "LayerStatistics", "calibration_calls", "load_calibration", "read_layers"]
