"""The noise schedule: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, Eq. 4).

"scaled_linear" is the schedule of Rombach et al. 2022 (linear in sqrt(beta)).
"""

import dataclasses
from typing import Any

import numpy as np

from infinite_id_jax.errors import InputError
from infinite_id_jax.typing import Float

# The classes that run on this process; flow matching, EDM and distilled models need samplers of their own.
_CLASSES = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler",
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
# Both of these change x_0 in pixel models; a file often carries them for a class that never reads them.
_READERS = {
    "clip_sample": ("DDIMScheduler", "DDPMScheduler", "HeunDiscreteScheduler"),
    "thresholding": (
        "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler", "UniPCMultistepScheduler",
    ),
}  # fmt: skip
_FIXED: dict[str, Any] = {
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "sigma_min": None,
    "sigma_max": None,
}
_CHOICES = {
    "beta_schedule": ("scaled_linear", "linear"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "prediction_type": ("epsilon", "v_prediction"),
    "final_sigmas_type": ("zero", "sigma_min"),
}


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """A diffusers scheduler_config.json; the defaults are SDXL's, for whichever class the file names.

    Raises InputError for a value out of range or not among the choices built here.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"  # Lin et al. 2023, Table 2
    steps_offset: int = 1  # added to the timesteps of "leading"
    set_alpha_to_one: bool = False  # DDIM ends at alpha_bar = 1 rather than at alpha_bar_0
    final_sigmas_type: str = "zero"  # Euler and DPM++ end at sigma = 0, or at the smallest trained
    use_karras_sigmas: bool = False  # Euler and DPM++ space sigma by Karras et al. 2022, Eq. 5

    def __post_init__(self):
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise InputError(
                    f"The scheduler's {key}={getattr(self, key)!r} is not supported: use a model with "
                    f"{' or '.join(map(repr, choices))}."
                )
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise InputError(
                f"The scheduler's beta_start={self.beta_start} and beta_end={self.beta_end} must rise within (0, 1)."
            )
        if self.num_train_timesteps < 1 or self.steps_offset < 0:
            raise InputError(
                f"The scheduler's num_train_timesteps={self.num_train_timesteps} must be positive and its "
                f"steps_offset={self.steps_offset} not negative."
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ScheduleConfig":
        """Take the known keys; raise InputError for a setting that changes images and is not built here."""
        name = values.get("_class_name")
        if name is not None and name not in _CLASSES:
            raise InputError(f"The scheduler {name!r} is not supported: use an SDXL, SD 2 or SD 1.5 model.")
        for key, readers in _READERS.items():
            if values.get(key) and (name is None or name in readers):
                raise InputError(f"The scheduler's {key}={values[key]!r} is for pixels: use a latent model.")
        for key, only in _FIXED.items():
            if values.get(key) is not None and values[key] != only:
                raise InputError(
                    f"The scheduler's {key}={values[key]!r} is not supported: use one with {key}={only!r}."
                )
        known = {}
        for field in dataclasses.fields(cls):
            value, kind = values.get(field.name), type(field.default)
            if value is None:
                continue
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise InputError(f"The scheduler's {field.name}={value!r} is not of type {kind.__name__}.")
            known[field.name] = kind(value)
        return cls(**known)


def alphas_cumprod(config: ScheduleConfig) -> Float[np.ndarray, " T"]:
    """alpha_bar_t = prod_{s <= t} (1 - beta_s), falling within (0, 1), float64 (Ho et al. 2020, Sec. 2).

    Beta, 1 - beta and the product are rounded to float32 on the way, as diffusers' tables are:
    sqrt(1 - alpha_bar_0) would differ from theirs by 1e-5 otherwise.
    """
    power = 2 if config.beta_schedule == "scaled_linear" else 1
    ends = config.beta_start ** (1 / power), config.beta_end ** (1 / power)
    beta = np.linspace(*ends, config.num_train_timesteps, dtype=np.float32) ** power
    alpha = (np.float32(1) - beta).astype(np.float64)
    return np.cumprod(alpha).astype(np.float32).astype(np.float64)
