"""The order of the samples: permutation, mixture, state, and all of it at the paper's size."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamatrain.data.order import (
    DataState,
    SampleOrder,
    Schedule,
    Segment,
    check_segments,
    describe_rounding,
    quota_table,
    round_weights,
)
from llamatrain.data.permutation import LARGEST_SORTED, permute
from llamatrain.data.shards import Manifest, ShardInfo, write_manifest
from llamatrain.errors import DataError

PAPER = {  # table 1: (sampling proportion, epochs at 1.4T tokens)
    "commoncrawl": (0.67, 1.10),
    "c4": (0.15, 1.06),
    "github": (0.045, 0.64),
    "wikipedia": (0.045, 2.45),
    "books": (0.045, 2.23),
    "arxiv": (0.025, 1.06),
    "stackexchange": (0.02, 1.03),
}
PAPER_WEIGHTS = {name: weight for name, (weight, _) in PAPER.items()}
PAPER_TOKENS = 1.4e12

part_lists = st.lists(st.integers(1, 400), min_size=1, max_size=9)
weight_tables = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=9).map(
    lambda values: {f"s{i}": value for i, value in enumerate(values)}
)
shard_lists = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any), min_size=1, max_size=4)


def build(windows: dict[str, list[int]], state: DataState, seed: int = 7) -> SampleOrder:
    return SampleOrder(list(windows), list(windows.values()), seed=seed, segments=state.segments)


def visited(order: SampleOrder, samples: np.ndarray) -> list[tuple[str, int, int, int]]:
    """(source, epoch, shard, window) of each sample."""
    found = order.locate(samples)
    columns = zip(found.source, found.epoch, found.shard, found.window, strict=True)
    return [(order.names[source], int(epoch), int(shard), int(window)) for source, epoch, shard, window in columns]


# The permutation


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 100, 4_097, 65_535, 65_536, 65_537, 100_003, 131_072, 131_073])
def test_the_permutation_is_a_bijection(n: int) -> None:
    for epoch in (0, 1):
        values = permute(np.arange(n), n, seed=3, name="books", epoch=epoch)
        assert np.array_equal(np.sort(values), np.arange(n))


@given(n=st.integers(LARGEST_SORTED + 1, 300_000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_the_permutation_is_a_bijection_for_any_size_and_key(n: int, seed: int, epoch: int) -> None:
    assert np.bincount(permute(np.arange(n), n, seed=seed, name="x", epoch=epoch), minlength=n).max() == 1


@pytest.mark.parametrize("n", [1_000, 200_000])
def test_seed_name_and_epoch_each_key_the_permutation(n: int) -> None:
    keys = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    orders = [permute(np.arange(n), n, seed=seed, name=name, epoch=epoch) for seed, name, epoch in keys]
    for i in range(len(keys)):
        for j in range(i):
            assert np.mean(orders[i] == orders[j]) < 0.01


def test_the_permutation_never_changes() -> None:
    """Pinned: a checkpoint of one release must go on in the next."""
    assert permute(np.arange(5), 1_000, seed=0, name="c4", epoch=0).tolist() == [508, 854, 660, 535, 418]
    assert permute(np.arange(5), 10**9, seed=0, name="c4", epoch=0).tolist() == [
        79196572,
        673665774,
        211286515,
        303951333,
        234453368,
    ]


def test_a_permutation_of_half_a_billion_is_spread_evenly() -> None:
    n, count = 500_000_003, 1 << 16
    values = permute(np.arange(count) + 12_345_678, n, seed=1, name="x", epoch=0)
    bins = np.bincount(values * 64 // n, minlength=64)
    z = ((bins - count / 64) ** 2 / (count / 64)).sum()
    assert abs(z - 63) < 5 * np.sqrt(2 * 63)
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 5 / np.sqrt(count)


@pytest.mark.parametrize("bits", [17, 18, 29, 30])
def test_every_bit_of_the_permutation_is_mixed(bits: int) -> None:
    count = 1 << 14
    values = permute(np.arange(count), 1 << bits, seed=0, name="x", epoch=0)
    for bit in range(bits):
        assert abs(np.mean(values >> bit & 1) - 0.5) < 5 * 0.5 / np.sqrt(count)


# The mixture


def worst_deviation(table: np.ndarray, parts: list[int]) -> tuple[int, int]:
    """The largest |S·count - W·g| over all sources and prefixes g, and S: exact; within one sample is < S."""
    period = sum(parts)
    prefixes = np.arange(1, period + 1)
    worst = 0
    for source, part in enumerate(parts):
        worst = max(worst, int(np.abs(period * np.cumsum(table == source) - part * prefixes).max()))
    return worst, period


def largest_deficit_table(parts: list[int]) -> np.ndarray:
    """The obvious rule, which does not keep the bound."""
    period, table = sum(parts), []
    counts = np.zeros(len(parts), np.int64)
    for g in range(1, period + 1):
        table.append(int(np.argmax(g * np.array(parts) - period * counts)))
        counts[table[-1]] += 1
    return np.array(table)


@given(parts=part_lists)
@settings(max_examples=150, deadline=None)
def test_every_prefix_is_within_one_sample_of_every_share(parts: list[int]) -> None:
    table = quota_table(parts)
    worst, period = worst_deviation(table, parts)
    spread = 2 * len(parts) - 2
    assert worst < period
    assert worst * spread <= period * max(0, spread - 1)  # Tijdeman's bound, 1 - 1/(2K - 2)
    assert np.bincount(table, minlength=len(parts)).tolist() == parts


def test_the_check_finds_the_largest_deficit_rule_wanting() -> None:
    for parts in ([1, 1, 135, 1, 107, 1], [61, 1, 1, 24, 124, 33, 39, 283, 894, 357, 1]):
        worst, period = worst_deviation(largest_deficit_table(parts), parts)
        assert worst > period
        worst, period = worst_deviation(quota_table(parts), parts)
        assert worst < period


@given(weights=weight_tables)
@settings(max_examples=100, deadline=None)
def test_rounded_weights_are_few_parts_close_to_what_was_asked(weights: dict[str, float]) -> None:
    parts = round_weights(weights)
    period, total = sum(parts.values()), sum(weights.values())
    assert period <= 10_000 and np.gcd.reduce(list(parts.values())) == 1
    assert all(part >= 1 for part in parts.values())
    for name, weight in weights.items():  # one part of 10,000; a source raised to one part costs another a little
        assert abs(parts[name] / period - weight / total) <= 1e-4 * len(weights)


def test_rounding_is_exact_where_it_can_be() -> None:
    assert sum(round_weights(PAPER_WEIGHTS).values()) == 200
    assert round_weights(PAPER_WEIGHTS)["commoncrawl"] == 134
    assert round_weights({"a": 1, "b": 1, "c": 1}) == {"a": 1, "b": 1, "c": 1}
    assert round_weights({"a": 0.1, "b": 0.2}) == {"a": 1, "b": 2}
    assert round_weights({"a": 1e-9, "b": 1, "none": 0}) == {"a": 1, "b": 9_999}
    assert round_weights({"only": 0.3}) == {"only": 1}


def test_rounding_does_not_depend_on_the_order_of_the_sources() -> None:
    assert list(round_weights({"b": 1, "a": 2}).items()) == list(round_weights({"a": 2, "b": 1}).items())


def test_rounding_is_printed() -> None:
    assert describe_rounding({"a": 1, "b": 3}) == "mixture: a 25.0000% -> 1/4 (25.0000%), b 75.0000% -> 3/4 (75.0000%)"


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": -1}, {"a": float("nan")}, {"a": float("inf")}])
def test_impossible_weights_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(DataError, match=r"data\.sources"):
        round_weights(weights)


@given(parts=part_lists, start=st.integers(0, 10**13))
@settings(max_examples=60, deadline=None)
def test_uses_count_up_without_gaps_from_any_sample_on(parts: list[int], start: int) -> None:
    schedule = Schedule({f"s{i}": part for i, part in enumerate(parts)})
    source, use = schedule.sample(np.arange(start, start + 500))
    before = schedule.counts(start)
    for i in range(len(parts)):
        uses = use[source == i]
        assert np.array_equal(uses, before[i] + np.arange(len(uses)))
        assert schedule.counts(start + 500)[i] == before[i] + len(uses)


# Samples and windows


@given(shards=shard_lists, seed=st.integers(0, 1_000), data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_window_comes_exactly_once_an_epoch(shards: list[list[int]], seed: int, data: st.DataObject) -> None:
    windows = {f"s{i}": counts for i, counts in enumerate(shards)}
    weights = {name: data.draw(st.integers(1, 5)) for name in windows}
    order = build(windows, DataState.start(round_weights(weights)), seed)
    seen = Counter(visited(order, np.arange(400)))
    assert max(seen.values()) == 1
    for name, counts in windows.items():
        every = {(shard, window) for shard, count in enumerate(counts) for window in range(count)}
        used = order.counts(400)[name]
        for epoch in range(used // len(every)):
            assert {(s, w) for source, e, s, w in seen if (source, e) == (name, epoch)} == every
        assert sum(source == name for source, *_ in seen) == used
        assert order.epochs(400)[name] == used / len(every)


def test_extending_a_run_or_cutting_it_in_other_pieces_never_changes_it() -> None:
    order = build({"a": [70_000, 5], "b": [3, 0, 4]}, DataState.start({"a": 2, "b": 1}))
    whole = visited(order, np.arange(600))
    assert visited(order, np.arange(100)) == whole[:100]
    assert [visited(order, np.array([g]))[0] for g in range(600)] == whole
    shuffled = np.random.default_rng(0).permutation(600)
    assert visited(order, shuffled) == [whole[g] for g in shuffled]


def test_reordering_the_sources_changes_nothing() -> None:
    windows = {"a": [70_000], "b": [3, 4], "c": [50]}
    weights = round_weights({"a": 0.5, "b": 0.25, "c": 0.25})
    turned = build(dict(reversed(windows.items())), DataState.start(dict(reversed(weights.items()))))
    assert visited(turned, np.arange(500)) == visited(build(windows, DataState.start(weights)), np.arange(500))


def test_adding_a_source_leaves_the_windows_order_of_the_others() -> None:
    windows = {"a": [70_000], "b": [300]}
    few = visited(build(windows, DataState.start({"a": 1, "b": 1})), np.arange(400))
    more = visited(build({"c": [9], **windows}, DataState.start({"a": 1, "b": 1, "c": 1})), np.arange(600))
    for name in windows:
        assert [v for v in few if v[0] == name] == [v for v in more if v[0] == name][:200]


def test_seeking_far_ahead_is_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many permuted positions at sample 10^12 as at 0, and the numbers that the definition gives."""
    windows, parts = {"a": [70_000, 1], "b": [80_000]}, {"a": 3, "b": 1}
    order = build(windows, DataState.start(parts))
    permuted = []

    def counting(positions: np.ndarray, n: int, **key: object) -> np.ndarray:
        permuted.append(len(positions))
        return permute(positions, n, **key)  # type: ignore[arg-type]

    monkeypatch.setattr("llamatrain.data.order.permute", counting)
    for start in (0, 10**12):
        permuted.clear()
        found = visited(order, np.arange(start, start + 64))
        assert sum(permuted) == 64 and len(permuted) <= 4
    position = order.segments[0].schedule.sample(np.array([10**12]))
    name, use = order.segments[0].schedule.names[position[0][0]], int(position[1][0])
    total = sum(windows[name])
    window = int(permute(np.array([use % total]), total, seed=7, name=name, epoch=use // total)[0])
    shard = 0 if window < windows[name][0] else 1
    assert found[0] == (name, use // total, shard, window - shard * windows[name][0])


def test_a_changed_mixture_goes_on_where_each_source_stands() -> None:
    windows = {"a": [40], "b": [30], "c": [25]}
    state = DataState.start({"a": 1, "b": 1}).advance(31).change_weights({"b": 1, "c": 2}).advance(33)
    state = state.change_weights({"a": 3, "b": 2, "c": 1})
    order = build(windows, state)
    end = 2_000
    seen = visited(order, np.arange(end))
    for name, (total,) in windows.items():
        mine = [(epoch, window) for source, epoch, _, window in seen if source == name]
        expected = [
            (epoch, window)
            for epoch in range(len(mine) // total + 1)
            for window in permute(np.arange(total), total, seed=7, name=name, epoch=epoch).tolist()
        ]
        assert mine == expected[: len(mine)]
        assert order.counts(end)[name] == len(mine)
    assert {source for source, *_ in seen[31:64]} == {"b", "c"}


def test_the_same_weights_make_no_new_segment() -> None:
    state = DataState.start({"a": 1, "b": 2}).advance(10)
    assert state.change_weights({"b": 2, "a": 1}) == state
    replaced = DataState.start({"a": 1}).change_weights({"b": 1})
    assert replaced == DataState.start({"b": 1})


def test_a_source_without_windows_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"data\.sources\.small: .*data\.seq_len"):
        build({"big": [5], "small": [0, 0]}, DataState.start({"big": 1, "small": 1}))


def test_a_checkpoint_with_other_sources_is_refused_by_name() -> None:
    segments = DataState.start({"wiki": 1, "books": 1}).segments
    check_segments(segments, ["books", "wiki", "new"])
    with pytest.raises(DataError, match=r"'wiki'.*data\.sources\.wiki\.path=DIRECTORY"):
        check_segments(segments, ["books", "wikipedia"])


# The state


def test_steps_take_consecutive_samples() -> None:
    state = DataState.start({"a": 1})
    for step in range(5):
        assert state.advance(step * 8).take(8).tolist() == list(range(step * 8, step * 8 + 8))


@given(
    ranges=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 60)), max_size=6),
    start=st.integers(0, 200),
    counts=st.lists(st.integers(0, 50), max_size=6),
)
@settings(max_examples=100, deadline=None)
def test_passed_over_samples_are_never_taken(ranges: list[tuple[int, int]], start: int, counts: list[int]) -> None:
    state = DataState.start({"a": 1}).advance(start)
    for first, length in ranges:
        state = state.pass_over(first, first + length)
    barred = {g for first, length in ranges for g in range(first, first + length)}
    expected = [g for g in range(start, 1_200) if g not in barred]
    taken: list[int] = []
    for count in counts:
        taken += state.take(count).tolist()
        state = state.advance(count)
        assert DataState.from_json(json.loads(json.dumps(state.to_json()))) == state
    assert taken == expected[: len(taken)]


