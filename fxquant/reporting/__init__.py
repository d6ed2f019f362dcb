"""Reports, dumps and logs."""
