import pytest

from fxquant.passes.recognise import RULES
from fxquant.passes.reparam import REPARAMS
from fxquant.passes.rule import Rule
from fxquant.testing import assert_rule


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name}-{RULES.index(rule)}")
def test_rule(rule: Rule) -> None:
    assert_rule(rule)


@pytest.mark.parametrize("rule", REPARAMS, ids=lambda rule: f"{rule.name}-{REPARAMS.index(rule)}")
def test_reparameterization(rule: Rule) -> None:
    assert_rule(rule)


def test_titles_are_the_rules_equations() -> None:
    for rule in (*RULES, *REPARAMS):
        assert rule.title
        assert not rule.title.endswith("."), rule.title
