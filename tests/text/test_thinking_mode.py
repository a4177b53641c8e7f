"""Tests of thinking modes as variables of the family's chat templates."""

import pytest

from mlx_k2.errors import RequestError
from mlx_k2.text.chat_template import ThinkingMode
from tests.text.kimi import MODELS, template

MODELS_WITH_SWITCH = ("kimi-k2.5", "kimi-k2.6")


@pytest.mark.parametrize("model", MODELS)
def test_the_default_mode_sets_no_variable(model: str) -> None:
    assert ThinkingMode().variables(template(model)) == {}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("thinking", [True, False])
def test_thinking_is_a_variable_where_the_template_reads_it_and_otherwise_must_match_the_model(
    model: str, thinking: bool
) -> None:
    mode = ThinkingMode(thinking=thinking)
    model_thinks = model != "kimi-k2-instruct"
    if model in MODELS_WITH_SWITCH:
        assert mode.variables(template(model)) == {"thinking": thinking}
    elif thinking == model_thinks:
        assert mode.variables(template(model)) == {}
    else:
        with pytest.raises(RequestError, match=f"this model {'always' if model_thinks else 'never'} thinks"):
            mode.variables(template(model))


@pytest.mark.parametrize("model", MODELS)
def test_preserved_thinking_needs_a_template_that_reads_it(model: str) -> None:
    mode = ThinkingMode(preserve_thinking=True)
    if model == "kimi-k2.6":
        assert mode.variables(template(model)) == {"preserve_thinking": True}
    else:
        with pytest.raises(RequestError, match="does not read the variable preserve_thinking"):
            mode.variables(template(model))
