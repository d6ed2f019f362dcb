"""What quantization costs: ``python benchmarks/accuracy`` scores every model, scheme and method beside float.

data.py holds every text and picture and which of them calibrate, fit a probe or are scored; subject.py says what a model
brings, one file each does; suite.py runs the cells and appends each to a file; tables.py writes the page and the plots;
memory.py measures calibration's peak of resident memory.
"""
