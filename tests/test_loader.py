"""The batches a rank gets: the same samples however the work is divided, documents kept apart, errors by name."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llamatrain.config.data import DataConfig, SourceConfig
from llamatrain.data.loader import IGNORE_INDEX, Batch, Loader, document_pieces
from llamatrain.data.order import DataState, SampleOrder, round_weights
from llamatrain.data.shards import Manifest, ShardWriter, read_manifest, write_manifest
from llamatrain.data.sources import Source, check_tokenizers, open_sources
from llamatrain.errors import DataError

BOS, EOS = 1, 2
VOCAB = 500
SEQ_LEN = 16
GLOBAL_BATCH = 8
SHARD_DOCUMENTS = {  # documents' lengths without BOS and EOS, by shard
    "prose": ([30, 5, 0, 61, 1, 2, 90], [200, 3, 40]),
    "code": ([7, 7, 7, 300], [15], [13, 14, 15, 16, 17, 18]),
}
WEIGHTS = {"prose": 2.0, "code": 1.0}


def write_data(
    directory: Path, name: str, *, vocab_size: int = VOCAB, tokenizer: str = "a" * 64, dtype: str = "uint16"
) -> Path:
    """A data set of random tokens, documents between BOS and EOS."""
    directory = directory / name
    directory.mkdir(parents=True)
    random = np.random.default_rng(len(name))
    shards = []
    for number, lengths in enumerate(SHARD_DOCUMENTS[name]):
        writer = ShardWriter(directory, f"train-{number}", dtype)
        for length in lengths:
            writer.add([BOS, *random.integers(3, vocab_size, length).tolist(), EOS], text_bytes=length)
        shards.append(writer.commit())
    write_manifest(
        Manifest(directory, name, dtype, tokenizer, vocab_size, BOS, EOS, True, True, {"train": tuple(shards)})
    )
    return directory


def data_config(directory: Path, **settings: object) -> DataConfig:
    entries = {name: SourceConfig(str(directory / name), weight) for name, weight in WEIGHTS.items()}
    return replace(DataConfig(sources=entries, seq_len=SEQ_LEN), **settings)  # type: ignore[arg-type]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in WEIGHTS:
        write_data(tmp_path, name)
    return tmp_path


@pytest.fixture
def sources(data: Path) -> list[Source]:
    return open_sources(data_config(data), vocab_size=VOCAB)


def make_order(sources: list[Source], state: DataState) -> SampleOrder:
    names, windows = [source.name for source in sources], [source.windows for source in sources]
    return SampleOrder(names, windows, seed=5, segments=state.segments)


START = DataState.start(round_weights(WEIGHTS))


def make_loader(sources: list[Source], state: DataState = START, *, micro_batch: int = 1, **settings: object) -> Loader:
    return Loader(
        sources,
        make_order(sources, state),
        state,
        seq_len=SEQ_LEN,
        global_batch=GLOBAL_BATCH,
        micro_batch=micro_batch,
        **settings,  # type: ignore[arg-type]
    )


def steps(sources: list[Source], count: int, state: DataState = START, **settings: object) -> list[Batch]:
    with make_loader(sources, state, **settings) as loader:  # type: ignore[arg-type]
        return [next(loader) for _ in range(count)]


def plain_window(sources: list[Source], order: SampleOrder, sample: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [T+1], whether each begins a document) by reading whole files."""
    found = order.locate(np.array([sample]))
    manifest = sources[found.source[0]].manifest
    shard = manifest.shards("train")[found.shard[0]]
    tokens = np.fromfile(manifest.directory / shard.file, manifest.dtype)
    begins = np.zeros(len(tokens) + 1, bool)
    begins[np.fromfile(manifest.directory / shard.index_file, np.uint64).astype(int)] = True
    window = slice(found.window[0] * SEQ_LEN, found.window[0] * SEQ_LEN + SEQ_LEN + 1)
    return tokens[window].astype(np.int64), begins[window]


# What a step reads


