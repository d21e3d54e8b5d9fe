"""What a site tells about its images so that a network can be planned: counts and moments, never a case.

Why counts per axis are enough: nnU-Net's ``ExperimentPlanner`` uses the cases' spacings and shapes only through
``np.percentile(spacings, q, 0)``, ``np.median(shapes, 0)`` and the median over cases of ``compute_new_shape``, which
is ``round(spacing / target * shape)`` of one axis. Each works on one axis at a time, so a table of (spacing, shape)
pairs per axis gives exactly what the cases would give (to bin width), and pairs of different axes need not be linked.
"""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme
from numpy.typing import NDArray

from fedcmt.data.checks import Case, channel_names, list_training_cases, read_dataset_json
from fedcmt.nnunet import fingerprint_json as read
from fedcmt.nnunet.fingerprint_json import AxisTable, Counts, Labels

logger = logging.getLogger(__name__)

MIN_CASES = 5
"""Sites with fewer training cases do not send a fingerprint unless the job says so."""

MIN_TAIL_VOXELS = 10
"""The outermost histogram bins stand for at least this many voxels: a single extreme voxel identifies an image."""

_LINEAR = 1e-3  # below this absolute intensity the grid is linear, above it logarithmic
_STEP = 0.002  # relative width of a bin in the logarithmic part
_LAST_BIN = 48_000  # beyond the largest float32

_MOST_CASES = (
    1_000_000  # tables are expanded to one entry per case for nnU-Net's planner, so a message must not ask for more
)

_FIELDS = frozenset(
    (
        *("num_cases", "channel_names", "labels", "regions_class_order", "file_ending"),
        *("spacing_step_mm", "shape_step_vox", "crop_bins", "axes", "crop", "intensities"),
    )
)


class FingerprintMismatchError(ValueError):
    """Fingerprints of sites that do not hold the same kind of data."""


@dataclass(frozen=True)
class BinPolicy:
    """How finely a fingerprint tells about images.

    Attributes:
      spacing_step_mm: Width of a spacing bin in mm.
      shape_step_vox: Width of a shape bin in voxels.
      crop_bins: Bins of the relative size after cropping in [0, 1); a multiple of 4, so that 3/4, below which nnU-Net
        normalises inside the mask, is an edge. With an odd number of cases the median's side of 3/4 is then exact, with
        an even one unless the true median is within half a bin of 3/4.
    """

    spacing_step_mm: float
    shape_step_vox: int
    crop_bins: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.spacing_step_mm) and self.spacing_step_mm > 0 and self.shape_step_vox >= 1):
            raise ValueError(
                f"bins: spacing_step_mm {self.spacing_step_mm} and shape_step_vox {self.shape_step_vox} must be above 0"
            )
        if self.crop_bins < 4 or self.crop_bins % 4:
            raise ValueError(f"bins: crop_bins must be a positive multiple of 4, got {self.crop_bins}")


_POLICIES = {
    # The plan must equal the one of the pooled data, which the sites have agreed to.
    "consensus": BinPolicy(spacing_step_mm=0.001, shape_step_vox=1, crop_bins=1000),
    # Only patch and topology are decided, and both are coarse.
    "architecture": BinPolicy(spacing_step_mm=0.1, shape_step_vox=8, crop_bins=100),
    "own": BinPolicy(spacing_step_mm=0.1, shape_step_vox=8, crop_bins=100),
}


def bin_policy(mode: str) -> BinPolicy:
    """The bins of a planning mode, "consensus", "architecture" or "own".

    Raises:
      ValueError: If there is no such mode.
    """
    if mode not in list(_POLICIES):  # by value: a job may hold anything here
        raise ValueError(f"planning.mode is {mode!r}, expected one of {sorted(_POLICIES)}")
    return _POLICIES[mode]


