"""From the specification graph to fxquant:: operators."""
