from pathlib import Path

import pytest

from fxquant.config import ENVIRONMENT, FxQuantConfig, environment, resolve_options
from fxquant.errors import ConfigError


def test_no_options_are_the_defaults() -> None:
    config = resolve_options(None)
    assert (config.scheme, config.codegen, config.sites, config.assume_inference) == ("auto", "inductor", {}, False)
    assert resolve_options({}) == config == resolve_options(FxQuantConfig())


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown option 'shceme'; did you mean 'scheme'"):
        FxQuantConfig(shceme="w8a8")
    with pytest.raises(ConfigError, match="unknown option 'zzz'; known: scheme, sites"):
        resolve_options({"zzz": 1})


@pytest.mark.parametrize("scheme", ["w8a9", "W8A8", "int8", ""])
def test_an_unknown_scheme_names_the_known_ones(scheme: str) -> None:
    with pytest.raises(ConfigError, match="unknown scheme"):
        FxQuantConfig(scheme=scheme)
    with pytest.raises(ConfigError, match="unknown scheme"):
        FxQuantConfig(sites={"lm_head": scheme})


def test_widths_that_mean_nothing_name_the_nearest() -> None:
    assert FxQuantConfig(scheme="w3a6").scheme == "w3a6"
    with pytest.raises(ConfigError, match=r"weights have 2 to 8 bits and activations 2 to 8, or 16.*nearest is 'w8a8'"):
        FxQuantConfig(scheme="w8a9")
    with pytest.raises(ConfigError, match=r"'w1a16'.* nearest is 'w2a16'"):
        FxQuantConfig(sites={"lm_head": "w1a16"})
    with pytest.raises(ConfigError, match="'W6A6'; did you mean 'w6a6'"):
        FxQuantConfig(scheme="W6A6")


def test_a_wrong_type_names_the_option_and_the_value() -> None:
    with pytest.raises(ConfigError, match=r"option 'assume_inference': .*got 'yes'"):
        FxQuantConfig(assume_inference="yes")
    with pytest.raises(ConfigError, match=r"option 'codegen': .*got 'cuda'"):
        FxQuantConfig(codegen="cuda")
    with pytest.raises(ConfigError, match="must be a dict or an FxQuantConfig, not int"):
        resolve_options(3)
    with pytest.raises(ConfigError, match="empty pattern"):
        FxQuantConfig(sites={"": "float"})


def test_the_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        FxQuantConfig().scheme = "w8a8"


def test_toml_below_explicit_options(tmp_path: Path) -> None:
    file = tmp_path / "options.toml"
    file.write_text('[fxquant]\nscheme = "w7a7"\ncodegen = "ops"\n[fxquant.sites]\nlm_head = "float"\n')
    assert FxQuantConfig.from_toml(file).scheme == "w7a7"
    config = resolve_options({"config": str(file), "scheme": "w8a8"})
    assert (config.scheme, config.codegen, config.sites) == ("w8a8", "ops", {"lm_head": "float"})


@pytest.mark.parametrize(("text", "message"), [("scheme = ", "no valid TOML"), ("fxquant = 3", "must be a table")])
def test_a_bad_toml_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "options.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        FxQuantConfig.from_toml(file)
    with pytest.raises(ConfigError, match="No such file"):
        FxQuantConfig.from_toml(tmp_path / "missing.toml")


def test_mode_is_mapped_to_inductor_options_or_refused() -> None:
    assert resolve_options(None, "max-autotune").inductor["max_autotune"] is True
    with pytest.raises(ConfigError, match="unknown mode 'max-autotun'; did you mean 'max-autotune"):
        resolve_options(None, "max-autotun")


def test_environment() -> None:
    env = environment({"FXQUANT_ISA": "avx2", "FXQUANT_LOGS": "plan, passes", "FXQUANT_CACHE": "/x", "PATH": "/bin"})
    assert (env.isa, env.logs, env.cache, env.dump) == (1, ("plan", "passes"), Path("/x"), None)
    empty = environment(dict.fromkeys(ENVIRONMENT, ""))
    assert (empty.isa, empty.logs, empty.cache, empty.dump) == (None, (), None, None)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FXQUANT_ISA": "avx3"}, "FXQUANT_ISA='avx3' is not an instruction set; use one of scalar, avx2"),
        ({"FXQUANT_LOGS": "pases"}, "unknown logger 'pases'; did you mean 'passes'"),
        ({"FXQUANT_DUMPS": "x"}, "unknown environment variable FXQUANT_DUMPS; did you mean 'FXQUANT_DUMP'"),
    ],
)
def test_a_bad_environment_variable(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        environment(variables)