def test_the_state_survives_json() -> None:
    state = DataState.start({"a": 1, "b": 3}).advance(12).change_weights({"a": 2, "c": 1})
    state = state.pass_over(40, 50).pass_over(60, 61).advance(30)
    again = DataState.from_json(json.loads(json.dumps(state.to_json())))
    assert again == state
    assert np.array_equal(again.take(100), state.take(100))
    assert len(json.dumps(state.to_json())) < 400


GOOD = {
    "next_sample": 9,
    "passed_over": [[2, 4]],
    "segments": [
        {"first_sample": 0, "weights": {"a": 1}, "counts_before": {}},
        {"first_sample": 5, "weights": {"a": 1, "b": 1}, "counts_before": {"a": 5}},
    ],
}


@pytest.mark.parametrize(
    "change",
    [
        {"next_sample": -1},
        {"next_sample": 1.5},
        {"next_sample": True},
        {"next_sample": 4},
        {"extra": 1},
        {"passed_over": [[4, 2]]},
        {"passed_over": [[2, 4], [3, 6]]},
        {"passed_over": [[1]]},
        {"passed_over": None},
        {"segments": []},
        {"segments": GOOD["segments"][1:]},
        {"segments": [{"first_sample": 0, "weights": {"a": 0}, "counts_before": {}}]},
        {"segments": [{"first_sample": 0, "weights": {}, "counts_before": {}}]},
        {"segments": [{"first_sample": 0, "weights": {"a": 10_001}, "counts_before": {}}]},
        {"segments": [{"first_sample": 0, "weights": {"a": 1}, "counts_before": {"a": 1}}]},
        {"segments": [{"first_sample": 0, "weights": {"a": 1}}]},
        {"segments": [{"first_sample": 0, "weights": 3, "counts_before": {}}]},
    ],
)
def test_a_nonsensical_state_is_refused(change: dict[str, object]) -> None:
    assert DataState.from_json(GOOD).segments[1] == Segment(5, {"a": 1, "b": 1}, {"a": 5})
    with pytest.raises(DataError, match="data state"):
        DataState.from_json({**GOOD, **change})


