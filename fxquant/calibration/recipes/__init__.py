"""Published methods put together: what a calibration fixes for one site, from what was seen of it."""
