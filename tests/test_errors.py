"""The one-line text of a pydantic error."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from safegen.core.errors import explain, setting_names


class Training(BaseModel):
    model_config = ConfigDict(extra="forbid")

    updates: int = Field(default=1, ge=1)


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    words: tuple[str, ...] = ("skull",)
    judge: str
    training: Training = Training()

    @field_validator("words")
    @classmethod
    def _refuse_blank(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        if not all(words):
            raise ValueError("words must not be blank")
        return words


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, "judge is required"),
        (
            {"judge": "a", "training": {"updates": 0}},
            "training.updates must be greater than or equal to 1, got 0",
        ),
        ({"judge": "a", "words": [""]}, "words: words must not be blank"),
        (
            {"judge": "a", "word": 1},
            "no setting named 'word'. Did you mean 'words'? Known: judge, training, words.",
        ),
        (
            {"judge": "a", "training": {"update": 2}},
            "no setting named 'training.update'. Did you mean 'training.updates'? "
            "Known: training.updates.",
        ),
        ({"judge": "a", "training": "x"}, "training must be a valid dictionary or instance of "),
        ({"judge": 1, "words": 2}, "words must be a list, got 2; judge must be a valid "),
    ],
)
def test_a_pydantic_error_is_one_line_with_path_rule_and_value(
    values: dict[str, object], line: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(values)
    text = explain(caught.value, Settings)
    assert text.startswith(line)
    assert "\n" not in text


def test_a_long_value_is_shortened() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate({"judge": ["x" * 1000]})
    assert len(explain(caught.value)) < 200


def test_setting_names_include_nested_ones() -> None:
    assert list(setting_names(Settings)) == ["words", "judge", "training", "training.updates"]
