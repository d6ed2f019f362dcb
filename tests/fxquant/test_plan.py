import pytest

from fxquant.config import FxQuantConfig
from fxquant.errors import ConfigError
from fxquant.passes.fuse import FUSIONS
from fxquant.plan import FLOAT_KINDS, Decision, Plan, refuse_patterns, resolve_scheme, setting_for, unmatched_patterns
from fxquant.schemes import SCHEMES
from fxquant.sites import KINDS, Site, clean_source

QUERY = Site("layers.0.attn.query:linear", "linear", "linear", ("2×4", "4×4"), "layers.0.attn.query.weight")
HEAD = Site("lm_head:linear", "linear", "linear_1", ("2×4", "9×4"), "embed.weight")


def test_the_first_matching_pattern_wins() -> None:
    config = FxQuantConfig(scheme="w8a7", sites={"layers.0.*": "float", "*.query": "w8a8"})
    assert setting_for(QUERY, config) == "float"
    assert setting_for(HEAD, config) == "w8a7"


@pytest.mark.parametrize("pattern", ["layers.*.query", "query", "attn.query", "layers.0.attn.query:linear", "*.weight"])
def test_a_pattern_names_a_site_by_path_tail_name_or_weight(pattern: str) -> None:
    assert setting_for(QUERY, FxQuantConfig(sites={pattern: "w7a7"})) == "w7a7"


def test_a_tail_starts_at_a_path_border() -> None:
    assert setting_for(QUERY, FxQuantConfig(sites={"uery": "w7a7"})) == "auto"


def test_a_pattern_that_matches_nothing_names_the_nearest_sites() -> None:
    with pytest.raises(ConfigError, match=r"'lm_haed' matches no site; nearest: 'lm_head'"):
        refuse_patterns(unmatched_patterns(FxQuantConfig(sites={"lm_haed": "float"}), (QUERY, HEAD)), (QUERY, HEAD))


def test_auto_by_instruction_set() -> None:
    assert resolve_scheme("auto", "avx2") == SCHEMES["w8a7"]
    assert resolve_scheme("auto", "avx512_vnni") == SCHEMES["w8a8"]
    assert "no integer kernel is faster" in str(resolve_scheme("auto", "scalar"))
    assert resolve_scheme("w7a7", "scalar") == SCHEMES["w7a7"]
    assert resolve_scheme("float", "avx2") == "the options ask for float"


def test_every_kind_without_a_kernel_has_its_sentence() -> None:
    assert {*KINDS.values(), "region"} - {"linear", *FUSIONS} == set(FLOAT_KINDS)


def test_plan_is_a_mapping_that_can_refuse() -> None:
    plan = Plan((Decision(QUERY, SCHEMES["w8a8"]), Decision(HEAD, reason="the options ask for float")))
    assert list(plan) == [QUERY.name, HEAD.name]
    assert plan.taken == {QUERY.name: SCHEMES["w8a8"]}
    refused = plan.refuse({QUERY.name: "it broke"})
    assert refused.taken == {}
    assert refused[QUERY.name].reason == "it broke"
    assert str(refused).splitlines()[0] == "layers.0.attn.query:linear: float, it broke"
    with pytest.raises(KeyError):
        plan["nothing"]


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']._modules['layer']._modules['0']._parameters['weight']", "layer.0.weight"),
        ("L['self'].encoder.layer[0].attention", "encoder.layer.0.attention"),
        ("L['model']", ""),
        ("L['self']._buffers['table']", "table"),
        ("L['fn'].block@2", "block"),
    ],
)
def test_source_names_become_paths(source: str, path: str) -> None:
    assert clean_source(source) == path