@dataclass(frozen=True)
class Intensities:
    """Sampled foreground intensities of one channel, in the images' own unit.

    Attributes:
      n: Number of samples.
      mean: Their mean; 0 if n is 0.
      m2: Their summed squared distance from the mean.
      histogram: Counts on one grid for all sites and units, bin ``sign(v) * rint(log1p(|v| / 1e-3) / 0.002)``:
        0.2 % wide wherever the values are well above 1e-3.
    """

    n: int
    mean: float
    m2: float
    histogram: Counts

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads them back."""
        return {
            "n": self.n,
            "mean": self.mean,
            "m2": self.m2,
            "bins": [b for b, _ in self.histogram],
            "counts": [k for _, k in self.histogram],
        }

    @classmethod
    def from_dict(cls, content: Any, where: str) -> "Intensities":
        """Read `to_dict`'s form, checked; ``where`` names it in errors."""
        read.check_keys(content, frozenset(("n", "mean", "m2", "bins", "counts")), where)
        n = read.integer(content["n"], where, 0)
        mean, m2 = read.number(content["mean"], where), read.number(content["m2"], where)
        if m2 < 0:
            raise ValueError(f"fingerprint: {where} has m2 {m2}, expected a sum of squares")
        bins = read.integers(content["bins"], where)
        if any(abs(b) > _LAST_BIN for b in bins):
            raise ValueError(
                f"fingerprint: {where} has bins beyond ±{_LAST_BIN}, which no float32 intensity falls into"
            )
        counts = [read.integer(c, where, 1) for c in read.items(content["counts"], where)]
        if len(bins) != len(counts):
            raise ValueError(f"fingerprint: {where} has {len(bins)} bins and {len(counts)} counts, expected as many")
        read.check_total(sum(counts), n, where, "samples")
        read.check_distinct(bins, where)
        return cls(n, mean, m2, tuple(sorted(zip(bins, counts, strict=True))))

    def merged(self, other: "Intensities") -> "Intensities":
        """Both samples together (Chan et al., 1979)."""
        n = self.n + other.n
        if n == 0:
            return self
        shift = other.mean - self.mean
        mean = self.mean + shift * other.n / n
        m2 = self.m2 + other.m2 + shift * shift * self.n * other.n / n
        return Intensities(n, mean, m2, _added(self.histogram, other.histogram))

    def std(self) -> float:
        """Population standard deviation, as nnU-Net's ``np.std``."""
        return math.sqrt(self.m2 / self.n)

    def percentile(self, q: float) -> float:
        """The q-th percentile (0..100), linear between order statistics like NumPy's; right to 0.1 % of the value.

        At the ends it is no further out than the outermost bin that stands for `MIN_TAIL_VOXELS` voxels.
        """
        bins = np.array([b for b, _ in self.histogram])
        ends = np.cumsum([c for _, c in self.histogram])
        position = q / 100 * (self.n - 1)
        low, high = (
            bin_to_intensity(bins[np.searchsorted(ends, rank, side="right")]) for rank in _neighbours(position)
        )
        return float(low + (high - low) * (position - math.floor(position)))


