"""Static activation ranges from data: ``fxquant.calibrate`` runs the model over batches and returns a ``Calibration``."""