# The paper's run


def paper_windows(scale: float) -> dict[str, list[int]]:
    """Windows of each source, in files of two billion tokens (or what that is at the scale)."""
    windows = {}
    for name, (share, epochs) in PAPER.items():
        total = round(share * PAPER_TOKENS / epochs / 2_048 * scale)
        files = max(1, round(total * 2_048 / scale / 2e9))
        windows[name] = [total // files + (i < total % files) for i in range(files)]
    return windows


def test_the_papers_epochs_come_out() -> None:
    order = build(paper_windows(1.0), DataState.start(round_weights(PAPER_WEIGHTS)))
    epochs = order.epochs(round(PAPER_TOKENS / 2_048))
    assert {name: round(value, 2) for name, value in epochs.items()} == {n: e for n, (_, e) in PAPER.items()}


def test_counts_at_a_thousandth_of_the_papers_scale_equal_enumeration() -> None:
    windows = paper_windows(0.001)
    order = build(windows, DataState.start(round_weights(PAPER_WEIGHTS)))
    samples = round(PAPER_TOKENS / 2_048 / 1_000)
    found = order.locate(np.arange(samples))
    for place, name in enumerate(order.names):
        mine = found.source == place
        assert int(mine.sum()) == order.counts(samples)[name]
        starts = np.cumsum([0, *windows[name]])
        visits = np.bincount(starts[found.shard[mine]] + found.window[mine], minlength=starts[-1])
        epochs = PAPER[name][1]
        assert visits.min() == int(epochs) and visits.max() == int(epochs) + 1
        assert abs(visits.mean() - epochs) < 0.005


CHILD = """
import json, sys, time
from pathlib import Path
begin = time.perf_counter()
import numpy as np
from llamatrain.config.data import DataConfig, SourceConfig
from llamatrain.data.order import DataState, SampleOrder, round_weights
from llamatrain.data.sources import open_sources
weights = json.loads(sys.argv[2])
entries = {name: SourceConfig(f"{sys.argv[1]}/{name}", weight) for name, weight in weights.items()}
sources = open_sources(DataConfig(sources=entries, seq_len=2048), vocab_size=32000)
state = DataState.start(round_weights(weights))
order = SampleOrder([s.name for s in sources], [s.windows for s in sources], seed=0, segments=state.segments)
found = order.locate(np.arange(2048) + 600_000_000)
seconds = time.perf_counter() - begin
files, windows = sum(len(s.windows) for s in sources), sum(sum(s.windows) for s in sources)
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
megabytes = int(status["VmHWM"].split()[0]) / 1024  # not getrusage: its maximum includes the parent's, before exec
print(json.dumps([seconds, megabytes, files, windows, "torch" in sys.modules]))
"""


def write_sparse_paper_data(directory: Path) -> None:
    """Seven data sets whose files have the paper's sizes and hold nothing."""
    for name, shards in paper_windows(1.0).items():
        folder = directory / name
        folder.mkdir()
        infos = []
        for number, windows in enumerate(shards):
            info = ShardInfo(f"{number}.bin", windows * 2_048 + 1, 0, 0, "0" * 64, f"{number}.idx", "0" * 64)
            (folder / info.file).touch()
            os.truncate(folder / info.file, 2 * info.tokens)
            (folder / info.index_file).touch()
            infos.append(info)
        write_manifest(
            Manifest(folder, name, "uint16", "0" * 64, 32_000, 1, 2, True, True, splits={"train": tuple(infos)})
        )


def test_start_up_on_the_papers_data_takes_seconds_and_megabytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sparse_paper_data(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), json.dumps(PAPER_WEIGHTS)],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, megabytes, files, windows, torch_loaded = json.loads(run.stdout)
    with capsys.disabled():
        print(f"\n{windows:,} windows in {files} files: ready in {seconds:.2f} s, {megabytes:.0f} MB at most")
    assert files > 600 and windows > 600_000_000
    assert not torch_loaded
    assert seconds < 2 and megabytes < 200