def test_a_batch_holds_the_windows_the_order_names(sources: list[Source]) -> None:
    order = make_order(sources, START)
    for step, batch in enumerate(steps(sources, 40)):
        assert batch.samples.tolist() == list(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH))
        assert batch.sources.tolist() == order.locate(batch.samples).source.tolist()
        assert batch.rows.dtype == torch.int64 and batch.tokens.shape == (GLOBAL_BATCH, SEQ_LEN + 1)
        for sample, tokens in zip(batch.samples.tolist(), batch.tokens.numpy(), strict=True):
            assert np.array_equal(tokens, plain_window(sources, order, sample)[0])
        assert batch.valid_targets == GLOBAL_BATCH * SEQ_LEN
        assert batch.data_wait_s >= 0


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("document_mask", [False, True])
def test_ranks_and_micro_batches_divide_the_same_step(
    sources: list[Source], world_size: int, micro_batch: int, document_mask: bool
) -> None:
    if micro_batch > GLOBAL_BATCH // world_size:
        pytest.skip("more rows than a rank has")
    count = 30
    whole = steps(sources, count, micro_batch=GLOBAL_BATCH, document_mask=document_mask)
    ranks = [
        steps(
            sources,
            count,
            micro_batch=micro_batch,
            rank=rank,
            world_size=world_size,
            document_mask=document_mask,
        )
        for rank in range(world_size)
    ]
    for step, expected in enumerate(whole):
        shares = [batches[step] for batches in ranks]
        pieces = [piece for share in shares for piece in share.micro_batches()]
        assert np.array_equal(np.concatenate([share.samples for share in shares]), expected.samples)
        assert all(piece.inputs.shape == (micro_batch, SEQ_LEN) for piece in pieces)
        assert torch.equal(torch.cat([piece.inputs for piece in pieces]), expected.tokens[:, :-1])
        assert torch.equal(torch.cat([piece.targets for piece in pieces]), expected.targets)
        assert sum(share.valid_targets for share in shares) == expected.valid_targets
        assert all(share.state_after == expected.state_after for share in shares)
        if document_mask:
            assert expected.document_lengths is not None
            assert [n for piece in pieces for n in piece.doc_lengths or []] == expected.document_lengths[0]


def test_targets_are_the_next_tokens(sources: list[Source]) -> None:
    (batch,) = steps(sources, 1, micro_batch=2)
    micro_batches = list(batch.micro_batches())
    assert len(micro_batches) == GLOBAL_BATCH // 2
    for number, (inputs, targets, lengths) in enumerate(micro_batches):
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert torch.equal(targets, batch.tokens[2 * number : 2 * number + 2, 1:])
        assert lengths is None


@pytest.mark.parametrize("world_size", [1, 8])
def test_starting_from_any_state_equals_running_there(sources: list[Source], world_size: int) -> None:
    batches = steps(sources, 12, world_size=world_size, prefetch_steps=5)
    for step in range(11):
        state = DataState.from_json(batches[step].state_after.to_json())
        assert state == START.advance((step + 1) * GLOBAL_BATCH)
        (resumed,) = steps(sources, 1, state, world_size=world_size)
        assert np.array_equal(resumed.samples, batches[step + 1].samples)
        assert torch.equal(resumed.rows, batches[step + 1].rows)


