"""Insert fake-quant where the plan says."""
