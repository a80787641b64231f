"""The preflight on several processes: a sound start, and faults of one rank that rank 0 names."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamatrain.device import describe_environment
from llamatrain.distributed import World
from llamatrain.errors import ConfigError
from llamatrain.preflight import inspection as module
from llamatrain.preflight.inspection import preflight
from llamatrain.session import open_run_directory
from tests.ranks import on_ranks
from tests.small_run import small_config

FAULTY = 2


def start_again_and_again(world: World, root: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """A sound start, then one with each fault: the journal's entry, and what was said to each fault."""
    config = small_config(root / "run", {"text": root}, train={"precision": "fp32"})
    directory = open_run_directory(config, world)
    preflight(config, directory, world)
    entries = directory.events("preflight") if world.leads else [None]
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TOKEN_PATIENCE_S", 0.3)
        here = world.rank == FAULTY

        def other_packages(device: Any) -> dict[str, Any]:
            environment = describe_environment(device)
            return {**environment, "packages": {**environment["packages"], "numpy": "0.1"}} if here else environment

        with patch.context() as fault:
            fault.setattr(module, "describe_environment", other_packages)
            said.append(refusal(config, directory, world))
        elsewhere = root / f"elsewhere-{world.rank}"
        elsewhere.mkdir()
        shown, directory.path = directory.path, elsewhere if here else directory.path
        said.append(refusal(config, directory, world))
        directory.path = root / "gone" if world.leads else shown
        said.append(refusal(config, directory, world))
        directory.path = shown
    directory.close()
    return entries[0], said


def refusal(config: Any, directory: Any, world: World) -> str:
    try:
        preflight(replace(config), directory, world)
    except ConfigError as error:
        return str(error)
    return "nothing"


def test_a_sound_start_is_measured_and_a_faulty_rank_is_named_on_all(tmp_path: Path) -> None:
    answers = on_ranks(3, start_again_and_again, tmp_path)
    entry, (packages, elsewhere, gone) = answers[0]
    assert entry is not None
    assert (entry["ranks"], entry["nodes"], entry["clock_spread_s"] < 1) == (3, 1, True)
    for name in ("product_flops", "all_reduce_bytes_per_s", "link_inside_bytes_per_s", "written_bytes_per_s"):
        assert 0 < entry[name]["slowest"] <= entry[name]["median"]
    assert entry["seconds"] < 5
    assert f"rank {FAULTY} on" in packages
    assert "numpy is 0.1 there" in packages
    assert f"rank {FAULTY} on" in elsewhere
    assert "does not see within 0 s what rank 0 wrote there; it must lie where all nodes can write" in elsewhere
    assert "rank 0 on" in gone
    assert "cannot write there (No such file or directory); it must lie" in gone
    assert "does not see" not in gone  # as a consequence
    assert all(said == answers[0][1] for _, said in answers)
    assert not list((tmp_path / "run").glob(".preflight*"))
