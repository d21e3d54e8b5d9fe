"""Intensity schemes that nnU-Net lacks, for plans that name them in ``normalization_schemes``.

nnU-Net looks a scheme up by name among the modules of its own package. So plans with one of these need this project's
preprocessing and prediction, and stock commands stop with "Unable to locate class ... for normalization".
"""

from collections.abc import Mapping

import numpy as np
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager


class MaskedMinMaxNormalization(ImageNormalization):
    """Each case and channel to [0, 1] by its smallest and largest value inside the foreground mask, and 0 outside.

    As in Fed-MUnet's released code, with nnU-Net's mask: voxels where any channel is not 0, with holes filled. The
    darkest voxel of the mask becomes 0 too. A channel that is constant there, such as a missing sequence, becomes 0.
    """

    leaves_pixels_outside_mask_at_zero_if_use_mask_for_norm_is_true = True

    def run(self, image: np.ndarray, seg: np.ndarray | None = None) -> np.ndarray:
        """One channel (z, y, x) normalised, float32; nnU-Net's ``seg`` is negative outside of the mask.

        Raises:
          ValueError: If there is no ``seg``.
        """
        if seg is None:
            raise ValueError(f"{type(self).__name__}: needs nnU-Net's segmentation, which holds the foreground mask")
        inside = seg >= 0
        values = image[inside].astype(np.float32)
        result = np.zeros(image.shape, dtype=np.float32)
        if values.size and (spread := values.max() - values.min()) > 0:
            result[inside] = (values - values.min()) / spread
        return result


SCHEMES: Mapping[str, type[ImageNormalization]] = {"MaskedMinMaxNormalization": MaskedMinMaxNormalization}
"""The schemes by their name in plans."""


def with_own_schemes(configuration: ConfigurationManager) -> ConfigurationManager:
    """The configuration, with a preprocessor that knows `SCHEMES` if it names one of them.

    Give the result to nnU-Net in place of its own: preprocessor and predictor ask it for ``preprocessor_class``.

    Raises:
      ValueError: If some channels have a scheme of ours and others one of nnU-Net's.
    """
    schemes = configuration.normalization_schemes
    ours = [scheme for scheme in schemes if scheme in SCHEMES]
    if not ours:
        return configuration
    if len(ours) < len(schemes):
        raise ValueError(
            f"normalization_schemes are {schemes}; {sorted(set(ours))} must be that of every channel or of none. Plan "
            "again."
        )
    return _Configuration(configuration.configuration)


class _Preprocessor(DefaultPreprocessor):
    def _normalize(
        self,
        data: np.ndarray,
        seg: np.ndarray,
        configuration_manager: ConfigurationManager,
        foreground_intensity_properties_per_channel: dict,
    ) -> np.ndarray:
        for channel, scheme in enumerate(configuration_manager.normalization_schemes):
            data[channel] = SCHEMES[scheme](use_mask_for_norm=True, intensityproperties={}).run(data[channel], seg[0])
        return data


class _Configuration(ConfigurationManager):
    @property
    def preprocessor_class(self) -> type[DefaultPreprocessor]:
        return _Preprocessor
