"""What users of fxquant test their own rules with."""

from fxquant.testing.rules import assert_rule, build_graph

__all__ = ["assert_rule", "build_graph"]
