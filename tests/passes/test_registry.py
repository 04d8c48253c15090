"""Passes by name and pipelines as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.passes.compress.prune_channels import PruneChannels
from graphopt.passes.errors import ConfigError
from graphopt.passes.registry import (
    format_pipeline,
    options_of,
    parse_pipeline,
    pass_named,
    pass_names,
)

PRUNE = st.builds(
    PruneChannels,
    share=st.floats(0.01, 1),
    round_to=st.integers(0, 64),
    scores=st.sampled_from(["auto", "magnitude", "obs"]),
    repair=st.booleans(),
    damping=st.floats(1e-6, 1),
)
OTHERS = st.sampled_from([pass_named(name) for name in pass_names()])


@given(st.lists(PRUNE | OTHERS, max_size=4))
def test_pipelines_read_back_what_they_write(steps: list[PruneChannels]) -> None:
    assert parse_pipeline(format_pipeline(steps)) == tuple(steps)


def test_only_changed_options_are_written() -> None:
    assert format_pipeline([PruneChannels()]) == "prune-channels"
    assert options_of(PruneChannels(round_to=16)) == {"round_to": 16}
    assert parse_pipeline(" prune-channels{round_to=16} , fold-batch-norm ")[0] == PruneChannels(
        round_to=16
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune-chanels", "did you mean 'prune-channels'"),
        ("xyz", "there are add-ngram-embeddings, drop-dead-tokens"),
        ("prune-channels{rounds=8}", "has no option 'rounds'; its options are"),
        ("prune-channels{round_to=8", "lacks its closing brace"),
        ("prune-channels{round_to}", "must be name=value"),
        ("prune-channels{round_to=a}", "the option round_to of prune-channels must be int"),
        ("prune-channels{round_to=1.5}", "the option round_to of prune-channels must be int"),
        ("prune-channels{round_to=true}", "the option round_to of prune-channels must be int"),
        ("prune-channels{repair=3}", "the option repair of prune-channels must be bool"),
        ("prune-channels{scores=1}", "the option scores of prune-channels must be str"),
        ("prune-channels{round_to=8=9}", "must be name=value"),
        ("prune-channels{round_to=[}", "cannot be read"),
    ],
)
def test_mistakes_are_said(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_pipeline(text)
