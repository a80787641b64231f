"""The planner's predictions beside published throughputs, and the fit of its calibration that they judge.

    python -m tests.benchmarks.bench_planning [--plot FILE.svg] [--parts]

For each kind of GPU two shares of its peak are fitted (products, attention), by the mean absolute error of the
logarithm. A row is predicted by a fit that has not seen any row of its publication: what a group has of its own, its
software, its network, its way to measure, cannot leak into its prediction. The rows of LLaMA are in no fit at all, nor
are those of GPUs at 500 W, which are reckoned as an H100 whose clock goes with the cube root of the power.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import Any

import yaml

from llamatrain.arithmetic import flops_per_token
from llamatrain.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from llamatrain.config.build import build
from llamatrain.config.cluster import ClusterConfig, HardwareConfig
from llamatrain.planning.hardware import CALIBRATION, Calibration, Cluster, cluster_of
from llamatrain.planning.roofline import Habits, StepTime, step_time

PUBLISHED = Path(__file__).with_name("published.yaml")
SXM = {"A100": "NVIDIA A100-SXM4-80GB", "H100": "NVIDIA H100 80GB HBM3"}
UNSEEN = ("llama", "titan_h100")  # in no fit
PRODUCTS = [0.50 + 0.01 * step for step in range(36)]
ATTENTION = [0.10 + 0.02 * step for step in range(21)]


@dataclass(frozen=True)
class Row:
    """A published throughput, and what it was measured with."""

    publication: str
    model: str
    config: RunConfig
    world_size: int
    kind: str  # of GPU
    watts: float
    cluster: Cluster
    habits: Habits
    rate: float  # tokens a second on each GPU

    def time(self, reached: Calibration) -> StepTime:
        clock = (self.watts / self.cluster.gpu.watts) ** (1 / 3)
        slower = Calibration(reached.products * clock, reached.attention * clock)
        cluster = replace(self.cluster, gpu=replace(self.cluster.gpu, reached=slower))
        recompute = self.config.parallel.recompute
        return step_time(self.config, recompute, cluster, world_size=self.world_size, habits=self.habits)

    def predicted(self, reached: Calibration) -> float:
        """Tokens a second on each GPU."""
        return self.config.train.global_batch_tokens / self.time(reached).total / self.world_size

    def error(self, reached: Calibration) -> float:
        return self.predicted(reached) / self.rate - 1

    def mfu(self, rate: float) -> float:
        return rate * flops_per_token(self.config.model, self.config.data.seq_len) / self.cluster.gpu.peak


def published() -> list[Row]:
    """All rows of published.yaml."""
    file = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    return [
        _row(name, {**publication["common"], **row}, file["shapes"])
        for name, publication in file["publications"].items()
        for row in publication["rows"]
    ]


def sources() -> dict[str, str]:
    """Of each publication."""
    file = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    return {name: publication["source"] for name, publication in file["publications"].items()}


def _row(publication: str, given: dict[str, Any], shapes: dict[str, Any]) -> Row:
    model = build(ModelConfig, {**shapes[given["shape"]], "max_seq_len": given["seq"], "attention": "sdpa"})
    tp, pp = given.get("tp", 1), given.get("pp", 1)
    ranks = given["gpus"] // (tp * pp)
    shard = given.get("dp", ranks)
    config = RunConfig(
        model=model,
        data=DataConfig(seq_len=given["seq"]),
        train=TrainConfig(
            micro_batch=given["micro_batch"],
            global_batch_tokens=given["seq"] * given["micro_batch"] * ranks * given.get("accumulate", 1),
            precision="bf16",
            compile=given["compile"],
        ),
        parallel=ParallelConfig(
            tp=tp,
            pp=pp,
            dp_shard=shard,
            dp_replicate=ranks // shard,
            recompute=given["recompute"],
            reduce_dtype=given.get("reduce_dtype", "fp32"),
            reshard_after_forward=given.get("reshard", "always"),
        ),
    )
    kind = given["gpu"]
    cluster = cluster_of(
        ClusterConfig(
            name=publication,
            accelerator=SXM[kind],
            gpus_per_node=8,
            hardware=HardwareConfig(network_gb_s=given["network_gb_s"]),
        )
    )
    return Row(
        publication=publication,
        model=given["shape"],
        config=config,
        world_size=given["gpus"],
        kind=kind,
        watts=given.get("watts", cluster.gpu.watts),
        cluster=cluster,
        habits=build(Habits, given["habits"]),
        rate=given.get("rate") or given["tflops"] * 1e12 / megatron_flops(model, given["seq"]),
    )


def megatron_flops(model: ModelConfig, seq_len: int) -> float:
    """Of a token, as Megatron-LM counts them."""
    d, layers = model.dim, model.n_layers
    return 72 * layers * d**2 * (1 + seq_len / (6 * d) + model.vocab_size / (12 * d * layers))


def fit(rows: Sequence[Row]) -> Calibration:
    """The shares with the least mean absolute error of the logarithm: along one, then along the other."""

    def loss(reached: Calibration) -> float:
        return statistics.mean(abs(log(1 + row.error(reached))) for row in rows)

    best = Calibration(products=0.70, attention=0.30)
    while True:
        before = best
        best = min((replace(best, products=round(share, 2)) for share in PRODUCTS), key=loss)
        best = min((replace(best, attention=round(share, 2)) for share in ATTENTION), key=loss)
        if best == before:
            return best


def fitted(rows: Sequence[Row], kind: str, *, without: str = "") -> Calibration:
    """To the rows of a kind of GPU, those of one publication left out."""
    return fit([row for row in rows if row.kind == kind and row.publication not in (*UNSEEN, without)])


def held_out(rows: Sequence[Row]) -> Iterator[tuple[str, Calibration, list[Row]]]:
    """Each publication with the calibration that has not seen it."""
    for publication in dict.fromkeys(row.publication for row in rows):
        own = [row for row in rows if row.publication == publication]
        yield publication, fitted(rows, own[0].kind, without=publication), own


def layout_of(row: Row) -> str:
    """In a few characters."""
    parallel, train = row.config.parallel, row.config.train
    axes = {"copies": parallel.dp_replicate, "tp": parallel.tp, "pp": parallel.pp}
    told = [f"{axis} {size}" for axis, size in axes.items() if size > 1]
    again = row.habits.repeated if row.habits.repeated is not None else parallel.recompute
    return ", ".join([*told, f"mb {train.micro_batch}", f"again {again}", *([] if train.compile else ["eager"])])


def draw(rows: Sequence[tuple[Row, float]], path: str) -> None:
    """Predicted over published MFU."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    axes = figure.subplots()
    line = [0.2, 0.75]
    axes.plot(line, line, color="black", linewidth=0.8)
    axes.fill_between(line, [0.9 * x for x in line], [1.1 * x for x in line], color="0.9", label="within 10 %")
    for number, publication in enumerate(dict.fromkeys(row.publication for row, _ in rows)):
        own = [(row.mfu(row.rate), row.mfu(rate)) for row, rate in rows if row.publication == publication]
        marker = "o^sDvP*Xdph"[number]
        published_mfu, predicted_mfu = zip(*own, strict=True)
        axes.scatter(published_mfu, predicted_mfu, s=26, marker=marker, alpha=0.8, label=publication)
    axes.set(xlabel="published MFU", ylabel="predicted MFU, its publication held out", xlim=line, ylim=line)
    axes.legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", help="file for predicted over published")
    parser.add_argument("--parts", action="store_true", help="what each step's time goes to")
    arguments = parser.parse_args()
    rows = published()
    for kind in CALIBRATION:
        print(f"{kind}, all rows but those of {' and '.join(UNSEEN)}: {fitted(rows, kind)}")
    print("\n| publication | GPU | rows | fit without it: products, attention | median error | median of its size |")
    print("|---|---|---|---|---|---|")
    predicted: list[tuple[Row, float]] = []
    for publication, reached, own in held_out(rows):
        errors = [row.error(reached) for row in own]
        predicted += [(row, row.predicted(reached)) for row in own]
        size = statistics.median(map(abs, errors))
        told = f"{own[0].kind} | {len(own)} | {reached.products:.2f}, {reached.attention:.2f}"
        print(f"| {publication} | {told} | {statistics.median(errors):+.1%} | {size:.1%} |")
    errors = [abs(rate / row.rate - 1) for row, rate in predicted]
    within = sum(error <= 0.1 for error in errors)
    print(f"\n{len(errors)} rows held out: median error {statistics.median(errors):.1%}, {within} within 10 %")
    print("\n| publication | model | sequence | GPUs | layout | published | predicted | error |")
    print("|---|---|---|---|---|---|---|---|")
    for row, rate in predicted:
        place = f"{row.publication} | {row.model} | {row.config.data.seq_len} | {row.world_size} | {layout_of(row)}"
        print(f"| {place} | {row.rate:,.0f} | {rate:,.0f} | {rate / row.rate - 1:+.1%} |")
        if arguments.parts:
            print(row.time(CALIBRATION[row.kind]))
    if arguments.plot:
        draw(predicted, arguments.plot)


if __name__ == "__main__":
    main()
