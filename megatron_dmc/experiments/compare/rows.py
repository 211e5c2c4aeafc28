"""What a comparison measures: its methods, and a row for each ratio and seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_dmc.baselines.presses import OF_KVPRESS, QUANTIZED
from megatron_dmc.experiments.compare.trainings import Training, Trainings

# {method: what it is called}, in the order of the tables. A press is called as kvpress calls it.
TRAINED = {"calibrated": "DMC, calibrated only", "dmc": "DMC", "dms": "DMS", "gqa": "GQA uptraining"}
# The export of the nearest ratio, asked for another one.
AT_THRESHOLD = "dmc_at_threshold"
# {method: in which its cache keeps a slot}, of DMC's exports.
CODED = {"dmc_int8": "int8", "dmc_fp8": "fp8", "dmc_int4": "int4"}
# Bits of a number in a plain cache; ratios against 16.
BITS = (8, 4, 2)
LABELS = {
    **TRAINED,
    AT_THRESHOLD: "DMC at another ratio than its own",
    **{name: f"DMC, slots in {dtype}" for name, dtype in CODED.items()},
    QUANTIZED: "plain, quantized",
    **{name: name for name in OF_KVPRESS},
}
METHODS = (*TRAINED, *CODED, QUANTIZED, *OF_KVPRESS)
# Ratios that cost no training of their own once there is a model for the others.
BETWEEN = (2, 3, 6)


@dataclass(frozen=True)
class Row:
    """One model, kept in one way.

    Attributes:
        method: of METHODS, or AT_THRESHOLD.
        ratio: that is asked for.
        seed: of its training; None: nothing is trained.
        training: that it comes from.
        checkpoint: of that training: ``final``, or ``cr_4``.
        share: of the training's steps that are done by then.
        flags: more words of ``megatron-dmc evaluate``.
    """

    method: str
    ratio: float
    seed: int | None = None
    training: Training | None = None
    checkpoint: str = "final"
    share: float = 1.0
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its report."""
        return f"{self.method}-cr{self.ratio:g}" + ("" if self.seed is None else f"-seed{self.seed}")

    @property
    def export(self) -> str:
        """The folder that is evaluated."""
        if self.training is None:
            return "hf-base"
        return f"hf-{self.training.name}" + ("" if self.checkpoint == "final" else f"-{self.checkpoint}")

    @property
    def tokens(self) -> int:
        """That were read for it: to calibrate, and to train."""
        before = sum(each.tokens for each in self.trainings[:-1])
        return before + (0 if self.training is None else round(self.share * self.training.tokens))

    @property
    def trainings(self) -> list[Training]:
        """What it takes, in the order in which it is done."""
        found, training = [], self.training
        while training is not None:
            found.append(training)
            training = training.base
        return found[::-1]


@dataclass(frozen=True)
class Wanted:
    """Which rows are asked for.

    Attributes:
        methods: of METHODS.
        ratios: of each method.
        seeds: of what is trained.
        ruler: texts of each of RULER's tasks and lengths; 0: none.
    """

    methods: Sequence[str]
    ratios: Sequence[float]
    seeds: Sequence[int]
    ruler: int = 0

    def rows(self, trainings: Trainings, groups: dict[float, int]) -> list[Row]:
        """What is not trained comes first, then a seed after the other, and of each first the methods at the ratios that
        were asked for: a run that is ended early has something of each.

        Args:
            groups: {ratio: KV heads} that the base's can be averaged into.
        """
        presses = [name for name in OF_KVPRESS if name in self.methods]
        found = [
            Row(press, ratio, flags=("--baseline", press, "--compression-ratio", f"{ratio:g}"))
            for ratio in self.ratios
            for press in presses
        ]
        if QUANTIZED in self.methods:
            found += [Row(QUANTIZED, 16 / bits, flags=("--baseline", QUANTIZED, "--bits", str(bits))) for bits in BITS]
        for seed in self.seeds:
            trained = list(self._decided(trainings, seed))
            if "dms" in self.methods:
                trained += self._sparsified(trainings, seed)
            if "gqa" in self.methods:
                trained += [
                    Row("gqa", ratio, seed, trainings.grouped(f"gqa-{heads}", heads, seed))
                    for ratio, heads in groups.items()
                ]
            found += sorted(trained, key=self._comes_later)
        return found

    def _comes_later(self, row: Row) -> bool:
        """Whether it only says more of a model that another row is of."""
        return row.method in CODED or (row.method != "gqa" and row.ratio not in self.ratios)

    def _decided(self, trainings: Trainings, seed: int) -> Iterator[Row]:
        for ratio in self.ratios:
            *start, whole = trainings.dmc(ratio, seed)
            if "calibrated" in self.methods:
                yield from (Row("calibrated", ratio, seed, each) for each in start)
            if "dmc" in self.methods:
                yield Row("dmc", ratio, seed, whole)
            # What one seed shows of a model that is there anyway.
            if seed != self.seeds[0]:
                continue
            for name, dtype in CODED.items():
                if name in self.methods:
                    yield Row(name, ratio, seed, whole, flags=("--cache-dtype", dtype))
            if "dmc" in self.methods:
                for other in self._nearest_to(ratio):
                    yield Row(AT_THRESHOLD, other, seed, whole, flags=("--compression-ratio", f"{other:g}"))

    def _sparsified(self, trainings: Trainings, seed: int) -> Iterator[Row]:
        most = max(self.ratios)
        training = trainings.sparsified(most, seed)
        for ratio in sorted({*self.ratios, *self._between}):
            # On its way it keeps what it has at whole ratios.
            if ratio == most or ratio == int(ratio):
                checkpoint = "final" if ratio == most else f"cr_{ratio:g}"
                yield Row("dms", ratio, seed, training, checkpoint, (ratio - 1) / (most - 1))

    @property
    def _between(self) -> list[float]:
        return [float(each) for each in BETWEEN if each < max(self.ratios) and each not in self.ratios]

    def _nearest_to(self, ratio: float) -> list[float]:
        """Ratios between, which no other trained one is nearer to: in steps of a factor."""

        def distance(known: float, other: float) -> float:
            return max(known / other, other / known)

        return [each for each in self._between if min(self.ratios, key=lambda known: distance(known, each)) == ratio]


def possible_groups(kv_heads: int, most: float) -> dict[float, int]:
    """{ratio: KV heads} that so many KV heads can be averaged into, up to a ratio."""
    fewer = (heads for heads in range(kv_heads - 1, 0, -1) if kv_heads % heads == 0)
    return {kv_heads / heads: heads for heads in fewer if kv_heads / heads <= most}