def test_a_block_located_ahead_joins_the_next_one(sources: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = steps(sources, 20)
    monkeypatch.setattr("llamatrain.data.loader.LOCATED_AHEAD", 3 * GLOBAL_BATCH)
    for batch, expected in zip(steps(sources, 20), whole, strict=True):
        assert torch.equal(batch.rows, expected.rows) and batch.state_after == expected.state_after


def test_samples_passed_over_are_not_read(sources: list[Source]) -> None:
    state = START.pass_over(3, 21)
    batches = steps(sources, 3, state, world_size=2, rank=1)
    assert np.concatenate([batch.samples for batch in batches]).tolist() == [
        *(22, 23, 24, 25),
        *(30, 31, 32, 33),
        *(38, 39, 40, 41),
    ]
    assert batches[1].state_after == state.advance(2 * GLOBAL_BATCH)


def test_wide_tokens_are_read_too(tmp_path: Path) -> None:
    write_data(tmp_path, "code", vocab_size=70_000, dtype="uint32")
    config = DataConfig({"code": SourceConfig(str(tmp_path / "code"))}, seq_len=SEQ_LEN)
    wide = open_sources(config, vocab_size=70_000)
    state = DataState.start({"code": 1})
    (batch,) = steps(wide, 1, state)
    order = make_order(wide, state)
    assert batch.tokens.max() > 65_536
    for sample, tokens in zip(batch.samples.tolist(), batch.tokens.numpy(), strict=True):
        assert np.array_equal(tokens, plain_window(wide, order, sample)[0])


# Documents


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_documents_are_kept_apart_as_the_obvious_way_does(sources: list[Source], micro_batch: int) -> None:
    order = make_order(sources, START)
    seen = set()
    for batch in steps(sources, 40, micro_batch=micro_batch, document_mask=True):
        valid = 0
        for number, (inputs, targets, lengths) in enumerate(batch.micro_batches()):
            expected_lengths, expected_targets = [], []
            for sample in batch.samples[number * micro_batch : (number + 1) * micro_batch].tolist():
                tokens, begins = plain_window(sources, order, sample)
                for position in range(SEQ_LEN):
                    if position == 0 or begins[position]:
                        expected_lengths.append(0)
                    expected_lengths[-1] += 1
                    expected_targets.append(IGNORE_INDEX if begins[position + 1] else int(tokens[position + 1]))
            assert lengths == expected_lengths and sum(lengths) == inputs.numel()
            assert targets.flatten().tolist() == expected_targets
            # BOS follows EOS: exactly the targets that are BOS
            assert BOS not in expected_targets and (inputs == BOS).sum() <= len(lengths)
            valid += int((targets != IGNORE_INDEX).sum())
            seen |= set(lengths)
        assert batch.valid_targets == valid
    assert {1, SEQ_LEN} <= seen


@pytest.mark.parametrize(
    ("starts", "first", "lengths", "ignored"),
    [
        ([0], 0, [4], []),
        ([0], 4, [4], []),
        ([0, 4], 0, [4], [3]),  # the next window's first token is this one's last target
        ([0, 4], 4, [4], []),
        ([0, 1, 3], 0, [1, 2, 1], [0, 2]),
        ([0, 2, 2, 2, 3], 0, [2, 1, 1], [1, 2]),  # two empty documents
        ([0, 3, 9], 2, [1, 3], [0]),
        ([], 0, [4], []),
    ],
)
def test_pieces_of_documents(starts: list[int], first: int, lengths: list[int], ignored: list[int]) -> None:
    assert document_pieces(np.array(starts, np.uint64), first, 4) == (lengths, ignored)


# The thread


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "llamatrain-loader"]