@dataclass(frozen=True)
class Fingerprint:
    """One site's, or several sites', statistics for planning. Holds no row that belongs to one case.

    Attributes:
      num_cases: Number of training cases, at least 1.
      channel_names: Input channels in nnU-Net's order.
      labels: Label names and values.
      regions_class_order: As in dataset.json; None without regions.
      file_ending: E.g. ".nii.gz".
      bins: Bin widths of the tables below.
      axes: One table per array axis (z, y, x as nnU-Net reads images), each sorted on its own.
      crop: Counts of the relative size after cropping; the last bin, ``bins.crop_bins``, is "nothing was cropped".
      intensities: One per channel.
    """

    num_cases: int
    channel_names: tuple[str, ...]
    labels: Labels
    regions_class_order: tuple[int, ...] | None
    file_ending: str
    bins: BinPolicy
    axes: tuple[AxisTable, AxisTable, AxisTable]
    crop: Counts
    intensities: tuple[Intensities, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads them back."""
        regions = self.regions_class_order
        return {
            "num_cases": self.num_cases,
            "channel_names": list(self.channel_names),
            "labels": [[name, list(value) if isinstance(value, tuple) else value] for name, value in self.labels],
            "regions_class_order": None if regions is None else list(regions),
            "file_ending": self.file_ending,
            "spacing_step_mm": self.bins.spacing_step_mm,
            "shape_step_vox": self.bins.shape_step_vox,
            "crop_bins": self.bins.crop_bins,
            "axes": [[list(row) for row in table] for table in self.axes],
            "crop": [list(row) for row in self.crop],
            "intensities": [channel.to_dict() for channel in self.intensities],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Fingerprint":
        """Read `to_dict`'s form, which may come from anybody: everything is checked.

        Raises:
          ValueError: If a key is missing or unknown, a value has another type, is negative or not finite, or the counts
            do not add up to the number of cases or samples.
        """
        read.check_keys(content, _FIELDS, "fingerprint")
        bins = BinPolicy(
            read.number(content["spacing_step_mm"], "spacing_step_mm"),
            read.integer(content["shape_step_vox"], "shape_step_vox", 1),
            read.integer(content["crop_bins"], "crop_bins", 1),
        )
        num_cases = read.integer(content["num_cases"], "num_cases", 1)
        if num_cases > _MOST_CASES:
            raise ValueError(f"fingerprint: num_cases is {num_cases}, expected at most {_MOST_CASES}")
        names = tuple(
            read.string(name, "channel_names") for name in read.items(content["channel_names"], "channel_names")
        )
        regions = content["regions_class_order"]
        axes = [
            read.axis_table(table, f"axes[{i}]", num_cases)
            for i, table in enumerate(read.items(content["axes"], "axes"))
        ]
        if len(axes) != 3:
            raise ValueError(f"fingerprint: axes has {len(axes)} tables, expected 3 (z, y, x)")
        intensities = tuple(
            Intensities.from_dict(item, f"intensities[{i}]")
            for i, item in enumerate(read.items(content["intensities"], "intensities"))
        )
        if not names or len(intensities) != len(names):
            raise ValueError(
                f"fingerprint: {len(intensities)} intensities for {len(names)} channels; expected one each"
            )
        return cls(
            num_cases=num_cases,
            channel_names=names,
            labels=read.labels(content["labels"]),
            regions_class_order=None if regions is None else read.integers(regions, "regions_class_order"),
            file_ending=read.string(content["file_ending"], "file_ending"),
            bins=bins,
            axes=(axes[0], axes[1], axes[2]),
            crop=read.crop_counts(content["crop"], num_cases, last_bin=bins.crop_bins),
            intensities=intensities,
        )

    def dataset_json(self) -> dict[str, Any]:
        """The dataset.json of the data this stands for, as nnU-Net's planner and label manager read it."""
        regions = self.regions_class_order
        return {
            "channel_names": {str(i): name for i, name in enumerate(self.channel_names)},
            "labels": {name: list(value) if isinstance(value, tuple) else value for name, value in self.labels},
            **({} if regions is None else {"regions_class_order": list(regions)}),
            "numTraining": self.num_cases,  # the planner caps the batch size by it
            "file_ending": self.file_ending,
        }

    def coarsened(self, bins: BinPolicy) -> "Fingerprint":
        """The same with wider bins, so that a site can read its images once, keep the fine form and send this one."""
        axes = [
            _axis_table(((self._spacing(s), self._shape(k)) for s, k, n in table for _ in range(n)), bins)
            for table in self.axes
        ]
        crop = Counter(_crop_bin(_crop_value(b, self.bins), bins) for b, n in self.crop for _ in range(n))
        return replace(self, bins=bins, axes=(axes[0], axes[1], axes[2]), crop=_sorted(crop))

    def axis(self, index: int) -> tuple[list[float], list[int]]:
        """Spacings in mm and shapes in voxels of one array axis, one entry per case, sorted by bin."""
        rows = [(self._spacing(s), self._shape(k)) for s, k, n in self.axes[index] for _ in range(n)]
        return [spacing for spacing, _ in rows], [shape for _, shape in rows]

    def median_relative_size_after_cropping(self) -> float:
        """Median over cases, in (0, 1], to half a bin."""
        return float(np.median([_crop_value(b, self.bins) for b, n in self.crop for _ in range(n)]))

    def _spacing(self, index: int) -> float:
        value = round(index * self.bins.spacing_step_mm, 9)
        # A NIfTI header holds float32, so 0.9 mm is read as 0.8999999762: give back what nnU-Net read.
        return float(np.float32(value)) if self.file_ending.startswith(".nii") else value

    def _shape(self, index: int) -> int:
        return max(1, index * self.bins.shape_step_vox)


def extract_fingerprint(
    dataset_folder: Path,
    *,
    samples_per_case: int = 10_000,
    spacing_step_mm: float,
    shape_step_vox: int,
    crop_bins: int = 1000,
    min_cases: int = MIN_CASES,
) -> Fingerprint:
    """Read every training case of one site once, with nnU-Net's own ``analyze_case``, one at a time in this process.

    Args:
      dataset_folder: The data set in nnU-Net raw form.
      samples_per_case: Foreground voxels drawn per case and channel, with replacement as nnU-Net does.
      spacing_step_mm: Width of a spacing bin in mm; see `bin_policy`.
      shape_step_vox: Width of a shape bin in voxels.
      crop_bins: Bins of the relative size after cropping.
      min_cases: Refuse below this many cases: counts of few cases are the cases.

    Raises:
      DatasetError: If dataset.json, an image or a label is missing or wrong, naming all of them.
      ValueError: If there are too few cases, an intensity is not finite, or a channel has some foreground voxels but
        fewer than `MIN_TAIL_VOXELS`.
    """
    bins = BinPolicy(spacing_step_mm, shape_step_vox, crop_bins)
    dataset_json = read_dataset_json(dataset_folder)
    cases = list_training_cases(dataset_folder, dataset_json)
    if len(cases) < min_cases:
        raise ValueError(
            f"{dataset_folder}: {len(cases)} training cases, planning.min_cases is {min_cases}; statistics of so few "
            "would describe single patients, so nothing is sent. Add cases, or --set server.planning.min_cases lower."
        )
    names = channel_names(dataset_json)
    first = str(next(iter(cases.values())).images[0])
    reader = _counting_reader(determine_reader_writer_from_dataset_json(dataset_json, first, verbose=False))
    axes: list[list[tuple[float, int]]] = [[], [], []]
    crop: Counter[int] = Counter()
    collectors = [_Collector() for _ in names]
    for done, (name, case) in enumerate(cases.items(), start=1):
        shape, spacing, samples, relative_size = _analyze(case, reader, samples_per_case)
        for axis in range(3):
            axes[axis].append((float(spacing[axis]), int(shape[axis])))
        crop[_crop_bin(relative_size, bins)] += 1
        for channel, values in enumerate(samples):
            collectors[channel].add(
                values, reader.foreground_voxels, where=f"case {name!r}, channel {names[channel]!r}"
            )
        logger.debug("fingerprint: case %d of %d", done, len(cases))
    regions = dataset_json.get("regions_class_order")
    return Fingerprint(
        num_cases=len(cases),
        channel_names=names,
        labels=read.labels(list(dataset_json["labels"].items())),
        regions_class_order=None if regions is None else read.integers(regions, "regions_class_order"),
        file_ending=dataset_json["file_ending"],
        bins=bins,
        axes=(_axis_table(axes[0], bins), _axis_table(axes[1], bins), _axis_table(axes[2], bins)),
        crop=_sorted(crop),
        intensities=tuple(c.result(f"{dataset_folder}, channel {n!r}") for c, n in zip(collectors, names, strict=True)),
    )


def merge(fingerprints: Sequence[Fingerprint], names: Sequence[str] | None = None) -> Fingerprint:
    """The fingerprint of all cases together. Tables add exactly; moments up to float addition, in the given order.

    Args:
      fingerprints: At least one.
      names: Site names for error messages; positions by default.

    Raises:
      FingerprintMismatchError: If channels, labels, file endings or bins differ.
      ValueError: If there is none.
    """
    if not fingerprints:
        raise ValueError("merge: no fingerprint to merge")
    names = names or [f"fingerprint {i}" for i in range(len(fingerprints))]
    total = fingerprints[0]
    for name, other in zip(names[1:], fingerprints[1:], strict=True):
        _check_same_kind(total, other, names[0], name)
        total = replace(
            total,
            num_cases=total.num_cases + other.num_cases,
            axes=tuple(_added_rows(a, b) for a, b in zip(total.axes, other.axes, strict=True)),  # type: ignore[arg-type]
            crop=_added(total.crop, other.crop),
            intensities=tuple(a.merged(b) for a, b in zip(total.intensities, other.intensities, strict=True)),
        )
    return total


def to_nnunet(fingerprint: Fingerprint) -> dict[str, Any]:
    """The content of nnU-Net's ``dataset_fingerprint.json``, with pseudo-cases that combine the axes' sorted tables.

    Minimum and maximum intensity are left out: nnU-Net writes but never reads them. A channel without any foreground
    sample gets an empty entry, which only CT normalisation would read.

    Raises:
      ValueError: If a channel with CT normalisation has no foreground sample.
    """
    spacings, shapes = zip(*(fingerprint.axis(i) for i in range(3)), strict=True)
    pairs = zip(fingerprint.channel_names, fingerprint.intensities, strict=True)
    return {
        "spacings": [list(case) for case in zip(*spacings, strict=True)],
        "shapes_after_crop": [list(case) for case in zip(*shapes, strict=True)],
        "foreground_intensity_properties_per_channel": {str(i): _properties(n, c) for i, (n, c) in enumerate(pairs)},
        "median_relative_size_after_cropping": fingerprint.median_relative_size_after_cropping(),
    }


def intensity_to_bin(values: NDArray[np.floating]) -> NDArray[np.int64]:
    """Bins of intensities of any unit on the one grid all sites share; any shape."""
    exact = np.asarray(values, dtype=np.float64)
    return (np.sign(exact) * np.rint(np.log1p(np.abs(exact) / _LINEAR) / _STEP)).astype(np.int64)


def bin_to_intensity(index: int) -> float:
    """The centre of a bin (in the grid's logarithm)."""
    return math.copysign(_LINEAR * math.expm1(abs(int(index)) * _STEP), index)


class _Collector:
    """Adds up one channel's samples case by case, so that only one case's are ever held."""

    def __init__(self) -> None:
        self._moments = Intensities(0, 0.0, 0.0, ())
        self._counts: Counter[int] = Counter()
        self._voxels: defaultdict[int, float] = defaultdict(float)

    def add(self, samples: NDArray[np.floating], foreground_voxels: int, *, where: str) -> None:
        values = np.asarray(samples, dtype=np.float64)
        if values.size == 0:
            return
        if not np.isfinite(values).all():
            raise ValueError(f"{where}: the foreground holds infinite intensities; repair or remove the image")
        mean = float(values.mean())
        m2 = float(np.square(values - mean).sum())
        self._moments = self._moments.merged(Intensities(values.size, mean, m2, ()))
        # Drawn with replacement: in a small foreground one voxel is drawn many times, and must still count as one.
        share = min(1.0, foreground_voxels / values.size)
        for index, count in zip(*np.unique(intensity_to_bin(values), return_counts=True), strict=True):
            self._counts[int(index)] += int(count)
            self._voxels[int(index)] += float(count) * share

    def result(self, where: str) -> Intensities:
        return replace(self._moments, histogram=_without_tails(self._counts, self._voxels, where))


def _without_tails(counts: Mapping[int, int], voxels: Mapping[int, float], where: str) -> Counts:
    """Move counts of the outermost bins inwards until the outermost bin stands for `MIN_TAIL_VOXELS` voxels."""
    if not counts:
        return ()
    order = sorted(counts)
    support = np.cumsum([voxels[b] for b in order])
    if support[-1] < MIN_TAIL_VOXELS:
        raise ValueError(
            f"{where}: about {support[-1]:.0f} foreground voxels in all cases, fewer than {MIN_TAIL_VOXELS}; their "
            "intensities would identify them. Check labelsTr, or use a label that covers more."
        )
    low = int(np.searchsorted(support, MIN_TAIL_VOXELS))
    from_above = np.cumsum([voxels[b] for b in reversed(order)])
    high = len(order) - 1 - int(np.searchsorted(from_above, MIN_TAIL_VOXELS))
    if high < low:
        low = high = (low + high) // 2
    kept: Counter[int] = Counter()
    for position, index in enumerate(order):
        kept[order[min(max(position, low), high)]] += counts[index]
    return _sorted(kept)


class _CountingReader(BaseReaderWriter):
    """What `_counting_reader` returns: called like a class, as ``analyze_case`` does, it gives itself."""

    foreground_voxels: int

    def __call__(self) -> "_CountingReader":
        return self


def _counting_reader(reader_class: type[BaseReaderWriter]) -> _CountingReader:
    """A reader that remembers how many foreground voxels the last segmentation had, so that it is not read twice."""

    class Reader(reader_class, _CountingReader):
        foreground_voxels = 0

        def read_seg(self, seg_fname: str) -> tuple[NDArray, dict]:
            segmentation, properties = super().read_seg(seg_fname)
            self.foreground_voxels = int(np.count_nonzero(segmentation > 0))
            return segmentation, properties

    return Reader()


def _analyze(
    case: Case, reader: _CountingReader, samples: int
) -> tuple[Sequence[int], Sequence[float], Sequence[NDArray[np.floating]], float]:
    images = [str(path) for path in case.images]
    shape, spacing, intensities, _, relative_size = DatasetFingerprintExtractor.analyze_case(
        images, str(case.label), reader, samples
    )
    return shape, spacing, intensities, float(relative_size)


def _properties(channel: str, intensities: Intensities) -> dict[str, float]:
    if intensities.n == 0:
        if get_normalization_scheme(channel) is CTNormalization:
            raise ValueError(
                f"channel {channel!r}: CT normalisation needs foreground intensities, but no label marks any voxel"
            )
        return {}
    return {
        "mean": intensities.mean,
        "median": intensities.percentile(50.0),
        "std": intensities.std(),
        "percentile_99_5": intensities.percentile(99.5),
        "percentile_00_5": intensities.percentile(0.5),
    }


def _check_same_kind(a: Fingerprint, b: Fingerprint, name_a: str, name_b: str) -> None:
    for field in ("channel_names", "labels", "regions_class_order", "file_ending", "bins"):
        left, right = getattr(a, field), getattr(b, field)
        if field == "labels" and not any(isinstance(v, tuple) for _, v in left + right):
            left, right = dict(left), dict(right)  # without regions the order of the names decides nothing
        if left != right:
            raise FingerprintMismatchError(f"{field} differ: {name_a} has {left}, {name_b} has {right}")


def _axis_table(pairs: Iterable[tuple[float, int]], bins: BinPolicy) -> AxisTable:
    counts = Counter((_spacing_bin(spacing, bins), _shape_bin(shape, bins)) for spacing, shape in pairs)
    return tuple((s, k, n) for (s, k), n in sorted(counts.items()))


def _spacing_bin(spacing: float, bins: BinPolicy) -> int:
    index = round(spacing / bins.spacing_step_mm)
    if index < 1:
        raise ValueError(
            f"spacing {spacing} mm is below half the bin of {bins.spacing_step_mm} mm; use a smaller spacing_step_mm"
        )
    return index


def _shape_bin(shape: int, bins: BinPolicy) -> int:
    # Bin 0 is a single slice, which nnU-Net plans as 2d: it must not be rounded to a volume, nor a volume to it.
    return 0 if shape == 1 else max(1, round(shape / bins.shape_step_vox))


def _crop_bin(value: float, bins: BinPolicy) -> int:
    return min(bins.crop_bins, math.floor(value * bins.crop_bins))


def _crop_value(index: int, bins: BinPolicy) -> float:
    return min(1.0, (index + 0.5) / bins.crop_bins)


def _neighbours(position: float) -> tuple[int, int]:
    return math.floor(position), math.ceil(position)


def _sorted(counts: Mapping[int, int]) -> Counts:
    return tuple(sorted(counts.items()))


def _added(a: Counts, b: Counts) -> Counts:
    return _sorted(Counter(dict(a)) + Counter(dict(b)))


def _added_rows(a: AxisTable, b: AxisTable) -> AxisTable:
    total: Counter[tuple[int, int]] = Counter()
    for spacing, shape, count in a + b:
        total[spacing, shape] += count
    return tuple((s, k, n) for (s, k), n in sorted(total.items()))