@pytest.mark.parametrize("taken", [0, 1, 10])
def test_closing_leaves_no_thread(sources: list[Source], taken: int) -> None:
    loader = make_loader(sources, prefetch_steps=1)
    for _ in range(taken):
        next(loader)
    assert len(loader_threads()) == 1
    loader.close()
    assert loader_threads() == []
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_no_more_than_prefetch_steps_are_read_ahead(sources: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    assembled = []
    assemble = Loader._assemble
    monkeypatch.setattr(Loader, "_assemble", lambda *args: assembled.append(1) or assemble(*args))
    with make_loader(sources, prefetch_steps=3) as loader:
        next(loader)
        next(loader)
        for _ in range(200):
            if len(assembled) == 5:
                break
            threading.Event().wait(0.01)
        threading.Event().wait(0.05)
        assert len(assembled) == 5


def test_an_error_in_the_thread_reaches_the_consumer_and_names_the_shard(sources: list[Source]) -> None:
    path = sources[1].manifest.directory / "train-0.bin"
    path.write_bytes(path.read_bytes()[:100])  # after its size was checked
    with make_loader(sources) as loader:
        with pytest.raises(DataError, match=r"code/train-0\.bin: cannot be mapped"):
            list(loader)
        with pytest.raises(DataError, match="train-0"):  # and again, when it is asked again
            next(loader)
    assert loader_threads() == []


@pytest.mark.parametrize(
    "wrong", [{"world_size": 3}, {"micro_batch": 3}, {"world_size": 4, "micro_batch": 4}, {"rank": 1}]
)
def test_a_batch_that_does_not_divide_is_refused(sources: list[Source], wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="does not divide"):
        make_loader(sources, **wrong)  # type: ignore[arg-type]


def test_sources_that_are_not_the_orders_are_refused(sources: list[Source]) -> None:
    order = make_order(sources, START)
    other_length = [replace(source, seq_len=SEQ_LEN // 2) for source in sources]
    for wrong in (sources[::-1], other_length):
        with pytest.raises(ValueError, match="not the order's"):
            Loader(wrong, order, START, seq_len=SEQ_LEN, global_batch=4, micro_batch=1)


# Opening


def test_windows_and_leftover_tokens_are_reported(sources: list[Source]) -> None:
    prose = sources[0]
    lengths = [sum(documents) + 2 * len(documents) for documents in SHARD_DOCUMENTS["prose"]]
    assert prose.windows == tuple((length - 1) // SEQ_LEN for length in lengths)
    assert prose.leftover_tokens == sum(lengths) - SEQ_LEN * sum(prose.windows)
    assert prose.describe() == (
        "data.sources.prose: 452 tokens in 2 shards, 27 samples of 16 tokens, 20 tokens left over at the shards' ends"
    )


def test_a_source_of_weight_0_is_not_opened(data: Path) -> None:
    config = data_config(data)
    config.sources["absent"] = SourceConfig("/nowhere", 0.0)
    assert [source.name for source in open_sources(config, vocab_size=None)] == ["prose", "code"]


def refusal(config: DataConfig, *, vocab_size: int = VOCAB, tokenizer_sha256: str | None = None) -> str:
    def open_and_check() -> None:
        sources = open_sources(config, vocab_size=vocab_size)
        check_tokenizers(sources, tokenizer_sha256 or sources[0].manifest.tokenizer_sha256)

    with pytest.raises(DataError) as caught:
        open_and_check()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_sources_of_different_tokenizers_are_refused(data: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "other", "code", tokenizer="b" * 64)
    config = data_config(data)
    config.sources["code"].path = str(tmp_path / "other" / "code")
    message = refusal(config)
    assert "data.sources.code and data.sources.prose" in message
    assert "aaaaaaaaaaaa" in message and "bbbbbbbbbbbb" in message


def test_another_tokenizer_than_the_given_is_refused(data: Path) -> None:
    check_tokenizers(open_sources(data_config(data), vocab_size=VOCAB), "a" * 64)
    message = refusal(data_config(data), tokenizer_sha256="c" * 64)
    assert "data.sources.prose" in message and "data.tokenizer (cccccccccccc…)" in message


def test_a_vocabulary_larger_than_the_models_is_refused(data: Path) -> None:
    message = refusal(data_config(data), vocab_size=499)
    assert "data.sources.prose" in message and "set model.vocab_size=500" in message


def test_a_missing_directory_is_refused(data: Path) -> None:
    config = data_config(data)
    config.sources["code"].path = "/nowhere/code"
    assert refusal(config).startswith("data.sources.code: /nowhere/code: no dataset.json")


def test_a_missing_shard_is_refused(data: Path) -> None:
    (data / "code" / "train-1.idx").unlink()
    assert "train-1.idx: named in the manifest but cannot be read" in refusal(data_config(data))


def test_a_truncated_shard_is_refused(data: Path) -> None:
    path = data / "prose" / "train-1.bin"
    path.write_bytes(path.read_bytes()[:-2])
    message = refusal(data_config(data))
    assert message.startswith(f"data.sources.prose: {path}: ") and "truncated" in message


def test_an_altered_shard_is_refused_when_hashes_are_verified(data: Path) -> None:
    path = data / "prose" / "train-1.bin"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    open_sources(data_config(data), vocab_size=VOCAB)
    assert f"{path}: its SHA-256" in refusal(data_config(data, verify_hashes=True))


def test_a_corpus_shorter_than_a_sample_is_refused(data: Path) -> None:
    sources = open_sources(data_config(data, seq_len=10_000), vocab_size=VOCAB)
    with pytest.raises(DataError, match=r"data\.sources\.code: .*data\.seq_len"):
        make_order(sources, START)
    assert read_manifest(data / "code").tokens("train") == sources[1].leftover_tokens
